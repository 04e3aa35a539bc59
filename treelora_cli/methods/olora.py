"""O-LoRA: each task learns an adapter whose input subspace is orthogonal to those of earlier tasks.

Source: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", Findings of EMNLP 2023,

    loss = L_task + reg * sum over earlier tasks i of L_orth(A_i, A)         (eq. 7)

with ``A_i`` a layer's ``down`` matrix. The paper's eq. 8 squares the entries of ``A_i A^T``; the authors' code, from
which the published scores and ``lambda_1 = 0.5`` come, sums their absolute values, and so does this one:
``L_orth = sum over layers and j, k of |(A_i A^T)_jk|``. Both vanish at the same adapters. The code's optional L2
term has weight 0 in most of the published runs and is left out.

Earlier adapters stay in force and frozen: their updates are folded into the frozen weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from treelora_cli.backend.adapters import fold_slot
from treelora_cli.methods.base import CALM, Entry
from treelora_cli.methods.seqlora import SeqLora

if TYPE_CHECKING:
    from torch import Tensor

    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.methods.base import StepView, TaskContext


class OLora(SeqLora):
    """A new adapter for each task, pushed to be orthogonal to the earlier ones.

    Args:
        reg: Strength of the orthogonality term, the paper's lambda_1, 0 or more.
    """

    def __init__(self, reg: float = 0.5) -> None:
        super().__init__()
        self.reg = reg
        self._earlier: list[Tensor] = []  # per layer, (earlier tasks * r, in)

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Start at a new adapter."""
        return task.fresh

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        """Return ``reg * sum of |A_earlier A^T|``, from the second task on."""
        if not self._earlier:
            return None
        overlaps = [
            (earlier @ down.float().T).abs().sum()  # (tasks * r, r)
            for earlier, (down, _) in zip(self._earlier, view.slot, strict=True)
        ]
        return self.reg * torch.stack(overlaps).sum()

    def end(self, task: TaskContext) -> None:
        """Keep the trained ``down`` matrices and fold the update into the frozen weights."""
        downs = [down.detach().float().clone() for down, _ in task.slot]
        if self._earlier:
            downs = [torch.cat(pair) for pair in zip(self._earlier, downs, strict=True)]
        self._earlier = downs
        fold_slot(task.network, task.layers, task.scale)

    def kept_bytes(self) -> int:
        """Return the bytes of the earlier ``down`` matrices."""
        return sum(earlier.nbytes for earlier in self._earlier)


OLORA = Entry(OLora, lr_share=CALM)
