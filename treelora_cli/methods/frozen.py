"""No adapter at all: the base stays as it is, and what is learned is the head's own, such as prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.methods.base import Unprotected

if TYPE_CHECKING:
    from treelora_cli.methods.base import TaskContext


class Frozen(Unprotected):
    """Meets ``Contender``; see the module docstring."""

    def begin(self, task: TaskContext) -> None:
        """Train no adapter."""

    def end(self, task: TaskContext) -> None:
        """Learn nothing for later."""
