"""What frozen states tell of an input.

Symbols: ``B`` texts, ``T`` tokens, ``C`` width, ``F`` features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_OPENING = 16
"""Tokens of an input's beginning that are looked at by themselves."""
_ROUTING_PARTS = 4


@dataclass(frozen=True)
class Reading:
    """What the frozen blocks make of right-padded texts.

    Attributes:
        embedded: Embeddings, (B, T, C).
        read: States after each of the blocks that are read, the last of which tells inputs apart, each (B, T, C).
        entering: States that enter the first adapted block, (B, T, C); ``None`` when the pass stopped before.
    """

    embedded: Tensor
    read: tuple[Tensor, ...]
    entering: Tensor | None

    def features(self, lengths: Tensor) -> Tensor:
        """Return what the states tell of each input, each part normalised, (B, F).

        The parts: mean embedding, mean embedding of the opening (where a task's form shows), mean and last hidden
        state after the middle block, and the mean states after the earlier blocks that are read.

        Args:
            lengths: Tokens of each input, with which its text begins, (B,).
        """
        embedded, hidden = self.embedded, self.read[-1]  # (B, T, C)
        places = torch.arange(embedded.shape[1], device=embedded.device)
        counted = (places < lengths[:, None]).float()
        counted[:, 0] *= (lengths == 1).float()  # models park a huge state on the first token
        opening = counted.clone()
        opening[:, 1 + _OPENING :] = 0
        last = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
        parts = [_mean(embedded, counted), _mean(embedded, opening), _mean(hidden, counted), last]
        parts += [_mean(earlier, counted) for earlier in self.read[:-1]]
        return torch.cat([nn.functional.layer_norm(part, part.shape[-1:]) for part in parts], dim=1)


def routing_part(features: Tensor, blocks_read: int) -> Tensor:
    """Return the part of ``features`` that tells an input's task, (B, 4C): all but the earlier blocks'."""
    return features[:, : features.shape[1] * _ROUTING_PARTS // (_ROUTING_PARTS + blocks_read - 1)]


def _mean(states: Tensor, weights: Tensor) -> Tensor:
    """Average states (B, T, C) over the tokens that count, (B, C)."""
    return (states * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
