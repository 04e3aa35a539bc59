"""The project directory: commits that cannot be half done, verified reads, a strict state file."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAULT_STEP, tree_hash
from faults import EVENTS, commit_of, die, everything, hooked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from treelora_cli.errors import DamagedError, LockedError, ResourceError, TreeLoraError, UsageError
from treelora_cli.project import Project
from treelora_cli.project.commit import tensor_file
from treelora_cli.project.lock import exclusive_lock
from treelora_cli.project.state import parse_state, seal
from treelora_cli.project.store import Store, check_inner_name, record_of, write_file


@pytest.fixture
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies or fails loses nothing that was not flushed: only a power cut does."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def count_events(root: Path, merge: bool) -> int:
    project, seen = Project.open(root), []
    change = commit_of(project, merge=merge)
    with hooked(seen.append):
        project.commit(change)
    return len(seen)


# -- commits ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize(
    ("merge", "step"),
    [
        (True, FAULT_STEP),
        pytest.param(False, FAULT_STEP, marks=pytest.mark.slow),
        pytest.param(True, 1, marks=pytest.mark.slow),
    ],
)
def test_death_at_every_operation_leaves_the_old_or_the_new_state(
    learned_project: Path, tmp_path: Path, merge: bool, step: int
) -> None:
    counted = Path(shutil.copytree(learned_project, tmp_path / "counted"))
    total = count_events(counted, merge)
    new = Project.open(counted)
    assert total > 40
    seen = set()
    for victim in range(0, total, step):
        root = Path(shutil.copytree(learned_project, tmp_path / "p"))
        old = Project.open(root)
        change = commit_of(old, merge=merge)
        child = os.fork()
        if child == 0:
            done = iter(range(total))
            with hooked(lambda _name, done=done, victim=victim: die() if next(done) == victim else None):
                old.commit(change)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        found = Project.open(root)
        assert found.state in (old.state, new.state)
        seen.add(found.state == new.state)
        assert everything(found) == everything(Project.open(counted) if found.state == new.state else old)
        after = found.commit(commit_of(found, "after"))
        assert everything(Project.open(root)) == everything(after)
        assert not list(root.rglob(".treelora-new-*")), "temporary files are swept by the next commit"
        assert all((root / name).is_file() for name in after.state.files)
        shutil.rmtree(root)
    assert seen == {False, True}
    print(f"killed at {len(range(0, total, step))} of {total} operations")


@pytest.mark.slow
@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize("merge", [False, True])
def test_an_error_at_every_operation_leaves_the_old_or_the_new_state(
    learned_project: Path, tmp_path: Path, merge: bool
) -> None:
    counted = Path(shutil.copytree(learned_project, tmp_path / "counted"))
    total = count_events(counted, merge)
    new = Project.open(counted).state
    for victim in range(0, total, FAULT_STEP):
        root = Path(shutil.copytree(learned_project, tmp_path / "p"))
        old = Project.open(root)
        change, done = commit_of(old, merge=merge), iter(range(total + 50))

        def fail(_name: str, victim: int = victim, done: Iterator[int] = done) -> None:
            if next(done) == victim:
                raise KeyboardInterrupt

        with hooked(fail), pytest.raises(KeyboardInterrupt, match=r"^$"):
            old.commit(change)
        found = Project.open(root)
        assert found.state in (old.state, new)
        everything(found)
        assert not list(root.rglob(".treelora-new-*"))
        shutil.rmtree(root)


@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize("lasts", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_full_disk_at_every_operation_says_truly_whether_the_task_was_committed(
    learned_project: Path, tmp_path: Path, lasts: bool
) -> None:
    counted = Path(shutil.copytree(learned_project, tmp_path / "counted"))
    total = count_events(counted, True)
    new = Project.open(counted)
    raised = 0
    for victim in range(0, total, FAULT_STEP):
        root = Path(shutil.copytree(learned_project, tmp_path / "p"))
        old = Project.open(root)
        change, done = commit_of(old, merge=True), iter(range(total + 500))

        def fail(_name: str, victim: int = victim, done: Iterator[int] = done) -> None:
            count = next(done)
            if count == victim or (lasts and count > victim):
                raise OSError(errno.ENOSPC, "No space left on device")

        with hooked(fail):
            try:
                after = old.commit(change)
            except (ResourceError, OSError):
                after = old
                raised += 1
        found = Project.open(root)
        assert found.state == after.state
        assert everything(found) == everything(old if after is old else new)
        assert lasts or not list(root.rglob(".treelora-new-*"))
        shutil.rmtree(root)
    assert 0 < raised < total
    print(f"disk full at {len(range(0, total, FAULT_STEP))} of {total} operations: {raised} refused")


@pytest.mark.usefixtures("_no_flush")
def test_a_reader_sees_a_whole_state_at_every_operation(project: Path) -> None:
    writer = Project.open(project)
    change = commit_of(writer, merge=True)
    before, generations = everything(writer), []

    def look(_name: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name in EVENTS:
                patch.setattr(os, name, originals[name])
            assert everything(Project(project, writer.state)) == before
            found = Project.open(project)
            everything(found)
            generations.append(found.state.generation)

    originals = {name: getattr(os, name) for name in EVENTS}
    with hooked(look):
        writer.commit(change)
    assert generations == sorted(generations)
    assert set(generations) == {3, 4}


def test_contents_reach_the_disk_before_the_state_that_names_them(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_replace(source: Any, target: Any) -> None:
        log.append(("replace", f"{source} {target}"))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    writer = Project.open(project)
    writer.commit(commit_of(writer))
    renames = [(place, *text.split(" ")) for place, (kind, text) in enumerate(log) if kind == "replace"]
    commit = next(place for place, _, target in renames if target == str(project / "state.json"))
    for place, source, target in renames:
        if place <= commit:  # what follows links objects that are on the disk already
            assert Path(source).name.startswith(".treelora-new-")
            assert ("fsync", source) in log[:place]
            assert ("fsync", str(Path(target).parent)) in log[place:]
    objects = str(project / ".treelora" / "objects")
    last_object = max(place for place, _, target in renames if target.startswith(objects) and place < commit)
    assert ("fsync", objects) in log[last_object:commit]
    assert ("fsync", str(project)) in log[commit:]


def test_a_reader_of_an_old_state_keeps_its_files_over_the_next_commit(project: Path) -> None:
    reader = Project.open(project)
    before = everything(reader)
    writer = reader.commit(commit_of(reader, "one", merge=True))
    assert everything(reader) == before
    between = everything(writer)
    writer.commit(commit_of(writer, "two"))
    assert everything(writer) == between


@pytest.mark.usefixtures("_no_flush")
def test_garbage_does_not_grow(project: Path) -> None:
    writer, counts = Project.open(project), []
    for number in range(12):
        writer = writer.commit(commit_of(writer, f"task-{number}"))
        inner = [path for path in (project / ".treelora").rglob("*") if path.is_file()]
        counts.append(len(inner))
        on_disk = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
        assert set(writer.state.files) <= on_disk
    assert len(set(counts[3:])) == 1
    assert len(list((project / "tasks").iterdir())) == 15


def test_commit_keeps_what_other_tasks_recorded(project: Path) -> None:
    old = Project.open(project)
    before = everything(old)
    after = old.commit(commit_of(old))
    assert after.state.generation == old.state.generation + 1
    assert [task.name for task in after.state.tasks] == ["warm", "cold", "grey", "next"]
    own = {name: data for name, data in everything(after).items() if name.startswith("tasks/00")}
    assert all(own[name] == data for name, data in before.items() if name.startswith("tasks/"))
    assert after.labels("next") == ("a", "b")
    assert torch.equal(after.memory().tasks[3].tensors()["head.weight"], torch.ones(2, 3))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6),
        st.tuples(
            st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bfloat16]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=5,
    )
)
def test_a_file_of_tensors_in_parts_is_the_one_of_safetensors(
    shapes: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {name: torch.full(shape, 3, dtype=dtype) for name, (dtype, shape) in shapes.items()}
    parts = tensor_file(tensors)
    assert b"".join(parts) == save(tensors)
    assert record_of(parts) == record_of(save(tensors))
    assert dict(map(repr_of, load(b"".join(parts)).items())) == dict(map(repr_of, tensors.items()))


def repr_of(item: tuple[str, torch.Tensor]) -> tuple[str, tuple[torch.dtype, list[object]]]:
    return item[0], (item[1].dtype, item[1].tolist())


def test_a_file_of_tensors_does_not_copy_them(tmp_path: Path) -> None:
    tensor = torch.zeros(4)
    parts = tensor_file({"a": tensor})
    tensor += 1
    write_file(tmp_path / "file", parts)
    assert load((tmp_path / "file").read_bytes())["a"].tolist() == [1.0] * 4


def test_merged_tasks_share_the_newest_members_directory(project: Path) -> None:
    old = Project.open(project)
    after = old.commit(commit_of(old, merge=True))
    assert [task.adapter for task in after.state.tasks[:2]] == ["tasks/002-cold"] * 2
    assert not (project / "tasks/001-warm/adapter_model.safetensors").exists()
    assert (project / "tasks/001-warm/head.safetensors").exists()
    assert torch.equal(after.adapter("warm").up[0], after.adapter("cold").up[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_committed(project: Path, bad: float) -> None:
    from safetensors.torch import load, save

    opened, before = Project.open(project), tree_hash(project)
    change = commit_of(opened)
    weights = load(change.adapter_files["adapter_model.safetensors"])
    key = next(iter(weights))
    weights[key][0, 0] = bad
    files = {**change.adapter_files, "adapter_model.safetensors": save(weights)}
    for broken in (
        dataclasses.replace(change, adapter_files=files),
        dataclasses.replace(change, merged={"cold": (("warm", "cold"), files)}),
        dataclasses.replace(change, tensors={"head.weight": torch.tensor([1.0, bad])}),
        dataclasses.replace(change, shared={"gram": torch.tensor([bad])}),
    ):
        with pytest.raises(TreeLoraError, match=r"Training diverged: '.*' of task 'next' is not finite; nothing was c"):
            opened.commit(broken)
    assert tree_hash(project) == before


def test_files_get_the_umask_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_checkpoint_round_trip_and_damage(project: Path) -> None:
    opened = Project.open(project)
    assert opened.checkpoint.facts() is None
    for step in (3, 6):
        opened.checkpoint.save(
            {"task": "x", "state": "", "request": {}, "step": step}, {"a": torch.full((2,), float(step))}
        )
    facts = opened.checkpoint.facts()
    assert facts is not None and facts["step"] == 6
    assert torch.equal(opened.checkpoint.tensors(facts)["a"], torch.tensor([6.0, 6.0]))
    run = project / ".treelora" / "run"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.json", "step-00000006.safetensors"]
    tensors = run / "step-00000006.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
    with pytest.raises(DamagedError, match=r"step-00000006\.safetensors: hash mismatch"):
        opened.checkpoint.tensors(facts)
    (run / "checkpoint.json").write_text("{")
    with pytest.raises(DamagedError, match=r"checkpoint\.json is damaged"):
        opened.checkpoint.facts()
    opened.checkpoint.clear()
    assert list(run.iterdir()) == []


# -- reading ----------------------------------------------------------------------------------------------


def test_a_symlinked_file_is_refused(project: Path) -> None:
    name = "tasks/001-warm/adapter_model.safetensors"
    kept = (project / name).rename(project.parent / "elsewhere")
    (project / name).symlink_to(kept)
    with pytest.raises(DamagedError, match=r"001-warm/adapter_model\.safetensors: hash mismatch"):
        Project.open(project).adapter("warm")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "a//b", ".hidden", "a\\b", "a/b\n", "x" * 90])
def test_names_that_escape_are_refused(learned_project: Path, name: str) -> None:
    with pytest.raises(DamagedError, match="is not allowed"):
        check_inner_name(name)
    with pytest.raises(DamagedError, match="is not allowed"):
        Store(learned_project).read(name, record_of(b""))
    record = json.loads((learned_project / "state.json").read_text())
    record["files"][name] = {"sha256": "0" * 64, "size": 0}
    with pytest.raises(DamagedError, match=r"not allowed|is damaged"):
        parse_state(seal(record))


def test_lock_excludes_and_is_released(tmp_path: Path) -> None:
    second = exclusive_lock(tmp_path / ".treelora", "other")
    with (
        exclusive_lock(tmp_path / ".treelora", "eval"),
        pytest.raises(LockedError, match=rf"'treelora eval' \(process {os.getpid()} on "),
    ):
        second.__enter__()
    with exclusive_lock(tmp_path / ".treelora", "again"):
        pass
    assert not (tmp_path / ".treelora" / "lock.json").exists()


def test_creating_over_something_is_refused(project: Path, tmp_path: Path) -> None:
    before = tree_hash(project)
    with pytest.raises(UsageError, match="is a treelora project already"):
        Project.create(project, "", backend="vit", base={}, fixed={})
    with pytest.raises(UsageError, match="is not empty"):
        Project.create(tmp_path, "", backend="vit", base={}, fixed={})
    assert tree_hash(project) == before
