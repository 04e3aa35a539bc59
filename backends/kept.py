"""Room for activations that are computed once and used in every epoch."""

from __future__ import annotations

import math
import tempfile

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
