"""The merged network as ONNX: any batch size, the same answers, refused where it cannot be written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, check_error, picture
from tiny_lm import TEMPLATE, save_model

ONNX = ["--format", "onnx", "--device", "cpu"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, _learned_project: Path) -> tuple[Path, dict[str, Any]]:
    from treelora_cli import Project

    out = tmp_path_factory.mktemp("onnx") / "out"
    done = Project.open(_learned_project, device="cpu").export(out, kind="onnx")
    assert done.check is not None
    return out, {"check": done.check, "load_with": done.load_with}


def test_the_file_answers_as_the_merged_network_in_any_batch_size(
    cli: Cli, learned_project: Path, written: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    import onnxruntime
    import timm
    from timm.data import create_transform

    out, done = written
    assert done["check"].passed and done["check"].largest_difference < 1e-3, "logits of this model reach 360"
    assert cli("-C", learned_project, "export", tmp_path / "merged", "--device", "cpu").code == 0
    stock = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    session = onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    transform = create_transform(**json.loads((out / "preprocessing.json").read_text()))
    for count in (1, 2, 9):
        images = torch.stack([transform(picture("blue", seed, size=23)) for seed in range(count)])
        with torch.no_grad():
            wanted = stock(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert found.shape == (count, 7)
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert json.loads((out / "labels.json").read_text()) == stock.pretrained_cfg["label_names"]


def test_the_card_says_how_images_get_in(written: tuple[Path, dict[str, Any]]) -> None:
    out, done = written
    card = (out / "README.md").read_text()
    assert "float32 (batch, 3, 16, 16), any batch size" in card
    assert "mean [0.5, 0.5, 0.5]" in card and "red, yellow, blue" in card
    assert done["load_with"] == f"onnxruntime.InferenceSession('{out}/model.onnx')"
    assert "| warm | " in card


def test_scores_are_those_of_merged(cli: Cli, learned_project: Path, written: tuple[Path, dict[str, Any]]) -> None:
    merged = cli("-C", learned_project, "--json", "eval", "--inference", "merged", "--device", "cpu").json["tasks"]
    for name, (here, there) in written[1]["check"].scores.items():
        assert here == there == pytest.approx(merged[name]["score"])


def test_a_file_that_computes_something_else_fails_the_check(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    original = onnxruntime.InferenceSession

    class Wrong:
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            self.session = original(*arguments, **keywords)

        def run(self, names: Any, inputs: Any) -> Any:
            return [self.session.run(names, inputs)[0] * 1.01]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    check_error(cli("-C", learned_project, "export", tmp_path / "out", *ONNX), 7, "differs from the model in memory")


def test_a_missing_package_is_named(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnxs" in name else original(name))
    done = cli("-C", learned_project, "export", tmp_path / "out", *ONNX)
    check_error(done, 2, r"--format onnx needs onnxscript\. Run: pip install 'treelora\[onnx\]'")
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_cannot_be_written_is_refused(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_arguments: Any, **_keywords: Any) -> None:
        raise RuntimeError("No decomposition for aten.mystery\nmore")

    monkeypatch.setattr(torch.onnx, "export", unknown)
    done = cli("-C", learned_project, "export", tmp_path / "out", *ONNX)
    check_error(done, 2, r"torch cannot write vit_tiny_patch16_224 as ONNX \(No decomposition for aten\.mystery\)\.")
    assert list(tmp_path.iterdir()) == []


def test_language_models_are_refused(cli: Cli, tmp_path: Path) -> None:
    model, root = save_model(tmp_path / "llama", "llama", TEMPLATE), tmp_path / "p"
    assert cli("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu").code == 0
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}", "answer": "b"}) for n in range(12)))
    assert cli("-C", root, "train-task", tmp_path / "a.jsonl", "--device", "cpu", "--no-eval").code == 0
    check_error(cli("-C", root, "export", tmp_path / "out", *ONNX), 2, r"--format onnx is for image models\.")
