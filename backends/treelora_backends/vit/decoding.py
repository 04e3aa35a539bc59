"""Images that threads decode while a device works on those before: PIL lets go of the interpreter meanwhile."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_IN_MEMORY_BYTES = 2 * 1024**3
_AHEAD = 256
"""Images that are read before they are asked for, at most: what a large GPU looks at together."""


class Pixels(Protocol):
    """Decoded images, (N, 3, H, W) bytes: a tensor, or what is on its way to become one."""

    @property
    def shape(self) -> Sequence[int]:
        """Sizes (N, 3, H, W)."""

    def __getitem__(self, rows: Any) -> Tensor:
        """Return some images, by their places (n,) or a slice."""

    def split(self, size: int) -> Iterable[Tensor]:
        """Return all images, so many at a time."""


def allocated(shape: Sequence[int]) -> Bytes:
    """Return room for images, in memory, or much of it in an unnamed file, which vanishes with the process."""
    if int(np.prod(shape)) <= _IN_MEMORY_BYTES:
        return np.empty(shape, dtype=np.uint8)
    return np.memmap(tempfile.TemporaryFile(), dtype=np.uint8, mode="w+", shape=tuple(shape))


def in_threads(work: Callable[[T], R], items: Sequence[T], ahead: int = _AHEAD) -> Iterator[R]:
    """Yield ``work`` of each item, in order; at most ``ahead`` are begun before they are asked for."""
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        waiting = iter(items)
        begun = deque(pool.submit(work, item) for item in islice(waiting, ahead))
        while begun:
            yield begun.popleft().result()
            begun.extend(pool.submit(work, item) for item in islice(waiting, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class PixelsAhead:
    """Images that are decoded once, when they are asked for or shortly before; meets ``Pixels``.

    What cannot be decoded raises its error where it is asked for, and not before. Once nobody holds the images, as
    after an error or Ctrl-C, no thread begins another.

    Args:
        count: Images.
        size: Height and width.
        decode: Returns the image (3, H, W) at a place; runs in threads.
    """

    def __init__(self, count: int, size: tuple[int, int], decode: Callable[[int], Bytes]) -> None:
        self.shape = (count, 3, *size)
        self._pixels = allocated(self.shape)
        self._decode = decode
        self._missing = set(range(count))
        self._begun: dict[int, Future[None]] = {}
        self._next: Iterator[int] = iter(())
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def expect(self, rows: Tensor) -> None:
        """Decode ahead what is not there yet: places (n,) in the order in which they will be asked for."""
        self._begun = {place: one for place, one in self._begun.items() if not one.cancel()}
        self._next = iter(rows.tolist())

    def __getitem__(self, rows: Any) -> Tensor:
        """Return some images, by their places (n,) or a slice, and begin to decode what comes after them."""
        places = range(*rows.indices(self.shape[0])) if isinstance(rows, slice) else rows.tolist()
        if self._missing:
            for place in places:
                self._begin(place)
            while len(self._begun) < len(places) + _AHEAD and (place := next(self._next, None)) is not None:
                self._begin(place)
            for place in places:
                self._end(place)
        return torch.from_numpy(self._pixels)[rows]

    def split(self, size: int) -> Iterator[Tensor]:
        """Yield all images in order, so many at a time."""
        self.expect(torch.arange(self.shape[0]))
        for start in range(0, self.shape[0], size):
            yield self[start : start + size]

    def _begin(self, place: int) -> None:
        if place in self._missing and place not in self._begun:
            self._begun[place] = self._pool.submit(_fill, self._pixels, self._decode, place)

    def _end(self, place: int) -> None:
        """Wait for an image; one that was decoded is never decoded again."""
        if place not in self._missing:
            return
        self._begun[place].result()
        self._missing.discard(place)
        del self._begun[place]
        if not self._missing:
            self._pool.shutdown(wait=False)


def _fill(pixels: Bytes, decode: Callable[[int], Bytes], place: int) -> None:
    """Decode an image; knows nothing of who asked for it, so that what waits in a queue keeps nobody alive."""
    pixels[place] = decode(place)


def expect(pixels: Pixels, rows: Tensor) -> None:
    """Say in which order images will be asked for, places (n,), where they are not all decoded yet."""
    if isinstance(pixels, PixelsAhead):
        pixels.expect(rows)
