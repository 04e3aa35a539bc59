"""What of a project still works, can be undone, and costs space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from treelora_cli.errors import DamagedError
from treelora_cli.project.history import Undone
from treelora_cli.project.project import Project
from treelora_cli.project.state import State, parse_state, read_state
from treelora_cli.project.unfinished import PENDING, STEPS


def whole_tasks(state: State, damaged: Mapping[str, str]) -> list[str]:
    """Return the tasks whose own files, adapter included, are not among the damaged."""
    folders = [(task.name, (f"{task.directory}/", f"{task.adapter}/adapter_")) for task in state.tasks]
    needed = [file for file in damaged if not file.endswith(f"/{STEPS}")]  # nothing is computed with it
    return [name for name, prefixes in folders if not any(file.startswith(prefixes) for file in needed)]


def works(project: Project, damaged: Mapping[str, str]) -> dict[str, Any]:
    """Return what is sure to work although some files are damaged.

    Returns:
        ``predict``: predictions over all tasks; ``export``: tasks whose adapter can be exported; ``rollback``:
        tasks that can be rolled back to a state that is whole; ``inspect``: the tree can be shown.
    """
    of_tasks = {f"{task.directory}/{name}" for task in project.state.tasks for name in ("task.json", "labels.json")}
    readable = not of_tasks & set(damaged)
    whole = whole_tasks(project.state, damaged) if readable else []
    names = [task.name for task in project.state.tasks]
    predict = "head.safetensors" not in damaged and whole == names != []
    before = {name: project.history.before(project.state, name) for name in project.history.reach(project.state)}
    return {
        "predict": predict,
        # the newest adapter's classifier is solved from what all tasks share
        "export": [name for name in whole if name != names[-1] or predict],
        "rollback": [name for name, data in before.items() if not Project(project.root, parse_state(data)).damage()],
        "inspect": not {"tree.json", "tree.safetensors"} & set(damaged),
    }


def damage_of_the_past(project: Project) -> dict[str, str]:
    """Return what is wrong with files that only undoing and resuming need, by name."""
    history = project.history
    found = dict.fromkeys([*history.damage(), *history.damaged_copies()], "unreadable")
    current = read_state(project.root)
    for data in dict.fromkeys(history.readable_states(current)):
        state = parse_state(data)
        other = {name: record for name, record in state.files.items() if project.state.files.get(name) != record}
        for name, problem in Project(project.root, dataclasses.replace(state, files=other)).damage().items():
            found[f".treelora/objects/{other[name].sha256}"] = f"{problem} ({name} of an earlier state)"
    return {**found, **project.checkpoint.damage(), **_damage_of_pending(project)}


def _damage_of_pending(project: Project) -> dict[str, str]:
    """Return what is wrong with the task that waits for a decision."""
    try:
        waiting = project.pending.read()
    except DamagedError:
        return {PENDING: "damaged"}
    if waiting is None or waiting.grown_from != project.state.digest():
        return {}
    state = parse_state(waiting.state)
    new = {name: record for name, record in state.files.items() if project.state.files.get(name) != record}
    damaged = Project(project.root, dataclasses.replace(state, files=new)).damage()
    return {
        f".treelora/objects/{new[name].sha256}": f"{why} ({name} of a task that waits)" for name, why in damaged.items()
    }


def trash(project: Project) -> list[tuple[Undone, int]]:
    """Return what rollbacks left, oldest first, each with the bytes that emptying the trash would free."""
    current = read_state(project.root)
    needed = _needed(project, project.history.copies())
    entries = []
    for entry in project.history.undone(current):
        own = _needed(project, entry.states) - needed
        entries.append((entry, project.store.object_bytes(own) + entry.path.stat().st_size))
        needed |= own
    return entries


def history_bytes(project: Project) -> int:
    """Return the bytes that earlier states cost, which rollback returns to."""
    return project.store.object_bytes(_needed(project, project.history.earlier(project.state)))


def disk_bytes(project: Project) -> int:
    """Return the bytes of all files below the project's directory, contents that several names share counted once."""
    found = {}
    for path in project.root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            facts = path.stat()
            found[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(found.values())


def _needed(project: Project, states: Sequence[bytes]) -> set[str]:
    return project.store.needed(project.state.files, (parse_state(data).files for data in states))
