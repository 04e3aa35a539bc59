"""Layers that compute something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn


@contextmanager
def standing_in(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within, each layer's ``forward`` is the function beside it; a stand-in that was there before comes back."""
    before = [vars(layer).get("forward") for layer, _ in pairs]
    for layer, forward in pairs:
        cast("Any", layer).forward = forward
    try:
        yield
    finally:
        for (layer, _), earlier in zip(pairs, before, strict=True):
            del cast("Any", layer).forward
            if earlier is not None:
                cast("Any", layer).forward = earlier
