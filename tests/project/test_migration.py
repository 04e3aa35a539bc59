"""A project of each released schema opens and works; one of a newer schema is refused untouched."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import Cli, check_error, make_images, tree_hash

from treelora_cli.project import Project
from treelora_cli.project.state import SCHEMA

FIXTURES = Path(__file__).parents[1] / "fixtures"
sys.path.insert(0, str(FIXTURES))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The project of schema 1 as it was committed, its base named anew because it lies elsewhere now."""
    from make_schema_1 import weights

    root = tmp_path / "p"
    with zipfile.ZipFile(FIXTURES / "schema_1.zip") as archive:
        archive.extractall(root)
    settings = root / "treelora.yaml"
    recorded = json.loads((root / "state.json").read_text())["base"]["resolved"]["weights"]
    here = weights(tmp_path / "tiny.safetensors")
    assert recorded in settings.read_text()
    settings.write_text(settings.read_text().replace(recorded, str(here)))
    return root


def test_every_released_schema_has_a_project() -> None:
    assert sorted(path.name for path in FIXTURES.glob("*.zip")) == [f"schema_{n}.zip" for n in range(1, SCHEMA + 1)]


def test_an_old_project_opens_whole(cli: Cli, old: Path) -> None:
    before = tree_hash(old)
    opened = Project.open(old)
    assert opened.damage() == {}
    assert opened.state.to_json() == (old / "state.json").read_bytes(), "read without a loss"
    done = cli("-C", old, "status", "--json")
    assert [task["name"] for task in done.json["tasks"]] == ["warm", "cold"]
    assert done.json["trash"] == [["grey"]]
    nodes = cli("-C", old, "inspect-tree", "--bandit", "--json").json
    assert nodes["tasks"] == ["warm", "cold"] or [task["name"] for task in nodes["tasks"]] == ["warm", "cold"]
    assert cli("-C", old, "doctor").code == 0
    assert tree_hash(old) == before


def test_an_old_project_predicts_exports_learns_and_evaluates(cli: Cli, old: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    done = cli("-C", old, "predict", more / "test/pink/00.png", "--json", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["predictions"][0]["output"] in {"red", "yellow", "blue", "green"}
    options = ["--format", "adapter", "--no-verify", "--device", "cpu"]
    assert cli("-C", old, "export", tmp_path / "out", *options).code == 0
    learned = cli("-C", old, "train-task", more, "--json", "--device", "cpu")
    assert learned.code == 0, learned.err
    scored = cli("-C", old, "eval", "--json", "--device", "cpu")
    assert scored.code == 0, scored.err
    assert list(scored.json["tasks"]) == ["more"], "the data of the others is gone"


def test_an_old_project_is_rolled_back_and_brought_back(cli: Cli, old: Path) -> None:
    assert cli("-C", old, "rollback", "--undo").code == 0
    assert [task.name for task in Project.open(old).state.tasks] == ["warm", "cold", "grey"]
    assert Project.open(old).damage() == {}
    assert cli("-C", old, "rollback", "warm", "--yes").code == 0
    assert Project.open(old).state.tasks == ()


def test_a_newer_schema_is_refused_untouched(cli: Cli, old: Path, tmp_path: Path) -> None:
    state = old / "state.json"
    newer = {**json.loads(state.read_text()), "schema": SCHEMA + 1, "new": {"key": 1}}
    state.write_text(json.dumps(newer))
    before = tree_hash(old)
    more = make_images(tmp_path / "more", ["pink", "brown"])
    commands = (
        ["status"],
        ["eval"],
        ["inspect-tree"],
        ["predict", "x.png"],
        ["export", str(tmp_path / "o")],
        ["train-task", str(more)],
        ["rollback", "cold"],
        ["rollback", "--undo"],
        ["doctor"],
        ["doctor", "--repair"],
    )
    line = rf"state\.json has schema {SCHEMA + 1}; this treelora reads up to {SCHEMA}\. Upgrade treelora\."
    for command in commands:
        check_error(cli("-C", old, *command), 3, line)
    assert tree_hash(old) == before
