"""A last feed-forward layer that runs where a label is predicted only.

It treats every position by itself, and of the last block only the positions that predict are read. The others are not
computed: exact.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from treelora_backends.standing_in import standing_in

_NAMES = ("mlp", "feed_forward", "ffn")


def feed_forward(block: nn.Module) -> nn.Module | None:
    """Return a block's feed-forward layer; ``None`` where there is none by a known name."""
    return next((getattr(block, name) for name in _NAMES if hasattr(block, name)), None)


def narrowed(layer: nn.Module, rows: Tensor, columns: Tensor) -> AbstractContextManager[None]:
    """Return the context in which ``layer`` runs at these positions of (B, T, C) and gives 0 elsewhere, both (N,)."""
    plain = layer.forward

    def forward(states: Tensor, *inputs: Any, **options: Any) -> Tensor:
        part = plain(states[rows, columns][None], *inputs, **options)
        out = torch.zeros(states.shape, dtype=part.dtype, device=states.device)
        return out.index_put((rows, columns), part[0])

    return standing_in([(layer, forward)])
