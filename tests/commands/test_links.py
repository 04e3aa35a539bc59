"""Links and pipes in the place of a project's files."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import Cli, check_error, tree_hash

from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.project import Project

ADAPTER = "tasks/001-warm/adapter_model.safetensors"


@pytest.mark.parametrize(
    "name",
    [".treelora", ".treelora/objects", ".treelora/history", ".treelora/trash", "tasks", "tasks/001-warm", "metrics"],
)
def test_a_directory_that_is_a_link_is_refused_and_nothing_there_is_touched(
    cli: Cli, project: Path, data: Path, tmp_path: Path, name: str
) -> None:
    """An earlier ``objects`` that led to somebody's home would have been emptied by the next commit."""
    assert cli("-C", project, "rollback", "grey").code == 0
    outside = tmp_path / "outside"
    shutil.move(project / name, outside)
    (outside / "precious.json").write_text("{}")
    (project / name).symlink_to(outside)
    before, there = tree_hash(project), tree_hash(outside)
    line = rf"{name} is a symbolic link; nothing outside a project is read or written\."
    commands = (
        ["status"],
        ["eval", "--device", "cpu"],
        ["train-task", data / "warm", "--name", "x", "--device", "cpu"],
        ["rollback", "cold"],
        ["rollback", "--undo"],
        ["doctor"],
        ["doctor", "--repair"],
        ["doctor", "--empty-trash", "--yes"],
    )
    for command in commands:
        check_error(cli("-C", project, *command), 3, line)
    assert tree_hash(project) == before
    assert tree_hash(outside) == there


@pytest.mark.parametrize("name", ["state.json", ".treelora/lock", ".treelora/lock.json"])
def test_a_file_that_is_a_link_is_not_written_through(cli: Cli, project: Path, data: Path, name: str) -> None:
    outside = project.parent / "outside"
    shutil.move(project / name, outside) if (project / name).exists() else outside.write_text("mine")
    (project / name).symlink_to(outside)
    whole = outside.read_bytes()
    done = cli("-C", project, "train-task", data / "warm", "--name", "x", "--device", "cpu")
    check_error(done, 3, rf"{name} is a symbolic link; nothing outside a project is read or written\.")
    assert outside.read_bytes() == whole


def test_the_project_itself_may_be_reached_by_a_link(cli: Cli, project: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project)
    learn = ["train-task", data / "warm", "--name", "x", "--epochs", "1", "--device", "cpu"]
    assert cli("-C", tmp_path / "link", *learn).code == 0


def test_a_named_pipe_in_a_files_place_holds_nobody(project: Path) -> None:
    (project / ADAPTER).unlink()
    os.mkfifo(project / ADAPTER)
    with pytest.raises(DamagedError, match=rf"{ADAPTER}: hash mismatch"):
        Project.open(project).adapter("warm")


def test_a_refused_link_is_an_error_of_the_project(project: Path) -> None:
    (project / "metrics").rename(project / "elsewhere")
    (project / "metrics").symlink_to("elsewhere")
    start = time.perf_counter()
    with pytest.raises(ProjectError, match="metrics is a symbolic link"):
        Project.open(project)
    assert time.perf_counter() - start < 1
