"""The arithmetic that ``auto`` chooses, and what it does not try."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import cast

import pytest
import torch
from conftest import plain_runtime

from treelora_cli.backend.arithmetic import bf16_multiplies_well, choose_arithmetic, measure_precision
from treelora_cli.backend.contract import Session
from treelora_cli.backend.runtime import Runtime, Silent, open_runtime


@pytest.mark.parametrize(("slow", "chosen"), [("fp32", "bf16"), ("bf16", "fp32"), ("", "fp32")])
def test_the_faster_arithmetic_is_taken_and_a_tie_is_fp32(
    monkeypatch: pytest.MonkeyPatch, slow: str, chosen: str
) -> None:
    monkeypatch.setattr("treelora_cli.backend.arithmetic.bf16_multiplies_well", lambda _device: True)
    runtime = plain_runtime()
    assert measure_precision(runtime, lambda: time.sleep(0.04 if runtime.precision == slow else 0.02)) == chosen
    assert runtime.precision == "fp32"


@pytest.mark.parametrize(("slower", "runs"), [(2.0, 2), (1.1, 4)])
def test_a_clear_difference_is_measured_once_and_a_small_one_three_times(
    monkeypatch: pytest.MonkeyPatch, slower: float, runs: int
) -> None:
    monkeypatch.setattr("treelora_cli.backend.arithmetic.bf16_multiplies_well", lambda _device: True)
    runtime = plain_runtime()
    ran: list[str] = []
    clock = 0.0

    def step() -> None:
        nonlocal clock
        ran.append(runtime.precision)
        clock += slower if runtime.precision == "fp32" else 1.0

    monkeypatch.setattr("treelora_cli.backend.arithmetic.time.perf_counter", lambda: clock)
    assert measure_precision(runtime, step) == ("bf16" if slower == 2.0 else "fp32")
    assert ran.count("fp32") == ran.count("bf16") == runs


class Halves:
    """A session whose steps are faster in one arithmetic and whose passes are in the other."""

    def __init__(self, runtime: Runtime, slow_steps: str) -> None:
        self.runtime, self.slow_steps = runtime, slow_steps

    def try_step(self, _parameters: Sequence[torch.Tensor]) -> None:
        time.sleep(0.04 if self.runtime.precision == self.slow_steps else 0.02)

    def try_forward(self) -> None:
        time.sleep(0.02 if self.runtime.forward_precision == self.slow_steps else 0.04)


@pytest.mark.parametrize(("slow", "fast"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_steps_and_passes_each_get_the_faster_arithmetic(monkeypatch: pytest.MonkeyPatch, slow: str, fast: str) -> None:
    monkeypatch.setattr("treelora_cli.backend.arithmetic.bf16_multiplies_well", lambda _device: True)
    runtime = plain_runtime()
    session = cast("Session", Halves(runtime, slow))
    choose_arithmetic(runtime, "auto", session, [])
    assert runtime.arithmetic == {"precision": fast, "forward_precision": slow}
    choose_arithmetic(runtime, "bf16", session, [])
    assert runtime.arithmetic == {"precision": "bf16", "forward_precision": "bf16"}


def test_gradients_decide_which_arithmetic_a_pass_has() -> None:
    runtime = plain_runtime()
    runtime.compute_as({"precision": "fp32", "forward_precision": "bf16"})
    left = torch.ones(2, 2)
    with runtime.autocast():
        assert (left @ left).dtype == torch.float32
    with torch.no_grad(), runtime.autocast():
        assert (left @ left).dtype == torch.bfloat16
    runtime.compute_as({"precision": "fp32"})
    with torch.no_grad(), runtime.autocast():
        assert (left @ left).dtype == torch.float32


def test_bf16_is_not_tried_where_a_product_alone_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr("treelora_cli.backend.arithmetic.bf16_multiplies_well", lambda _device: False)
    assert measure_precision(plain_runtime(), never) == "fp32"


def test_the_small_product_agrees_with_a_larger_one() -> None:
    """Processors without bf16 instructions are many times slower in it; those with them are not."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 256, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - start)
        return min(times)

    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if 0.67 < ratio < 6:
        pytest.skip("too close to the threshold to say")
    assert bf16_multiplies_well(torch.device("cpu")) == (ratio < 2)


@pytest.mark.parametrize("name", ["ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"])
def test_few_compiled_kernels_are_kept_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    open_runtime("cpu", offline=True, reporter=Silent())
    assert os.environ[name] == "32"
    monkeypatch.setenv(name, "7")
    open_runtime("cpu", offline=True, reporter=Silent())
    assert os.environ[name] == "7"
