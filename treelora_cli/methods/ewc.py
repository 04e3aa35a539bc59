"""Elastic weight consolidation on the adapter's parameters.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, eq. 3,

    L(theta) = L_new(theta) + sum over earlier tasks i and parameters j of  reg / 2 * F_ij (theta_j - theta_ij)^2

with ``F_i`` the diagonal of the Fisher information of task ``i`` and ``theta_i`` its trained parameters. A sum
of quadratic penalties is one quadratic penalty up to a constant: with ``F = sum F_i`` and
``mean = sum F_i theta_i / F`` it is ``reg / 2 * F (theta - mean)^2``, exactly, so the memory does not grow.

``F_i`` here is the *empirical* Fisher of mini-batch losses: the mean over mini-batches of the squared gradient of
a mini-batch's mean loss at the true labels. With ``B`` examples to a batch it is about ``1 / B`` of the empirical
Fisher of single examples where their gradients are independent, hence the large default strength.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from treelora_cli.methods.base import CALM, Entry
from treelora_cli.methods.flat import loss_gradients, parameters_of
from treelora_cli.methods.seqlora import SeqLora

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.methods.base import StepView, TaskContext


class Ewc(SeqLora):
    """One adapter, held near its earlier values where the Fisher information is large.

    Args:
        reg: Strength of the penalty, 0 or more.
        batches: Mini-batches over which a task's Fisher information is averaged.
    """

    def __init__(self, reg: float = 10_000.0, batches: int = 20) -> None:
        super().__init__()
        self.reg = reg
        self.batches = batches
        self._fisher: Tensor | None = None  # (P,), summed over tasks
        self._mean: Tensor | None = None  # (P,), of the tasks' parameters, weighted by their Fisher

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return ``reg / 2 * sum of F (theta - mean)^2``, from the second task on."""
        if self._fisher is None or self._mean is None:
            return None
        theta = torch.cat([parameter.float().flatten() for parameter in parameters_of(view.slot)])
        return self.reg / 2 * (self._fisher * (theta - self._mean).square()).sum()

    def end(self, task: TaskContext) -> None:
        """Add the task's Fisher information, at the trained parameters."""
        super().end(task)
        theta = torch.cat([parameter.detach().float().flatten() for parameter in parameters_of(task.slot)])
        fisher = torch.zeros_like(theta)
        for count, gradient in enumerate(loss_gradients(task.slot, task.losses(self.batches)), start=1):
            fisher += (gradient.square() - fisher) / count
        if self._fisher is None or self._mean is None:
            self._fisher, self._mean = fisher, theta
            return
        total = self._fisher + fisher
        share = torch.where(total > 0, fisher / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0)
        self._fisher, self._mean = total, self._mean + share * (theta - self._mean)

    def kept_bytes(self) -> int:
        """Return the bytes of the summed Fisher diagonal and of the weighted mean."""
        return sum(one.nbytes for one in (self._fisher, self._mean) if one is not None)


EWC = Entry(Ewc, lr_share=CALM)
