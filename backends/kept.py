"""Room for what is computed once and used later: activations of every epoch, sums of a whole pass."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT_BYTES = 1024**3
"""Activations up to this size stay in memory; larger ones go to an unnamed temporary file."""


def room(shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialised bfloat16 tensor on the CPU, in memory or in a file that vanishes with the process."""
    if 2 * math.prod(shape) <= KEPT_BYTES:
        return torch.empty(shape, dtype=torch.bfloat16)
    backing = np.memmap(tempfile.TemporaryFile(), dtype=np.int16, mode="w+", shape=shape)  # noqa: SIM115
    return torch.from_numpy(backing).view(torch.bfloat16)


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
