"""Where and in which arithmetic a command computes: device, processes, precision, progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from treelora_cli.backend import Session

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
    """Processes and device (through accelerate), arithmetic and reporter of one command.

    Attributes:
        precision: ``fp32`` or ``bf16``, where gradients are computed.
        forward_precision: The same where none are.
    """

    accelerator: Accelerator
    precision: str = "fp32"
    forward_precision: str = "fp32"
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
        """Return the context of a pass in the chosen arithmetic: that of gradients, unless torch's are off."""
        import torch

        precision = self.precision if torch.is_grad_enabled() else self.forward_precision
        if precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def arithmetic(self) -> dict[str, str]:
        """Both precisions, by name."""
        return {"precision": self.precision, "forward_precision": self.forward_precision}

    def compute_as(self, record: Mapping[str, Any]) -> None:
        """Take the ``arithmetic`` of a record; older ones have one precision for all."""
        self.precision = str(record["precision"])
        self.forward_precision = str(record.get("forward_precision", self.precision))

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

    def gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, F) of all processes, however many each has."""
        if self.accelerator.num_processes == 1:
            return tensor
        import torch

        counts = self.accelerator.gather(torch.tensor([len(tensor)], device=self.device)).tolist()
        padded = tensor.new_zeros(max(counts), tensor.shape[1])
        padded[: len(tensor)] = tensor
        parts = self.concatenate(padded).reshape(len(counts), max(counts), -1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


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
    _map_large_blocks()
    for name in _COMPILED_KERNELS:
        os.environ.setdefault(name, "32")  # read when the first is compiled
    accelerator = Accelerator(cpu=wanted == "cpu")
    return Runtime(accelerator=accelerator, offline=offline, reporter=reporter)


_COMPILED_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many bf16 kernels torch's libraries keep, one for each shape: a megabyte each, and by default a thousand."""
_LARGE_BLOCK = 2**21
_MALLOC_TRIM, _MALLOC_MMAP = -1, -3
"""Names of glibc's mallopt for the free memory it keeps and for the size from which a block is mapped by itself."""


def _c_library() -> Any:
    import ctypes

    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None  # not a system whose allocator can be spoken to


def _map_large_blocks() -> None:
    """Have memory of large tensors returned as soon as they are freed: glibc by itself begins to keep it."""
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is not None:
        mallopt(_MALLOC_MMAP, _LARGE_BLOCK)
        mallopt(_MALLOC_TRIM, 4 * _LARGE_BLOCK)


def return_free_memory() -> None:
    """Give what one phase freed back to the system before the next one asks for other sizes."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


_WORTH_IT = 0.85
"""bf16 is taken when it needs at most this share of the time; a tie must not flip from run to run."""


def choose_arithmetic(runtime: Runtime, wanted: str, session: Session, trained: Sequence[torch.Tensor]) -> None:
    """Compute as asked for; with ``auto``, steps and passes without gradients each in what is faster for them.

    Small batches through few blocks gain nothing from bf16 where passes over many tokens halve their time.
    """
    if wanted != "auto":
        runtime.compute_as({"precision": wanted})
        return
    steps = measure_precision(runtime, lambda: session.try_step(trained))
    passes = measure_precision(runtime, session.try_forward)
    runtime.compute_as({"precision": steps, "forward_precision": passes})


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
    import torch

    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
