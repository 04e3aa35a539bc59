"""How gradients are taken where that is measured: the CPU stands in for such a device, the clock is the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import Cli, learned_hashes, plain_runtime
from interrupting import OPTIONS, stop_after
from treelora_backends.causal_lm import session as module
from treelora_backends.causal_lm.session import LmSession

from treelora_cli.backend.arithmetic import choose_gradient
from treelora_cli.backend.contract import ChoosingSession
from treelora_cli.learning import task

WHOLE, DIVIDED = module._WHOLE, module._DIVIDED


class Clocked:
    """Ways with their seconds a step; those of ``too_large`` run out of memory on a long batch."""

    def __init__(self, seconds: dict[str, float], too_large: Sequence[str] = ()) -> None:
        self.seconds, self.too_large = seconds, too_large
        self.now, self.way = 0.0, ""
        self.tried: list[str] = []

    def gradient_ways(self) -> tuple[str, ...]:
        return tuple(self.seconds)

    def take_gradient(self, way: str) -> None:
        self.way = way

    def try_gradient(self, _parameters: object, *, longest: bool) -> None:
        if longest and self.way in self.too_large:
            raise MemoryError
        known = self.tried.count(self.way) > 1  # the first of each shape builds its kernels
        self.now += self.seconds[self.way] if known else 100.0
        self.tried.append(self.way)


@pytest.mark.parametrize(
    ("seconds", "too_large", "chosen", "steps"),
    [
        ({"a": 1.0, "b": 0.5}, (), "b", 6),
        ({"a": 0.5, "b": 1.0}, (), "a", 6),
        ({"a": 1.0, "b": 0.9}, (), "a", 10),
        ({"a": 1.0, "b": 0.8}, (), "b", 10),
        ({"a": 0.1, "b": 1.0}, ("a",), "b", 1),
        ({"a": 0.1, "b": 0.01}, ("a", "b"), "a", 0),
    ],
)
def test_the_clearly_faster_way_that_fits_is_taken_and_new_shapes_do_not_count(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], too_large: Sequence[str], chosen: str, steps: int
) -> None:
    session = Clocked(seconds, too_large)
    monkeypatch.setattr("treelora_cli.backend.arithmetic.time.perf_counter", lambda: session.now)
    assert choose_gradient(plain_runtime(), cast("ChoosingSession", session), []) == chosen == session.way
    assert len(session.tried) == steps


def test_an_error_that_is_not_memory_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Clocked({"a": 1.0, "b": 1.0})

    def broken(*_given: object, **_more: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(session, "try_gradient", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        choose_gradient(plain_runtime(), cast("ChoosingSession", session), [])


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the CPU decide as a GPU does; a step through the ends of prompts takes a second, another three."""
    monkeypatch.setattr(module, "_ALWAYS_DIVIDED", ())
    monkeypatch.setattr(module, "_MEASURED", ("cpu",))
    monkeypatch.setattr(task, "LEAST_STEPS", 12)
    plain: Callable[..., None] = LmSession.try_gradient
    ways: list[str] = []
    now = [0.0]

    def clocked(self: LmSession, parameters: Sequence[torch.Tensor], *, longest: bool) -> None:
        plain(self, parameters, longest=longest)
        ways.append("divided" if self.tail else "whole")
        now[0] += 1.0 if self.tail else 3.0

    monkeypatch.setattr(LmSession, "try_gradient", clocked)
    monkeypatch.setattr("treelora_cli.backend.arithmetic.time.perf_counter", lambda: now[0])
    return ways


def record(project: Path, number: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(next(project.glob(f"tasks/{number:03}-*/task.json")).read_text())
    return found


@pytest.mark.slow
def test_a_project_measures_once_says_so_and_a_resumed_task_goes_on_alike(
    cli: Cli, llama: Path, lm_tables: Path, tmp_path: Path, tried: list[str]
) -> None:
    """Four steps are too few, sixteen are enough; the third task takes the second's choice, also when interrupted."""
    project, options = tmp_path / "p", ["--batch-size", 12, "--val", lm_tables / "colours.jsonl", "--no-eval"]
    assert cli("init", project, "--backend", "causal-lm", "--model", llama).code == 0
    short = ["--epochs", 1, "--precision", "fp32", "--device", "cpu", *options]
    assert cli("-C", project, "train-task", lm_tables / "colours.jsonl", "--name", "short", *short).code == 0
    assert tried == [] and "gradient" not in record(project, 1), "a short task is not worth a trial"
    assert record(project, 1)["facts"]["prompt_tail"] == 0

    done = cli("-v", "-C", project, "train-task", lm_tables / "colours.jsonl", "--name", "long", *OPTIONS, *options)
    assert done.code == 0, done.err
    assert f"Gradients are taken {DIVIDED}." in done.err
    assert tried == ["whole", "divided", "divided", "whole", "divided", "whole"]
    assert (record(project, 2)["gradient"], record(project, 2)["facts"]["prompt_tail"]) == (DIVIDED, 8)

    stop_after(cli, project, lm_tables / "colours.jsonl", 5, "--name", "more", *map(str, options), of=16)
    assert cli("-C", project, "train-task", "--resume", "--no-eval", "--device", "cpu").code == 0
    assert len(tried) == 6 and record(project, 3)["gradient"] == DIVIDED
    resumed = learned_hashes(project)
    assert cli("-C", project, "rollback", "more", "--yes").code == 0
    again = ["--name", "more", *OPTIONS, *options]
    assert cli("-C", project, "train-task", lm_tables / "colours.jsonl", *again).code == 0
    assert learned_hashes(project) == resumed

    told = ["--name", "told", *OPTIONS, *options, "--set", "train.prompt_tail=0"]
    assert cli("-C", project, "train-task", lm_tables / "colours.jsonl", *told).code == 0
    assert "gradient" not in record(project, 4) and record(project, 4)["facts"]["prompt_tail"] == 0
