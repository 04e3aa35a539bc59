"""Texts in two parts: what is only read, and the end through which gradients pass.

The first tokens of a prompt act on the answer through their keys and values alone. They are computed without a graph,
with the adapter as it is, and the end attends to them: the last tokens of the prompt and the answer. The loss is the
same; its gradient leaves out what the adapter does at the first tokens, and a step's backward pass and memory no longer
grow with the prompt.

Symbols: ``B`` texts, ``T`` tokens of the longest, ``P`` of the longest first part, ``E`` of the longest end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_backends.causal_lm.batches import Batch, LabelledBatch


@dataclass(frozen=True)
class Divided:
    """A batch in two parts.

    Attributes:
        first: The first tokens, padded on the left so that ends follow at once, (B, P); P may be 0.
        end: The others, padded on the right, (B, E), with every label.
        first_places, end_places: Column in the whole text of each token; 0 where there is none, (B, P) and (B, E).
    """

    first: Batch
    end: LabelledBatch
    first_places: Tensor
    end_places: Tensor


def divide(labelled: LabelledBatch, tail: int) -> Divided:
    """Divide right-padded texts, each of which has a label.

    Args:
        labelled: The texts.
        tail: Tokens of a prompt that belong to the end, 1 or more; the answer always does.
    """
    ids, lengths = labelled.batch.ids, labelled.batch.lengths
    last = torch.full_like(lengths, ids.shape[1])
    last = last.scatter_reduce(0, labelled.rows, labelled.columns, "amin")  # of the prompt, (B,)
    starts = (last + 1 - tail).clamp(min=0)  # of the end, (B,)

    def part(columns: Tensor, held: Tensor) -> tuple[Batch, Tensor]:
        places = torch.where(held, columns, 0)
        return Batch(ids.gather(1, places), held.long()), places

    widest = int(starts.max())
    columns = torch.arange(widest, device=ids.device) - widest + starts[:, None]
    first, first_places = part(columns, columns >= 0)
    columns = torch.arange(int((lengths - starts).max()), device=ids.device) + starts[:, None]
    end, end_places = part(columns, columns < lengths[:, None])
    labels = LabelledBatch(end, labelled.rows, labelled.columns - starts[labelled.rows], labelled.targets)
    return Divided(first, labels, first_places, end_places)


def chosen_states(states: Tensor, places: Tensor) -> Tensor:
    """Return the states (B, T, C) of tokens at ``places`` (B, N), (B, N, C)."""
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
