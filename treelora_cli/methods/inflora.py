"""InfLoRA: only ``up`` is trained, behind a ``down`` chosen so that earlier tasks' inputs do not pass.

Source: Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024. Training
``up`` alone moves a layer's weights within the row space of ``down``, so ``down`` decides before training
which directions of the inputs a task may use. For each layer, with the new task's inputs ``H`` (in, n) and the
subspace ``M`` of earlier tasks' inputs, in which their gradients lie:

- ``down`` is the first r left singular vectors of ``H - M M^T H`` (section 3.2), each over ``sqrt(3)``, which gives
  its rows the length they have in LoRA's usual initialisation;
- after training, DualGPM (Liang and Li, "Adaptive Plasticity Improvement for Continual Learning", CVPR 2023)
  widens ``M`` by as many singular vectors of the rest of ``H`` as make it hold a share ``e`` of the inputs' squared
  norm; once ``M`` has more than half of the dimensions, its complement is kept and narrowed instead;
- ``e`` rises from ``threshold`` to 1 over the stream, ``e_t = threshold + (1 - threshold) t / tasks``.

The trained update is folded into the frozen weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from treelora_cli.backend.adapters import AdapterWeights, base_only, fold_slot
from treelora_cli.methods.base import CALM, Entry
from treelora_cli.methods.seqlora import SeqLora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from treelora_cli.methods.base import StepView, TaskContext

_ROUNDING = 1e-6
"""Directions with less than this share of the inputs' squared norm may be float32 rounding errors."""


class InfLora(SeqLora):
    """A new, fixed ``down`` for each task, outside the earlier tasks' input subspace.

    Args:
        threshold: Share of the first task's inputs, in squared norm, that its subspace holds, in (0, 1].
        batches: Mini-batches whose inputs are read before and after a task's training.
    """

    def __init__(self, threshold: float = 0.95, batches: int = 20) -> None:
        super().__init__()
        self.threshold = threshold
        self.batches = batches
        self.subspaces: list[Subspace] = []

    def begin(self, task: TaskContext) -> AdapterWeights:
        """Choose ``down`` from the new task's inputs; ``up`` is zero."""
        grams = input_grams(task.network, task.layers, task.losses(self.batches))
        if not self.subspaces:
            self.subspaces = [Subspace(gram.new_zeros(len(gram), 0)) for gram in grams]
        chosen = [subspace.down(gram, task.fresh.rank) for subspace, gram in zip(self.subspaces, grams, strict=True)]
        up = tuple(torch.zeros_like(one) for one in task.fresh.up)
        return AdapterWeights(task.layers, tuple(chosen), up, task.scale)

    def before_step(self, view: StepView) -> None:
        """Take ``down`` out of the step: a parameter without gradient is not decayed either."""
        for down, _ in view.slot:
            down.grad = None

    def end(self, task: TaskContext) -> None:
        """Fold the update into the frozen weights and widen the subspaces by the task's inputs."""
        assert task.tasks is not None, "the share rises over a stream whose length is known"
        fold_slot(task.network, task.layers, task.scale)
        share = min(1.0, self.threshold + (1 - self.threshold) * task.index / task.tasks)
        grams = input_grams(task.network, task.layers, task.losses(self.batches))
        self.subspaces = [one.widened(gram, share) for one, gram in zip(self.subspaces, grams, strict=True)]

    def kept_bytes(self) -> int:
        """Return the bytes of the subspaces' bases."""
        return sum(subspace.basis.nbytes for subspace in self.subspaces)


INFLORA = Entry(InfLora, lr_share=CALM)


@dataclass(frozen=True)
class Subspace:
    """The subspace of earlier tasks' inputs of one layer.

    Attributes:
        basis: Orthonormal columns, float64 (in, k).
        complement: Whether the columns span the subspace's complement.
    """

    basis: Tensor
    complement: bool = False

    def off(self, rows: Tensor) -> Tensor:
        """Return the part of ``rows`` (n, in) outside the subspace."""
        inside = (rows @ self.basis) @ self.basis.T
        return inside if self.complement else rows - inside

    def down(self, gram: Tensor, rank: int) -> Tensor:
        """Return a layer's fixed ``down``, float32 (rank, in); rows beyond the inputs' own rank are zero.

        Args:
            gram: ``H H^T`` of the new task's inputs, float64 (in, in).
            rank: LoRA rank.
        """
        outside = self.off(self.off(gram).T)  # (in, in), of the inputs' part outside the subspace
        values, vectors = _descending(outside)
        rows = self.off(vectors[:, :rank].T)  # outside again, free of the decomposition's rounding
        rows = torch.nn.functional.normalize(rows, dim=1) * (values[:rank, None] > _floor(gram))
        missing = rank - len(rows)
        return torch.nn.functional.pad(rows / 3**0.5, (0, 0, 0, missing)).float()

    def widened(self, gram: Tensor, share: float) -> Subspace:
        """Return the subspace that holds ``share`` of the inputs' squared norm.

        Source: the InfLoRA paper's appendix on DualGPM; the smallest number of leading directions is added.
        """
        total = gram.trace()
        if self.complement:
            within = self.basis.T @ gram @ self.basis  # (k, k)
            values, vectors = _descending(within)
            taken = _needed(values, total - within.trace(), total, share, _floor(gram))
            return Subspace(self.basis @ vectors[:, taken:], complement=True)
        outside = self.off(self.off(gram).T)
        values, vectors = _descending(outside)
        room = len(gram) - self.basis.shape[1]
        taken = min(room, _needed(values, total - outside.trace(), total, share, _floor(gram)))
        added = torch.cat([self.basis, vectors[:, :taken]], dim=1)
        complete, _ = torch.linalg.qr(added, mode="complete")  # (in, in)
        width = added.shape[1]
        if 2 * width > len(gram):
            return Subspace(complete[:, width:], complement=True)
        return Subspace(complete[:, :width])


def input_grams(network: nn.Module, layers: Iterable[str], losses: Iterable[Tensor]) -> list[Tensor]:
    """Return ``H H^T`` of each layer's inputs over some losses, with the slot off, float64 (in, in) on the CPU."""
    modules = [network.get_submodule(f"base_model.model.{layer}") for layer in layers]
    sums: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = cast("Tensor", args[0]).detach().float().flatten(0, -2)  # (..., in) -> (n, in)
        sums[id(module)] = sums.get(id(module), 0) + rows.T @ rows

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with torch.no_grad(), base_only(network):
            for _ in losses:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return [sums[id(module)].double().cpu() for module in modules]


def _descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) and vectors as columns (k, k), largest first."""
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    return values.flip(0), vectors.flip(1)


def _floor(gram: Tensor) -> float:
    """Eigenvalue below which there may be only rounding."""
    return _ROUNDING * float(gram.trace())


def _needed(values: Tensor, held: Tensor, total: Tensor, share: float, floor: float) -> int:
    """How many leading ``values`` bring what is ``held`` to ``share`` of the ``total``."""
    reached = held + torch.cat([values.new_zeros(1), values.clamp_min(0).cumsum(0)])  # (k + 1,)
    enough = (reached >= share * total).nonzero()
    needed = int(enough[0]) if len(enough) else len(values)
    return min(needed, int((values > floor).sum()))
