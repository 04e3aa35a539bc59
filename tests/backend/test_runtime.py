"""The arithmetic that ``auto`` chooses, and what it does not try."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from conftest import plain_runtime, run_python

from treelora_cli.backend.arithmetic import bf16_multiplies_well, choose_arithmetic, measure_precision
from treelora_cli.backend.contract import TaskSession
from treelora_cli.backend.runtime import (
    Runtime,
    Silent,
    keep_kernels,
    open_runtime,
    usable_processors,
    yield_while_waiting,
)
from treelora_cli.errors import UsageError


@pytest.mark.parametrize(("slow", "chosen"), [("fp32", "bf16"), ("bf16", "fp32"), ("", "fp32")])
def test_the_faster_arithmetic_is_taken_and_a_tie_is_fp32(
    monkeypatch: pytest.MonkeyPatch, slow: str, chosen: str
) -> None:
    monkeypatch.setattr("treelora_cli.backend.arithmetic.bf16_multiplies_well", lambda _device: True)
    runtime = plain_runtime()
    assert measure_precision(runtime, lambda: time.sleep(0.2 if runtime.precision == slow else 0.05)) == chosen
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
    session = cast("TaskSession", Halves(runtime, slow))
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
def test_so_many_compiled_kernels_are_kept_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    keep_kernels(128)
    assert os.environ[name] == "128"
    monkeypatch.setenv(name, "7")
    keep_kernels(128)
    assert os.environ[name] == "7"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that there are two; returns the numbers of those that are chosen, in order."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("accelerate.Accelerator", lambda cpu, **_options: f"cpu={cpu}")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return chosen


@pytest.mark.parametrize(("device", "number"), [("cuda:1", [1]), ("cuda:0", [0]), ("cuda", []), (None, [])])
def test_the_gpu_that_is_named_is_taken(two_gpus: list[int], device: str | None, number: list[int]) -> None:
    runtime = open_runtime(device, offline=True, reporter=Silent())
    assert (runtime.accelerator, two_gpus) == ("cpu=False", number)
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "its kernels are built for every shape"
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.parametrize("device", ["cuda:2", "cuda:", "cuda:x", "cuda:-1"])
def test_a_gpu_that_is_not_there_is_refused(two_gpus: list[int], device: str) -> None:
    with pytest.raises(UsageError, match=rf"--device {device}: this machine has cuda:0 to cuda:1\."):
        open_runtime(device, offline=True, reporter=Silent())
    assert two_gpus == []


def test_one_gpu_for_several_processes_is_refused(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"--device cuda:1: of several processes each takes its own GPU"):
        open_runtime("cuda:1", offline=True, reporter=Silent())
    assert two_gpus == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
def test_a_configuration_that_would_divide_the_base_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(
        UsageError, match=rf"asks for {said}; treelora divides a base .* by FSDP alone.* init --dtype nf4\."
    ):
        open_runtime("cpu", offline=True, reporter=Silent())
    monkeypatch.setenv(name, "false")
    open_runtime("cpu", offline=True, reporter=Silent())


@pytest.mark.parametrize("name", ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"])
def test_gradients_are_the_losses_own_whatever_accelerate_is_configured_for(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(name, "4" if name.endswith("STEPS") else "bf16")
    accelerator = open_runtime("cpu", offline=True, reporter=Silent()).accelerator
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == ("no", 1)
    trained = torch.ones(1, requires_grad=True)
    accelerator.backward(3 * trained.sum())
    assert trained.grad is not None
    assert float(trained.grad) == 3.0
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_number_is_for_gpus() -> None:
    with pytest.raises(UsageError, match=r"or cuda:N; got 'cpu:1'"):
        open_runtime("cpu:1", offline=True, reporter=Silent())


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_a_gpu_with_bf16_units_computes_in_bf16_without_a_trial(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    runtime = plain_runtime()
    tried: list[str] = []
    session = cast("TaskSession", Halves(runtime, ""))
    monkeypatch.setattr(type(runtime), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    measure = lambda _runtime, _step: tried.append("trial") or "fp32"  # noqa: E731
    monkeypatch.setattr("treelora_cli.backend.arithmetic.measure_precision", measure)
    choose_arithmetic(runtime, "auto", session, [])
    assert (runtime.precision, runtime.forward_precision) == (chosen, chosen)
    assert tried == ([] if chosen == "bf16" else ["trial", "trial"])
    choose_arithmetic(runtime, "fp32", session, [])
    assert runtime.precision == "fp32", "what is asked for is done"


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    yield_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    yield_while_waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_no_more_threads_than_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: {0, 1, 2}, raising=False)
    limits = {"300000 100000": 3, "150000 100000": 2, "20000 100000": 1, "max 100000": 3}
    for text, processors in limits.items():
        monkeypatch.setattr("pathlib.Path.read_text", lambda _path, text=text, **_kind: text)
        assert usable_processors() == processors


_LEAVES = """
import atexit, os
from pathlib import Path

def gloo():
    return [one for one in Path("/proc/self/task").iterdir() if "gloo" in (one / "comm").read_text()]

atexit.register(lambda: print("left", len(gloo())))
from treelora_cli.backend.runtime import Silent, open_runtime

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
runtime = open_runtime("cpu", offline=True, reporter=Silent())
import peft, timm, transformers  # what is imported later may keep the group that is open then

print("open", len(gloo()) > 0)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are read from Linux's /proc")
def test_no_thread_of_the_processes_group_is_left_when_python_ends() -> None:
    done = run_python(_LEAVES)
    assert (done.code, done.out) == (0, "open True\nleft 0\n"), done.err
