"""Watch sets: scored after each task, never learned from, counted by the gate."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Cli, Result, check_error, learned_hashes, make_images

from treelora_cli.project import Project, repair
from treelora_cli.project.metrics import WATCH


@pytest.fixture(scope="module")
def acceptance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images each of red and yellow, without a held-out part."""
    root = tmp_path_factory.mktemp("watch") / "acceptance"
    return make_images(root, ["red", "yellow"], train=4, test=0, seed=500) / "train"


@pytest.fixture
def watched(cli: Cli, empty_project: Path, data: Path, acceptance: Path) -> Path:
    """A project that learned ``warm`` and watches ``acceptance``."""
    assert train(cli, empty_project, data / "warm").code == 0
    assert cli("-C", empty_project, "watch", "add", "acceptance", acceptance, "--device", "cpu").code == 0
    return empty_project


def train(cli: Cli, root: Path, data: Path, *options: object) -> Result:
    return cli("-C", root, "train-task", data, "--device", "cpu", "--precision", "fp32", *options)


def test_every_example_is_scored_after_every_task(cli: Cli, watched: Path, data: Path, acceptance: Path) -> None:
    (told,) = cli("--json", "-C", watched, "watch", "list").json["watch"]
    assert (told["examples"], told["untouched"], list(told["scores"])) == (8, None, ["warm"])
    done = cli("-C", watched, "predict", *sorted(acceptance.glob("*/*.png")), "--json", "--device", "cpu").json
    right = sum(Path(one["input"]).parent.name == one["output"] for one in done["predictions"])
    assert told["scores"]["warm"] == told["reference"] == right / 8
    report = train(cli, watched, data / "cold", "--json").json
    (again,) = cli("--json", "-C", watched, "watch", "list").json["watch"]
    assert list(again["scores"]) == ["warm", "cold"]
    assert report["watch"] == {"acceptance": {"now": again["scores"]["cold"], "reference": right / 8}}
    shown = cli("-C", watched, "watch", "list").out
    assert "acceptance" in shown and "Reference: the untouched base" in shown


def test_it_changes_nothing_that_is_learned(cli: Cli, watched: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(watched, tmp_path / "other")
    assert cli("-C", other, "watch", "remove", "acceptance").code == 0
    for root in (watched, other):
        assert train(cli, root, data / "cold").code == 0
    ours, theirs = learned_hashes(watched), learned_hashes(other)
    assert ours.pop(WATCH)
    assert ours == theirs


def test_the_gate_counts_it(cli: Cli, watched: Path, data: Path) -> None:
    before = Project.open(watched).watch()
    done = train(cli, watched, data / "cold", "--task-under", "100")
    assert done.code == 7
    assert Project.open(watched).watch() == before, "nobody sees a score of what was not committed"
    assert cli("-C", watched, "train-task", "--accept").code == 0
    assert list(Project.open(watched).watch()[0].scores) == ["warm", "cold"]


def test_a_rollback_takes_its_scores_along(cli: Cli, watched: Path, data: Path) -> None:
    before = Project.open(watched).watch()
    assert train(cli, watched, data / "cold").code == 0
    assert cli("-C", watched, "rollback", "cold").code == 0
    assert Project.open(watched).watch() == before


def test_data_that_changed_or_went_is_said(
    cli: Cli, watched: Path, data: Path, acceptance: Path, tmp_path: Path
) -> None:
    moved = acceptance.rename(acceptance.parent / "elsewhere")
    try:
        done = train(cli, watched, data / "cold")
        assert done.code == 0
        assert "Watch set 'acceptance' is not scored: " in done.err and "not found" in done.err
        assert list(Project.open(watched).watch()[0].scores) == ["warm"]
        changed = Path(shutil.copytree(moved, acceptance))
        (changed / "red" / "00.png").unlink()
        done = train(cli, watched, data / "grey")
        assert "Watch set 'acceptance' is not scored: " in done.err
    finally:
        shutil.rmtree(acceptance, ignore_errors=True)
        moved.rename(acceptance)


def test_labels_that_no_task_has(cli: Cli, watched: Path, data: Path, empty_project: Path) -> None:
    line = "Watch set 'x' has labels that no task has: 'blue', 'cyan', 'green'. Learn a task with them first"
    check_error(cli("-C", watched, "watch", "add", "x", data / "cold", "--device", "cpu"), 4, line)
    assert [one.name for one in Project.open(watched).watch()] == ["acceptance"]


def test_bad_names_and_data(cli: Cli, watched: Path, acceptance: Path, tmp_path: Path) -> None:
    add = ["-C", watched, "watch", "add"]
    check_error(cli(*add, "acceptance", acceptance), 2, "Watch set 'acceptance' exists")
    check_error(cli(*add, "A B", acceptance), 2, "'A B' is not allowed")
    check_error(cli(*add, "x", tmp_path / "nowhere", "--device", "cpu"), 4, "not found")
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    check_error(cli(*add, "x", tmp_path / "text.jsonl", "--device", "cpu"), 4, "backend is vit")
    check_error(cli("-C", watched, "watch", "remove", "x"), 2, "No watch set 'x' in this project. Known: acceptance")


def test_damage_is_repaired_by_doing_without(cli: Cli, watched: Path) -> None:
    (watched / WATCH).write_text("{}")
    check_error(cli("-C", watched, "watch", "list"), 3, "watch.json: hash mismatch|watch.json is missing")
    with Project.open(watched).lock("test") as opened:
        opened, report = repair(opened)
    assert report.dropped == [WATCH]
    assert opened.damage() == {}
    assert cli("-C", watched, "watch", "list").out == "No watch set. Add one: treelora watch add NAME DATA\n"
