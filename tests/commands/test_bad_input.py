"""Every bad input: documented exit code, one line on standard error, project byte for byte as before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import MODEL, MODEL_ARGS, Cli, check_error, make_images, picture, tree_hash
from PIL import Image

WRONG_KIND = r"This project's backend is vit: give an image folder CLASS/\*\.png or a CSV with path,label\."


# -- data -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``build`` writes the data and returns the arguments of train-task."""

    build: Callable[[Path], list[object]]
    line: str
    code: int = 4


def _missing(root: Path) -> list[object]:
    make_images(root / "birds", ["red", "blue"])
    return [root / "brids"]


def _unlabelled(root: Path) -> list[object]:
    make_images(root / "made", ["red", "blue"], test=0)
    for name, part in (("red", "train"), ("blue", "test")):
        (root / "d").mkdir(exist_ok=True)
        (root / "made" / "train" / name).rename(root / "d" / part)
    return [root / "d"]


def _two_levels(root: Path) -> list[object]:
    make_images(root / "d" / "warm", ["red", "yellow"])
    make_images(root / "d" / "cold", ["blue", "green"])
    return [root / "d"]


def _dark(root: Path) -> list[object]:
    folder = make_images(root / "d", ["red", "blue"])
    Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(folder / "train" / "red" / "deep.tif")
    return [folder]


def _truncated(root: Path) -> list[object]:
    path = make_images(root / "d", ["red", "blue"]) / "train" / "blue" / "03.png"
    path.write_bytes(path.read_bytes()[:200])
    return [root / "d"]


def _not_an_image(root: Path) -> list[object]:
    (make_images(root / "d", ["red", "blue"]) / "test" / "red" / "01.png").write_bytes(b"no picture")
    return [root / "d"]


def _text(root: Path) -> list[object]:
    (root / "words.txt").write_text("some words")
    return [root / "words.txt"]


def _prompts(root: Path) -> list[object]:
    (root / "fomc.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return [root / "fomc.jsonl"]


def _bad_jsonl(root: Path) -> list[object]:
    (root / "m.jsonl").write_text('{"path": "a.png", "label": "a"}\n{"path": "b.png"\n')
    return [root / "m.jsonl"]


def _csv_without_file(root: Path) -> list[object]:
    (root / "m.csv").write_text("path,label\nno.png,red\n")
    return [root / "m.csv"]


def _csv_ragged(root: Path) -> list[object]:
    (root / "m.csv").write_text("path,label\na.png\n")
    return [root / "m.csv"]


def _no_folders(root: Path) -> list[object]:
    (root / "d").mkdir()
    return [root / "d"]


def _held_out_class(root: Path) -> list[object]:
    folder = make_images(root / "d", ["red", "blue"])
    make_images(folder, ["green"], train=0)
    return [folder]


def _absent_class(root: Path) -> list[object]:
    return [make_images(root / "d", ["red", "blue"]), "--classes", "red,violet"]


def _absent_val(root: Path) -> list[object]:
    return [make_images(root / "d", ["red", "blue"]), "--val", root / "none"]


def _metric(root: Path) -> list[object]:
    return [make_images(root / "d", ["red", "blue"]), "--metric", "rouge"]


def _bad_format(root: Path) -> list[object]:
    (root / "m.csv").write_text("path,label\n")
    return [root / "m.csv", "--format", "xml"]


def _not_parquet(root: Path) -> list[object]:
    (root / "m.parquet").write_bytes(b"PAR1 nothing")
    return [root / "m.parquet"]


def _all_bad(root: Path) -> list[object]:
    folder = make_images(root / "d", ["red", "blue"], train=2)
    for path in (folder / "train" / "red").iterdir():
        path.write_bytes(b"")
    return [folder, "--skip-bad"]


CASES = {
    "missing folder": Case(_missing, r"brids not found\. Did you mean .*birds\?"),
    "parts without classes": Case(_unlabelled, r"images in test/ \(8\), train/ \(8\) but no class folders in them"),
    "classes on two levels": Case(_two_levels, r"holds cold/ .*, warm/ .*: two levels of folders could be classes\."),
    "12 bits in 16": Case(_dark, r"deep\.tif: values from 0 to 4095, which leaves open how many bits are used"),
    "truncated image": Case(_truncated, r"train/blue/03\.png: unreadable or truncated image \(.*--skip-bad"),
    "not an image": Case(_not_an_image, r"test/red/01\.png: unreadable or truncated image \(no known format\)\."),
    "text file": Case(_text, rf"words\.txt: {WRONG_KIND}"),
    "prompts": Case(_prompts, rf"Found prompt, answer\. {WRONG_KIND}"),
    "bad JSONL": Case(_bad_jsonl, r"m\.jsonl:2: invalid JSON \("),
    "CSV naming no file": Case(_csv_without_file, r"m\.csv:2: no\.png not found\."),
    "ragged CSV": Case(_csv_ragged, r"m\.csv:2: the number of fields differs from the first line's\."),
    "folder without classes": Case(_no_folders, rf"holds no class folders\. {WRONG_KIND}"),
    "held-out class unknown": Case(_held_out_class, r"held-out class 'green' has no training images\."),
    "class not there": Case(_absent_class, r"no class 'violet' there\."),
    "no held-out data there": Case(_absent_val, r"none not found\."),
    "metric of another family": Case(_metric, r"Metric 'rouge' does not fit images"),
    "unknown format": Case(_bad_format, r"unknown format 'xml'\. Pass --format with one of arrow, csv, json, j"),
    "not parquet": Case(_not_parquet, r"m\.parquet: invalid parquet \("),
    "every image of a class bad": Case(_all_bad, r"a class has no readable training image left\."),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_ends_with_4_and_changes_nothing(cli: Cli, empty_project: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    (tmp_path / "data").mkdir()
    arguments = case.build(tmp_path / "data")
    before = tree_hash(empty_project)
    check_error(cli("-C", empty_project, "train-task", *arguments, "--device", "cpu"), case.code, case.line)
    assert tree_hash(empty_project) == before


def test_skip_bad_counts_and_goes_on(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"])
    (folder / "train" / "blue" / "03.png").write_bytes(b"no picture")
    (folder / "test" / "red" / "01.png").write_bytes(b"")
    done = cli("-C", empty_project, "train-task", folder, "--skip-bad", "--json", "--device", "cpu")
    assert done.code == 0
    assert re.search(r"2 unreadable images were skipped, such as .*blue/03\.png\.", done.json["notes"][0])
    assert done.json["scores"]["d"]["examples"] == 15


def test_images_of_every_mode_and_size_are_converted(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"])
    for index, mode in enumerate(("L", "P", "RGBA", "1", "LA", "CMYK")):
        suffix = "tif" if mode == "CMYK" else "png"
        for name in ("red", "blue"):
            picture(name, index, size=7 + 23 * index).convert(mode).save(folder / f"train/{name}/{mode}.{suffix}")
    deep = (np.arange(30 * 20).reshape(30, 20) * 100).astype(np.uint16)
    Image.fromarray(deep).save(folder / "train/red/deep.png")
    Image.fromarray(np.zeros((1, 300, 3), np.uint8)).save(folder / "train/blue/flat.bmp")
    done = cli("-C", empty_project, "train-task", folder, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert json.loads((empty_project / "tasks/001-d/task.json").read_text())["train_examples"] == 16 + 12 + 2


@pytest.mark.parametrize(
    "name", ["../x", "A B", "con", "", "x" * 65, "/tmp/x", "a\\b", ".hidden", "com1.txt", "ü", "a/b", "x.", "a\n"]
)
def test_unsafe_names_are_refused(cli: Cli, empty_project: Path, data: Path, name: str) -> None:
    before = tree_hash(empty_project.parent)
    done = cli("-C", empty_project, "train-task", data / "warm", "--name", name, "--device", "cpu")
    why = r"(use letters, digits, '\.', '_' and '-', at most 64\.|Windows keeps it for a device\.)"
    check_error(done, 2, f"Task name .* is not allowed: {why}")
    assert tree_hash(empty_project.parent) == before


def test_name_taken(cli: Cli, project: Path, data: Path) -> None:
    before = tree_hash(project)
    line = r"Task 'cold' exists \(002\)\. Choose another --name, or treelora rollback cold\."
    check_error(cli("-C", project, "train-task", data / "cold", "--device", "cpu"), 2, line)
    check_error(cli("-C", project, "train-task", data / "warm", "--name", "cold", "--device", "cpu"), 2, line)
    assert tree_hash(project) == before


# -- usage of other commands ------------------------------------------------------------------------------

USAGE = {
    "train-task without data": (["train-task"], 2, r"train-task needs DATA"),
    "--map without =": (["train-task", "x", "--map", "label"], 2, r"--map label: expected KEY=VALUE\."),
    "negative learning rate": (["train-task", "x", "--lr", "-1"], 2, r"--lr: 'lr' must be at least 0; got -1\.0"),
    "batch of 0": (["train-task", "x", "--batch-size", "0"], 2, r"--batch-size: 'batch_size' must be at least 1"),
    "unknown warm start": (["train-task", "x", "--warm-start", "nearst"], 2, r"did you mean 'nearest'\?"),
    "unknown device": (
        ["eval", "--device", "tpu"],
        2,
        r"--device is one of auto, cpu, cuda, mps or cuda:N; got",
    ),
    "unknown inference": (["eval", "--inference", "best"], 2, r"'inference' is one of routed, latest, merged"),
    "unknown task": (["eval", "--tasks", "warm,hot"], 2, r"No task 'hot' in this project\. Known: warm, cold, grey\."),
    "layer that is not there": (["inspect-tree", "--layer", "9"], 2, r"this project adapts 2 layers, 0 to 1\."),
    "unknown export format": (
        ["export", "OUT", "--format", "merge"],
        2,
        r"--format is one of merged, adapter.*; got 'merge' \(did you mean 'merged'\?\)\.",
    ),
    "unknown dtype": (["export", "OUT", "--dtype", "int8"], 2, r"--dtype is one of float32, float16, bfloat16"),
    "task of a merged export": (["export", "OUT", "--task", "warm"], 2, r"--task goes with --format adapter"),
    "task of a routed export": (["export", "OUT", "--format", "routed", "--task", "warm"], 2, r"holds every task\."),
    "dtype of a routed export": (
        ["export", "OUT", "--format", "routed", "--dtype", "float16"],
        2,
        r"--dtype goes with --format merged, adapter, gguf",
    ),
    "export of an unknown task": (["export", "OUT", "--format", "adapter", "--task", "x"], 2, r"No task 'x'"),
    "predict of a missing file": (["predict", "nowhere.png"], 4, r"nowhere\.png not found\."),
    "predict of a directory without images": (["predict", "p/tasks"], 4, r"Error: p/tasks holds no images\."),
    "predict of an address": (
        ["predict", "http://example.org/a.png"],
        4,
        r"http://example\.org/a\.png is an address; predict reads local files\. Download it first\.",
    ),
    "predict of a pattern that fits nothing": (["predict", "*.webp"], 4, r"\*\.webp: nothing fits this pattern\."),
    "recipe that is not there": (["run", "demmo"], 2, r"No recipe 'demmo' \(did you mean 'demo'\?\)\. Shipped: "),
    "unknown option": (["eval", "--fast"], 2, r"No such option"),
    "rollback of nothing": (["rollback"], 2, r"rollback needs TASK\. Can be rolled back: warm, cold, grey\."),
    "rollback of an unknown task": (["rollback", "hot"], 2, r"No task 'hot' in this project\. Known: warm, cold"),
    "rollback of an unsafe name": (["rollback", "../warm"], 2, r"No task '\.\./warm' in this project\."),
    "rollback of more than one": (["rollback", "warm"], 2, r"also undoes what was learned after it: cold, grey\. Pass"),
    "undo of nothing": (["rollback", "--undo"], 2, r"Nothing was rolled back\."),
    "undo of a task that is there": (["rollback", "warm", "--undo"], 2, r"The trash holds no task 'warm'\."),
    "misspelt command": (["rolback", "warm"], 2, r"No such command 'rolback'"),
    "budget below 0": (["train-task", "x", "--budget", "-1"], 2, r"--budget: 'budget' must be at least 0; got -1\."),
    "epochs of text": (["train-task", "x", "--epochs", "many"], 2, r"Invalid value for '--epochs': "),
    "limit of 0": (["eval", "--limit", "0"], 2, r"Invalid value for '--limit': "),
    "threshold beyond 100": (["eval", "--fail-under", "101"], 2, r"Invalid value for '--fail-under': "),
    "negative layer": (["inspect-tree", "--layer", "-1"], 2, r"Invalid value for '--layer': "),
    "drawing into no directory": (["inspect-tree", "--svg", "no/x.svg"], 2, r"--svg no/x\.svg: No such file or dir"),
    "predict without input": (["predict"], 2, r"predict needs INPUT, or --messages FILE\."),
    "predict of text": (["predict", __file__], 4, r"test_bad_input\.py"),
    "other task resumed": (["train-task", "--resume", "--name", "x"], 3, r"No interrupted task to resume"),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage_changes_nothing(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, code, line = USAGE[name]
    before = tree_hash(tmp_path)
    check_error(cli("-C", project, *arguments), code, line)
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize("command", [["status"], ["eval"], ["inspect-tree"], ["train-task", "x"], ["export", "x"]])
def test_no_project(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    line = r"No treelora project here or above\. Run: treelora init DIR --model \.\.\."
    check_error(cli("-C", tmp_path, *command), 3, line)
    check_error(cli("-C", tmp_path / "absent", *command), 3, line)


@pytest.mark.parametrize("command", [["eval"], ["export", "OUT"], ["predict", "x.png"]])
def test_nothing_learned_yet(cli: Cli, empty_project: Path, command: list[str]) -> None:
    check_error(cli("-C", empty_project, *command), 2, r"Nothing is learned yet\. Run: treelora train-task DATA")


def test_exports_stay_outside_the_project_and_overwrite_nothing(cli: Cli, project: Path, tmp_path: Path) -> None:
    before = tree_hash(project)
    for out in (project / "out", project, project.parent, project / ".." / project.name / "x"):
        check_error(cli("-C", project, "export", out), 2, r"overlaps the project\. Choose a directory outside it\.")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    check_error(cli("-C", project, "export", tmp_path / "full"), 2, r"full is not empty\. Choose another directory")
    assert tree_hash(project) == before
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_data_of_an_earlier_task_gone_is_noted(cli: Cli, empty_project: Path, tmp_path: Path, data: Path) -> None:
    gone = Path(shutil.copytree(data / "warm", tmp_path / "gone"))
    cli("-C", empty_project, "train-task", gone, "--device", "cpu")
    shutil.rmtree(gone)
    after = cli("-C", empty_project, "train-task", data / "cold", "--json", "--device", "cpu")
    assert after.code == 0
    assert re.search(r"Task 'gone' is not scored: .*gone not found\.", after.err)
    assert after.json["op"] is None
    scored = cli("-C", empty_project, "eval", "--json", "--device", "cpu")
    assert scored.code == 0
    assert list(scored.json["tasks"]) == ["cold"]
    assert "gone not found" in scored.json["not_scored"]["gone"]
    check_error(cli("-C", empty_project, "eval", "--tasks", "gone"), 4, r"No task can be scored\. gone: .*not found")


# -- init -------------------------------------------------------------------------------------------------


def _arguments(weights: Path, **changed: object) -> list[str]:
    pairs = [part for k, v in {**MODEL_ARGS, **changed}.items() for part in ("--model-arg", f"{k}={v}")]
    return ["--model", MODEL, "--weights", str(weights), *pairs]


def _pickled_model(root: Path) -> Path:
    """A model directory as timm saves it, its weights pickled."""
    import timm
    import torch

    folder = root / "pickled"
    folder.mkdir()
    model = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
    config = {"architecture": MODEL, "model_args": MODEL_ARGS, "pretrained_cfg": {"num_classes": 0}, "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_bad_models_make_no_project(cli: Cli, tmp_path: Path, weights: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(weights.read_bytes()[:-100])
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(b"\x80\x04.")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, config in (("broken", "{"), ("unknown", '{"architecture": "vit_of_nobody"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights.read_bytes())
    fitting = _arguments(weights)
    named = ["--model", "vit_tiny_patch16_244"]
    cases = [
        (named, 5, r"Unknown timm model 'vit_tiny_patch16_244'\. Did you mean 'vit_tiny_patch16_224'\?"),
        (_arguments(weights, embed_dim=64), 5, r"tiny\.safetensors does not fit: '.*' is \(.*\), the architecture has"),
        (_arguments(weights, depth=3), 5, r"tiny\.safetensors does not fit: it lacks 'blocks\.2\."),
        (_arguments(weights, depth=1), 5, r"tiny\.safetensors does not fit: it has an unexpected 'blocks\.1\."),
        (_arguments(pickled), 5, r"only \.safetensors weights are read, nothing is ever unpickled\."),
        (_arguments(torn), 5, r"torn\.safetensors: not a readable safetensors file \("),
        (_arguments(tmp_path / "no.safetensors"), 5, r"no\.safetensors not found\. Pass --weights FILE\.safetensors\."),
        ([*fitting, "--model-arg", "colour=blue"], 5, r"--model-arg does not fit this architecture \(.*colour"),
        ([*fitting, "--model-arg", "depth"], 2, r"--model-arg depth: expected KEY=VALUE\."),
        ([*fitting, "--backend", "vitt"], 2, r"Unknown backend 'vitt' \(did you mean 'vit'\?\)\. Known: .*vit"),
        ([*fitting, "--preprocess", "men=0.5"], 2, r"--preprocess men: known are crop_mode, crop_pct, interpolation"),
        ([*fitting, "--targets", "nothing"], 2, r"--targets nothing: no such linear layer"),
        ([*fitting, "--blocks", "9"], 2, r"--blocks 9: vit_tiny_patch16_224 has 2 blocks\."),
        ([*fitting, "--rank", "0"], 2, r"--rank: 'rank' must be between 1 and 1024; got 0\."),
        (["--model", str(folder)], 5, r"holds no config\.json: no model that timm or transformers saved\."),
        (["--model", str(tmp_path / "broken")], 5, r"broken/config\.json is no JSON \(Expecting property name"),
        (["--model", str(tmp_path / "unknown")], 5, r"/unknown cannot be loaded by timm \(Unknown model"),
        (["--model", "./nowhere/model"], 5, r"nowhere/model not found\."),
        (["--model", "resnet18", "--weights", str(weights)], 5, r"does not fit|is not a vision transformer"),
        (
            [*fitting, "--model-arg", "trust_remote_code=true"],
            2,
            r"model argument 'trust_remote_code' is not allowed: code that comes with a model is never run\.",
        ),
        (
            ["--model", str(_pickled_model(tmp_path))],
            5,
            r"pickled holds pytorch_model\.bin: only \.safetensors weights are read, nothing is ever unpickled\.",
        ),
        ([*fitting, "--recipe", "nope"], 2, r"No recipe 'nope'\. Shipped: "),
        (
            ["--model", MODEL, "--offline"],
            5,
            r"is not cached and --offline is set\. Pass --weights FILE\.safetensors\.",
        ),
    ]
    for arguments, code, line in cases:
        check_error(cli("init", tmp_path / "p", *arguments), code, line)
        assert not (tmp_path / "p").exists()


def test_init_refuses_a_directory_in_use(cli: Cli, project: Path, tmp_path: Path, init_options: list[str]) -> None:
    before = tree_hash(tmp_path)
    check_error(cli("init", project, *init_options), 2, r"is a treelora project already\. Choose another directory\.")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    line = r"used is not empty\. Choose another directory for the project\."
    check_error(cli("init", tmp_path / "used", *init_options), 2, line)
    check_error(cli("init", tmp_path / "used" / "file", *init_options), 2, r"file is not empty")
    shutil.rmtree(tmp_path / "used")
    assert tree_hash(tmp_path) == before
