"""Answers token by token: prompts side by side over one cache, which those that have ended leave.

Symbols: ``B`` prompts, ``b`` of them that go on, ``T`` tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from treelora_backends.causal_lm.batches import Batch

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length")
_SAYS_NOTHING = {
    *_SAMPLING,
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("do_sample", "max_new_tokens", "min_new_tokens"),
    *("transformers_version", "use_cache", "cache_implementation", "trust_remote_code"),
    *("output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"),
}
"""Generation settings that do not change which token is the likeliest."""
_LEFT = 0.75
"""Ended texts leave a batch when at most this share of it goes on: leaving copies the others' keys and values."""


@dataclass(frozen=True)
class Length:
    """Fewest and most new tokens of an answer, its end not counted; ``most`` 1 or more."""

    least: int
    most: int


Step = Callable[[Tensor, Tensor, Any, Sequence[int]], tuple[Tensor, Any]]
"""Takes ids (b, T), their mask with what is cached (b, cached + T), the cache and tokens that may not come; returns the
next ids (b,) and the cache."""


def is_plain(settings: Any) -> bool:
    """Return whether under a model's generation settings the likeliest token is always the next."""
    return {key for key in settings.to_diff_dict() if not key.startswith("_")} <= _SAYS_NOTHING


@torch.no_grad()
def decoded(step: Step, batch: Batch, length: Length, end_ids: Sequence[int]) -> list[list[int]]:
    """Continue left-padded prompts, each with the likeliest tokens; returns the new ids, without what follows an end.

    Args:
        step: Runs the model.
        batch: Prompts.
        length: Of each answer.
        end_ids: Tokens that end an answer.
    """
    found: list[list[int]] = [[] for _ in batch.ids]
    rows = list(range(len(found)))  # which prompt each row of the cache is
    going = set(rows)
    ids, mask, cache = batch.ids, batch.mask, None
    for count in range(1, length.most + 1):
        chosen, cache = step(ids, mask, cache, end_ids if count <= length.least else ())
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if row not in going:
                continue
            if token in end_ids:
                going.remove(row)
            else:
                found[row].append(token)
        if not going or count == length.most:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        if len(going) <= _LEFT * len(rows) and _rows_can_leave(cache):
            kept = [place for place, row in enumerate(rows) if row in going]
            places = torch.tensor(kept, device=mask.device)
            cache.batch_select_indices(places)
            rows, mask, chosen = [rows[place] for place in kept], mask[places], chosen[places]
        ids = chosen[:, None]
    return found


def _rows_can_leave(cache: Any) -> bool:
    return all(hasattr(layer, "batch_select_indices") for layer in getattr(cache, "layers", [None]))


@torch.no_grad()
def generated(model: Any, batch: Batch, length: Length, end_ids: Sequence[int], pad_id: int) -> list[list[int]]:
    """Do the same by the model's own ``generate``, whatever it is made of and its generation settings say."""
    config = copy.deepcopy(model.generation_config)
    for key in _SAMPLING:
        setattr(config, key, None)
    config.do_sample = False
    config.max_new_tokens = length.most
    config.min_new_tokens = length.least or None
    config.pad_token_id = pad_id
    config.eos_token_id = list(end_ids) or None
    out = model.generate(input_ids=batch.ids, attention_mask=batch.mask, generation_config=config)
    continued = []
    for row in out[:, batch.ids.shape[1] :].tolist():
        end = next((place for place, one in enumerate(row) if one in end_ids), len(row))
        continued.append(row[:end])
    return continued


def numbers_of_token(model: Any) -> int:
    """Return how many numbers a token's keys and values are in all blocks."""
    config = model.config.get_text_config()
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return int(2 * config.num_hidden_layers * heads * width)
