"""Where a language model's layers are, and layers that compute something else for a while."""

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


def first_adapted(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[str]) -> int:
    """Return the index of the first block with an adapted layer; 0 when one lies outside the blocks."""
    index_of = {id(inner): index for index, block in enumerate(blocks) for inner in block.modules()}
    return min((index_of.get(id(model.get_submodule(layer)), 0) for layer in layers), default=0)


def body_of(model: nn.Module) -> nn.Module:
    """Return the model without its output layer."""
    decoder = getattr(model, "get_decoder", None)
    found = decoder() if callable(decoder) else None
    if found is None or found is model:
        found = cast("Any", model).base_model
    return cast("nn.Module", found)


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the list of transformer blocks: the first list as long as the configuration says.

    Raises:
        LookupError: There is none.
    """
    count = int(cast("Any", model).config.get_text_config().num_hidden_layers)
    for module in body_of(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise LookupError("no list of transformer blocks")
