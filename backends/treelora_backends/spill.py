"""Room for what is computed once and used later: activations of every epoch, sums of a whole pass."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_cli.errors import ResourceError


class KeptRows:
    """Activations in an unnamed temporary file, which vanishes with the process: memory holds what is being read.

    Args:
        shape: Of one row; rows are bfloat16.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)
        self._bytes = 2 * math.prod(self._shape)
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise _no_room(error) from error

    def write(self, first: int, rows: Tensor) -> None:
        """Keep rows (n, *shape) under the places from ``first`` on.

        Raises:
            ResourceError: The disk is full.
        """
        wanted = _bytes_of(rows.to(torch.bfloat16).cpu().contiguous())
        try:
            self._file.seek(first * self._bytes)
            while wanted:
                wanted = wanted[self._file.write(wanted) :]
        except OSError as error:
            raise _no_room(error) from error

    def write_each(self, places: Tensor, rows: Tensor) -> None:
        """Keep rows (n, *shape) each under its place, (n,); raises as ``write`` does."""
        for place, row in zip(places.tolist(), rows.to(torch.bfloat16).cpu(), strict=True):
            self.write(place, row)

    def read(self, first: int, count: int) -> Tensor:
        """Return the rows at ``first`` and after it, (count, *shape), on the CPU."""
        rows = torch.empty(count, *self._shape, dtype=torch.bfloat16)
        self._read_into(first, rows)
        return rows

    def read_each(self, places: Tensor) -> Tensor:
        """Return the rows at places (n,), (n, *shape), on the CPU."""
        rows = torch.empty(len(places), *self._shape, dtype=torch.bfloat16)
        for place, row in zip(places.tolist(), rows, strict=True):
            self._read_into(place, row)
        return rows

    def _read_into(self, first: int, rows: Tensor) -> None:
        wanted = _bytes_of(rows)
        self._file.seek(first * self._bytes)
        while wanted:
            got = self._file.readinto(wanted)
            if not got:
                raise IndexError(f"nothing is kept under place {first}")
            wanted = wanted[got:]


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
