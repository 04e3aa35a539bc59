"""Orthogonal gradient descent in the adapter's parameters.

Source: Farajtabar, Azizan, Mott, Li, "Orthogonal Gradient Descent for Continual Learning", AISTATS 2020,
algorithm 1: gradients of earlier tasks are kept as an orthonormal set ``S`` (Gram-Schmidt), and each new gradient
``g`` is replaced by ``g - sum over v in S of (v . g) v``.

Deviations: the paper stores gradients of the network's outputs, one per example; a loss is all that every model
family has in common, so gradients of mini-batch losses are stored. The paper steps by plain gradient descent; an
optimizer that scales each entry, such as Adam, turns the projected gradient out of the orthogonal space again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from treelora_cli.methods.base import CALM, Entry
from treelora_cli.methods.flat import flat_gradient, loss_gradients, set_gradient
from treelora_cli.methods.seqlora import SeqLora

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.methods.base import StepView, TaskContext

_DEPENDENT = 1e-3
"""A gradient of which less than this share is new adds only rounding errors to the set."""


class Ogd(SeqLora):
    """One adapter, moved only in directions orthogonal to stored gradients of earlier tasks.

    Args:
        per_task: Gradients stored for each task, at least 1.
    """

    def __init__(self, per_task: int = 20) -> None:
        super().__init__()
        self.per_task = per_task
        self._stored: Tensor | None = None  # orthonormal rows, float32 (K, P)

    def before_step(self, view: StepView) -> None:
        """Project the slot's gradient off the stored ones."""
        if self._stored is not None:
            set_gradient(view.slot, projected_off(flat_gradient(view.slot), self._stored))

    def end(self, task: TaskContext) -> None:
        """Store the directions of the task's gradients, at the trained parameters, that are new."""
        super().end(task)
        for gradient in loss_gradients(task.slot, task.losses(self.per_task)):
            self._stored = extended(self._stored, gradient)

    def kept_bytes(self) -> int:
        """Return the bytes of the stored gradients."""
        return 0 if self._stored is None else self._stored.nbytes


OGD = Entry(Ogd, lr_share=CALM)


def projected_off(gradient: Tensor, stored: Tensor) -> Tensor:
    """Return the part of ``gradient`` (P,) orthogonal to the orthonormal rows of ``stored`` (K, P)."""
    once = gradient - stored.T @ (stored @ gradient)
    return once - stored.T @ (stored @ once)  # the second pass takes away the first one's rounding


def extended(stored: Tensor | None, gradient: Tensor) -> Tensor | None:
    """Return the orthonormal rows with the new direction of ``gradient`` added, if it has one."""
    size = torch.linalg.vector_norm(gradient)
    if not size > 0:
        return stored
    rest = gradient / size
    if stored is not None:
        rest = projected_off(rest, stored)
    new = torch.linalg.vector_norm(rest)
    if not new > _DEPENDENT:
        return stored
    row = (rest / new)[None]
    return row if stored is None else torch.cat([stored, row])
