"""Activations that every epoch reads again: computed once, kept where there is room, read a batch at a time.

On a GPU they stay there while they fit into a share of its free memory; else they wait in the computer's memory, from
which a batch is gathered and copied while the one before computes; else in an unnamed file, which vanishes with the
process. On a CPU it is memory for little and the file for much. What is read is the same everywhere. Where the disk has
no room either, or takes longer than computing does, nothing is kept, and whoever can computes the rows again.

Symbols: ``n`` rows.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from treelora_cli.backend.runtime import sent, wait_for
from treelora_cli.errors import ResourceError

T = TypeVar("T")

_MIB = 2**20
_ROW_TYPE = torch.bfloat16
_SHARE = 0.5
"""Of what is free on a GPU, or in the computer for a GPU, rows take at most so much."""
_MOST_ON_CPU = 16 * _MIB
"""A file that is read again and again is in the system's cache, and does not count as the process's memory."""
_READ_AHEAD = 2
"""Batches that are being read at most: the one asked for next and the one after it."""


@dataclass(frozen=True)
class Keeping:
    """Where rows may be kept.

    Attributes:
        device: Where they are used.
        most_bytes: Largest size in memory, the device's or else the computer's; ``None`` for the shares above.
    """

    device: torch.device
    most_bytes: int | None = None

    @classmethod
    def of(cls, device: torch.device, most_mib: int | None) -> Keeping:
        """Return where rows may be kept under a limit in MiB, if there is one."""
        return cls(device, None if most_mib is None else most_mib * _MIB)

    def place(self, wanted: int, *, again: bool = False) -> str:
        """Return where so many bytes go: ``device``, ``memory`` or ``file``.

        What can be computed ``again`` goes ``nowhere`` where the disk has no room for it.
        """
        limit = math.inf if self.most_bytes is None else self.most_bytes
        if self.device.type == "cuda" and wanted <= min(limit, _SHARE * _free_on(self.device)):
            return "device"
        if self.device.type == "cpu" and self.most_bytes is None:
            limit = _MOST_ON_CPU
        if wanted <= min(limit, _SHARE * _free_in_computer()):
            return "memory"
        return "nowhere" if again and wanted > _free_on_disk() else "file"


def planned(count: int, shape: Sequence[int], keeping: Keeping, *, again: bool) -> dict[str, Any]:
    """Return place and size, in MiB, of so many rows that would be kept now."""
    wanted = size_of(count, shape)
    return {"place": keeping.place(wanted, again=again), "mib": round(wanted / _MIB, 1)}


def _free_on(device: torch.device) -> int:
    """Return the bytes of a GPU that nothing uses, those that torch holds ready included."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_in_computer() -> int:
    """Return the bytes of memory that programs can still have."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _free_on_disk() -> float:
    """Return the bytes that a temporary file may still have."""
    try:
        return shutil.disk_usage(tempfile.gettempdir()).free
    except OSError:
        return math.inf  # a system that does not say: whoever writes will see


class KeptRows:
    """Rows of activations under their places, written once and read often.

    Args:
        count: Rows in all; places are 0 to ``count - 1``.
        shape: Of one row; rows are bfloat16.
        keeping: Where they may be kept.
        again: True where rows can be computed again, so that they need not be kept.

    Attributes:
        place: Where they are: ``device``, ``memory``, ``file`` or ``nowhere``.
        given_up: True where they went to the disk until it proved too slow.
        bytes: Size of all rows.
    """

    def __init__(self, count: int, shape: Sequence[int], keeping: Keeping, *, again: bool = False) -> None:
        self.bytes = size_of(count, shape)
        self.place = keeping.place(self.bytes, again=again)
        self._device = keeping.device
        self.given_up = False
        self._weighs = again and self.place == "file" and self.bytes > _free_in_computer()
        """True while it is open whether the disk, which the system cannot hide, is faster than computing again."""
        self._store: _Store | None = None
        if self.place == "file":
            self._store = _InFile(tuple(shape), pinned=keeping.device.type == "cuda")
        elif self.place != "nowhere":
            pinned = self.place == "memory" and keeping.device.type == "cuda"
            where = keeping.device if self.place == "device" else torch.device("cpu")
            self._store = _InMemory(torch.empty(count, *shape, dtype=_ROW_TYPE, device=where, pin_memory=pinned))
        self._slots = torch.full((count,), -1, dtype=torch.int64)
        self._written = 0
        read_ahead = keeping.device.type == "cuda" and self.place in ("memory", "file")
        self._reader = _Ahead(keeping.device) if read_ahead else None
        self._expected: deque[tuple[Tensor, Future[_Copied]]] = deque(maxlen=_READ_AHEAD)

    def clock(self) -> float | None:
        """Return the time, in seconds, at which the device has done its work; ``None`` where that decides nothing."""
        if not self._weighs:
            return None
        wait_for(self._device)
        return time.perf_counter()

    def write(self, places: Tensor, rows: Tensor, began: float | None = None) -> None:
        """Keep rows (n, *shape) each under its place, (n,) on the CPU.

        Args:
            places: Where they will be asked for.
            rows: What is kept.
            began: ``clock`` before these rows were computed.

        Raises:
            ResourceError: The disk is full.
        """
        if self._store is None:
            return
        done = None if began is None else self.clock()
        self._slots[places] = torch.arange(self._written, self._written + len(places))
        self._store.write(self._written, rows.to(_ROW_TYPE), through=done is not None)
        self._written += len(places)
        if began is not None and done is not None:
            self._weigh(done - began, time.perf_counter() - done)

    def _weigh(self, computing: float, writing: float) -> None:
        """Keep nothing where computing some rows takes less time than the disk, whose reads cost what writes cost."""
        self._weighs = False
        if computing < writing:
            self.given_up = True
            self.place, self._store, self._reader = "nowhere", None, None

    def expect(self, places: Tensor) -> None:
        """Begin to read what will be asked for next, while something else computes."""
        if self._reader is not None:
            self._expected.append((places, self._begin(self._reader, places)))

    def read(self, places: Tensor) -> Tensor:
        """Return the rows at places (n,) on the CPU, (n, *shape), on the device.

        Raises:
            IndexError: Nothing is kept under a place.
        """
        assert self._store is not None, "nothing is kept"
        if self._reader is None:
            return self._store.read(self._slots_of(places)).to(self._device)
        if self._expected and torch.equal(self._expected[0][0], places):
            return self._expected.popleft()[1].result().wait()
        return self._begin(self._reader, places).result().wait()

    def _begin(self, reader: _Ahead, places: Tensor) -> Future[_Copied]:
        slots, store = self._slots_of(places), self._store
        assert store is not None
        return reader.start(lambda: store.read(slots))

    def _slots_of(self, places: Tensor) -> Tensor:
        slots = self._slots[places]
        if len(slots) and int(slots.min()) < 0:
            raise IndexError(f"nothing is kept under place {int(places[slots < 0][0])}")
        return slots

    def facts(self) -> dict[str, Any]:
        """Return size and place, for ``task.json``."""
        return {"place": self.place, "mib": round(self.bytes / _MIB, 1)}

    def __str__(self) -> str:
        where = {"device": f"on {self._device.type}", "memory": "in memory", "file": f"in {tempfile.gettempdir()}"}
        if self.place == "nowhere":
            return f"Activations of {self.bytes / _MIB:,.1f} MiB are not kept: each step runs the frozen blocks again."
        return f"Activations of {self.bytes / _MIB:,.1f} MiB are kept {where[self.place]}."


def size_of(count: int, shape: Sequence[int]) -> int:
    """Return the bytes of so many kept rows."""
    return _ROW_TYPE.itemsize * count * math.prod(shape)


def each_expected(rows: KeptRows | None, batches: Iterable[T], places: Callable[[T], Tensor]) -> Iterator[T]:
    """Yield batches; while one is worked on, what the next one needs, ``places(batch)`` (n,), is being read."""
    if rows is None:
        yield from batches
        return
    ahead, behind = itertools.tee(batches)
    for first in itertools.islice(ahead, 1):
        rows.expect(places(first))
    for batch in behind:
        for following in itertools.islice(ahead, 1):
            rows.expect(places(following))
        yield batch


class _Store(ABC):
    """Rows one after the other, in the order in which they are written."""

    @abstractmethod
    def write(self, first: int, rows: Tensor, *, through: bool) -> None:
        """Append rows (n, *shape); with ``through`` return when the disk has them."""

    @abstractmethod
    def read(self, slots: Tensor) -> Tensor:
        """Return a copy of the rows at ``slots`` (n,) on the CPU, (n, *shape), where the store is."""


class _InMemory(_Store):
    """Rows in a tensor of the device or the computer."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def write(self, first: int, rows: Tensor, *, through: bool) -> None:
        """Copy; from a GPU to pinned memory without waiting."""
        self._values[first : first + len(rows)].copy_(rows, non_blocking=self._values.is_pinned())

    def read(self, slots: Tensor) -> Tensor:
        """Gather."""
        if not self._values.is_pinned():
            return self._values.index_select(0, sent(slots, self._values.device))
        out = torch.empty(len(slots), *self._values.shape[1:], dtype=self._values.dtype, pin_memory=True)
        return torch.index_select(self._values, 0, slots, out=out)


class _InFile(_Store):
    """Rows in an unnamed temporary file."""

    def __init__(self, shape: tuple[int, ...], *, pinned: bool) -> None:
        self._shape = shape
        self._pinned = pinned
        self._bytes = size_of(1, shape)
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error

    def write(self, first: int, rows: Tensor, *, through: bool) -> None:
        """Write; raises ``ResourceError`` where the disk is full."""
        wanted = _bytes_of(rows.cpu().contiguous())
        try:
            self._file.seek(first * self._bytes)
            while wanted:
                wanted = wanted[self._file.write(wanted) :]
            if through:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _no_room(error) from error

    def read(self, slots: Tensor) -> Tensor:
        """Read, rows that follow each other at once."""
        rows = torch.empty(len(slots), *self._shape, dtype=_ROW_TYPE, pin_memory=self._pinned)
        breaks = (slots[1:] != slots[:-1] + 1).nonzero().squeeze(1) + 1
        edges = [0, *breaks.tolist(), len(slots)]
        for start, end in itertools.pairwise(edges):
            if end > start:
                self._read_into(int(slots[start]), rows[start:end])
        return rows

    def _read_into(self, first: int, rows: Tensor) -> None:
        wanted = _bytes_of(rows)
        self._file.seek(first * self._bytes)
        while wanted:
            got = self._file.readinto(wanted)
            assert got, "the file is shorter than what was written"
            wanted = wanted[got:]


@dataclass(frozen=True)
class _Copied:
    """Rows on their way to a GPU."""

    rows: Tensor
    arrived: torch.cuda.Event

    def wait(self) -> Tensor:
        """Return the rows; what the GPU does next waits for them, the caller does not."""
        stream = torch.cuda.current_stream(self.rows.device)
        stream.wait_event(self.arrived)
        self.rows.record_stream(stream)
        return self.rows


class _Ahead:
    """Reads in a thread of its own and copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        self._stream = torch.cuda.Stream(self._device)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._written: torch.cuda.Event | None = None

    def start(self, read: Callable[[], Tensor]) -> Future[_Copied]:
        """Begin to read rows; ``read`` returns them on the CPU."""
        if self._written is None:  # rows may still be on their way from the pass that made them
            self._written = torch.cuda.current_stream(self._device).record_event()
        return self._pool.submit(self._copied, read, self._written)

    def _copied(self, read: Callable[[], Tensor], written: torch.cuda.Event) -> _Copied:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            written.synchronize()
            rows = read().to(self._device, non_blocking=True)
            return _Copied(rows, self._stream.record_event())


def _bytes_of(rows: Tensor) -> memoryview:
    """Return the memory of contiguous rows on the CPU."""
    return rows.view(torch.uint8).view(-1).numpy().data


def _no_room(error: OSError) -> ResourceError:
    return ResourceError(
        f"Activations cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}. Nothing was committed."
        " Free some space there, or set TMPDIR."
    )


class Aside:
    """A tensor that is not needed for a while: it waits in an unnamed temporary file, or in memory where none fits.

    Args:
        tensor: On the CPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        array = tensor.contiguous().numpy()
        self._shape, self._type = array.shape, array.dtype
        self._array: np.ndarray[Any, Any] | None = None
        try:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115
            array.tofile(self._file)
        except OSError:  # such as a full disk
            self._array = array

    def read(self) -> Tensor:
        """Return a copy."""
        if self._array is not None:
            return torch.from_numpy(self._array.copy())
        self._file.seek(0)
        return torch.from_numpy(np.fromfile(self._file, self._type).reshape(self._shape))
