"""Batches of token ids: padded, of similar lengths, in an order that depends on seed and epoch only.

Symbols: ``B`` examples, ``T`` tokens, ``M`` labelled positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from treelora_backends.causal_lm.render import Encoded, Encoder, Ids
from treelora_cli.backend.runtime import sent

T = TypeVar("T")

_AT_ONCE, _AT_ONCE_ELSEWHERE = {"cpu": 512}, 4096
_AT_ONCE_PER_GIB = 205
"""More on a GPU of more than 20 GiB."""
_SIZES_PER_OCTAVE, _SMALLEST_STEP = 8, 16
"""Lengths to which texts are padded on a GPU, between one power of two and the next."""
_BUCKET_BATCHES = 16
"""Batches whose examples are sorted by length together."""


@dataclass(frozen=True)
class Batch:
    """Padded token ids.

    Attributes:
        ids: (B, T) int64.
        mask: 1 where there is a token, (B, T) int64.
    """

    ids: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (B,)."""
        return self.mask.sum(dim=1)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(sent(self.ids, device), sent(self.mask, device))


@dataclass(frozen=True)
class LabelledBatch:
    """Padded examples and the positions at which a token is to be predicted.

    Attributes:
        batch: Prompts and answers, padded on the right.
        rows, columns: Row and position of each hidden state that predicts, both (M,).
        targets: The token that follows there, (M,).
    """

    batch: Batch
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> LabelledBatch:
        """Return the batch on ``device``."""
        parts = [sent(part, device) for part in (self.rows, self.columns, self.targets)]
        return LabelledBatch(self.batch.to(device), *parts)


def width_for(longest: int, device: torch.device, most: int, *, few: bool = False) -> int:
    """Return how many tokens wide a batch is whose longest text has ``longest``; none is wider than ``most``.

    Kernels are chosen, loaded and at times built for each shape that occurs. On a GPU, or where blocks are compiled
    (``few``), that takes longer than a few tokens more: widths there are multiples of 16, at most eight between one
    power of two and the next.
    """
    if device.type == "cpu" and not few:
        return longest
    octave: int = 2 ** (max(1, longest) - 1).bit_length()
    step = max(_SMALLEST_STEP, octave // (2 * _SIZES_PER_OCTAVE))
    return max(longest, min(most, -(-longest // step) * step))


def padded(rows: Sequence[Ids], encoder: Encoder, device: torch.device, *, left: bool = False) -> Batch:
    """Return texts side by side on ``device``, in one of the widths that are used there."""
    width = width_for(max(len(row) for row in rows), device, encoder.context)
    return pad(rows, encoder.pad_id, left=left, width=width).to(device)


def labelled_padded(
    examples: Sequence[Encoded], encoder: Encoder, device: torch.device, *, few: bool = False
) -> LabelledBatch:
    """Return examples side by side on ``device``, in one of the widths that are used there, or of a few."""
    width = width_for(max(len(one) for one in examples), device, encoder.context, few=few)
    return collate(examples, encoder.pad_id, width).to(device)


def pad(rows: Sequence[Ids], pad_id: int, *, left: bool = False, width: int | None = None) -> Batch:
    """Pad rows to ``width``, or to the longest, on the right or the left."""
    width = width or max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.from_numpy(row).long()
        mask[index, place] = 1
    return Batch(ids, mask)


def collate(examples: Sequence[Encoded], pad_id: int, width: int | None = None) -> LabelledBatch:
    """Put examples side by side, padded to ``width`` or the longest; only what is learned of them is labelled."""
    import numpy as np

    batch = pad([np.concatenate([one.prompt, one.answer]) for one in examples], pad_id, width=width)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for index, one in enumerate(examples):
        first, places = len(one.prompt) - 1, one.places
        rows += [index] * len(places)
        columns += [first + place for place in places]
        targets += one.answer[places].tolist()
    return LabelledBatch(batch, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets))


def shuffled_batches(lengths: Sequence[int], count: int, seed: int) -> Iterator[list[int]]:
    """Yield ``count`` batches of example indices, each of similar lengths, all examples once.

    The sizes differ by at most one. Examples are shuffled, sorted by length within buckets of some batches,
    and the batches shuffled again.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = -(-len(lengths) // count)
    bucket = size * _BUCKET_BATCHES
    sorted_order: list[int] = []
    for start in range(0, len(order), bucket):
        sorted_order += sorted(order[start : start + bucket], key=lambda index: lengths[index])
    batches = [part.tolist() for part in torch.tensor(sorted_order, dtype=torch.int64).tensor_split(count)]
    for index in torch.randperm(count, generator=generator).tolist():
        yield batches[index]


def tokens_at_once(device: torch.device) -> int:
    """Return the padded tokens of a batch that is only read: on a CPU what stays in its caches is faster than more."""
    if device.type != "cuda":
        return _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max(_AT_ONCE_ELSEWHERE, int(_AT_ONCE_PER_GIB * gib))


def by_length(items: Sequence[T], length: Callable[[T], int], most_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest first, of at most ``most_tokens`` padded tokens (at least one item)."""
    order = sorted(range(len(items)), key=lambda index: -length(items[index]))
    start = 0
    while start < len(order):
        count = max(1, most_tokens // max(1, length(items[order[start]])))
        yield order[start : start + count]
        start += count
