"""``treelora run``: a whole stream from one file, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli, check_error, learned_hashes, make_images, two_task_recipe

from treelora_cli.learning.trainer import Trainer

_DIRECTORIES = ("001-warm", "002-cold")


@pytest.fixture
def recipe(tmp_path: Path, weights: Path, data: Path) -> Path:
    path = tmp_path / "small.yaml"
    text = two_task_recipe(weights, data, adapter="{rank: 4, alpha: 8}")
    path.write_text(text)
    return path


def test_run_learns_every_task_of_a_recipe(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("run", recipe, tmp_path / "p", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["tasks"] == ["warm", "cold"]
    assert [len(row) for row in done.json["rows"]] == [1, 2]
    assert [task["warm_start_from"] for task in done.json["tasks_learned"]] == [None, "warm"]
    records = [json.loads((tmp_path / "p" / "tasks" / name / "task.json").read_text()) for name in _DIRECTORIES]
    assert [record["steps"] for record in records] == [2, 6]
    assert (tmp_path / "p" / "treelora.yaml").read_text() == recipe.read_text()
    shown = cli("-C", tmp_path / "p", "eval", "--json", "--device", "cpu")
    assert shown.json["op"] == pytest.approx(done.json["op"])


def test_run_takes_weights_that_the_recipe_does_not_name(cli: Cli, recipe: Path, weights: Path, tmp_path: Path) -> None:
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if "weights:" not in line))
    options = ["--limit", "2", "--epochs", "0", "--device", "cpu"]
    done = cli("run", recipe, tmp_path / "p", "--weights", weights, *options)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "p" / "state.json").read_text())["base"]["resolved"]["weights"] == str(weights)


def test_run_resumes_after_the_tasks_already_learned(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    whole = cli("run", recipe, tmp_path / "whole", "--json", "--device", "cpu")
    text = recipe.read_text()
    recipe.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    assert cli("run", recipe, tmp_path / "parts", "--device", "cpu").code == 0
    recipe.write_text(text)
    refused = cli("run", recipe, tmp_path / "parts", "--device", "cpu")
    assert refused.code == 2
    assert "is a treelora project already" in refused.err
    done = cli("run", recipe, tmp_path / "parts", "--resume", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert [task["task"] for task in done.json["tasks_learned"]] == ["cold"]
    assert done.json["rows"] == whole.json["rows"]
    assert learned_hashes(tmp_path / "parts") == learned_hashes(tmp_path / "whole")


def test_run_splits_a_folder_and_caps_examples(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "all", ["red", "yellow", "blue", "green", "black"], train=4, test=2)
    text = recipe.read_text().split("stream:")[0] + "stream:\n  split: 2\n"
    recipe.write_text(text)
    done = cli("run", recipe, tmp_path / "p", "--data", folder, "--limit", "3", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    labels = [json.loads((tmp_path / f"p/tasks/00{i}-t0{i}/labels.json").read_text()) for i in (1, 2)]
    assert [len(names) for names in labels] == [3, 2]
    assert sorted(labels[0] + labels[1]) == ["black", "blue", "green", "red", "yellow"]
    assert json.loads((tmp_path / "p/tasks/001-t01/task.json").read_text())["train_examples"] == 9


def test_a_run_stopped_inside_a_task_resumes_to_the_same_hashes(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    assert cli("run", recipe, tmp_path / "whole", "--device", "cpu").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_any_process", lambda self, _flag: self.step == 5)
        stopped = cli("run", recipe, tmp_path / "parts", "--device", "cpu")
    check_error(stopped, 130, r"Interrupted after step 5 of 6; nothing was committed\.")
    assert [path.name for path in (tmp_path / "parts" / "tasks").iterdir()] == ["001-warm"]
    done = cli("run", recipe, tmp_path / "parts", "--resume", "--device", "cpu")
    assert done.code == 0, done.err
    assert learned_hashes(tmp_path / "parts") == learned_hashes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("old", "new", "code", "line"),
    [
        ("name: cold", "name: warm", 2, r"small\.yaml: task 'warm' is listed twice\."),
        ("name: cold", "name: ../cold", 2, r"Task name '\.\./cold' is not allowed"),
        ("  data: ", "  data: /nowhere", 4, r"/nowhere.* not found\. Pass --data DIR\."),
        ("stream:", "stram:", 2, r"small\.yaml:10: unknown key 'stram' \(did you mean 'stream'\?\)\."),
        ("epochs: 2", "epochs: -2", 2, r"small\.yaml:14: 'epochs' must be at least 0; got -2\."),
    ],
)
def test_a_bad_recipe_makes_no_project(
    cli: Cli, recipe: Path, tmp_path: Path, old: str, new: str, code: int, line: str
) -> None:
    recipe.write_text(recipe.read_text().replace(old, new))
    check_error(cli("run", recipe, tmp_path / "p", "--device", "cpu"), code, line)
    assert not (tmp_path / "p").exists()


def test_a_recipe_without_data_asks_for_it(cli: Cli, tmp_path: Path) -> None:
    line = r"demo\.yaml names no data\. Pass --data DIR\."
    check_error(cli("run", "demo", tmp_path / "p"), 2, line)
    assert not (tmp_path / "p").exists()
