"""What one learned task adds to a project."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import DamagedError, TreeLoraError
from treelora_cli.project.metrics import ANSWERS, WATCH, TaskAnswers, WatchSet, answers_document, watch_document
from treelora_cli.project.state import TaskEntry
from treelora_cli.project.store import Content, FileRecord
from treelora_cli.project.unfinished import STEPS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from treelora_cli.algorithm.tree import Tree
    from treelora_cli.backend.values import Layout
    from treelora_cli.score_matrix import ScoreMatrix


STORED = "stored"
"""Key of ``task.json`` that says which tensors a commit wrote: a later fault is the project's only if they differ."""


@dataclass(frozen=True)
class Commit:
    """Everything one learned task adds to the project.

    Attributes:
        name: Task name.
        record: Contents of ``task.json``.
        labels: Class or answer names.
        adapter_files: The task's PEFT directory, file name to content.
        tensors: Kept with the task.
        shared: Statistics shared by all tasks.
        tree: Tree over all tasks, this one included.
        bandit_arrays, bandit_meta: Statistics of this task's search; empty for the first task.
        matrix: Scores, this task's row included.
        merged: PEFT directories that replace those of merged tasks: newest member's name to
            (members' names, files).
        watch: Watch sets, this task's scores included.
        steps: The task's step log, as JSON lines.
        answers: What was answered when tasks were scored, by task; ``None`` when nothing was.
        branches: Statistics of the branches that this task changed, by name.
        home: Earlier task whose adapter this one uses; its own where ``None``.
    """

    name: str
    record: dict[str, Any]
    labels: tuple[str, ...]
    adapter_files: dict[str, bytes]
    tensors: dict[str, Tensor]
    shared: dict[str, Tensor]
    tree: Tree
    bandit_arrays: dict[str, np.ndarray[Any, Any]]
    bandit_meta: dict[str, Any]
    matrix: ScoreMatrix
    merged: dict[str, tuple[tuple[str, ...], dict[str, bytes]]] = field(default_factory=dict)
    watch: tuple[WatchSet, ...] = ()
    steps: bytes = b""
    answers: Mapping[str, TaskAnswers] | None = None
    branches: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    home: str | None = None


def all_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite, without a copy of the tensor."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()  # NaN when any value is
    return bool(low.isfinite() and high.isfinite())


def check_finite(change: Commit) -> None:
    """Raise ``TreeLoraError`` when a tensor holds NaN or infinity."""
    from safetensors.torch import load

    weights = [files["adapter_model.safetensors"] for files in (change.adapter_files, *_merged_files(change))]
    for tensors in (change.tensors, change.shared, *change.branches.values(), *map(load, weights)):
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise TreeLoraError(
                    f"Training diverged: '{name}' of task '{change.name}' is not finite; nothing was committed."
                    " Retry with a smaller --lr."
                )


def _merged_files(change: Commit) -> list[dict[str, bytes]]:
    return [files for _, files in change.merged.values()]


def to_json(value: Any) -> bytes:
    """Render with sorted keys: the same value is the same bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def place_merged(
    tasks: Sequence[TaskEntry],
    files: Mapping[str, FileRecord],
    contents: dict[str, Content],
    merged: Mapping[str, tuple[tuple[str, ...], dict[str, bytes]]],
) -> tuple[tuple[TaskEntry, ...], dict[str, FileRecord], dict[str, Content]]:
    """Point merged tasks at their group's directory and drop the adapters they had."""
    placed, kept, contents = {task.name: task for task in tasks}, dict(files), dict(contents)
    for newest, (members, adapter_files) in merged.items():
        home = placed[newest].directory
        for member in members:
            placed[member] = dataclasses.replace(placed[member], adapter=home)
        contents |= {f"{home}/{name}": data for name, data in adapter_files.items()}
    homes = {task.adapter for task in placed.values()}
    for task in tasks:
        if task.directory not in homes:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                kept.pop(f"{task.directory}/{name}", None)
                contents.pop(f"{task.directory}/{name}", None)
    return tuple(placed[task.name] for task in tasks), kept, contents


def contents_of(change: Commit, directory: str) -> dict[str, Content]:
    """Return the files of a commit, by name in the project; the task's own lie in ``directory``."""
    from safetensors.numpy import save as save_arrays
    from safetensors.torch import save as save_tensors

    own = {} if change.home is not None else change.adapter_files
    contents: dict[str, Content] = {f"{directory}/{name}": data for name, data in own.items()}
    contents |= {branch_file(name): tensor_file(tensors) for name, tensors in change.branches.items()}
    contents |= {
        f"{directory}/head.safetensors": save_tensors(change.tensors),
        f"{directory}/labels.json": to_json(list(change.labels)),
        f"{directory}/task.json": to_json({**change.record, STORED: _layouts(change)}),
        f"{directory}/signature.safetensors": save_arrays({"signature": change.tree.signatures[-1]}),
        "head.safetensors": tensor_file(change.shared),
        **tree_files(change.tree),
        "metrics/matrix.json": to_json(change.matrix.to_json()),
    }
    contents[ANSWERS] = to_json(answers_document(change.answers or {}))
    if change.steps:
        contents[f"{directory}/{STEPS}"] = change.steps
    if change.watch:
        contents[WATCH] = to_json(watch_document(change.watch))
    if change.bandit_meta:
        contents["bandit.safetensors"] = save_arrays(change.bandit_arrays)
        contents["bandit.json"] = to_json(change.bandit_meta)
    return contents


def branch_file(name: str) -> str:
    """Return where the statistics of a branch lie, by the name of the task that opened it."""
    return f"branches/{name}.safetensors"


def _layouts(change: Commit) -> dict[str, Any]:
    from safetensors.torch import load

    from treelora_cli.backend.values import layout_of

    adapter = load(change.adapter_files["adapter_model.safetensors"])
    return {"task": layout_of({**change.tensors, **adapter}), "shared": layout_of(change.shared)}


def stored_layout(record: Mapping[str, Any], part: str) -> Layout | None:
    """Return what a task's record says was written: ``part`` is ``task`` or ``shared``.

    Returns:
        ``None`` when an earlier treelora, which did not record it, wrote the task.

    Raises:
        DamagedError: The record is not what this program writes.
    """
    if STORED not in record:
        return None
    try:
        found = record[STORED][part]
        return {name: (str(kind), tuple(int(size) for size in shape)) for name, (kind, shape) in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"task.json: '{STORED}' is malformed ({error}). Run treelora doctor.") from error


def tensor_file(tensors: Mapping[str, Tensor]) -> list[memoryview]:
    """Return the file that ``safetensors.torch.save`` makes of tensors on the CPU, in parts: nothing is copied.

    Raises:
        ValueError: A type of number that no statistic has.
    """
    import torch

    from treelora_cli.backend.contract import STORED_KINDS

    kinds = {getattr(torch, name): code for name, code in STORED_KINDS.items()}
    rank = list(kinds).index
    order = sorted(tensors, key=lambda name: (rank(tensors[name].dtype), name))
    header: dict[str, Any] = {}
    parts, end = [], 0
    for name in order:
        tensor = tensors[name].contiguous()
        part = tensor.reshape(-1).view(torch.uint8).numpy().data
        places = [end, end := end + len(part)]
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        parts.append(part)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def tree_files(tree: Tree) -> dict[str, bytes]:
    """Return the files that hold a tree."""
    from safetensors.numpy import save

    return {"tree.json": to_json(tree.to_dict()), "tree.safetensors": save(tree.to_arrays())}
