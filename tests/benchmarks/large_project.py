"""How a project of 1,000 tasks opens, shows itself and takes one more task.

    python tests/benchmarks/large_project.py

The project is written through the project's own store, with small adapters and simulated signatures; ``status`` and
``inspect-tree`` run as a user's would, each in a new process. Starting the next task is timed without the model
and its data: open, read the memory, the tree and the nearest adapter, search with 12 mini-batches, insert, commit.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from charts import table
from safetensors.numpy import save as save_arrays
from safetensors.torch import save as save_tensors
from scale import DEPTH, LAYERS, clustered_signatures

from treelora_cli.algorithm.bandit import TreeBandit
from treelora_cli.algorithm.tree import build_tree
from treelora_cli.backend.values import DataRequest
from treelora_cli.project import Commit, Project
from treelora_cli.project.state import TaskEntry
from treelora_cli.score_matrix import ScoreMatrix

NAMES = tuple(f"blocks.{index}.attn.qkv" for index in range(LAYERS))
FIXED = {"adapter.alpha": 8.0, "adapter.rank": 4}


def adapter_files(seed: int) -> dict[str, bytes]:
    """A small adapter as a PEFT directory."""
    generator = torch.Generator().manual_seed(seed)
    key = "base_model.model.{}.lora_{}.weight"
    tensors = {}
    for name in NAMES:
        tensors[key.format(name, "A")] = torch.randn(4, 32, generator=generator)
        tensors[key.format(name, "B")] = torch.randn(96, 4, generator=generator)
    return {"adapter_config.json": b"{}\n", "adapter_model.safetensors": save_tensors(tensors)}


def record_of(name: str) -> dict[str, Any]:
    data = DataRequest(Path("simulated")).to_json()
    told = {"name": name, "metric": "accuracy", "precision": "fp32", "device": "cpu"}
    return {**told, "train_examples": 100, "nearest": None, "data": data}


def write_project(root: Path, tasks: int) -> Project:
    """Write a project of simulated tasks in one commit."""
    base = {
        "fingerprint": "0" * 64,
        "layers": list(NAMES),
        "facts": {},
        "resolved": {"model": "simulated"},
        "given": {},
    }
    project = Project.create(root, "", backend="vit", base=base, fixed=FIXED)
    signatures = clustered_signatures(tasks, LAYERS)
    tree = build_tree(signatures, DEPTH)
    bandit = TreeBandit(tree)
    bandit.step(signatures[0])
    rng = np.random.default_rng(0)
    matrix = ScoreMatrix()
    names = [f"task-{index:04d}" for index in range(tasks)]
    rows = tuple(tuple(rng.random(index + 1).round(4).tolist()) for index in range(tasks))
    matrix = ScoreMatrix(tuple(names), rows)
    contents: dict[str, bytes] = {}
    entries = []
    for index, name in enumerate(names):
        folder = f"tasks/{index + 1:03d}-{name}"
        entries.append(TaskEntry(name, folder, folder))
        contents |= {f"{folder}/{file}": data for file, data in adapter_files(index).items()}
        contents[f"{folder}/head.safetensors"] = save_tensors({"head.weight": torch.randn(5, 32)})
        contents[f"{folder}/labels.json"] = json.dumps([f"{name}-{label}" for label in range(5)]).encode()
        contents[f"{folder}/task.json"] = json.dumps(record_of(name)).encode()
    facts = {"tasks": names, "task": names[-1], "state": bandit.state_meta()}
    contents |= {
        "head.safetensors": save_tensors({"sums": torch.zeros(5 * tasks, 32)}),
        "tree.json": json.dumps(tree.to_dict(), indent=1, sort_keys=True).encode(),
        "tree.safetensors": save_arrays(tree.to_arrays()),
        "metrics/matrix.json": json.dumps(matrix.to_json(), indent=1, sort_keys=True).encode(),
        "bandit.safetensors": save_arrays(bandit.state_arrays()),
        "bandit.json": json.dumps(facts, indent=1, sort_keys=True).encode(),
    }
    with mock.patch.object(os, "fsync", return_value=None):  # a simulated past need not survive a power cut
        return project.advance(tuple(entries), {}, contents)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def command(root: Path, *arguments: str) -> tuple[float, int]:
    """Seconds of a command in a new process, and the lines it printed."""
    call = [sys.executable, "-m", "treelora_cli", "-C", str(root), *arguments]
    seconds, done = timed(lambda: subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True))
    return seconds, done.stdout.count("\n")


def next_task(root: Path) -> dict[str, float]:
    """Seconds by phase of what surrounds the training of one more task."""
    found = {}
    signature = clustered_signatures(10, LAYERS, seed=3)[0]
    found["open"], project = timed(lambda: Project.open(root))
    found["read memory"], memory = timed(project.memory)
    found["read tree"], tree = timed(project.tree)
    assert tree is not None
    found["prepare the search"], bandit = timed(lambda: TreeBandit(tree))

    def search() -> None:
        for _ in range(48):
            bandit.step(signature)

    found["search, 48 steps"], _ = timed(search)
    nearest = bandit.nearest()
    found["read the nearest adapter"], _ = timed(memory.tasks[nearest].adapter)
    found["insert"], grown = timed(lambda: tree.insert(signature))
    name, count = "one-more", len(memory.tasks)
    change = Commit(
        name=name,
        record=record_of(name),
        labels=("a", "b"),
        adapter_files=adapter_files(count),
        tensors={"head.weight": torch.ones(2, 32)},
        shared=memory.shared(),
        tree=grown,
        bandit_arrays={key: np.ascontiguousarray(value) for key, value in bandit.state_arrays().items()},
        bandit_meta={"tasks": [task.name for task in memory.tasks], "task": name, "state": bandit.state_meta()},
        matrix=project.matrix().with_row(name, [0.5] * (count + 1)),
    )
    found["commit"], after = timed(lambda: project.commit(change))
    assert len(after.state.tasks) == count + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 1000])
    options = parser.parse_args()
    columns: list[dict[str, str]] = []
    for tasks in options.tasks:
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch) / "p"
            project = write_project(root, tasks)
            cells = {"tasks": f"{tasks:,}", "on disk, MiB": f"{project.total_bytes() / 2**20:.1f}"}
            for arguments in (["--help"], ["status"], ["inspect-tree"], ["inspect-tree", "--json"]):
                seconds, lines = command(root, *arguments)
                cells[f"`treelora {' '.join(arguments)}`, s"] = f"{seconds:.2f} ({lines:,} lines)"
            phases = next_task(root)
            cells |= {f"{name}, s": f"{seconds:.3f}" for name, seconds in phases.items()}
            cells["next task in all, s"] = f"{sum(phases.values()):.2f}"
            columns.append(cells)
    heading, *keys = columns[0]
    print(table([heading, *(one[heading] for one in columns)], [[key, *(one[key] for one in columns)] for key in keys]))


if __name__ == "__main__":
    main()
