"""A method of one's own, in one file: a new adapter starts where the last one ended, and is held near it.

What CONTRIBUTING asks for under "Add a method", to the letter; the tests run it through a whole project, and the
``pyproject.toml`` beside it registers it.
"""

from __future__ import annotations

import torch

from treelora_cli.methods.base import Entry, Found, Unprotected


class Anchor(Unprotected):
    """Adds ``reg * sum of (theta - theta_last)^2`` to the loss, from the second task on."""

    def begin(self, task):
        """Start where the last task ended."""
        self.reg, self.last, self.index = task.config.train.reg, None, task.index
        if task.index == 0:
            return task.fresh
        self.last = task.past.adapter(task.index - 1)
        return self.last

    def penalty(self, view, loss):
        """Return the squared distance to the last task's adapter."""
        if self.last is None:
            return None
        pairs = zip(view.slot, self.last.down, self.last.up, strict=True)
        return self.reg * torch.stack([((d - a) ** 2).sum() + ((u - b) ** 2).sum() for (d, u), a, b in pairs]).sum()

    def found(self):
        """Return the task whose adapter was started from."""
        return Found(parent=self.index - 1 if self.index else None)


ANCHOR = Entry(Anchor, in_project=True)
