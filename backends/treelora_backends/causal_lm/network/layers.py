"""Where a language model's layers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn


def first_adapted(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[str]) -> int:
    """Return the index of the first block with an adapted layer; 0 when one lies outside the blocks."""
    index_of = {id(inner): index for index, block in enumerate(blocks) for inner in block.modules()}
    return min((index_of.get(id(model.get_submodule(layer)), 0) for layer in layers), default=0)


def called_parts(blocks: Sequence[nn.Module], apart: nn.Module | None) -> list[nn.Module]:
    """Return blocks in parts that are each called as they are; where ``apart`` is given, the last without that part."""
    if apart is None:
        return list(blocks)
    others = [part for part in blocks[-1].children() if part is not apart]
    return [*blocks[:-1], *(part for part in others if next(part.parameters(), None) is not None)]


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
