"""Gradient episodic memory in the adapter's parameters.

Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017. With ``g`` the
gradient of the new task and ``G`` (k, P) those of the k earlier tasks on their memories, at the parameters as they
are, the step follows the closest gradient that raises no memory's loss to first order (eq. 8):

    minimise  |g - z|^2 / 2   subject to  G z >= 0

solved in its dual (eq. 11), ``minimise |G^T v + g|^2 / 2 subject to v >= margin``, with ``z = G^T v + g``.
``margin`` above 0 favours backward transfer (the authors' code; their runs use 0.5); 0 gives the closest gradient.

A memory is a task's first few mini-batches, read again at each step, so a step costs as many further gradients
as there are earlier tasks, times ``batches``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import nnls

from treelora_cli.methods.base import CALM, Entry
from treelora_cli.methods.flat import flat_gradient, loss_gradients, set_gradient
from treelora_cli.methods.seqlora import SeqLora

if TYPE_CHECKING:
    from torch import Tensor, nn

    from treelora_cli.methods.base import StepView, TaskContext


class Gem(SeqLora):
    """One adapter, never stepped against the gradient of an earlier task's memory.

    Args:
        batches: Mini-batches in each task's memory, at least 1.
        margin: Least value of the dual variables when a constraint is violated, 0 or more.
    """

    def __init__(self, batches: int = 1, margin: float = 0.5) -> None:
        super().__init__()
        self.batches = batches
        self.margin = margin
        self._memories: list[Callable[[int], Iterator[Tensor]]] = []
        self._bytes = 0

    def before_step(self, view: StepView) -> None:
        """Replace the slot's gradient if it would raise the loss on a memory."""
        if not self._memories:
            return
        rows = []
        for losses in self._memories:
            gradients = list(loss_gradients(view.slot, losses(self.batches)))
            rows.append(torch.stack(gradients).mean(dim=0))
        gradient, memory = flat_gradient(view.slot), torch.stack(rows)  # (P,), (k, P)
        if bool((memory @ gradient < 0).any()):
            set_gradient(view.slot, project(gradient, memory, self.margin))

    def end(self, task: TaskContext) -> None:
        """Keep the task's losses, which hold its examples."""
        super().end(task)
        self._memories.append(task.losses)
        self._bytes += _input_bytes(task.network, task.losses(self.batches))

    def kept_bytes(self) -> int:
        """Return the bytes of the memories' inputs as they enter the network; labels are not counted."""
        return self._bytes


GEM = Entry(Gem, lr_share=CALM)


def project(gradient: Tensor, memory: Tensor, margin: float = 0.0) -> Tensor:
    """Solve the dual of the projection.

    Args:
        gradient: ``g``, (P,).
        memory: ``G``, (k, P).
        margin: Least value of the dual variables.

    Returns:
        ``z``, (P,), with ``G z >= 0`` up to rounding; for ``margin`` 0 the closest to ``g``.

    Source: GEM eq. 11. With ``v = margin + u`` it is non-negative least squares in ``u``, solved exactly by an
    active set; a QR decomposition first brings its height from P to k.
    """
    rows = memory.double()
    shifted = gradient.double() + margin * rows.sum(dim=0)
    # Equal units for all columns keep small gradients from being taken for zero.
    sizes = torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(torch.float64).tiny)  # (k,)
    q, r = torch.linalg.qr((rows / sizes[:, None]).T)  # (P, k) = (P, s) (s, k)
    u, _ = nnls(r.cpu().numpy(), (-(q.T @ shifted)).cpu().numpy())
    dual = torch.as_tensor(u, dtype=torch.float64, device=rows.device) / sizes
    closest: Tensor = shifted + rows.T @ dual
    return closest.to(gradient.dtype)


def _input_bytes(network: nn.Module, losses: Iterator[Tensor]) -> int:
    """Bytes of the tensors given to the outermost module that each loss calls."""
    found = 0
    entered = False

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal found, entered
        if not entered:
            found += sum(one.nbytes for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor))
            entered = True

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in network.modules()]
    try:
        with torch.no_grad():
            for _ in losses:
                entered = False
    finally:
        for handle in handles:
            handle.remove()
    return found
