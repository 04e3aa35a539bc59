"""One project, one arithmetic: what learns, scores and answers on one kind of device computes alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import STREAM, Cli, plain_runtime

from treelora_cli.api import Project
from treelora_cli.config import Config
from treelora_cli.learning.opening import compute_as_recorded, open_base, project_config, recorded_arithmetic
from treelora_cli.project import Project as Stored

BF16 = {"precision": "bf16", "forward_precision": "bf16"}
FP32 = {"precision": "fp32", "forward_precision": "fp32"}


@pytest.fixture
def bf16_project(cli: Cli, empty_project: Path, data: Path) -> Path:
    name = STREAM[0][0]
    taught = cli("-C", empty_project, "train-task", data / name, "--device", "cpu", "--precision", "bf16", "--no-eval")
    assert taught.code == 0, taught.err
    return empty_project


def test_scores_answers_and_the_next_task_compute_as_the_project_was_taught(
    bf16_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = Project.open(bf16_project, device="cpu", offline=True)
    image = next((data / STREAM[0][0]).rglob("*.png"))
    used = []
    autocast = type(project.runtime).autocast
    monkeypatch.setattr(
        type(project.runtime), "autocast", lambda self: used.append(dict(self.arithmetic)) or autocast(self)
    )

    def arithmetic_of(work: object) -> list[dict[str, str]]:
        found = [dict(pairs) for pairs in {tuple(one.items()) for one in used}]
        used.clear()
        return found

    assert arithmetic_of(project.evaluate()) == [BF16]
    assert arithmetic_of(project.predict([image])) == [BF16]
    project.export(bf16_project.parent / "out", limit=2)
    assert project.runtime.arithmetic == FP32, "an export is compared with stock code, which computes in float32"
    used.clear()
    assert arithmetic_of(project.predict([image])) == [BF16]
    project.train_task(data / STREAM[1][0], evaluate=False)
    assert {key: project.record(STREAM[1][0])[key] for key in BF16} == BF16


def test_another_kind_of_device_computes_in_float32_until_it_was_taught_there(bf16_project: Path) -> None:
    stored, runtime = Stored.open(bf16_project), plain_runtime()
    assert recorded_arithmetic(stored, "cuda") is None
    assert {key: recorded_arithmetic(stored, "cpu")[key] for key in BF16} == BF16
    open_base(stored, project_config(stored, Config()), runtime)
    assert runtime.arithmetic == BF16
    compute_as_recorded(stored, runtime, exact=True)
    assert runtime.arithmetic == FP32


def test_the_last_task_of_a_kind_of_device_decides(bf16_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {"a": ("cuda", "bf16"), "b": ("cpu", "fp32"), "c": ("cuda", "fp32")}
    stored = Stored.open(bf16_project)
    tasks = [type(stored.state.tasks[0])(name, f"tasks/{name}", f"tasks/{name}") for name in records]
    monkeypatch.setattr(stored, "state", type("S", (), {"tasks": tuple(tasks)}))
    monkeypatch.setattr(
        stored, "task_record", lambda name: dict(zip(("device", "precision"), records[name], strict=True))
    )
    assert recorded_arithmetic(stored, "cuda") == {"device": "cuda", "precision": "fp32"}
    assert recorded_arithmetic(stored, "cpu") == {"device": "cpu", "precision": "fp32"}
    assert recorded_arithmetic(stored, "mps") is None
