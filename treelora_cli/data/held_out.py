"""Set examples aside for scoring when a task brings none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def set_aside(members: Sequence[T], share: float, key: str) -> tuple[list[T], list[T]]:
    """Divide examples into (kept, set aside), shuffled by ``key``; of two or more, each part gets at least one."""
    order = list(members)
    random.Random(key).shuffle(order)
    count = min(len(order) - 1, max(1, round(share * len(order))))
    return order[count:], order[:count]
