"""The contenders of ``treelora compare`` by name: strategy, head, and settings in which one differs.

Rank, alpha, epochs, batch size, data order and arithmetic are the recipe's for everyone. Importing this module
imports no strategy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, cast

from treelora_cli.config import Config, HeadConfig
from treelora_cli.errors import UsageError, suggest

if TYPE_CHECKING:
    from treelora_cli.methods.base import Contender

OURS = "treelora"
"""The method that runs through a real project instead of a contender."""
_SHARED = ("linear", "answer")
"""One adapter for all tasks, under a growing classifier or the language model's own output layer."""


@dataclass(frozen=True)
class Entry:
    """One contender.

    Attributes:
        strategy: Class in ``treelora_cli.methods``, as ``module:Class``.
        heads: Kinds of head it works with; the first that the backend offers is taken.
        lr_share: Learning rate of what is trained, as a share of the recipe's, by head; 1 where none is named.
        settings: Settings that the method's paper fixes.
        at_once: All tasks are learned as one.
        counts_tasks: The strategy is made with ``tasks=`` the stream's length; others are made without arguments.
    """

    strategy: str
    heads: tuple[str, ...] = _SHARED
    lr_share: Mapping[str, float] = field(default_factory=dict)
    settings: Config = Config()
    at_once: bool = False
    counts_tasks: bool = False

    def make(self, tasks: int) -> Contender:
        """Return a new strategy for a stream of so many tasks."""
        module, _, name = self.strategy.partition(":")
        kind = getattr(import_module(f"treelora_cli.methods.{module}"), name)
        return cast("Contender", kind(tasks=tasks) if self.counts_tasks else kind())


_CALM = {"linear": 0.2}
"""One adapter drifts under the image recipes' rate, which suits an adapter for each task: sequential LoRA on
``cifar100_50classes`` (40 of 500 images per class, seed 0) ended at OP 14.4 with it and at 20.5 with a fifth of it."""

CONTENDERS: dict[str, Entry] = {
    "seqlora": Entry("seqlora:SeqLora", lr_share=_CALM),
    "ncm": Entry("seqlora:SeqLora", heads=("mean",)),
    # RanPAC, section 4: 10,000 random features
    "ranpac": Entry("seqlora:SeqLora", heads=("ridge",), settings=Config(head=HeadConfig(width=10_000))),
    # a slow learner: the adapter moves at a tenth of the head's rate, which is the recipe's
    "slca": Entry("seqlora:SeqLora", heads=("aligned",), lr_share={"aligned": 0.1}),
    "hidelora": Entry("hidelora:HideLora", heads=("routed",)),
    "olora": Entry("olora:OLora", lr_share=_CALM),
    "ewc": Entry("ewc:Ewc", lr_share=_CALM),
    "inflora": Entry("inflora:InfLora", lr_share=_CALM, counts_tasks=True),
    "gem": Entry("gem:Gem", lr_share=_CALM),
    "ogd": Entry("ogd:Ogd", lr_share=_CALM),
    # the image recipes' own rate, 0.005: on ``cifar100_50classes`` (40 of 500 images per class, seed 0) L2P ended at OP
    # 14.5 with forgetting 12.5, at 0.03 at 14.3 with 15.4; DualPrompt ended at 19.3, other rates not measured
    "l2p": Entry("frozen:Frozen", heads=("l2p",)),
    "dualprompt": Entry("frozen:Frozen", heads=("dualprompt",)),
    "joint": Entry("seqlora:SeqLora", at_once=True),
}


def method_names() -> list[str]:
    """Names that ``--methods`` knows."""
    return [OURS, *CONTENDERS]


def check_method(name: str) -> None:
    """Raise ``UsageError`` when ``name`` is no method."""
    if name not in method_names():
        hint = suggest(name, method_names())
        raise UsageError(f"Unknown method '{name}'{hint}. Known: {', '.join(method_names())}.")


def choose_head(method: str, offered: tuple[str, ...], backend: str) -> str:
    """Return the kind of head that ``method`` works with on a backend.

    Raises:
        UsageError: The backend offers none of them.
    """
    for head in CONTENDERS[method].heads:
        if head in offered:
            return head
    fitting = [OURS, *(name for name, entry in CONTENDERS.items() if set(entry.heads) & set(offered))]
    raise UsageError(f"'{method}' does not work with the {backend} backend. These do: {', '.join(fitting)}.")
