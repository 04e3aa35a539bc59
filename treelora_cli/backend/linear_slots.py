"""LoRA slots on plain linear layers that compute what PEFT's do, without PEFT, whose import takes two seconds.

Modules lie where PEFT puts them (``base_model.model.LAYER.lora_A``), so ``adapters`` reads and writes both kinds alike.
Under autocast on a CPU a slot adds its update within a matrix product and keeps the frozen weight in the narrow type:
the same values but for rounding, in less time (recipes/RESULTS.md).

Symbols: ``n`` rows of the input, ``r`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from peft import LoraConfig

SLOT = "default"
"""Name of the one adapter slot; PEFT saves this name without a suffix."""


class _AddedInside(torch.autograd.Function):
    """``x W^T + bias + scale * (x down^T) up^T`` for ``x`` (n, in), all in the type of a frozen ``W`` (out, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        few, down, up = x.to(weight.dtype), down.to(weight.dtype), up.to(weight.dtype)
        inner = few @ down.T  # (n, r)
        ctx.save_for_backward(few, inner, weight, down, up)
        ctx.scale, ctx.kind = scale, x.dtype
        return nn.functional.linear(few, weight, bias).addmm_(inner, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        few, inner, weight, down, up = ctx.saved_tensors
        through = (outer @ up).mul_(ctx.scale)  # (n, r)
        back = (outer @ weight).addmm_(through, down).to(ctx.kind) if ctx.needs_input_grad[0] else None
        to_up = (inner.T @ outer).T.float().mul_(ctx.scale)
        return back, None, None, (through.T @ few).float(), to_up, None


class LinearSlot(nn.Module):
    """A frozen linear layer in float32 and its slot: ``base(x) + alpha / rank * up(down(dropout(x)))``."""

    fan_in_fan_out = False

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scale = alpha / rank
        self.enabled = True
        self.lora_dropout = nn.ModuleDict({SLOT: nn.Dropout(dropout) if dropout > 0 else nn.Identity()})
        # drawn as PEFT draws it, which leaves the generator where PEFT leaves it
        down, up = (
            nn.Linear(base_layer.in_features, rank, bias=False),
            nn.Linear(rank, base_layer.out_features, bias=False),
        )
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({SLOT: down}), nn.ModuleDict({SLOT: up})
        self._narrow: tuple[Tensor, int, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight, (out, in), for networks that read it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, (out,)."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Width of the inputs."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Width of the outputs."""
        return self.base_layer.out_features

    def get_base_layer(self) -> nn.Linear:
        """Return the frozen layer."""
        return self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self._adds_inside(x):
            return self._added_inside(x)
        plain: Tensor = self.base_layer(x)
        if not self.enabled:
            return plain
        down, up = self.lora_A[SLOT], self.lora_B[SLOT]
        added: Tensor = plain + up(down(self.lora_dropout[SLOT](x))) * self.scale
        return added.to(plain.dtype)

    def _adds_inside(self, x: Tensor) -> bool:
        """Whether autocast narrows a layer held in float32, and nothing is left out at random."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        leaves_out = self.training and not isinstance(self.lora_dropout[SLOT], nn.Identity)
        return self.weight.dtype == torch.float32 and not leaves_out

    def _added_inside(self, x: Tensor) -> Tensor:
        weight, bias = self._narrow_weight(), self.bias
        bias = None if bias is None else bias.to(weight.dtype)
        rows = x.reshape(-1, self.in_features)
        if self.enabled:
            down, up = self.lora_A[SLOT].weight, self.lora_B[SLOT].weight
            out = cast("Tensor", _AddedInside.apply(rows, weight, bias, down, up, self.scale))
        else:
            out = nn.functional.linear(rows.to(weight.dtype), weight, bias)
        return out.view(*x.shape[:-1], self.out_features)

    def _narrow_weight(self) -> Tensor:
        """Return the frozen weight in autocast's type, kept until the frozen weight is another or changes in place."""
        wanted, kind = self.weight.data, torch.get_autocast_dtype("cpu")
        kept, version = self._narrow, self.weight._version
        # who holds the source knows that no other tensor lies at its address
        if kept is None or kept[0].data_ptr() != wanted.data_ptr() or kept[1] != version or kept[2].dtype != kind:
            kept = self._narrow = (wanted, version, wanted.to(kind))
        return kept[2]


class _Holder(nn.Module):
    """Gives the network the name that PEFT gives it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class SlottedNetwork(nn.Module):
    """A frozen network with slots on some of its linear layers; what ``adapters`` uses of a ``PeftModel``.

    Args:
        network: Changed in place.
        layers: Names of linear layers.
        rank: LoRA rank r.
        alpha: The update is scaled by alpha / r.
        dropout: Share of the slot's inputs that training leaves out.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self._settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.base_model = _Holder(network.requires_grad_(False))
        self._slots: list[LinearSlot] = []  # in a list, so that they are no modules of this one, too
        for layer in layers:
            parent, _, name = layer.rpartition(".")
            linear = network.get_submodule(layer)
            assert isinstance(linear, nn.Linear)
            self._slots.append(LinearSlot(linear, rank, alpha, dropout).to(linear.weight.device))
            setattr(network.get_submodule(parent), name, self._slots[-1])
        self._layers = tuple(layers)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the network."""
        return self.base_model.model(*inputs, **named)

    def get_base_model(self) -> nn.Module:
        """Return the network, slots included."""
        return self.base_model.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the network without its adapter."""
        before = [slot.enabled for slot in self._slots]
        try:
            for slot in self._slots:
                slot.enabled = False
            yield
        finally:
            for slot, enabled in zip(self._slots, before, strict=True):
                slot.enabled = enabled

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """PEFT's configuration of such an adapter."""
        from peft import LoraConfig

        return {SLOT: LoraConfig(target_modules=list(self._layers), bias="none", **self._settings)}


def attach_linear(
    network: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float
) -> SlottedNetwork:
    """Freeze ``network`` and put one LoRA slot on the linear layers named in ``layers``."""
    with torch.no_grad():
        return SlottedNetwork(network, layers, rank, alpha, dropout)
