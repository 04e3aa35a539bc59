"""Whose fault it is when a backend fails on what a project stores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Cli, check_error, tree_hash
from treelora_backends.vit.predictor import VitPredictor

from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.values import Memory, TaskMemory
from treelora_cli.errors import BackendError, ProjectError, describe_error
from treelora_cli.learning.evaluation import blamed
from treelora_cli.project.commit import to_json
from treelora_cli.project.state import seal
from treelora_cli.project.store import record_of


def adapter(rank: int = 1) -> AdapterWeights:
    return AdapterWeights(("l",), (torch.zeros(rank, 4),), (torch.zeros(5, rank),), 2.0)


KEY = "base_model.model.l.lora_{}.weight"
ADAPTER = {KEY.format("A"): ("float32", (1, 4)), KEY.format("B"): ("float32", (5, 1))}


def memory(task: dict[str, torch.Tensor], shared: dict[str, torch.Tensor], *, known: bool = True) -> Memory:
    """One task that was committed with ``a`` of two numbers, and shared statistics ``s`` of three."""
    own = {"a": ("float32", (2,)), **ADAPTER} if known else None
    of_all = {"s": ("float64", (3,))} if known else None
    return Memory(
        (TaskMemory("birds", (), "accuracy", adapter, lambda: task, lambda: own),), lambda: shared, lambda: of_all
    )


WHOLE = ({"a": torch.zeros(2)}, {"s": torch.zeros(3, dtype=torch.float64)})


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("error", [KeyError("b"), RuntimeError("shapes"), AttributeError("none"), TypeError("int")])
def test_a_fault_on_a_whole_project_is_the_backends(error: Exception) -> None:
    with (
        pytest.raises(BackendError, match=rf"^The backend failed: {type(error).__name__}: ") as caught,
        blamed(memory(*WHOLE)),
    ):
        fail(error)
    line, code = describe_error(caught.value)
    assert code == 1
    assert "(test_evaluation.py:" in line
    assert "What the project stores is as it was committed." in line


@pytest.mark.parametrize(
    ("task", "shared", "line"),
    [
        ({}, WHOLE[1], "task 'birds': 'a' is missing, was float32 \\[2\\] when committed"),
        ({"a": torch.zeros(3)}, WHOLE[1], "task 'birds': 'a' is float32 \\[3\\], was float32 \\[2\\] when"),
        ({"a": torch.zeros(2).half()}, WHOLE[1], "task 'birds': 'a' is float16 \\[2\\], was float32 \\[2\\] when"),
        (
            WHOLE[0],
            {**WHOLE[1], "t": torch.zeros(1)},
            "the shared statistics: 't' is float32 \\[1\\], was missing when",
        ),
    ],
)
def test_a_fault_on_stored_tensors_that_were_changed_is_the_projects(
    task: dict[str, torch.Tensor], shared: dict[str, torch.Tensor], line: str
) -> None:
    with (
        pytest.raises(ProjectError, match=f"^What this project stores does not fit its model: {line}"),
        blamed(memory(task, shared)),
    ):
        fail(KeyError("a"))


def test_an_adapter_that_was_changed_is_the_projects_fault() -> None:
    changed = replace(memory(*WHOLE).tasks[0], adapter=lambda: adapter(rank=2))
    line = r"task 'birds': 'base_model\.model\.l\.lora_A\.weight' is float32 \[2, 4\], was float32 \[1, 4\] when"
    with pytest.raises(ProjectError, match=line), blamed(replace(memory(*WHOLE), tasks=(changed,))):
        fail(RuntimeError("shapes"))


def test_nobody_is_blamed_alone_where_an_earlier_treelora_did_not_record_what_it_stored() -> None:
    line = r"does not fit its model, or the backend failed: KeyError: 'a' \(test_evaluation\.py:\d+\)\."
    with pytest.raises(ProjectError, match=line), blamed(memory({}, {}, known=False)):
        fail(KeyError("a"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_want_of_memory_is_nobodys_fault(error: Exception) -> None:
    with pytest.raises(type(error)), blamed(memory(*WHOLE)):
        fail(error)


def test_a_task_that_this_process_learned_is_as_it_was_handed_over() -> None:
    tensors = {"b": torch.zeros(4)}
    grown = memory(*WHOLE).with_task(TaskMemory("fish", (), "accuracy", adapter, lambda: tensors), lambda: tensors)
    assert grown.layout() == {"b": ("float32", (4,))}
    assert grown.tasks[-1].layout() == {"b": ("float32", (4,)), **ADAPTER}
    with pytest.raises(BackendError), blamed(grown):
        fail(KeyError("a"))


def test_commands_blame_a_backends_fault_on_the_backend(
    cli: Cli, project: Path, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(self: VitPredictor, images: torch.Tensor) -> None:
        raise KeyError("nothing of that name")

    monkeypatch.setattr(VitPredictor, "class_scores", broken)
    before = tree_hash(project)
    line = r"The backend failed: KeyError: 'nothing of that name' \(test_evaluation\.py:\d+\)\. What the project stores"
    image = next(data.glob("warm/test/*/*.png"))
    for command in (["eval"], ["predict", image], ["train-task", data / "warm", "--name", "x"]):
        check_error(cli("-C", project, *command, "--device", "cpu"), 1, line)
    after = {name: one for name, one in tree_hash(project).items() if "/run/" not in name}
    assert after == before, "a checkpoint may be left: the training itself went well"


def test_a_record_of_what_is_stored_that_nobody_can_read_is_refused(cli: Cli, project: Path) -> None:
    name = "tasks/003-grey/task.json"
    record = json.loads((project / name).read_text())
    assert record["stored"]["shared"]["feature.mean"][0] == "float32"
    data = to_json({**record, "stored": {"task": {"head.weight": 3}, "shared": {}}})
    (project / name).write_bytes(data)
    state = json.loads((project / "state.json").read_text())
    state["files"][name] = vars(record_of(data))
    (project / "state.json").write_bytes(seal(state))
    check_error(
        cli("-C", project, "eval", "--device", "cpu"), 3, r"task\.json: 'stored' is malformed .*treelora doctor"
    )
