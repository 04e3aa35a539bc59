"""Whatever is named as a model loads, or one line says what it is and what to give instead."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from conftest import MODEL, MODEL_ARGS, STREAM, Cli, check_error
from safetensors.torch import load_file, save_file
from tiny_lm import TEMPLATE, save_model
from treelora_backends.vit.loading import check_model_name

from treelora_cli.backend.arithmetic import precision_beside
from treelora_cli.errors import ModelError, UsageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as timm saves it for the hub."""
    folder = tmp_path_factory.mktemp("timm") / "saved"
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
    timm.models.save_for_hf(model, folder, model_args=MODEL_ARGS, safe_serialization=True)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


def init(cli: Cli, tmp_path: Path, model: object, *more: object):
    return cli("init", tmp_path / "p", "--model", model, "--device", "cpu", *more)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_saved_in_half_the_bytes_is_learned_on_and_exported(
    cli: Cli, folder: Path, data: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Its numbers are read as they are; the merged export differs by rounding alone."""
    stored = {name: one.to(dtype) for name, one in load_file(folder / "model.safetensors").items()}
    save_file(stored, folder / "model.safetensors")
    assert init(cli, tmp_path, folder, "--head-width", 64, "--epochs", 1).code == 0
    root = ("-C", tmp_path / "p")
    assert cli(*root, "train-task", data / STREAM[0][0], "--device", "cpu").code == 0
    for kind in ("merged", "routed"):
        done = cli(*root, "--json", "export", tmp_path / kind, "--format", kind, "--device", "cpu")
        assert done.code == 0, done.err
        assert done.json["largest_logit_difference"] < 1e-4


def test_code_that_a_directory_of_timm_names_is_refused(cli: Cli, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Model: pass\n")
    check_error(init(cli, tmp_path, folder), 5, r"config\.json names code of the model's own \('own\.Model'\)")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "model.pt", "weights.ckpt", "jx_vit.npz"])
def test_pickled_weights_are_not_read_in_place_of_safetensors(
    cli: Cli, folder: Path, tmp_path: Path, named: str
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / named)
    check_error(init(cli, tmp_path, folder), 5, rf"m holds {named}: only \.safetensors weights are read")
    (folder / named).unlink()
    check_error(init(cli, tmp_path, folder), 5, r"m holds no weights: no \.safetensors file beside its config\.json\.")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", r"config\.json is no JSON \(Expecting property name"),
        ("[]", r"config\.json is not a model's configuration but a list\."),
        ('"vit"', r"config\.json is not a model's configuration but a str\."),
        ("null", r"config\.json is not a model's configuration but a NoneType\."),
        ("{}", r"config\.json names no 'architecture' of timm, and no 'model_type' of transformers\."),
        ('{"architecture": 3}', r"config\.json names no 'architecture' of timm"),
        ('{"architecture": "nothing"}', r"m cannot be loaded by timm \(Unknown model"),
        ('{"architecture": "resnet18"}', r"m: weights do not fit the architecture \("),
    ],
)
def test_a_configuration_that_is_none_is_said(cli: Cli, folder: Path, tmp_path: Path, content: str, line: str) -> None:
    (folder / "config.json").write_text(content)
    check_error(init(cli, tmp_path, folder), 5, line)


def test_a_model_further_down_is_named(cli: Cli, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_error(init(cli, tmp_path, tmp_path / "empty"), 5, r"empty holds no config\.json: no model that timm or")
    for inner in ("models/vit", "models--a--vit/snapshots/0123"):
        shutil.copytree(saved, tmp_path / inner)
        top = tmp_path / inner.split("/")[0]
        check_error(init(cli, tmp_path, top), 5, rf"{top} holds no config\.json, {tmp_path / inner} does\. Give that\.")
    shutil.copytree(saved, tmp_path / "models/other")
    check_error(init(cli, tmp_path, tmp_path / "models"), 5, r"but several models \(other, vit\)\. Give one of them\.")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("m.safetensors", r"m\.safetensors holds weights alone: give the architecture, too: --model NAME --weights"),
        ("m.pth", r"m\.pth: only \.safetensors weights are read, nothing is ever unpickled\."),
        ("m.onnx", r"m\.onnx is a file and no model\. Give a directory with config\.json"),
        ("m.zip", r"m\.zip is a file and no model\."),
    ],
)
def test_a_file_that_is_there_is_not_said_to_be_missing(cli: Cli, tmp_path: Path, name: str, line: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    check_error(init(cli, tmp_path, tmp_path / name), 5, line)


@pytest.mark.parametrize("address", ["s3://bucket/vit", "https://example.org/vit", "hf://timm/vit"])
def test_an_address_is_no_model(cli: Cli, tmp_path: Path, address: str) -> None:
    check_error(init(cli, tmp_path, address), 5, f"{address} is an address; give a hub id, or download it")


def test_an_empty_name_is_said(cli: Cli, tmp_path: Path) -> None:
    for name in ("", " "):
        check_error(init(cli, tmp_path, name), 2, r"--model is empty\. Leave it out for the model that comes along\.")


def test_hub_ids_of_timm_have_a_dot() -> None:
    check_model_name("timm/vit_small_patch14_dinov2.lvd142m", None, offline=False)
    with pytest.raises(ModelError, match=r"timm/vit\.lvd142m is not cached and --offline is set"):
        check_model_name("timm/vit.lvd142m", None, offline=True)
    with pytest.raises(ModelError, match=r"^models/vit\.safetensors not found\.$"):
        check_model_name("models/vit.safetensors", None, offline=False)


def test_a_language_model_held_in_float16_is_learned_on_and_exported(cli: Cli, lm_tables: Path, tmp_path: Path) -> None:
    """It is computed with as it is held: bf16 is not tried beside it."""
    model = save_model(tmp_path / "llama", "llama", TEMPLATE)
    assert init(cli, tmp_path, model, "--dtype", "float16", "--epochs", 1).code == 0
    root = ("-C", tmp_path / "p")
    done = cli(*root, "train-task", lm_tables / "moods.jsonl", "--precision", "bf16", "--device", "cpu")
    check_error(done, 2, r"--precision bf16 does not go with a base held in float16\.")
    done = cli(*root, "--json", "train-task", lm_tables / "moods.jsonl", "--device", "cpu")
    assert done.code == 0, done.err
    for kind in ("merged", "routed"):
        done = cli(*root, "--json", "export", tmp_path / kind, "--format", kind, "--device", "cpu")
        assert done.code == 0, done.err


def test_what_goes_with_the_type_of_a_base() -> None:
    assert [precision_beside(wanted, "float16") for wanted in ("auto", "fp32")] == ["fp32", "fp32"]
    assert [precision_beside("auto", held) for held in (None, "float32", "bfloat16", "nf4")] == ["auto"] * 4
    with pytest.raises(UsageError, match="held in float16"):
        precision_beside("bf16", "float16")
