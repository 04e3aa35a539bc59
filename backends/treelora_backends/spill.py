"""Room for sums of a whole pass that are not needed for a while."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
