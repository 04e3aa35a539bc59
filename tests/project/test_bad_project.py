"""Damage, a changed base, edited settings, a full disk, a held lock: refused, named, and nothing touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error, child_environment, make_images, tree_hash

DOCTOR = r"Run treelora doctor\."


def edit_state(root: Path, **changes: Any) -> None:
    state = json.loads((root / "state.json").read_text())
    state.update(changes)
    (root / "state.json").write_text(json.dumps(state))


def flip_bit(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(bytes(data))


# -- settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "  rank: 4",
            "  lora_rnak: 4",
            r"treelora\.yaml:\d+: unknown key 'lora_rnak' \(did you mean 'rank'\?\)\.",
        ),
        ("  rank: 4", "  rnak: 4", r"treelora\.yaml:\d+: unknown key 'rnak' \(did you mean 'rank'\?\)\."),
        (
            "  rank: 4",
            "  rank: 8",
            r"'rank' is 8 but this project was made with 4\. Set it back, or make a new project\.",
        ),
        ("  width: 64", "  width: 128", r"'width' is 128 but this project was made with 64\."),
        ("seed: 0", "seed: 1", r"'seed' is 1 but this project was made with 0\."),
        ("  lr: 0.01", "  lr: fast", r"treelora\.yaml:\d+: 'lr' needs float, got 'fast'\."),
        ("train:", "train: [", r"treelora\.yaml:\d+: "),
    ],
)
def test_edited_settings_are_refused(cli: Cli, project: Path, data: Path, old: str, new: str, line: str) -> None:
    path = project / "treelora.yaml"
    text = path.read_text()
    assert f"\n{old}" in text
    path.write_text(text.replace(f"\n{old}", f"\n{new}", 1))
    before = tree_hash(project)
    for command in (["eval"], ["train-task", str(data / "cold"), "--name", "x"], ["export", str(project.parent / "o")]):
        check_error(cli("-C", project, *command, "--device", "cpu"), 2, line)
    assert tree_hash(project) == before


def test_an_edited_free_setting_is_used(cli: Cli, project: Path, data: Path) -> None:
    path = project / "treelora.yaml"
    path.write_text(path.read_text().replace("  epochs: 2", "  epochs: 5").replace("  reg: 0.1", "  reg: 0.3"))
    cli("-C", project, "train-task", data / "warm", "--name", "x", "--reg", "0.2", "--device", "cpu")
    settings = json.loads((project / "tasks/004-x/task.json").read_text())["settings"]["train"]
    assert (settings["epochs"], settings["reg"]) == (5, 0.2)


# -- another base -----------------------------------------------------------------------------------------


def test_weights_changed_after_init(
    cli: Cli, tmp_path: Path, weights: Path, init_options: list[str], data: Path
) -> None:
    from safetensors.torch import load_file, save_file

    own = Path(shutil.copy(weights, tmp_path / "own.safetensors"))
    root = tmp_path / "p"
    cli("init", root, *[str(own) if option == str(weights) else option for option in init_options])
    tensors = load_file(own)
    tensors["norm.bias"][0] += 1e-6
    save_file(tensors, own)
    before = tree_hash(root)
    line = (
        r"The base model is not the one this project was made with: weights hash [0-9a-f]{12}, expected [0-9a-f]{12}\."
    )
    check_error(cli("-C", root, "train-task", data / "warm", "--device", "cpu"), 3, line)
    own.unlink()
    line = r"own\.safetensors, this project's base, not found\. Put it back, or write where it lies now into "
    check_error(cli("-C", root, "train-task", data / "warm", "--device", "cpu"), 5, line)
    assert tree_hash(root) == before


def test_weights_moved_and_named_anew_in_the_settings(
    cli: Cli, tmp_path: Path, weights: Path, init_options: list[str], data: Path
) -> None:
    own = Path(shutil.copy(weights, tmp_path / "own.safetensors"))
    root = tmp_path / "p"
    cli("init", root, *[str(own) if option == str(weights) else option for option in init_options])
    moved = own.rename(tmp_path / "moved.safetensors")
    settings = root / "treelora.yaml"
    settings.write_text(settings.read_text().replace(str(own), str(moved)))
    assert cli("-C", root, "train-task", data / "warm", "--device", "cpu").code == 0


# -- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}', b'{"schema": "1"}', b"[" * 100_000]
)
def test_damaged_state_is_refused(cli: Cli, project: Path, content: bytes) -> None:
    (project / "state.json").write_bytes(content)
    before = tree_hash(project)
    for command in ("status", "eval", "inspect-tree"):
        check_error(cli("-C", project, command), 3, rf"state\.json is damaged \(\w+\)\. {DOCTOR}")
    assert tree_hash(project) == before


def test_newer_schema_is_refused_untouched(cli: Cli, project: Path, data: Path) -> None:
    edit_state(project, schema=99)
    before = tree_hash(project)
    line = r"state\.json has schema 99; this treelora reads up to 1\. Upgrade treelora\."
    for command in (["status"], ["eval"], ["train-task", str(data / "warm"), "--name", "x"], ["inspect-tree"]):
        check_error(cli("-C", project, *command), 3, line)
    assert tree_hash(project) == before


FILES = {
    "tasks/001-warm/adapter_model.safetensors": "eval",
    "tasks/002-cold/head.safetensors": "eval",
    "tasks/002-cold/task.json": "status",
    "tasks/003-grey/labels.json": "status",
    "head.safetensors": "eval",
    "tree.json": "inspect-tree",
    "tree.safetensors": "inspect-tree",
    "bandit.safetensors": "bandit",
    "bandit.json": "bandit",
    "metrics/matrix.json": "status",
}


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_noticed_and_named(cli: Cli, project: Path, name: str) -> None:
    command = ["inspect-tree", "--bandit"] if FILES[name] == "bandit" else [FILES[name]]
    whole = (project / name).read_bytes()
    line = rf"{name.replace('.', '[.]')}: hash mismatch\. {DOCTOR}"
    for share in (0.0, 0.37, 1.0):
        (project / name).write_bytes(whole)
        flip_bit(project / name, share)
        before = tree_hash(project)
        check_error(cli("-C", project, *command), 3, line)
        assert tree_hash(project) == before


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_missing_or_swapped_file_is_noticed(cli: Cli, project: Path, name: str) -> None:
    command = ["inspect-tree", "--bandit"] if FILES[name] == "bandit" else [FILES[name]]
    path = project / name
    path.write_bytes(path.read_bytes()[:-1])
    check_error(cli("-C", project, *command), 3, rf"{name}: hash mismatch\. {DOCTOR}")
    path.unlink()
    check_error(cli("-C", project, *command), 3, rf"{name} is missing\. {DOCTOR}")
    shutil.copy(project / "state.json", path)
    check_error(cli("-C", project, *command), 3, rf"{name}: hash mismatch\. {DOCTOR}")


def test_training_on_a_damaged_project_changes_nothing(cli: Cli, project: Path, data: Path) -> None:
    flip_bit(project / "head.safetensors", 0.5)
    before = tree_hash(project)
    done = cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu")
    check_error(done, 3, r"head\.safetensors: hash mismatch\.")
    assert tree_hash(project) == before


# -- full disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["fsync", "mkstemp", "replace"])
def test_full_disk_ends_with_6_and_leaves_nothing_half_written(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    import tempfile

    more = make_images(tmp_path / "more", ["pink", "brown"])
    before = tree_hash(project)
    state = (project / "state.json").read_bytes()

    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile if place == "mkstemp" else os, place, full)
        done = cli("-C", project, "train-task", more, "--device", "cpu")
    check_error(done, 6, r"Disk full .*; nothing was committed\. Free space and retry\.")
    assert (project / "state.json").read_bytes() == state
    assert tree_hash(project) == before
    assert cli("-C", project, "train-task", more, "--device", "cpu").code == 0


@pytest.mark.parametrize("kind", ["merged", "adapter", "routed"])
def test_full_disk_while_exporting_leaves_nothing(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import safetensors.torch

    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        patched.setattr(Path, "write_text", full)
        done = cli("-C", learned_project, "export", tmp_path / "out", "--format", kind, "--device", "cpu")
    check_error(done, 6, r"out could not be written: No space left on device\.")
    assert list(tmp_path.iterdir()) == []


# -- lock -------------------------------------------------------------------------------------------------

_HOLDER = """
import sys
from pathlib import Path
from treelora_cli.project import Project
with Project.open(Path(sys.argv[1])).lock("train-task birds"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_writer_ends_with_8_naming_the_first(cli: Cli, project: Path, data: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(project)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert holder.stdin is not None and holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    before = tree_hash(project)
    try:
        done = cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu")
        line = rf"being written by 'treelora train-task birds' \(process {holder.pid} on .*, since \d{{4}}-"
        check_error(done, 8, line)
        assert cli("-C", project, "eval", "--device", "cpu").code == 0
        assert cli("-C", project, "status").code == 0
    finally:
        holder.kill()
        holder.wait()
    assert tree_hash(project) == before
    assert (project / ".treelora" / "lock.json").exists()
    after = cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu")
    assert after.code == 0, "a lock left by a dead process is taken over"
    assert not (project / ".treelora" / "lock.json").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_project_can_be_read(cli: Cli, project: Path) -> None:
    for path in (project, *project.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert cli("-C", project, "eval", "--device", "cpu").code == 0
    assert cli("-C", project, "inspect-tree").code == 0
