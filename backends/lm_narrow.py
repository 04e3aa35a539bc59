"""Feed-forward layers with a graph only where it is needed: most of a block's work, at most of its positions.

A feed-forward layer treats every position by itself, so it may run position by position. Two savings follow:

* In the last block only the positions that predict are read. The others are not computed: exact.
* In the other adapted blocks all positions are computed, but gradients pass through the layer only at the last
  tokens of a prompt and its answer; at earlier tokens they pass by attention and the residual stream alone. The
  loss is the same, its gradient approximate; its time and memory no longer grow with the prompt's length there.

Symbols: ``B`` texts, ``T`` tokens, ``C`` width, ``N`` chosen positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from treelora_backends.lm_batches import LabelledBatch
from treelora_backends.lm_forwards import standing_in

_NAMES = ("mlp", "feed_forward", "ffn")


@dataclass(frozen=True)
class Places:
    """Positions of a batch.

    Attributes:
        rows, columns: Of each position, both (N,).
    """

    rows: Tensor
    columns: Tensor

    def of(self, states: Tensor) -> Tensor:
        """Return the states there as one text, (1, N, C)."""
        return states[self.rows, self.columns][None]


def read_places(labelled: LabelledBatch) -> Places:
    """Return the positions whose last state is read."""
    return Places(labelled.rows, labelled.columns)


def tail_places(labelled: LabelledBatch, tail: int) -> tuple[Places, Places]:
    """Return the positions at the end of each text, and the other ones that hold a token.

    Args:
        labelled: Right-padded texts.
        tail: Tokens of the prompt that still belong to the end, 1 or more; the answer always does.
    """
    width = labelled.batch.ids.shape[1]
    first = torch.full_like(labelled.batch.lengths, width)
    first = first.scatter_reduce(0, labelled.rows, labelled.columns, "amin")  # (B,)
    columns = torch.arange(width, device=first.device)
    held = labelled.batch.mask.bool()
    end = held & (columns > (first - tail)[:, None])  # (B, T); the token at `first` is the prompt's last
    return Places(*end.nonzero(as_tuple=True)), Places(*(held & ~end).nonzero(as_tuple=True))


def feed_forwards(blocks: Sequence[nn.Module], layers: Sequence[nn.Module]) -> list[nn.Module | None]:
    """Return each block's feed-forward layer; ``None`` where there is none by a known name.

    Args:
        blocks: The blocks.
        layers: Adapted modules; a feed-forward layer that holds one learns at every position and is left out.
    """
    adapted = {id(layer) for layer in layers}
    found: list[nn.Module | None] = []
    for block in blocks:
        named = next((getattr(block, name) for name in _NAMES if hasattr(block, name)), None)
        holds = named is not None and any(id(inner) in adapted for inner in named.modules())
        found.append(None if holds else named)
    return found


def narrowed(
    layers: Sequence[nn.Module | None], last: Places, tail: tuple[Places, Places] | None
) -> AbstractContextManager[None]:
    """Return the context in which feed-forward layers run narrowed; see the module docstring.

    Args:
        layers: Of the adapted blocks, in order; the last of them belongs to the last block.
        last: What is read of the last block.
        tail: Positions with a graph and the others; ``None`` for a graph at every position.
    """
    chosen = [*([tail] * (len(layers) - 1)), (last, None)]
    pairs = [(layer, places) for layer, places in zip(layers, chosen, strict=True) if layer is not None and places]
    return standing_in([(layer, _stand_in(layer.forward, *places)) for layer, places in pairs])


def _stand_in(plain: Callable[..., Any], with_graph: Places, without: Places | None) -> Callable[..., Tensor]:
    def forward(states: Tensor, *inputs: Any, **options: Any) -> Tensor:
        parts = [(with_graph, plain(with_graph.of(states), *inputs, **options))]
        if without is not None and len(without.rows):
            with torch.no_grad():
                parts.insert(0, (without, plain(without.of(states), *inputs, **options)))
        out = torch.zeros(states.shape, dtype=parts[0][1].dtype, device=states.device)
        for places, part in parts:
            out = out.index_put((places.rows, places.columns), part[0])
        return out

    return forward
