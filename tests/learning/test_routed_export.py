"""An export that keeps the routed score: written, loaded without this library, answered alike."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STREAM, Cli, check_error, child_environment, must, picture
from PIL import Image
from tiny_lm import TEMPLATE, save_model

from treelora_cli.backend.values import ExportCheck
from treelora_cli.data.pixels import open_image

ROUTED = ["--format", "routed", "--device", "cpu"]
STOCK = {"json", "sys", "re", "argparse", "collections", "contextlib", "pathlib", "typing", "__future__"} | {
    *("PIL", "peft", "safetensors", "timm", "torch", "transformers"),
}


def exported(cli: Cli, root: Path, out: Path) -> dict[str, Any]:
    done = cli("-C", root, "--json", "export", out, *ROUTED)
    assert done.code == 0, done.err
    return done.json


def check_alike(done: dict[str, Any]) -> None:
    """Every answer is the project's, and so is every score."""
    assert done["largest_logit_difference"] <= done["tolerance"] == 1e-3
    assert done["same_answers"][0] == done["same_answers"][1] > 0
    for scores in done["scores"].values():
        assert scores["project"] == pytest.approx(scores["reloaded"])
    assert (done["gap"], done["advice"]) == (pytest.approx(0, abs=1e-6), "")


def without_treelora(folder: Path, *arguments: str) -> str:
    """Run the loader as somebody who has none of this library."""
    blocked = (
        "import sys, runpy; sys.modules.update(treelora_cli=None, treelora_backends=None);"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", blocked, str(folder / "predict.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- images -----------------------------------------------------------------------------------------------


def test_images_are_answered_as_the_project_answers_them(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    done = exported(cli, learned_project, tmp_path / "out")
    check_alike(done)
    assert done["same_answers"] == [56, 56]
    assert done["load_with"] == f"python {tmp_path / 'out'}/predict.py IMAGE..."
    document = json.loads((tmp_path / "out/routed.json").read_text())
    assert [task["name"] for task in document["tasks"]] == ["warm", "cold", "grey"]
    assert document["labels"] == ["red", "yellow", "blue", "cyan", "green", "black", "white"]
    card = (tmp_path / "out/README.md").read_text()
    assert "7 classes" in card and "| warm | " in card and "python predict.py IMAGE..." in card


def test_one_image_from_python_gets_what_predict_says(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    from treelora_backends.vit.standalone import Routed

    exported(cli, learned_project, tmp_path / "out")
    image = picture("cyan", 7, size=40)  # another size than the model's
    image.save(tmp_path / "one.png")
    told = cli("-C", learned_project, "--json", "predict", tmp_path / "one.png", "--device", "cpu").json
    found = Routed(tmp_path / "out").answer([image])[0]
    wanted = told["predictions"][0]
    assert (found["label"], found["task"]) == (wanted["output"], wanted["task"])
    assert found["probability"] == pytest.approx(wanted["confidence"], abs=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_drawing_on_transparent_ground_is_seen_as_predict_sees_it(
    cli: Cli, learned_project: Path, tmp_path: Path, mode: str
) -> None:
    """Where transparency alone holds it, a dark one is put on white and a light one on black."""
    from treelora_backends.vit.standalone import Routed, _as_rgb

    exported(cli, learned_project, tmp_path / "out")
    for shade in (0, 255):
        image = Image.new("RGBA", (16, 16), (shade, shade, shade, 0))
        image.paste((shade, shade, shade, 255), (3, 3, 12, 9))
        image = image.convert(mode)
        if mode == "P":
            image = image.convert("RGB").quantize(4)
            image.info["transparency"] = 0
        image.save(tmp_path / "one.png")
        with Image.open(tmp_path / "one.png") as opened:
            assert _as_rgb(opened).tobytes() == open_image((tmp_path / "one.png").read_bytes(), "one").tobytes()
            found = Routed(tmp_path / "out").answer([opened])[0]
        told = cli("-C", learned_project, "--json", "predict", tmp_path / "one.png", "--device", "cpu").json
        assert found["label"] == told["predictions"][0]["output"]
        assert found["probability"] == pytest.approx(told["predictions"][0]["confidence"], abs=1e-4)


def test_solved_blocks_features_are_written_too(cli: Cli, init_options: list[str], data: Path, tmp_path: Path) -> None:
    plain = [one for one in init_options if one != "--recipe" and not one.endswith("quick.yaml")]
    must("init", tmp_path / "p", *plain)
    for name in ("warm", "cold"):
        must("-C", tmp_path / "p", "train-task", data / name, "--device", "cpu")
    check_alike(exported(cli, tmp_path / "p", tmp_path / "out"))
    assert "first_random" in json.loads((tmp_path / "out/routed.json").read_text())


def test_own_preprocessing_comes_along_in_every_export(
    cli: Cli, init_options: list[str], data: Path, tmp_path: Path
) -> None:
    import timm

    recipe = tmp_path / "r.yaml"
    recipe.write_text("head: {merged: mean}\nbase: {preprocess: {mean: 0.25, std: 0.75, crop_pct: 0.8}}\n")
    plain = [one for one in init_options if one != "--recipe" and not one.endswith("quick.yaml")]
    must("init", tmp_path / "p", *plain, "--recipe", recipe)
    must("-C", tmp_path / "p", "train-task", data / "warm", "--device", "cpu")
    check_alike(exported(cli, tmp_path / "p", tmp_path / "routed"))
    assert cli("-C", tmp_path / "p", "export", tmp_path / "merged", "--device", "cpu").code == 0
    for folder in ("merged", "routed/base"):
        stock = timm.create_model(f"local-dir:{tmp_path / folder}", pretrained=True)
        found = timm.data.resolve_model_data_config(stock)
        assert (list(found["mean"]), list(found["std"]), found["crop_pct"]) == ([0.25] * 3, [0.75] * 3, 0.8)


@pytest.mark.parametrize("policy", ["first", "always"])
def test_branches_are_written_with_their_heads(
    cli: Cli, init_options: list[str], data: Path, tmp_path: Path, policy: str
) -> None:
    must("init", tmp_path / "p", *init_options, "--branch", policy)
    for name, _ in STREAM:
        must("-C", tmp_path / "p", "train-task", data / name, "--device", "cpu", "--precision", "fp32")
    check_alike(exported(cli, tmp_path / "p", tmp_path / "out"))
    document = json.loads((tmp_path / "out/routed.json").read_text())
    assert len(document["branches"]) == len(document["adapters"]) == (1 if policy == "first" else 3)


def test_an_earlier_export_is_replaced_file_by_file(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    exported(cli, learned_project, tmp_path / "out")
    (tmp_path / "out/base/model.safetensors").write_bytes(b"older")
    (tmp_path / "out/mine.txt").write_text("kept")
    check_error(cli("-C", learned_project, "export", tmp_path / "out", *ROUTED), 2, r"is not empty")
    assert cli("-C", learned_project, "export", tmp_path / "out", *ROUTED, "--force").code == 0
    assert (tmp_path / "out/base/model.safetensors").read_bytes() != b"older"
    assert (tmp_path / "out/mine.txt").read_text() == "kept"


# -- the check --------------------------------------------------------------------------------------------


def test_a_router_that_is_not_the_project_s_fails_the_check(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_backends.vit import routed

    original = routed._router

    def wrong(base: Any, memory: Any) -> Any:
        tensors, facts = original(base, memory)
        return {**tensors, "bias": tensors["bias"].flip(0) + torch.arange(len(tensors["bias"]))}, facts

    monkeypatch.setattr(routed, "_router", wrong)
    check_error(cli("-C", learned_project, "export", tmp_path / "out", *ROUTED), 7, "differs from the model in memory")
    assert (tmp_path / "out").is_dir()


def test_a_loader_that_somebody_else_wrote_is_not_run(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"

    def planted(_source: Path, target: Path) -> None:
        Path(target).write_text(f"open({str(marker)!r}, 'w')")

    monkeypatch.setattr(shutil, "copyfile", planted)
    done = cli("-C", learned_project, "export", tmp_path / "out", *ROUTED)
    check_error(done, 7, r"predict\.py is not the loader that was written there\.")
    assert not marker.exists()


def test_answers_that_differ_fail_the_check() -> None:
    assert ExportCheck(0.0, 1.0, {}, same=(100, 100)).passed
    assert ExportCheck(0.0, 1.0, {}, same=(99, 100)).passed
    assert not ExportCheck(0.0, 1.0, {}, same=(98, 100)).passed


@pytest.mark.parametrize("family", ["vit", "causal_lm"])
def test_the_loaders_import_stock_libraries_only(family: str) -> None:
    import treelora_backends

    path = Path(next(iter(treelora_backends.__path__))) / family / "standalone.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    assert found <= STOCK


@pytest.mark.slow
def test_the_loader_runs_where_this_library_is_not(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    exported(cli, learned_project, tmp_path / "out")
    picture("blue", 3).save(tmp_path / "one.png")
    shown = without_treelora(tmp_path / "out", str(tmp_path / "one.png")).split("\t")
    assert (shown[0], shown[1], shown[3].strip()) == (str(tmp_path / "one.png"), "blue", "cold")


# -- text -------------------------------------------------------------------------------------------------

CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Where is {n}?"},
            {"role": "assistant", "content": ("here", "there", "far away")[n % 3]},
        ]
    }
    for n in range(24)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "moods": [{"sentence": f"Tom is {n}", "label": ("good", "bad")[n % 2]} for n in range(24)],
    "chats": CHATS,
    "colours": [{"prompt": f"What colour is the apple {n}?", "answer": f"red {n % 4}"} for n in range(24)],
    "texts": [{"text": f"Once there was a {n}, and it was {n % 3}."} for n in range(24)],
}


def text_project(root: Path, model: Path, folder: Path, *settings: str) -> Path:
    must("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu", *settings)
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        must("-C", root, "train-task", folder / f"{name}.jsonl", "--device", "cpu", "--no-eval", "--precision", "fp32")
    return root


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE, depth=4))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    return text_project(folder / "p", llama, folder)


def test_texts_of_every_kind_are_answered_as_the_project_answers_them(cli: Cli, texts: Path, tmp_path: Path) -> None:
    done = exported(cli, texts, tmp_path / "out")
    assert done["largest_logit_difference"] <= done["tolerance"] == 1e-3
    assert done["same_answers"][0] == done["same_answers"][1] >= 8
    document = json.loads((tmp_path / "out/routed.json").read_text())
    assert [task["style"] for task in document["tasks"]] == ["labels", "chat", "plain", "text"]
    assert document["tasks"][1]["system"] == "Be brief."
    assert set(done["scores"]) == {"moods", "chats", "colours"}, "free text is scored token by token, elsewhere"


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_labels_by_likelihood_and_chats_without_a_template(cli: Cli, tmp_path: Path, family: str) -> None:
    model = save_model(tmp_path / "model", family, None, depth=4)
    root = text_project(tmp_path / "p", model, tmp_path, "--set", "head.closed=likelihood")
    done = exported(cli, root, tmp_path / "out")
    assert done["largest_logit_difference"] <= 1e-3
    assert done["same_answers"][0] == done["same_answers"][1] >= 8
    tasks = json.loads((tmp_path / "out/routed.json").read_text())["tasks"]
    assert [task["sharpness"] for task in tasks] == [None] * 4


def test_prompts_and_chats_from_python_get_what_predict_says(cli: Cli, texts: Path, tmp_path: Path) -> None:
    from treelora_backends.causal_lm.standalone import Routed

    exported(cli, texts, tmp_path / "out")
    loaded = Routed(tmp_path / "out")
    asked = ["Tom is 3", "Where is 5?", "What colour is the apple 2?", "Zzz unknown words 99 99 99"]
    told = cli("-C", texts, "--json", "predict", *asked, "--device", "cpu").json["predictions"]
    for text, wanted in zip(asked, told, strict=True):
        found = loaded.answer(text)
        assert (found["output"], found["task"]) == (wanted["output"], wanted["task"]), text
    told = cli("-C", texts, "--json", "predict", asked[1], "--system", "Be brief.", "--device", "cpu").json
    found = loaded.answer(asked[1], system="Be brief.")
    assert (found["output"], found["task"]) == (told["predictions"][0]["output"], told["predictions"][0]["task"])
    with pytest.raises(ValueError, match="the model's context is 128"):
        loaded.answer([{"role": "user", "content": "apple " * 200}], system="Be brief.")


def test_a_base_in_another_type_is_loaded_in_it(cli: Cli, llama: Path, tmp_path: Path) -> None:
    root = text_project(tmp_path / "p", llama, tmp_path, "--dtype", "bfloat16")
    done = exported(cli, root, tmp_path / "out")
    assert json.loads((tmp_path / "out/routed.json").read_text())["base"]["dtype"] == "bfloat16"
    assert done["largest_logit_difference"] <= done["tolerance"] == 0.05


@pytest.mark.slow
def test_the_text_loader_runs_where_this_library_is_not(cli: Cli, texts: Path, llama: Path, tmp_path: Path) -> None:
    exported(cli, texts, tmp_path / "out")
    moved = Path(shutil.copytree(llama, tmp_path / "moved"))
    found = json.loads(without_treelora(tmp_path / "out", "Tom is 3", "--base", str(moved)))
    told = cli("-C", texts, "--json", "predict", "Tom is 3", "--device", "cpu").json["predictions"][0]
    assert (found["output"], found["task"]) == (told["output"], told["task"])
