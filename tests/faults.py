"""A ready commit, and faults put at the operations of one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from treelora_cli.project import Commit, Project

EVENTS = ("replace", "link", "fsync", "fchmod", "unlink", "mkdir", "rmdir", "open")


def commit_of(project: Project, name: str = "next", *, merge: bool = False) -> Commit:
    """A further task made of what the project holds, wherever it lies; ``merge`` joins the first two adapters."""
    tree = project.tree()
    assert tree is not None
    first = project.state.tasks[0]
    files = {
        part: project.read(f"{first.adapter}/{part}") for part in ("adapter_config.json", "adapter_model.safetensors")
    }
    shared = {key: value + 1 for key, value in project.memory().shared().items()}
    arrays, facts = project.bandit() or ({}, {})
    members = tuple(task.name for task in project.state.tasks[:2])
    return Commit(
        name=name,
        record={**json.loads(project.read(f"{first.directory}/task.json")), "name": name},
        labels=("a", "b"),
        adapter_files={**files, "adapter_config.json": b"{}\n"},
        tensors={"head.weight": torch.ones(2, 3)},
        shared=shared,
        tree=tree.insert(np.asarray(tree.signatures[0])),
        bandit_arrays={key: np.ascontiguousarray(value) for key, value in arrays.items()},
        bandit_meta={**facts, "task": name} if facts else {},
        matrix=project.matrix().with_row(name, [0.5] * (len(project.state.tasks) + 1)),
        merged={members[-1]: (members, files)} if merge else {},
    )


def everything(project: Project) -> dict[str, bytes]:
    """Every recorded file, read and verified."""
    return {name: project.read(name) for name in project.state.files}


@contextmanager
def hooked(hook: Callable[[str], None]) -> Iterator[None]:
    """Call ``hook`` before every operation of a commit that touches the disk, and half-way through every write."""
    fdopen = os.fdopen

    def opened(descriptor: int, mode: str, *arguments: Any, **keywords: Any) -> Any:
        file = fdopen(descriptor, mode, *arguments, **keywords)
        return _TornFile(file, hook) if "w" in mode else file

    originals = {name: getattr(os, name) for name in EVENTS}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            hook(name)
            return originals[name](*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in EVENTS:
            patch.setattr(os, name, wrapped(name))
        patch.setattr(os, "fdopen", opened)
        yield


def die() -> None:
    """End this process without any clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class _TornFile:
    """A file whose contents arrive in two parts, with ``hook`` called before each."""

    def __init__(self, file: Any, hook: Callable[[str], None]) -> None:
        self.file, self.hook = file, hook

    def __enter__(self) -> _TornFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, data: bytes) -> None:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.hook("write")
            self.file.write(part)
            self.file.flush()
