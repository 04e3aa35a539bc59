"""HiDe with LoRA: every task has an adapter of its own; which one answers is the head's to find out.

Source: HiDe-Prompt (Wang et al., NeurIPS 2023) and HiDe-PET (2024), with LoRA as the instruction. What makes
the method work across tasks, statistics of uninstructed and instructed features, is the ``routed`` head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treelora_cli.methods.base import Entry, Unprotected

if TYPE_CHECKING:
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import TaskContext


class HideLora(Unprotected):
    """No other task shares the adapter, so nothing is protected; the head keeps the adapters."""

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Start anew."""
        return task.fresh


HIDELORA = Entry(HideLora, heads=("routed",))
