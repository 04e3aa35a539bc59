"""How many images a pass without gradients takes at a time, and a few of them for an adapter."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST, _MOST = 32, 256
"""On a CPU what stays in its caches is faster than more; a GPU is busy with the larger number."""
_IMAGES_PER_GIB = 4
_ROWS = 16
"""Adapters see multiples of this: kernels are compiled, and kept, for each number of rows that occurs."""


def images_at_once(device: torch.device) -> int:
    """Return the images of a chunk that is only read: more, the more memory a GPU has."""
    if device.type != "cuda":
        return _FEWEST
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max(_FEWEST, min(_MOST, int(_IMAGES_PER_GIB * gib)))


def filled(rows: Tensor) -> Tensor:
    """Return ``rows`` (n,) with the first image repeated up to a multiple of 16, whose results are left out."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % _ROWS)])
