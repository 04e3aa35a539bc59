"""Where and in which arithmetic a command computes: device, processes, precision, memory, progress."""

from __future__ import annotations

import atexit
import importlib
import math
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from treelora_cli.backend.shards import Shards


T = TypeVar("T")


class Reporter(Protocol):
    """What the core may tell the user while it works."""

    def note(self, message: str) -> None:
        """Show one line."""

    def detail(self, message: str) -> None:
        """Show one line to those who ask for more."""

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield ``items`` while showing a progress bar with rate and time left."""


class Silent:
    """A reporter that shows nothing."""

    def note(self, message: str) -> None:
        """Ignore the line."""

    def detail(self, message: str) -> None:
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
        gradient: The way in which gradients are taken where this was measured, see ``ChoosingSession``.
        shards: Holds the base's blocks where processes divide them between them.
    """

    accelerator: Accelerator
    precision: str = "fp32"
    forward_precision: str = "fp32"
    gradient: str | None = None
    offline: bool = False
    reporter: Reporter = field(default_factory=Silent)
    shards: Shards | None = None

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
        """Both precisions, and the way of gradients where there was a choice, by name."""
        precisions = {"precision": self.precision, "forward_precision": self.forward_precision}
        return precisions if self.gradient is None else {**precisions, "gradient": self.gradient}

    def compute_as(self, record: Mapping[str, Any]) -> None:
        """Take the ``arithmetic`` of a record; older ones have one precision for all."""
        self.precision = str(record["precision"])
        self.forward_precision = str(record.get("forward_precision", self.precision))

    def share(self, items: list[T]) -> list[T]:
        """Return this process's part of ``items``: of N processes every N-th, from its rank on."""
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def meet(self) -> None:
        """Wait, where processes hold a base together, until none of them needs a share of another any more."""
        if self.shards is not None:
            self.shards.meet()

    def _alone(self) -> bool:
        """Return whether there is one process; several meet here, before they exchange anything."""
        self.meet()
        return bool(self.accelerator.num_processes == 1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of ``tensor`` over processes."""
        if self._alone():
            return tensor
        total = self.accelerator.reduce(tensor, reduction="sum")
        return total  # type: ignore[no-any-return]

    def smallest(self, count: int) -> int:
        """Return the least of all processes' counts."""
        if self._alone():
            return count
        import torch

        return int(self.accelerator.gather(torch.tensor([count], device=self.device)).min())

    def concatenate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes; every process gives equally many."""
        if self._alone():
            return tensor
        gathered = self.accelerator.gather(tensor.contiguous())
        return gathered  # type: ignore[no-any-return]

    def gather_json(self, items: list[Any]) -> list[Any]:
        """Return the items, of JSON's types, of all processes."""
        if self._alone():
            return items
        import json

        import torch

        text = json.dumps(items).encode()
        lengths = self.accelerator.gather(torch.tensor([len(text)], device=self.device)).tolist()
        rows = torch.tensor(list(text), dtype=torch.uint8, device=self.device)[:, None]
        data = bytes(self.gather_rows(rows)[:, 0].tolist())
        ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
        parts = [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        return [item for part in parts for item in json.loads(part)]

    def gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, F) of all processes, however many each has."""
        if self._alone():
            return tensor
        import torch

        counts = self.accelerator.gather(torch.tensor([len(tensor)], device=self.device)).tolist()
        padded = tensor.new_zeros(max(counts), tensor.shape[1])
        padded[: len(tensor)] = tensor
        parts = self.concatenate(padded).reshape(len(counts), max(counts), -1)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def open_runtime(device: str | None, *, offline: bool, reporter: Reporter) -> Runtime:
    """Start accelerate on ``device``: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` or ``None`` for the best.

    Raises:
        UsageError: The device is unknown or not present, or accelerate's configuration would divide the base.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    from treelora_cli.backend.shards import FSDP, Shards, base_is_divided, hidden

    divided = base_is_divided()
    kind = _present_kind(device)
    torch.set_num_threads(min(torch.get_num_threads(), usable_processors()))
    if kind != "cpu":
        _set_up_cuda(_numbered(device))
    if torch.distributed.is_available():
        # its functions' defaults are the group there is when it is imported: later they would keep the group's threads
        importlib.import_module("torch.distributed.nn.functional")
    with hidden(FSDP):  # blocks are divided by ``Shards``; accelerate itself would have them wrapped
        accelerator = Accelerator(  # the trainer knows its arithmetic and accumulation: others would come on top
            cpu=kind == "cpu",
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    runtime = Runtime(accelerator=accelerator, offline=offline, reporter=reporter)
    if divided and accelerator.num_processes > 1:
        runtime.shards = Shards()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        atexit.register(_leave_processes, runtime)
    return runtime


def _leave_processes(runtime: Runtime) -> None:
    """End gloo's threads while Python still runs: one that gives back its last tensors later aborts the process."""
    import torch.distributed as dist

    if runtime.shards is not None:
        runtime.shards.leave()
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def _present_kind(device: str | None) -> str:
    """Return the kind of device that ``device`` names, ``auto`` included."""
    import torch

    kind, colon, _ = (device or "auto").partition(":")
    present = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if kind not in present or (colon and kind != "cuda"):
        raise UsageError(f"--device is one of {', '.join(present)} or cuda:N; got {device!r}.")
    if not present[kind]:
        raise UsageError(f"--device {device}: not present on this machine. Leave it out to use the best.")
    return kind


def _numbered(device: str | None) -> int | None:
    """Return N of ``cuda:N``.

    Raises:
        UsageError: There is no such GPU, or every process has its own.
    """
    import torch

    _, colon, number = (device or "").partition(":")
    if not colon:
        return None
    count = torch.cuda.device_count()
    if not number.isdecimal() or int(number) >= count:
        raise UsageError(f"--device {device}: this machine has cuda:0 to cuda:{count - 1}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"--device {device}: of several processes each takes its own GPU. Say cuda.")
    return int(number)


def _set_up_cuda(number: int | None) -> None:
    """Choose the GPU that is meant by ``cuda``, and attention kernels that are not built anew for every shape."""
    import torch

    if not torch.cuda.is_available():
        return
    if number is not None:
        torch.cuda.set_device(number)
    torch.backends.cuda.enable_cudnn_sdp(False)


_COMPILED_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""How many bf16 kernels torch's libraries keep, one for each shape: by default a thousand."""


def keep_kernels(count: int) -> None:
    """Say how many compiled kernels are kept; a user's own setting stays. Read when the first is compiled.

    Args:
        count: A step that runs through more shapes than this compiles each of them again at every use.
    """
    for name in _COMPILED_KERNELS:
        os.environ.setdefault(name, str(count))


def _c_library() -> Any:
    import ctypes

    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None  # not a system whose allocator can be spoken to


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peaks(device: str) -> dict[str, int]:
    """Return the largest memory of this process so far, in bytes, under the names of ``task.json``."""
    import torch

    on_gpu = {"cuda_peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    return {"peak_bytes": peak_bytes(), **on_gpu}


def return_free_memory() -> None:
    """Give what one phase freed back to the system before the next one asks for other sizes."""
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def yield_while_waiting() -> None:
    """Have threads that wait for others sleep: on a busy machine threads that spin take four times as long.

    Read by OpenMP when torch is first imported; a user's own setting stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def usable_processors() -> int:
    """Return how many processors this process may use: its affinity, within the share of its control group."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return count  # no control group, or one without a limit


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor on ``device``; a GPU fetches it from pinned memory while the caller goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the CPU; a GPU's may still be on its way until ``wait_for`` returns."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    import torch

    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def quiet_libraries() -> None:
    """Keep libraries' warnings off the terminal unless asked for."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
