"""Hundreds of tasks: a commit and an opening cost what must be read, and no more."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Cli
from faults import commit_of

from treelora_cli.algorithm.budget import merge_to_budget
from treelora_cli.algorithm.tree import Tree, extend_tree
from treelora_cli.project import Commit, Project


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "tasks"), [(0, 300), (20, 100)])
def test_hundreds_of_tasks_stay_usable(
    cli: Cli, project: Path, capsys: pytest.CaptureFixture[str], budget: int, tasks: int
) -> None:
    generator = np.random.default_rng(0)
    opened = Project.open(project)
    shape = opened.read_arrays("tree.safetensors")["signatures"].shape[1:]
    weights = {name: value.numpy() for name, value in _tensors(opened).items()}
    commits: list[float] = []
    for number in range(3, tasks):
        signature = generator.normal(size=shape).astype(np.float32)
        signature /= np.linalg.norm(signature, axis=1, keepdims=True)
        tree = extend_tree(opened.tree(), signature, 5, split="principal-gap")
        change = commit_of(opened, f"task-{number}")
        own = {
            name: (value + 0.01 * generator.normal(size=value.shape)).astype(np.float32)
            for name, value in weights.items()
        }
        change = dataclasses.replace(change, tree=tree, adapter_files=_files(own))
        if budget:
            change = dataclasses.replace(change, merged=_merged(opened, change, tree, budget))
        start = time.perf_counter()
        opened = opened.commit(change)
        commits.append(time.perf_counter() - start)
        if budget:
            assert len({task.adapter for task in opened.state.tasks}) <= budget
            held = list((project / "tasks").glob("*/adapter_model.safetensors"))
            assert len(held) <= budget
    start = time.perf_counter()
    found = Project.open(project)
    found.tree()
    for task in found.state.tasks:
        found.task_record(task.name)
    opening = time.perf_counter() - start
    assert found.damage() == {}
    assert len(found.state.tasks) == tasks
    around = {count: statistics.median(commits[count - 3 - 5 : count - 3 + 1]) for count in sorted({10, 100, tasks})}
    inside = _bytes(project / ".treelora")
    learned = _bytes(project / "tasks")
    listed = (project / "state.json").stat().st_size
    # what a commit must write grows with the tasks (state, tree, history), hence linear and no more
    assert around[tasks] < 30 * max(around[10], 0.005)
    assert opening < 5
    start = time.perf_counter()
    assert cli("-C", project, "status").code == 0
    assert cli("-C", project, "rollback", f"task-{tasks - 1}").code == 0
    assert time.perf_counter() - start < 10
    with capsys.disabled():
        print(
            json.dumps(
                {
                    "budget": budget,
                    "commit_ms": {count: round(1000 * seconds, 1) for count, seconds in around.items()},
                    "open_ms": round(1000 * opening, 1),
                    "tasks_kib_each": round(learned / tasks / 1024, 2),
                    "state_kib": round(listed / 1024, 1),
                    "treelora_kib": round(inside / 1024, 1),
                }
            )
        )


def _tensors(opened: Project) -> dict[str, Any]:
    return opened._read_tensors("tasks/001-warm/adapter_model.safetensors")


def _files(tensors: dict[str, Any]) -> dict[str, bytes]:
    from safetensors.numpy import save

    return {"adapter_config.json": b"{}\n", "adapter_model.safetensors": save(tensors)}


def _merged(opened: Project, change: Commit, tree: Tree, budget: int) -> dict[str, Any]:
    from safetensors.torch import load

    from treelora_cli.backend.adapters import AdapterWeights, merge

    names = [task.name for task in opened.state.tasks] + [change.name]
    homes = [task.adapter for task in opened.state.tasks] + [f"new/{change.name}"]
    layers = opened.state.base["layers"]
    scale = opened.state.fixed["adapter.alpha"] / opened.state.fixed["adapter.rank"]
    own = AdapterWeights.from_tensors(
        load(change.adapter_files["adapter_model.safetensors"]),
        layers,
        scale,
        "new",
    )
    groups = merge_to_budget(
        tree,
        homes,
        lambda index: own if index == len(names) - 1 else opened.adapter(names[index]),
        budget,
        merge,
    )
    merged = {}
    for group in groups:
        members = tuple(names[index] for index in group.members)
        files = _files({name: value.numpy() for name, value in group.adapter.to_tensors().items()})
        merged[members[-1]] = members, files
    return merged
