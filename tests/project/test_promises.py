"""What a project promises while things go wrong around it: data, disk, rights, other processes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import FAULT_STEP, Cli, check_error, child_environment, learned_hashes, make_images, run_python, tree_hash
from faults import hooked

from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.project import Project
from treelora_cli.project.state import parse_state


def state_hash(root: Path) -> dict[str, str]:
    """Everything that a reader may look at; a checkpoint or an unreferenced content is nobody's state."""
    return {name: one for name, one in tree_hash(root).items() if not name.startswith(".treelora/")}


@pytest.mark.parametrize("fate", ["gone", "truncated", "emptied"])
def test_data_that_breaks_half_way_changes_nothing(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    from treelora_backends.vit import images as vit_images

    folder = make_images(tmp_path / "d", ["pink", "brown"])
    victim = folder / "train/pink/05.png"
    listed = vit_images.list_images

    def breaking(request: Any) -> Any:
        found = listed(request)
        if fate == "gone":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes()[:200] if fate == "truncated" else b"")
        return found

    monkeypatch.setattr(vit_images, "list_images", breaking)
    before = tree_hash(project)
    check_error(cli("-C", project, "train-task", folder, "--device", "cpu"), 4, r"05\.png")
    assert tree_hash(project) == before


def test_data_that_is_deleted_once_it_was_read_is_not_missed(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_cli.learning import task

    twin = Path(shutil.copytree(project, tmp_path / "twin"))
    folder = make_images(tmp_path / "d", ["pink", "brown"])
    learn = ["train-task", folder, "--device", "cpu", "--precision", "fp32"]
    assert cli("-C", twin, *learn).code == 0
    train = task.train_task

    def deleting(*arguments: Any, **keywords: Any) -> Any:
        shutil.rmtree(folder)
        return train(*arguments, **keywords)

    monkeypatch.setattr(task, "train_task", deleting)
    assert cli("-C", project, *learn).code == 0
    assert learned_hashes(project) == learned_hashes(twin)


def test_of_two_train_tasks_at_once_the_second_ends_with_8(cli: Cli, project: Path, tmp_path: Path) -> None:
    one, two = (make_images(tmp_path / name, ["pink", "brown"]) for name in ("one", "two"))
    command = [sys.executable, "-m", "treelora_cli", "-C", str(project), "train-task", str(one), "--device", "cpu"]
    first = subprocess.Popen(
        [*command, "--epochs", "400"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=child_environment()
    )
    try:
        while not (project / ".treelora/run/checkpoint.json").exists() and first.poll() is None:
            time.sleep(0.02)
        line = rf"being written by 'treelora train-task one' \(process {first.pid} on .*\)\. Wait for it to end\."
        start = time.perf_counter()
        check_error(cli("-C", project, "train-task", two, "--device", "cpu"), 8, line)
        assert time.perf_counter() - start < 5, "it does not wait"
        check_error(cli("-C", project, "rollback", "grey"), 8, line)
        check_error(cli("-C", project, "doctor", "--repair"), 8, line)
        assert cli("-C", project, "eval", "--device", "cpu").code == 0, "readers use the last commit"
        first.terminate()
        _, err = first.communicate(timeout=60)
        assert first.returncode == 130, err
    finally:
        first.kill()
        first.wait()
    check_error(cli("-C", project, "train-task", two, "--device", "cpu"), 3, "Task 'one' was interrupted after step")
    assert cli("-C", project, "train-task", two, "--device", "cpu", "--abandon").code == 0


_READ_ONLY = """
import ctypes, os, sys
from pathlib import Path
from treelora_cli.app import run_command
if os.geteuid() == 0:  # without its capabilities root obeys the permissions too
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0
root, image, out, data = sys.argv[1:]
try:
    Path(root, "probe").write_text("x")
except PermissionError:
    print("READ-ONLY")
for command in (["status"], ["eval"], ["inspect-tree", "--bandit"], ["predict", image], ["export", out], ["doctor"]):
    assert run_command(["-C", root, *command]) == 0, command
for command in (["train-task", data, "--name", "x"], ["rollback", "grey"], ["doctor", "--repair"]):
    assert run_command(["-C", root, *command]) == 3, command
"""


def test_a_read_only_project_is_read_and_refuses_to_be_written(project: Path, data: Path, tmp_path: Path) -> None:
    before = tree_hash(project)
    paths = [project, *project.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        image = next(data.glob("warm/test/*/*.png"))
        done = run_python(_READ_ONLY, str(project), str(image), str(tmp_path / "out"), str(data / "cold"))
    finally:
        for path in paths:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "READ-ONLY"
    assert done.err.count("cannot be written: Permission denied.") == 3
    assert tree_hash(project) == before


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_everything_written_has_the_rights_of_the_users_umask(
    cli: Cli, tmp_path: Path, init_options: list[str], data: Path, umask: int
) -> None:
    root, out = tmp_path / "p", tmp_path / "out"
    before = os.umask(umask)
    try:
        assert cli("init", root, *init_options).code == 0
        for name in ("warm", "cold"):
            assert cli("-C", root, "train-task", data / name, "--device", "cpu").code == 0
        assert cli("-C", root, "rollback", "cold").code == 0
        assert cli("-C", root, "export", out, "--format", "adapter", "--device", "cpu").code == 0
    finally:
        os.umask(before)
    for path in [root, *root.rglob("*"), out, *out.rglob("*")]:
        if path.name == "lock":
            continue  # holds nothing
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_paths_with_spaces_and_any_script(cli: Cli, tmp_path: Path, init_options: list[str]) -> None:
    root = tmp_path / "mes tâches 任务 'x'"
    assert cli("init", root, *init_options).code == 0
    for name, classes in (("ete ❄", ["red", "yellow"]), ("b c", ["blue", "green"])):
        folder = make_images(tmp_path / name, classes)
        (folder / "train" / classes[0]).rename(folder / "train" / "été rouge 红")
        (folder / "test" / classes[0]).rename(folder / "test" / "été rouge 红")
        done = cli("-C", root, "train-task", folder, "--name", classes[1], "--json", "--device", "cpu")
        assert done.code == 0, done.err
    assert Project.open(root).labels("green")[1] == "été rouge 红"
    assert cli("-C", root, "rollback", "green").code == 0
    assert cli("-C", root, "rollback", "--undo").code == 0
    assert cli("-C", root, "eval", "--device", "cpu").code == 0
    assert cli("-C", root, "export", tmp_path / "aus gabe ü", "--device", "cpu").code == 0
    assert cli("-C", root, "doctor").code == 0


def test_the_same_seed_gives_the_same_hashes_and_another_does_not(
    cli: Cli, tmp_path: Path, init_options: list[str], data: Path
) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        root = tmp_path / name
        assert cli("init", root, *init_options, "--seed", seed).code == 0
        for task in ("warm", "cold"):
            done = cli("-C", root, "train-task", data / task, "--device", "cpu", "--precision", "fp32")
            assert done.code == 0
        found.append(learned_hashes(root))
    assert found[0] == found[1]
    name = "tasks/002-cold/adapter_model.safetensors"
    assert found[0][name] != found[2][name]


@pytest.mark.slow  # quick: test_trust.py flips one bit in each file of the bookkeeping
def test_one_flipped_bit_or_a_cut_anywhere_in_any_file_is_noticed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Project.open(project)
    generator = random.Random(0)
    flips = cuts = 0
    for name, record in opened.state.files.items():
        whole = opened.read(name)
        for _ in range(60):
            place = generator.randrange(8 * len(whole))
            changed = bytearray(whole)
            changed[place // 8] ^= 1 << place % 8
            (project / name).write_bytes(changed)
            with pytest.raises(DamagedError, match=rf"^{name}: hash mismatch"):
                opened.store.read(name, record)
            flips += 1
        for length in {0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(10))}:
            (project / name).write_bytes(whole[:length])
            with pytest.raises(DamagedError, match=rf"^{name}: hash mismatch"):
                opened.store.read(name, record)
            cuts += 1
        (project / name).write_bytes(whole)
    text = (project / "state.json").read_bytes()
    state_flips = 0
    for place in range(0, 8 * len(text), 3):
        changed = bytearray(text)
        changed[place // 8] ^= 1 << place % 8
        try:
            found = parse_state(bytes(changed))
        except ProjectError:
            pass
        else:
            assert found == opened.state, "only white space between values may differ"
        state_flips += 1
    for length in range(0, len(text) - 1, 7):
        with pytest.raises(DamagedError, match=r"state\.json is damaged"):
            parse_state(text[:length])
        cuts += 1
    with capsys.disabled():
        print(f"{flips} flipped bits of files and {state_flips} of state.json, {cuts} cuts: all noticed")


def objects_of(root: Path) -> set[str]:
    return {path.name for path in (root / ".treelora" / "objects").glob("*")}


@pytest.mark.slow
def test_a_full_disk_at_every_write_of_a_command(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command this time: lock, checkpoint and commit."""
    more = make_images(tmp_path / "more", ["pink", "brown"], train=4, test=2)
    learn = ["train-task", more, "--device", "cpu", "--precision", "fp32", "--epochs", "1"]
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    counted, events = Path(shutil.copytree(project, tmp_path / "counted")), []

    def is_write(name: str) -> bool:
        return name in ("replace", "link", "fsync", "mkdir", "write")

    with hooked(lambda name: events.append(name) if is_write(name) else None):
        assert cli("-C", counted, *learn).code == 0
    new, old = learned_hashes(counted), state_hash(project)
    outcomes = []
    for victim in range(0, len(events), FAULT_STEP):
        root = Path(shutil.copytree(project, tmp_path / "q"))
        count = 0

        def fail(name: str, victim: int = victim) -> None:
            nonlocal count
            if is_write(name):
                count += 1
                if count > victim:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with hooked(fail):
            done = cli("-C", root, *learn)
        if done.code == 0:
            assert learned_hashes(root) == new
            assert Project.open(root).damage() == {}
        else:
            check_error(done, 6, r"Disk full.*; nothing was committed\. Free space and retry\.")
            assert state_hash(root) == old
            assert objects_of(root) <= objects_of(project), "what a full disk took is given back"
        assert not list(root.rglob(".treelora-new-*"))
        outcomes.append(done.code)
        shutil.rmtree(root)
    assert set(outcomes) == {0, 6}
    refused = outcomes.count(6)
    with capsys.disabled():
        print(f"{len(outcomes)} of {len(events)} writes failed: {refused} refused, the others committed")
