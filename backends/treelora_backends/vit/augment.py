"""Training images changed at random, as timm's ``auto_augment`` strings say: RandAugment, AugMix, AutoAugment.

Symbols: ``B`` images.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_cli.errors import UsageError

_FAMILIES = ("rand", "augmix", "v0", "v0r", "original", "originalr", "3a")
_SECTION = re.compile(r"[a-z]+\d+(\.\d+)?|tweights|t3aw")
"""A key and its number, as in ``m9``; or a named set of RandAugment's changes."""


class Augment:
    """Changes images; what it draws depends on torch's own generator alone, which the trainer seeds by step.

    Args:
        policy: timm's string, such as ``rand-m9-mstd0.5``.
        size: Height and width of the images in pixels.
        mean: The model's, per channel, in [0, 1]; fills what a shift leaves empty.

    Raises:
        UsageError: timm does not know the policy; the message says what is wrong with it.
    """

    def __init__(self, policy: str, size: tuple[int, int], mean: Sequence[float]) -> None:
        self.policy = policy
        self._change = _made(policy, size, mean)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return other images of the same kind: bytes (B, 3, H, W), on the CPU."""
        from PIL import Image

        changed = []
        with _drawing(int(torch.randint(2**31, ()))):
            for one in pixels:
                picture = Image.fromarray(one.permute(1, 2, 0).contiguous().numpy())
                changed.append(torch.from_numpy(np.array(self._change(picture), dtype=np.uint8)))
        return torch.stack(changed).permute(0, 3, 1, 2).contiguous()


def _made(policy: str, size: tuple[int, int], mean: Sequence[float]) -> Callable[[Any], Any]:
    """Return timm's transform; of a string that timm would read in part, nothing."""
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    family, *sections = policy.split("-")
    if family not in _FAMILIES:
        raise UsageError(f"train.augment: '{policy}' begins with none of {', '.join(_FAMILIES)}.")
    for section in sections:
        if not _SECTION.fullmatch(section):
            raise UsageError(f"train.augment: '{section}' in '{policy}' is no key with a number, such as m9.")
    make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(family, auto_augment_transform)
    settings = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, round(255 * one)) for one in mean),
    }
    try:
        change: Callable[[Any], Any] = make(policy, settings)
        _try(change, size)
    except (AssertionError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"train.augment: timm does not take '{policy}' ({str(error) or type(error).__name__})."
        ) from error
    return change


def _try(change: Callable[[Any], Any], size: tuple[int, int]) -> None:
    from PIL import Image

    with _drawing(0):
        for _ in range(4):
            change(Image.new("RGB", (size[1], size[0]), (128, 64, 32)))


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Let Python's and numpy's own generators, which timm draws from, begin at ``seed``; they go on as before then."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
