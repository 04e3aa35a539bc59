"""Stopped at the wrong moment, and who holds the lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import Cli, check_error, child_environment, learned_hashes, make_images, tree_hash
from faults import commit_of, everything
from filelock import FileLock
from interrupting import OPTIONS, stop_after

from treelora_cli.errors import Interrupted, ResourceError
from treelora_cli.project import Project


def test_status_speaks_of_resuming_only_where_it_can(cli: Cli, project: Path, tmp_path: Path) -> None:
    stop_after(cli, project, make_images(tmp_path / "more", ["pink", "brown"]), 3)
    assert "Next: treelora train-task --resume" in cli("-C", project, "status").out
    assert cli("-C", project, "rollback", "grey").code == 0
    shown = cli("-C", project, "status").out
    assert "--resume" not in shown
    assert "'more' was interrupted at another state of this project, to which it belongs." in shown
    assert "Next: treelora train-task DATA" in shown
    assert cli("-C", project, "status", "--json").json["interrupted"] == {"task": "more", "step": 3, "resumable": False}
    assert cli("-C", project, "rollback", "--undo").code == 0
    assert "Next: treelora train-task --resume" in cli("-C", project, "status").out
    assert cli("-C", project, "status", "--json").json["interrupted"]["resumable"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_signal_in_a_commit_is_answered_truly(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, place: str
) -> None:
    opened, replace = Project.open(project), os.replace

    def signalled(source: object, target: object) -> None:
        is_state = str(target) == str(project / "state.json")
        if is_state and place == "before":
            os.kill(os.getpid(), number)
        replace(source, target)  # type: ignore[arg-type]
        if is_state and place == "after":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "replace", signalled)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"^Interrupted, but task 'next' is committed\. See: treelora status$"):
        opened.commit(commit_of(opened))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    found = Project.open(project)
    assert found.state.tasks[-1].name == "next"
    everything(found)
    with pytest.raises(Interrupted, match=r"^Interrupted, but the change was made\. See: treelora status$"):
        found.rollback("next")
    assert Project.open(project).state == opened.state


_SLOW_READING = """
import sys, time
from treelora_backends.vit import images as vit_images
from treelora_cli.app import main
def slow(request):
    print("reading", flush=True)
    time.sleep(60)
vit_images.list_images = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training_ends_with_130_and_leaves_no_lock(
    project: Path, data: Path, number: signal.Signals
) -> None:
    before = tree_hash(project)
    command = [sys.executable, "-c", _SLOW_READING, "-C", str(project), "train-task", str(data / "warm")]
    child = subprocess.Popen(
        [*command, "--name", "x", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
        # a suite that a shell runs in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "reading\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "Error: Interrupted; nothing was committed.\n"
    assert tree_hash(project) == before
    assert not (project / ".treelora/lock.json").exists()


@pytest.mark.slow
def test_stopped_after_any_step_a_task_resumes_to_the_same_hashes(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    assert cli("-C", whole, "train-task", more, *OPTIONS).code == 0
    for step in range(1, 8):
        root = Path(shutil.copytree(project, tmp_path / "q"))
        stop_after(cli, root, more, step)
        assert cli("-C", root, "train-task", "--resume", *OPTIONS).code == 0
        assert learned_hashes(root) == learned_hashes(whole), f"step {step}"
        shutil.rmtree(root)


def test_out_of_memory_while_training_changes_nothing_and_says_what_to_do(
    cli: Cli, project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_cli.learning.trainer import Trainer

    def full(_trainer: Trainer, _batch: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(Trainer, "_take_step", full)
    before = tree_hash(project)
    done = cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu")
    check_error(done, 6, r"Out of memory at step 1; nothing was committed\. Retry with --batch-size 4 --set tr")
    assert tree_hash(project) == before


@pytest.mark.parametrize("victim", range(0, 16, 3))
def test_a_new_project_is_made_whole_or_not_at_all(tmp_path: Path, victim: int) -> None:
    from faults import hooked

    root, count = tmp_path / "a" / "b", 0

    def fail(name: str) -> None:
        nonlocal count
        count += 1
        if count > victim and name not in ("unlink", "rmdir"):  # removing needs no space
            raise OSError(28, "No space left on device")

    def make() -> Project:
        return Project.create(root, "seed: 0\n", backend="vit", base={"layers": [], "fingerprint": ""}, fixed={})

    with hooked(fail), pytest.raises(ResourceError, match="Disk full while writing"):
        make()
    assert list(tmp_path.iterdir()) == []
    assert make().state.generation == 0


@pytest.mark.parametrize("victim", range(0, 20, 2))
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_alone(project: Path, victim: int) -> None:
    from faults import hooked

    checkpoint, count = Project.open(project).checkpoint, 0
    facts = {"task": "x", "state": "", "request": {}}
    checkpoint.save({**facts, "step": 3}, {"a": torch.zeros(2)})
    before = tree_hash(project / ".treelora")

    def fail(name: str) -> None:
        nonlocal count
        count += 1
        if count > victim and name != "unlink":
            raise OSError(28, "No space left on device")

    with hooked(fail):
        try:
            checkpoint.save({**facts, "step": 6}, {"a": torch.ones(2)})
        except ResourceError:
            found = checkpoint.facts()
            assert found is not None
            assert found["step"] == 6 or tree_hash(project / ".treelora") == before
    found = checkpoint.facts()
    assert found is not None
    assert checkpoint.tensors(found)["a"].tolist() == [float(found["step"] == 6)] * 2
    assert len(list((project / ".treelora/run").iterdir())) == 2


def test_who_asks_for_the_holder_does_not_turn_a_writer_away(project: Path) -> None:
    """``doctor`` looks who holds the lock by taking it for a moment."""
    asking = FileLock(project / ".treelora/lock", thread_local=False)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    with Project.open(project).lock("train-task x"):
        pass


def test_a_shared_projects_lock_can_be_taken_by_the_group(project: Path) -> None:
    (project / ".treelora/lock").unlink()
    before = os.umask(0o002)
    try:
        with Project.open(project).lock("train-task x"):
            pass
    finally:
        os.umask(before)
    assert (project / ".treelora/lock").stat().st_mode & 0o777 == 0o664


def test_a_reader_sees_a_whole_state_at_every_operation_of_an_undo(project: Path) -> None:
    from faults import EVENTS, hooked

    originals = {name: getattr(os, name) for name in (*EVENTS, "fdopen")}
    generations: list[int] = []

    def look(_name: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(os, name, original)
            found = Project.open(project)
            everything(found)
            generations.append(found.state.generation)

    with hooked(look):
        after = Project.open(project).rollback("cold")
        after.undo_rollback(None)
    assert set(generations) == {1, 3}


def test_a_crafted_lock_file_is_described_as_well_as_it_can(project: Path) -> None:
    from treelora_cli.project.lock import _describe

    (project / "lock.json").write_text(json.dumps({"pid": 1, "host": "h", "command": "c", "since": 2**70}))
    assert _describe(project / "lock.json") == "another process"
