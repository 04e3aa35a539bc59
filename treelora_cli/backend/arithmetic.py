"""Measure what is faster, fp32 or bf16, and one way of taking gradients or another, and compute so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from treelora_cli.backend.runtime import wait_for
from treelora_cli.errors import UsageError, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from treelora_cli.backend.contract import ChoosingSession, TaskSession
    from treelora_cli.backend.runtime import Runtime

_WORTH_IT = 0.85
"""bf16 is taken when it needs at most this share of the time; a tie must not flip from run to run."""


def precision_beside(wanted: str, held: str | None) -> str:
    """Return the precision that goes with the type a base is held in: float16 is computed with as it is.

    Raises:
        UsageError: bf16 is wanted, in which no layer takes float16.
    """
    if held != "float16":
        return wanted
    if wanted == "bf16":
        raise UsageError(
            "--precision bf16 does not go with a base held in float16. Leave it out, or make a project with"
            " --dtype bfloat16."
        )
    return "fp32"


def choose_arithmetic(runtime: Runtime, wanted: str, session: TaskSession, trained: Sequence[torch.Tensor]) -> None:
    """Compute as asked for; with ``auto``, steps and passes without gradients each in what is faster for them.

    Small batches through few blocks gain nothing from bf16 where passes over many tokens halve their time. A GPU with
    bf16 units is not tried: there it is always faster, and a trial would measure how long kernels take to load.
    """
    if wanted == "auto" and _has_bf16_units(runtime.device):
        wanted = "bf16"
    if wanted != "auto":
        runtime.compute_as({"precision": wanted})
        return
    steps = measure_precision(runtime, lambda: session.try_step(trained))
    passes = measure_precision(runtime, session.try_forward)
    runtime.compute_as({"precision": steps, "forward_precision": passes})


LEAST_STEPS = 100
"""Steps of a task from which on a choice of gradients is measured: it takes about ten, and saves a third at most."""


def choose_gradient(runtime: Runtime, session: ChoosingSession, trained: Sequence[torch.Tensor]) -> str:
    """Have a session take gradients in the faster of its ways that fits the memory; returns it.

    Each way meets the task's longest batch once, which shows whether it fits, and then a middling one, whose kernels
    are chosen before the clock runs. With several processes the main one's measurement decides for all.
    """
    import torch

    ways = session.gradient_ways()

    def seconds(way: str, longest: bool) -> float:
        session.take_gradient(way)
        return _seconds(lambda: session.try_gradient(trained, longest=longest), runtime.device)

    fitting = [way for way in ways if runtime.smallest(_fits(partial(seconds, way, True)))]
    best, least = (fitting or ways)[0], 1.0
    for way in fitting[1:]:
        share = _share_of_time(partial(seconds, way, False), partial(seconds, fitting[0], False), clear=_CLEAR)
        runtime.reporter.detail(f"Gradients: {way} takes {share:.2f} of the time of {fitting[0]}.")
        if share < min(least, _WORTH_IT):
            best, least = way, share
    votes = runtime.concatenate(torch.tensor([ways.index(best)], device=runtime.device))
    chosen = ways[int(votes[0])]
    session.take_gradient(chosen)
    return chosen


def _fits(step: Callable[[], object]) -> bool:
    """Return whether a step ends without running out of memory."""
    import torch

    try:
        step()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return False
    return True


_BF16_UNITS_SINCE = (8, 0)
"""Compute capability of the first NVIDIA GPUs that multiply in bf16."""


def _has_bf16_units(device: torch.device) -> bool:
    """Return whether this is a GPU that multiplies in bf16 faster than in fp32."""
    import torch

    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _BF16_UNITS_SINCE


def try_gradient(runtime: Runtime, loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]) -> None:
    """Compute a loss and its gradient, to measure the time; parameters that it does not reach cost nothing."""
    import torch

    with runtime.autocast():
        value = loss()
    torch.autograd.grad(value, parameters, allow_unused=True)


def measure_precision(runtime: Runtime, step: Callable[[], None]) -> str:
    """Run ``step`` in fp32 and under bf16 autocast and return the faster: ``fp32`` or ``bf16``.

    Where one matrix product alone is slower in bf16, ``step`` is not run: a processor without such instructions takes
    minutes for what fp32 does in a second. With several processes the main one's measurement decides for all.
    """
    import torch

    before = runtime.arithmetic

    def run(precision: str) -> float:
        runtime.compute_as({"precision": precision})
        return _seconds(step, runtime.device)

    def share() -> float:
        return _share_of_time(lambda: run("bf16"), lambda: run("fp32"), clear=_CLEAR)

    pays = bf16_multiplies_well(runtime.device) and share() < _WORTH_IT
    runtime.compute_as(before)
    votes = runtime.concatenate(torch.tensor([float(pays)], device=runtime.device))
    return "bf16" if float(votes[0]) > 0.5 else "fp32"


def bf16_multiplies_well(device: torch.device) -> bool:
    """Return whether a small matrix product in bf16 is no slower than twice the same in fp32."""
    import torch

    def multiply(dtype: torch.dtype) -> float:
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((64, 512), (512, 256)))
        return _seconds(lambda: left @ right, device)

    return _share_of_time(lambda: multiply(torch.bfloat16), lambda: multiply(torch.float32)) <= 2


_TRIALS = 3


_CLEAR = 1.5
"""Steps take seconds: one that takes so many times as long as the other is not measured again."""


def _share_of_time(one: Callable[[], float], other: Callable[[], float], clear: float = math.inf) -> float:
    """Return the least seconds of ``one`` by those of ``other``; each is run once before, which is not counted.

    Args:
        one: Does its work and returns the seconds.
        other: The same.
        clear: Ratio from which on a first result is not checked by further trials.
    """
    one(), other()
    ones, others = [], []
    for _ in range(_TRIALS):
        ones.append(one())
        others.append(other())
        share = min(ones) / max(min(others), 1e-9)
        if not 1 / clear < share < clear:
            break
    return share


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long ``work`` takes."""
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start
