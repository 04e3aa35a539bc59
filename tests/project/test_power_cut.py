"""After a power cut at any instant of a commit or rollback the project opens at the old or the new state."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import FAULT_STEP
from faults import commit_of, everything, hooked
from power_cut import Disk, choices

from treelora_cli.project import Project

Action = Callable[[Project], Project]
ACTIONS: dict[str, Action] = {
    "commit": lambda project: project.commit(commit_of(project)),
    "merging commit": lambda project: project.commit(commit_of(project, merge=True)),
    "rollback": lambda project: project.rollback("cold"),
    "undo": lambda project: project.undo_rollback(None),
}


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake disk notes what is flushed; flushing the real one would only take time."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


class Died(BaseException):
    """The process is gone: nothing catches this, and no operation works any more."""


@contextmanager
def killed_at(victim: int) -> Iterator[None]:
    """End the process, as by SIGKILL, before its operation number ``victim``."""
    count = 0

    def hook(_name: str) -> None:
        nonlocal count
        count += 1
        if count > victim:
            raise Died

    with hooked(hook):
        yield


def check_image(image: Path, states: dict[str, dict[str, bytes]], where: str) -> str:
    """The image opens at one of the states, whole, and can be written again."""
    found = Project.open(image)
    digest = found.state.digest()
    assert digest in states, where
    assert everything(found) == states[digest], where
    after = found.commit(commit_of(found, "after"))
    assert everything(Project.open(image)) == everything(after), where
    return digest


def states_of(*projects: Project) -> dict[str, dict[str, bytes]]:
    return {project.state.digest(): everything(project) for project in projects}


@pytest.mark.parametrize(
    ("action", "step"),
    [*((action, FAULT_STEP) for action in ACTIONS), pytest.param("merging commit", 1, marks=pytest.mark.slow)],
)
def test_a_cut_at_every_operation(learned_project: Path, tmp_path: Path, action: str, step: int) -> None:
    root = Path(shutil.copytree(learned_project, tmp_path / "p"))
    if action == "undo":
        Project.open(root).rollback("cold")
    twin = Path(shutil.copytree(root, tmp_path / "twin"))
    old = Project.open(root)
    states = states_of(old, ACTIONS[action](Project.open(twin)))
    disk, seen, tried = Disk(root), set(), 0

    def cut() -> None:
        nonlocal tried
        if disk.operations % step:
            return
        for number, choose in enumerate(choices(disk.operations)):
            image = disk.image(tmp_path / "image", choose)
            seen.add(check_image(image, states, f"operation {disk.operations}, choice {number}"))
            tried += 1

    with disk.watched(cut):
        ACTIONS[action](old)
    assert seen == set(states), "some images are at the old state, some at the new"
    assert tried > 150 / step
    print(f"{action}: {disk.operations} operations, {tried} power-loss states")


@pytest.mark.slow
@pytest.mark.parametrize("action", ACTIONS)
def test_a_cut_after_a_process_was_killed_and_the_next_commit_began(
    learned_project: Path, tmp_path: Path, action: str
) -> None:
    """The second process finds what the first left, but cannot know whether that has reached the disk.

    Where the first is killed at every operation, the cuts fall on every 31st of the second, another one each time.
    """
    source, events = Path(shutil.copytree(learned_project, tmp_path / "source")), []
    if action == "undo":
        Project.open(source).rollback("cold")
    counted = Path(shutil.copytree(source, tmp_path / "counted"))
    with hooked(events.append):
        ACTIONS[action](Project.open(counted))
    tried, victims = 0, range(0, len(events), 1 if FAULT_STEP == 1 else 5 * FAULT_STEP)
    for number, victim in enumerate(victims):
        root = Path(shutil.copytree(source, tmp_path / "p"))
        disk, before = Disk(root), Project.open(root)
        with disk.watched(), killed_at(victim), pytest.raises(Died, match=r"^$"):
            ACTIONS[action](before)
        middle = Project.open(root)
        change = commit_of(middle, "second")
        end = Path(shutil.copytree(root, tmp_path / "end"))
        states = states_of(before, middle, Project.open(end).commit(change))

        def cut(
            disk: Disk = disk, number: int = number, victim: int = victim, states: dict[str, dict[str, bytes]] = states
        ) -> None:
            nonlocal tried
            if disk.operations % 31 == number % 31:
                choose = choices(disk.operations)[number % 4]
                check_image(disk.image(tmp_path / "image", choose), states, f"killed at {victim}")
                tried += 1

        with disk.watched(cut):
            middle.commit(change)
        shutil.rmtree(root)
        shutil.rmtree(end)
    assert tried > 10
    print(f"{action}: killed at {len(victims)} of {len(events)} operations, then {tried} power-loss states")


def test_a_cut_while_a_checkpoint_is_saved(project: Path, tmp_path: Path) -> None:
    opened = Project.open(project)
    opened.checkpoint.save({"task": "x", "state": "", "request": {}, "step": 3}, {"a": torch.full((2,), 3.0)})
    disk, steps = Disk(project), set()

    def cut() -> None:
        for choose in choices(disk.operations):
            found = Project.open(disk.image(tmp_path / "image", choose)).checkpoint
            facts = found.facts()
            assert facts is not None
            assert found.tensors(facts)["a"].tolist() == [facts["step"]] * 2
            steps.add(facts["step"])

    with disk.watched(cut):
        opened.checkpoint.save({"task": "x", "state": "", "request": {}, "step": 6}, {"a": torch.full((2,), 6.0)})
    assert steps == {3, 6}


def test_a_new_project_is_there_once_it_was_made(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    root = tmp_path / "a" / "b"
    with disk.watched():
        Project.create(root, "seed: 0\n", backend="vit", base={"layers": [], "fingerprint": ""}, fixed={})
    image = disk.image(tmp_path.with_name("image"), lambda seen: seen[0])
    assert Project.open(image / "a" / "b").state == Project.open(root).state
    assert (image / "a" / "b" / "treelora.yaml").read_text() == "seed: 0\n"


def test_the_disk_forgets_what_was_not_flushed(tmp_path: Path) -> None:
    """The fake must find the fault that it is there for: contents renamed into place before they are flushed."""
    root = tmp_path / "p"
    root.mkdir()
    (root / "file").write_bytes(b"old")
    disk = Disk(root)
    with disk.watched():
        descriptor = os.open(root / "aside", os.O_CREAT | os.O_WRONLY | os.O_EXCL)
        os.write(descriptor, b"new")
        os.close(descriptor)
        os.replace(root / "aside", root / "file")
    least, most = (disk.image(tmp_path / "image", choose) / "file" for choose in choices(0)[:2])
    assert least == most
    assert disk.image(tmp_path / "image", choices(0)[0]).joinpath("file").read_bytes() == b"old"
    assert disk.image(tmp_path / "image", choices(0)[1]).joinpath("file").read_bytes() == b""
