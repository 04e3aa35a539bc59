"""Rebuild what the rest of a project still determines; never touch what it does not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.project.commit import to_json, tree_files
from treelora_cli.project.history import History
from treelora_cli.project.lock import exclusive_lock
from treelora_cli.project.metrics import ANSWERS, WATCH
from treelora_cli.project.project import Project
from treelora_cli.project.state import STATE, State, parse_state
from treelora_cli.project.store import record_of, write_file
from treelora_cli.project.unfinished import PENDING, STEPS
from treelora_cli.score_matrix import ScoreMatrix

if TYPE_CHECKING:
    import numpy as np

    from treelora_cli.algorithm.tree import Tree

_TREE = ("tree.json", "tree.safetensors")
_BANDIT = ("bandit.json", "bandit.safetensors")
_MATRIX = "metrics/matrix.json"


@dataclass
class Repair:
    """What a repair did.

    Attributes:
        restored: Files that are again what they were, bit for bit.
        rebuilt: Files computed anew, with another content than the lost one.
        dropped: Files that the project does without.
        notes: Lines for the user.
    """

    restored: list[str] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_lost_state(start: Path) -> Path | None:
    """Return the nearest directory at or above ``start`` whose ``state.json`` is unreadable but has a copy."""
    for root in (start.absolute(), *start.absolute().parents):
        if not (root / ".treelora" / "history").is_dir():
            continue
        try:
            Project.open(root)
        except DamagedError:
            pass
        except ProjectError:
            if (root / STATE).exists():
                return None  # whole, but from a newer version
        else:
            return None
        return root if History(root).copies() else None
    return None


def restore_state(root: Path) -> State:
    """Write ``state.json`` again from its newest copy; what of its files is damaged too is another matter.

    Raises:
        DamagedError: No copy is kept.
    """
    copies = History(root).copies()
    if not copies:
        raise DamagedError(f"{root / STATE} is damaged and no copy is kept. Restore it from a backup.")
    with exclusive_lock(root / ".treelora", "doctor --repair"):
        write_file(root / STATE, copies[0])
    return parse_state(copies[0])


def repair(project: Project) -> tuple[Project, Repair]:
    """Restore or rebuild what is damaged, as far as the rest determines it; the caller holds the lock."""
    report = Repair()
    damaged = set(project.damage())
    contents: dict[str, bytes] = {}
    _restore_from_twins(project, damaged, report)
    if damaged & set(_TREE):
        _rebuild_tree(project, damaged, contents, report)
    if damaged & set(_BANDIT):
        damaged -= set(_BANDIT)
        report.dropped += [name for name in _BANDIT if name in project.state.files]
        report.notes.append("What the last task's search pulled is gone; the next task starts its own search.")
    for name in sorted(one for one in damaged if one == ANSWERS or one.endswith(f"/{STEPS}")):
        damaged.discard(name)
        report.dropped.append(name)
        report.notes.append(f"{name} only told how training and scoring went.")
    if WATCH in damaged:
        damaged.discard(WATCH)
        report.dropped.append(WATCH)
        report.notes.append("The watch sets are gone. Add them again: treelora watch add NAME DATA")
    if _MATRIX in damaged:
        damaged.discard(_MATRIX)
        contents[_MATRIX] = to_json(_known_matrix(project).to_json())
        report.rebuilt.append(_MATRIX)
        report.notes.append("Scores that are not known any more are shown as '-'. 'treelora eval' measures today's.")
    _drop_damaged_pending(project, report)
    if contents or set(report.dropped) - {PENDING}:
        kept = {name: record for name, record in project.state.files.items() if name not in report.dropped}
        project = project.advance(project.state.tasks, kept, contents)
    else:
        project.store.publish(project.state.files, {})
    return project, report


def _drop_damaged_pending(project: Project, report: Repair) -> None:
    """Give up a task that waits for a decision but cannot be read: it was never part of the project."""
    try:
        project.pending.read()
    except DamagedError:
        project.pending.clear()
        report.dropped.append(PENDING)
        report.notes.append("A task that waited to be accepted is gone; learn it again.")


def _restore_from_twins(project: Project, damaged: set[str], report: Repair) -> None:
    """Restore files whose content another file, such as another task's settings, holds too."""
    twins = {record: name for name, record in project.state.files.items() if name not in damaged}
    for name in sorted(damaged):
        twin = twins.get(project.state.files[name])
        if twin is not None:
            _restore(project, name, project.read(twin), damaged, report)


def _restore(project: Project, name: str, data: bytes, damaged: set[str], report: Repair) -> None:
    assert record_of(data) == project.state.files[name]
    (project.root / name).unlink(missing_ok=True)  # also a symbolic link
    write_file(project.root / name, data)
    damaged.discard(name)
    report.restored.append(name)


def _rebuild_tree(project: Project, damaged: set[str], contents: dict[str, bytes], report: Repair) -> None:
    """Grow the tree again, task by task, as it was grown; the same settings give the same bytes."""
    signatures = _signatures(project, damaged)
    tree = None if signatures is None else _regrown(project, damaged, signatures)
    if tree is None:
        report.notes.append("The tree cannot be rebuilt: a task's signature or its settings are damaged too.")
        return
    files = tree_files(tree)
    if all(record_of(data) == project.state.files[name] for name, data in files.items()):
        for name in sorted(damaged & set(_TREE)):
            _restore(project, name, files[name], damaged, report)
        return
    contents |= files
    damaged -= set(_TREE)
    report.rebuilt += _TREE


def _signatures(project: Project, damaged: set[str]) -> list[np.ndarray[Any, Any]] | None:
    names = [f"{task.directory}/signature.safetensors" for task in project.state.tasks]
    try:
        if "tree.safetensors" not in damaged:
            return list(project.read_arrays("tree.safetensors")["signatures"])
        return [project.read_arrays(name)["signature"] for name in names]
    except (DamagedError, KeyError):
        return None


def _regrown(project: Project, damaged: set[str], signatures: list[np.ndarray[Any, Any]]) -> Tree | None:
    from treelora_cli.algorithm.tree import extend_tree

    tree: Tree | None = None
    settings = _tree_settings(project, damaged)
    try:
        for signature, (depth, split) in zip(signatures, settings, strict=True):
            tree = extend_tree(tree, signature, depth, split=split)
    except (ValueError, TypeError):
        return None
    return tree


def _tree_settings(project: Project, damaged: set[str]) -> list[tuple[int, Any]]:
    """Return (depth, split) as each task was learned with; a task whose record is lost takes the next one's."""
    found: list[tuple[int, Any]] = []
    try:
        last = json.loads(project.read("tree.json")) if "tree.json" not in damaged else None
        known = None if last is None else (int(last["tree_depth"]), last["split"])
        for task in reversed(project.state.tasks):
            if f"{task.directory}/task.json" not in damaged:
                tree = project.task_record(task.name)["settings"]["tree"]
                known = (int(tree["depth"]), tree["split"])
            if known is None:
                return []
            found.append(known)
    except (DamagedError, KeyError, TypeError, ValueError):
        return []
    return found[::-1]


def _known_matrix(project: Project) -> ScoreMatrix:
    """Return the newest earlier matrix that can be read, with rows of unknown scores for the tasks since."""
    names = [task.name for task in project.state.tasks]
    matrix = ScoreMatrix()
    for data in reversed(project.history.earlier(project.state)):
        try:
            matrix = Project(project.root, parse_state(data)).matrix()
        except DamagedError:
            continue
        break
    for name in names[len(matrix.tasks) :]:
        matrix = matrix.with_row(name, [None] * (len(matrix.tasks) + 1))
    return matrix
