"""No adapter at all: the base stays as it is, and what is learned is the head's own, such as prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.methods.base import Entry, Unprotected

if TYPE_CHECKING:
    from treelora_cli.methods.base import TaskContext


class Frozen(Unprotected):
    """The base alone, under a head that learns; see the module docstring."""

    def begin(self, task: TaskContext) -> None:
        """Train no adapter."""


# the image recipes' own rate, 0.005: on ``cifar100_50classes`` (40 of 500 images per class, seed 0) L2P ended at OP
# 14.5 with forgetting 12.5, at 0.03 at 14.3 with 15.4; DualPrompt ended at 19.3, other rates not measured
L2P = Entry(Frozen, heads=("l2p",))
DUALPROMPT = Entry(Frozen, heads=("dualprompt",))
