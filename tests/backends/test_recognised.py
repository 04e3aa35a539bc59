"""A language model named without its backend, and answers that have no end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MODEL_ARGS, Cli, check_error
from safetensors.torch import load_file, save_file
from tiny_lm import TEMPLATE, save_model
from treelora_backends.vit.loading import EMBEDDED

from treelora_cli.backend.registry import backend_for
from treelora_cli.project import Project


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE)


def test_a_directory_is_recognised_by_its_configuration(cli: Cli, llama: Path, tmp_path: Path) -> None:
    done = cli("init", tmp_path / "p", "--model", llama, "--device", "cpu")
    assert done.code == 0, done.err
    assert Project.open(tmp_path / "p").state.backend == "causal-lm"


def test_what_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def directory(name: str, config: object) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(tmp_path / name)

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.gguf").write_bytes(b"GGUF")
    lm = [
        directory("gpt2", {"architectures": ["GPT2LMHeadModel"]}),
        directory("llama", {"architectures": ["LlamaForCausalLM"]}),
        str(tmp_path / "model.gguf"),
        str(tmp_path / "packed"),
    ]
    other = [
        None,
        str(EMBEDDED),
        "vit_tiny_patch16_224",
        "nobody/nothing",
        directory("bert", {"architectures": ["BertForMaskedLM"]}),
        directory("timm", {"architecture": "vit_tiny_patch16_224", "model_args": MODEL_ARGS}),
        directory("list", []),
        directory("broken", "{"),
        directory("odd", {"architectures": 3}),
    ]
    assert [backend_for(model) for model in lm] == ["causal-lm"] * 4
    assert [backend_for(model) for model in other] == ["vit"] * 9
    cached = str(Path(lm[1]) / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _id, _name: cached)
    assert backend_for("somebody/llama") == "causal-lm"


def test_a_family_without_a_declared_class_is_told_by_its_type(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    del config["architectures"]
    (model / "config.json").write_text(json.dumps(config))
    assert backend_for(str(model)) == "causal-lm"


@pytest.mark.parametrize(
    "name", ["../m", "~/m", "hf-hub:nobody/none", "no body/none", "a/b/c", "--x/y", "x" * 99 + "/y"]
)
def test_names_that_are_no_ids_are_not_found(cli: Cli, tmp_path: Path, name: str) -> None:
    done = cli("init", tmp_path / "p", f"--model={name}", "--device", "cpu")
    check_error(done, 5, r"not found\.|cannot be fetched \(|is not cached and --offline is set")


@pytest.mark.parametrize(
    ("declared", "line"),
    [
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "is ViTForImageClassification of tr"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "is CLIPModel of transformers"),
        ({"model_type": "t5", "architectures": []}, "is t5 of transformers"),
    ],
)
def test_other_models_of_transformers_are_named(
    cli: Cli, tmp_path: Path, declared: dict[str, object], line: str
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(declared))
    check_error(cli("init", tmp_path / "p", "--model", tmp_path / "m", "--device", "cpu"), 5, line)


def test_a_directory_of_an_adapter_is_no_base(cli: Cli, llama: Path, tmp_path: Path) -> None:
    """Transformers would load the base that the adapter names, and not what lies in the directory."""
    beside = Path(shutil.copytree(llama, tmp_path / "beside"))
    (tmp_path / "alone").mkdir()
    for folder in (beside, tmp_path / "alone"):
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(llama)}))
        done = cli("init", tmp_path / "p", "--model", folder, "--device", "cpu")
        check_error(
            done, 5, rf"{folder.name} holds an adapter\. Give its base model \({llama}\), or merge both first\."
        )


def changed(llama: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    model = Path(shutil.copytree(llama, tmp_path / "m"))
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors", metadata={"format": "pt"})
    return model


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda one: {**one, UP: one[UP].to(torch.int8)}, rf"'{UP}' holds whole numbers, and the model has fractions"),
        (lambda one: {**one, UP: one[UP] * float("inf")}, r"m holds weights that are not finite\."),
        (lambda one: {**one, UP: one[UP][:9].contiguous()}, r"m: cannot be loaded as a llama model"),
        (lambda one: {key: value for key, value in one.items() if key != UP}, rf"m lacks 1 weights, such as '{UP}'"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    cli: Cli, llama: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], line: str
) -> None:
    model = changed(llama, tmp_path, change)
    check_error(cli("init", tmp_path / "p", "--model", model, "--device", "cpu"), 5, line)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers_of_git_lfs_are_named(cli: Cli, llama: Path, tmp_path: Path, name: str) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "m"))
    (model / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    done = cli("init", tmp_path / "p", "--backend", "causal-lm", "--model", model, "--device", "cpu")
    check_error(done, 5, rf"m/{name} is a pointer of Git LFS and not the file\. Fetch it: git lfs pull")


@pytest.mark.parametrize("endless", [False, True])
def test_answers_without_an_end_are_said_before_anything_is_learned(
    cli: Cli, llama: Path, tmp_path: Path, endless: bool
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    if endless:
        for file, key in (
            ("tokenizer_config.json", "eos_token"),
            ("config.json", "eos_token_id"),
            ("generation_config.json", "eos_token_id"),
        ):
            settings = json.loads((model / file).read_text())
            (model / file).write_text(json.dumps({**settings, key: None}))
    rows = [{"prompt": f"How is {n}?", "answer": f"As {n} is"} for n in range(20)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert cli("init", tmp_path / "p", "--model", model, "--device", "cpu").code == 0
    done = cli("-C", tmp_path / "p", "--json", "train-task", tmp_path / "d.jsonl", "--dry-run", "--device", "cpu")
    assert done.code == 0, done.err
    said = [note for note in done.json["notes"] if "answers have no end" in note]
    line = (
        "18 of 18 training answers have no end (the tokenizer names no end token): what is generated runs to its limit."
    )
    assert said == ([line] if endless else [])


def test_a_language_model_given_to_the_backend_of_images_is_named(cli: Cli, llama: Path, tmp_path: Path) -> None:
    done = cli("init", tmp_path / "p", "--model", llama, "--backend", "vit", "--device", "cpu")
    check_error(done, 5, r" is LlamaForCausalLM of transformers, a language model: pass --backend causal-lm$")
