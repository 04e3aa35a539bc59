"""Where and in which arithmetic a command computes: device, processes, precision, progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

T = TypeVar("T")


class Reporter(Protocol):
    """What the core may tell the user while it works."""

    def note(self, message: str) -> None:
        """Show one line."""

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield ``items`` while showing a progress bar with rate and time left."""


class Silent:
    """A reporter that shows nothing."""

    def note(self, message: str) -> None:
        """Ignore the line."""

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield ``items``."""
        yield from items


@dataclass
class Runtime:
    """Processes and device (through accelerate), precision and reporter of one command."""

    accelerator: Accelerator
    precision: str = "fp32"
    offline: bool = False
    reporter: Reporter = field(default_factory=Silent)

    @property
    def device(self) -> torch.device:
        """The device this process computes on."""
        return cast("torch.device", self.accelerator.device)

    @property
    def is_main(self) -> bool:
        """True in the one process that writes and prints."""
        return bool(self.accelerator.is_main_process)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass in the chosen precision."""
        import torch

        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of ``items``: every ``world``-th, from its rank on."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``tensor`` over processes."""
        if self.accelerator.num_processes == 1:
            return tensor
        total = self.accelerator.reduce(tensor, reduction="sum")
        return total  # type: ignore[no-any-return]

    def smallest(self, count: int) -> int:
        """Return the least of all processes' counts."""
        if self.accelerator.num_processes == 1:
            return count
        import torch

        return int(self.accelerator.gather(torch.tensor([count], device=self.device)).min())

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes; every process gives equally many."""
        if self.accelerator.num_processes == 1:
            return tensor
        gathered = self.accelerator.gather(tensor.contiguous())
        return gathered  # type: ignore[no-any-return]


def open_runtime(device: str | None, *, offline: bool, reporter: Reporter) -> Runtime:
    """Start accelerate on ``device`` (``cpu``, ``cuda``, ``mps``, ``None`` or ``auto`` for the best there is).

    Raises:
        UsageError: The device is unknown or not present.
    """
    import torch
    from accelerate import Accelerator

    wanted = (device or "auto").split(":")[0]
    present = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if wanted not in present:
        raise UsageError(f"--device is one of {', '.join(present)}; got {device!r}.")
    if not present[wanted]:
        raise UsageError(f"--device {device}: not present on this machine. Leave it out to use the best.")
    accelerator = Accelerator(cpu=wanted == "cpu")
    return Runtime(accelerator=accelerator, offline=offline, reporter=reporter)


_WORTH_IT = 0.85
"""bf16 is taken when it needs at most this share of the time; a tie must not flip from run to run."""


def choose_precision(
    runtime: Runtime, wanted: str, loss: Callable[[], torch.Tensor], parameters: Sequence[torch.Tensor]
) -> str:
    """Return the arithmetic asked for; for ``auto``, the one in which the gradients of ``loss`` come faster."""
    if wanted != "auto":
        return wanted
    import torch

    def step() -> None:
        with runtime.autocast():
            value = loss()
        torch.autograd.grad(value, parameters)

    return measure_precision(runtime, step)


_EMULATED = 2.0
"""A type whose products take so many times float32's is not computed with by this processor."""


def _emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether one matrix product says enough: a whole trial step in an emulated type would cost seconds."""
    import torch

    def least(kind: torch.dtype) -> float:
        a, b = torch.ones(128, 512, dtype=kind, device=device), torch.ones(512, 512, dtype=kind, device=device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    return least(dtype) > _EMULATED * least(torch.float32)


def measure_precision(runtime: Runtime, step: Callable[[], None]) -> str:
    """Run ``step`` in fp32 and under bf16 autocast and return the faster: ``fp32`` or ``bf16``.

    With several processes the main one's measurement decides for all.
    """
    import torch

    before = runtime.precision
    if runtime.concatenate(torch.tensor([_emulated(torch.bfloat16, runtime.device)], device=runtime.device))[0]:
        return "fp32"
    seconds: dict[str, float] = {}
    for precision in ("fp32", "bf16"):
        runtime.precision = precision
        step()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds[precision] = min(times)
    runtime.precision = before
    prefer = torch.tensor([float(seconds["bf16"] < _WORTH_IT * seconds["fp32"])], device=runtime.device)
    votes = runtime.concatenate(prefer)
    return "bf16" if float(votes[0]) > 0.5 else "fp32"
