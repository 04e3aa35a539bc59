"""``doctor --repair`` rebuilds what the rest determines, touches nothing else, and says what still works."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli, check_error, tree_hash
from faults import commit_of

from treelora_cli.algorithm.tree import extend_tree
from treelora_cli.project import Project, repair


def visible(root: Path) -> dict[str, str]:
    return {name: one for name, one in tree_hash(root).items() if not name.startswith(".treelora/")}


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


@pytest.mark.parametrize(
    "names",
    [
        ["tree.json"],
        ["tree.safetensors"],
        ["tree.json", "tree.safetensors"],
        ["tree.json", "tree.safetensors", "tasks/001-warm/task.json"],
        ["tasks/002-cold/adapter_config.json"],
        ["state.json"],
        ["state.json", "tree.json", "tasks/001-warm/adapter_config.json"],
    ],
)
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_what_the_rest_determines_comes_back_bit_for_bit(
    cli: Cli, project: Path, names: list[str], damage: str
) -> None:
    before = visible(project)
    for name in names:
        flip(project / name) if damage == "flip" else (project / name).unlink()
    lost = "tasks/001-warm/task.json"
    if names[0] == "state.json":
        check_error(cli("-C", project, "doctor"), 3, r"state\.json is damaged or missing; a copy is kept\. Run tree")
    else:
        check_error(cli("-C", project, "doctor"), 3, rf"{len(names)} of \d+ files .* Run treelora doctor --repair")
    done = cli("-C", project, "doctor", "--repair", "--json")
    if lost in names:
        assert done.code == 3
        assert list(done.json["damaged"]) == [lost]
    else:
        assert done.code == 0, done.err
    after = visible(project)
    assert {name: one for name, one in after.items() if name != lost} == {
        name: one for name, one in before.items() if name != lost
    }
    assert after.get(lost) != before[lost] if lost in names else True
    assert sorted(done.json["repair"]["restored"]) == sorted(set(names) - {lost, "state.json"})


def test_a_tree_grown_by_insertion_comes_back_bit_for_bit(project: Path) -> None:
    generator = np.random.default_rng(0)
    opened = Project.open(project)
    shape = opened.read_arrays("tree.safetensors")["signatures"].shape[1:]
    settings = opened.task_record("warm")["settings"]["tree"]
    for number in range(11):
        signature = generator.normal(size=shape).astype(np.float32)
        signature /= np.linalg.norm(signature, axis=1, keepdims=True)
        tree = extend_tree(opened.tree(), signature, settings["depth"], split=settings["split"])
        opened = opened.commit(dataclasses.replace(commit_of(opened, f"task-{number}"), tree=tree))
    before = visible(project)
    assert json.loads((project / "tree.json").read_text())["tasks_at_build"] < 14, "not built at once"
    for name in ("tree.json", "tree.safetensors"):
        (project / name).unlink()
    _, report = repair(Project.open(project))
    assert report.restored == ["tree.json", "tree.safetensors"]
    assert visible(project) == before
    (project / "tasks/005-task-1/signature.safetensors").unlink()
    flip(project / "tree.safetensors")
    _, report = repair(Project.open(project))
    assert report.notes == ["The tree cannot be rebuilt: a task's signature or its settings are damaged too."]


def test_search_statistics_are_dropped_and_scores_kept_as_far_as_they_are_known(cli: Cli, project: Path) -> None:
    old = json.loads((project / "metrics/matrix.json").read_text())
    flip(project / "bandit.json")
    flip(project / "metrics/matrix.json")
    before = visible(project)
    done = cli("-C", project, "doctor", "--repair", "--json")
    assert done.code == 0, done.err
    assert done.json["repair"]["dropped"] == ["bandit.json", "bandit.safetensors"]
    assert done.json["repair"]["rebuilt"] == ["metrics/matrix.json"]
    assert any("next task starts its own search" in note for note in done.json["notes"])
    rows = json.loads((project / "metrics/matrix.json").read_text())["rows"]
    assert rows == [*old["rows"][:2], [None, None, None]]
    changed = {"bandit.json", "bandit.safetensors", "metrics/matrix.json", "state.json"}
    assert {n: one for n, one in visible(project).items() if n not in changed} == {
        n: one for n, one in before.items() if n not in changed
    }
    assert cli("-C", project, "inspect-tree", "--bandit").code == 0
    assert cli("-C", project, "eval", "--device", "cpu").code == 0
    assert cli("-C", project, "rollback", "grey").code == 0, "a repaired project can be rolled back"
    assert json.loads((project / "metrics/matrix.json").read_text())["rows"] == old["rows"][:2]


LOST = ["tasks/001-warm/adapter_model.safetensors", "tasks/002-cold/labels.json", "tasks/003-grey/head.safetensors"]


@pytest.mark.parametrize("name", [*LOST, "head.safetensors", "tasks/001-warm/task.json"])
def test_what_cannot_be_rebuilt_is_left_alone_and_what_works_is_said_truly(
    cli: Cli, project: Path, data: Path, tmp_path: Path, name: str
) -> None:
    flip(project / name)
    before = tree_hash(project)
    done = cli("-C", project, "doctor", "--repair", "--json")
    assert done.code == 3
    assert tree_hash(project) == before
    document = done.json
    assert list(document["damaged"]) == [name]
    works = document["works"]
    image = next(data.glob("warm/test/*/*.png"))
    codes = {"predict": cli("-C", project, "predict", image, "--device", "cpu").code}
    for task in ("warm", "cold", "grey"):
        options = ["--format", "adapter", "--task", task, "--no-verify", "--device", "cpu"]
        codes[task] = cli("-C", project, "export", tmp_path / task, *options).code
    assert codes["predict"] == 0 or not works["predict"]
    assert all(codes[task] == 0 for task in works["export"])
    assert any(code == 3 for code in codes.values())
    assert cli("-C", project, "inspect-tree").code == 0 and works["inspect"]
    if works["rollback"]:
        assert cli("-C", project, "rollback", works["rollback"][0], "--yes").code == 0
        assert cli("-C", project, "doctor").code == 0
    else:
        assert "warm" in name


def test_the_trash_is_listed_and_emptied_after_a_yes(cli: Cli, project: Path) -> None:
    check = cli("-C", project, "doctor", "--empty-trash", "--json")
    assert check.json["notes"] == ["The trash is empty."]
    assert cli("-C", project, "rollback", "grey").code == 0
    document = cli("-C", project, "doctor", "--json").json
    assert [entry["tasks"] for entry in document["trash"]] == [["grey"]]
    assert document["trash"][0]["bytes"] > 10_000
    assert "In the trash since 2" in cli("-C", project, "doctor").out
    assert cli("-C", project, "status", "--json").json["trash"] == [["grey"]]
    before = tree_hash(project)
    line = r"Emptying the trash deletes for good what was rolled back: grey\. Pass --yes\."
    check_error(cli("-C", project, "doctor", "--empty-trash"), 2, line)
    assert tree_hash(project) == before
    done = cli("-C", project, "doctor", "--empty-trash", "--yes", "--json")
    assert done.code == 0
    assert done.json["trash"] == []
    check_error(cli("-C", project, "rollback", "--undo"), 2, r"Nothing was rolled back\.")


def test_a_project_from_a_newer_version_is_not_repaired(cli: Cli, project: Path) -> None:
    state = project / "state.json"
    state.write_text(state.read_text().replace('"schema": 1', '"schema": 2'))
    before = tree_hash(project)
    for options in ([], ["--repair"], ["--empty-trash", "--yes"]):
        check_error(cli("-C", project, "doctor", *options), 3, r"state\.json has schema 2; this treelora reads up to 1")
    check_error(cli("-C", project, "rollback", "grey"), 3, r"state\.json has schema 2")
    assert tree_hash(project) == before


def test_a_lost_state_without_a_copy_is_said(cli: Cli, project: Path) -> None:
    shutil.rmtree(project / ".treelora")
    (project / "state.json").write_text("{")
    check_error(cli("-C", project, "doctor", "--repair"), 3, r"state\.json is damaged \(\w+\)\. Run treelora doctor\.")
