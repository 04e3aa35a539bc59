"""LoRA adapters: attach, read, write, merge and save, through PEFT.

Symbols: ``D`` adapted layers, ``r`` rank; a layer's update is ``scale * up @ down`` with ``down`` (PEFT's
``lora_A``) of shape (r, in) and ``up`` (``lora_B``) of shape (out, r).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treelora_cli import seeds
from treelora_cli.backend.linear_slots import SLOT
from treelora_cli.backend.shards import is_released
from treelora_cli.errors import DamagedError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel

_KEY = "base_model.model.{layer}.lora_{part}.weight"
_LEAST_STRETCH = 1e-3
"""Least singular value, as a share of the greatest, by which factors are turned into others with the same product."""


@dataclass(frozen=True)
class AdapterWeights:
    """One adapter's weights on the CPU in float32, layers in network order.

    Attributes:
        layers: Module names in the base, (D,).
        down: Per layer, (r, in).
        up: Per layer, (out, r).
        scale: alpha / r.
    """

    layers: tuple[str, ...]
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    scale: float

    @property
    def rank(self) -> int:
        """LoRA rank r."""
        return self.down[0].shape[0]

    def update(self, index: int) -> Tensor:
        """Return the dense update of layer ``index``, (out, in)."""
        return self.scale * (self.up[index] @ self.down[index])

    def equals(self, other: AdapterWeights) -> bool:
        """Return whether every weight is the same."""
        if (self.layers, self.scale) != (other.layers, other.scale):
            return False
        pairs = zip((*self.down, *self.up), (*other.down, *other.up), strict=True)
        return all(torch.equal(one, two) for one, two in pairs)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors under PEFT's key names."""
        tensors = {}
        for layer, down, up in zip(self.layers, self.down, self.up, strict=True):
            tensors[_KEY.format(layer=layer, part="A")] = down.contiguous()
            tensors[_KEY.format(layer=layer, part="B")] = up.contiguous()
        return tensors

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], layers: Sequence[str], scale: float, where: str
    ) -> AdapterWeights:
        """Check and take the tensors of a PEFT file.

        Raises:
            DamagedError: A layer is missing or left over, a shape does not fit, or a value is not finite.
        """
        wanted = {_KEY.format(layer=layer, part=part) for layer in layers for part in "AB"}
        if set(tensors) != wanted:
            odd = sorted(wanted.symmetric_difference(tensors))[0]
            raise DamagedError(f"{where}: tensor '{odd}' is missing or unexpected. Run treelora doctor.")
        down = tuple(tensors[_KEY.format(layer=layer, part="A")].float() for layer in layers)
        up = tuple(tensors[_KEY.format(layer=layer, part="B")].float() for layer in layers)
        for layer, a, b in zip(layers, down, up, strict=True):
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != down[0].shape[0]:
                raise DamagedError(f"{where}: shapes of layer '{layer}' do not fit. Run treelora doctor.")
            if not (a.isfinite().all() and b.isfinite().all()):
                raise DamagedError(f"{where}: layer '{layer}' holds values that are not finite.")
        return cls(tuple(layers), down, up, scale)


def attach(
    network: nn.Module, layers: Sequence[str], *, rank: int, alpha: float, dropout: float, task_type: str | None = None
) -> PeftModel:
    """Freeze ``network`` and put one LoRA slot on the modules named in ``layers``.

    ``task_type`` is PEFT's name of the kind of model, such as ``CAUSAL_LM``, kept in its configuration file.

    Raises:
        ModelError: PEFT cannot adapt one of the modules.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=cast("int", alpha),
        lora_dropout=dropout,
        target_modules=list(layers),
        bias="none",
        task_type=cast("Any", task_type),
    )
    try:
        adapted = cast("PeftModel", get_peft_model(cast("Any", network), config, SLOT))
    except ValueError as error:
        raise ModelError(f"LoRA does not fit this model: {error}".splitlines()[0]) from error
    _leave_inputs_uncast(adapted, layers)
    return adapted


def _leave_inputs_uncast(network: nn.Module, layers: Sequence[str]) -> None:
    """Spare inputs of float32 layers a cast to the adapter's type: no change, or under autocast taken back at once."""
    for layer in layers:
        module = cast("Any", network.get_submodule(f"base_model.model.{layer}"))
        if module.get_base_layer().weight.dtype == torch.float32:
            module.cast_input_dtype_enabled = False


def slot_parameters(network: nn.Module, layers: Sequence[str]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the live (down, up) parameters of each layer, in the order of ``layers``."""
    pairs = []
    for layer in layers:
        module = network.get_submodule(f"base_model.model.{layer}")
        down = cast("nn.ModuleDict", module.lora_A)[SLOT].weight
        up = cast("nn.ModuleDict", module.lora_B)[SLOT].weight
        pairs.append((cast("nn.Parameter", down), cast("nn.Parameter", up)))
    return pairs


def slot_bytes(network: nn.Module, layers: Sequence[str]) -> int:
    """Return the bytes of one adapter in float32."""
    return 4 * sum(down.numel() + up.numel() for down, up in slot_parameters(network, layers))


def read_slot(network: nn.Module, layers: Sequence[str], scale: float) -> AdapterWeights:
    """Copy the slot's weights to the CPU in float32."""
    pairs = slot_parameters(network, layers)
    return AdapterWeights(
        tuple(layers),
        tuple(down.detach().float().cpu().clone() for down, _ in pairs),
        tuple(up.detach().float().cpu().clone() for _, up in pairs),
        scale,
    )


def write_slot(network: nn.Module, weights: AdapterWeights) -> None:
    """Put ``weights`` into the slot, in place."""
    with torch.no_grad():
        slot = slot_parameters(network, weights.layers)
        for layer, (down, up), a, b in zip(weights.layers, slot, weights.down, weights.up, strict=True):
            if (down.shape, up.shape) != (a.shape, b.shape):
                raise DamagedError(f"An adapter's layer '{layer}' does not fit the model. Run treelora doctor.")
            down.copy_(a)
            up.copy_(b)


@contextmanager
def base_only(network: nn.Module) -> Iterator[None]:
    """Run the network without its adapter."""
    with cast("PeftModel", network).disable_adapter():
        yield


@contextmanager
def added(network: nn.Module, weights: AdapterWeights) -> Iterator[None]:
    """Run the network with the update of ``weights``, of any rank, added to its base and the slot off."""
    touched = []
    try:
        with base_only(network), torch.no_grad():
            for index, layer in enumerate(weights.layers):
                module = cast("Any", network.get_submodule(f"base_model.model.{layer}"))
                base_weight = module.get_base_layer().weight
                original = base_weight.data
                delta = weights.update(index).to(original.device, original.dtype)
                transposed = module.fan_in_fan_out  # GPT-2's layers keep (in, out)
                base_weight.data = original + (delta.T if transposed else delta)
                touched.append((base_weight, original))
            yield
    finally:
        for base_weight, original in touched:
            base_weight.data = original


def fold_slot(network: nn.Module, layers: Sequence[str], scale: float) -> None:
    """Add the slot's update to the frozen weights in place and set ``up`` to zero: the function stays the same.

    The sum is taken in float32 and rounded once to the weights' own type.

    Raises:
        ModelError: A layer's weights are quantised, or divided between processes: an update cannot be added to them.
    """
    weights = read_slot(network, layers, scale)
    with torch.no_grad():
        for index, (layer, (_, up)) in enumerate(zip(layers, slot_parameters(network, layers), strict=True)):
            module = cast("Any", network.get_submodule(f"base_model.model.{layer}"))
            base_weight = module.get_base_layer().weight
            if not base_weight.is_floating_point():
                raise ModelError(f"Layer '{layer}' is quantised; this method needs weights of full precision.")
            if is_released(base_weight):
                raise ModelError("This method changes the base's weights, and processes hold them together (FSDP).")
            delta = weights.update(index).to(base_weight.device)
            transposed = module.fan_in_fan_out  # GPT-2's layers keep (in, out)
            base_weight.copy_(base_weight.float() + (delta.T if transposed else delta))
            up.zero_()


def reference_point(network: nn.Module, layers: Sequence[str], scale: float, seed: int) -> AdapterWeights:
    """Return the adapter at which all tasks' gradients are compared: ``up`` zero, ``down`` seeded.

    ``down`` is drawn per layer as PEFT draws it, uniform within ``1 / sqrt(in)``, from a generator of its
    own, so that it does not depend on the device or on what was drawn before.
    """
    down, up = [], []
    for index, (a, b) in enumerate(slot_parameters(network, layers)):
        generator = torch.Generator().manual_seed(seeds.of_layer(seed, index))
        bound = a.shape[1] ** -0.5
        down.append((torch.rand(a.shape, generator=generator) * 2 - 1) * bound)
        up.append(torch.zeros(b.shape))
    return AdapterWeights(tuple(layers), tuple(down), tuple(up), scale)


def random_like(weights: AdapterWeights, seed: int) -> AdapterWeights:
    """Return an adapter drawn at random whose updates have the norms of another's, layer by layer: a control."""
    generator = torch.Generator().manual_seed(seed)
    down, up = [], []
    for index, (a, b) in enumerate(zip(weights.down, weights.up, strict=True)):
        drawn = torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator)
        size = float(weights.update(index).norm()) / max(float((weights.scale * drawn[1] @ drawn[0]).norm()), 1e-12)
        down.append(drawn[0] * size**0.5)
        up.append(drawn[1] * size**0.5)
    return AdapterWeights(weights.layers, tuple(down), tuple(up), weights.scale)


def mean_update(adapters: Sequence[AdapterWeights]) -> AdapterWeights:
    """Return an adapter of rank N r whose update is exactly the mean of the N adapters' updates."""
    first, count = adapters[0], len(adapters)
    down = tuple(torch.cat([one.down[index] for one in adapters]) for index in range(len(first.layers)))
    up = tuple(
        torch.cat([one.up[index] * (one.scale / count) for one in adapters], dim=1)
        for index in range(len(first.layers))
    )
    return AdapterWeights(first.layers, down, up, 1.0)


def merge(adapters: Sequence[AdapterWeights], shares: Sequence[float]) -> AdapterWeights:
    """Return the rank-r adapter nearest, in Frobenius norm, to the weighted mean of the updates.

    The products are averaged and refactored by singular value decomposition; averaging ``up`` and ``down``
    separately would not average the updates. The SVD is taken of the stacked thin factors, so its cost
    depends on the ranks and not on the layer's size squared. Of all factors with that product those are returned
    whose ``down`` is nearest to that of the adapter of the greatest share: eq. 3 compares factors, and the merge of
    one adapter is that adapter.

    Args:
        adapters: Adapters on the same layers.
        shares: Weight of each; they are normalised to sum to 1.
    """
    first, total = adapters[0], float(sum(shares))
    leading = adapters[max(range(len(adapters)), key=lambda one: shares[one])]
    down, up = [], []
    for index in range(len(first.layers)):
        factors = [(a.up[index] * (a.scale * s / total), a.down[index]) for a, s in zip(adapters, shares, strict=True)]
        left = torch.cat([f for f, _ in factors], dim=1).double()  # (out, R)
        right = torch.cat([f for _, f in factors], dim=0).double()  # (R, in)
        q_left, r_left = torch.linalg.qr(left)
        q_right, r_right = torch.linalg.qr(right.T)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        keep = first.rank
        root = s[:keep].clamp(min=0).sqrt()
        new_up = (q_left @ u[:, :keep]) * root / first.scale
        new_down = root[:, None] * (vh[:keep] @ q_right.T)
        new_up, new_down = _factored_like(leading.down[index].double(), new_up, new_down)
        up.append(_pad(new_up.float(), dim=1, size=keep))
        down.append(_pad(new_down.float(), dim=0, size=keep))
    return AdapterWeights(first.layers, tuple(down), tuple(up), first.scale)


def _factored_like(wanted: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors with the same product whose ``down`` is nearest to the wanted one, as far as that is stable."""
    if wanted.shape != down.shape:
        return up, down
    left, stretch, right = torch.linalg.svd(wanted @ torch.linalg.pinv(down))  # (r, r)
    if float(stretch.max()) <= torch.finfo(stretch.dtype).eps:
        return up, down
    stretch = stretch.clamp(min=float(stretch.max()) * _LEAST_STRETCH)
    return up @ (right.T / stretch) @ left.T, (left * stretch) @ right @ down


def _pad(matrix: Tensor, *, dim: int, size: int) -> Tensor:
    missing = size - matrix.shape[dim]
    if missing <= 0:
        return matrix.contiguous()
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim).contiguous()


def save_adapter(weights: AdapterWeights, config: Mapping[str, Any], out: Path) -> None:
    """Write a stock PEFT directory of one adapter.

    Args:
        weights: The adapter.
        config: As ``peft_config`` returned it.
        out: An existing directory.
    """
    from safetensors.torch import save_file

    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(weights.to_tensors(), out / "adapter_model.safetensors", metadata={"format": "pt"})


def save_each(named: Sequence[tuple[str, AdapterWeights]], config: Mapping[str, Any], out: Path) -> list[str]:
    """Write PEFT directories below ``out/adapters``, one for each distinct adapter.

    Args:
        named: Task names with their adapters, in order.
        config: What ``peft_config`` returned.
        out: An existing directory.

    Returns:
        The directory of each task's adapter, relative to ``out``.
    """
    known: list[tuple[AdapterWeights, str]] = []
    places = []
    for number, (name, weights) in enumerate(named, start=1):
        place = next((place for other, place in known if weights.equals(other)), None)
        if place is None:
            place = f"adapters/{number:03d}-{name}"
            known.append((weights, place))
            (out / place).mkdir(parents=True)
            save_adapter(weights, config, out / place)
        places.append(place)
    return places


def peft_config(network: nn.Module, base_name: str | None) -> dict[str, Any]:
    """Return ``adapter_config.json`` as PEFT itself writes it for the slot."""
    config = cast("PeftModel", network).peft_config[SLOT]
    with tempfile.TemporaryDirectory() as scratch:
        config.save_pretrained(scratch)
        written = json.loads((Path(scratch) / "adapter_config.json").read_text(encoding="utf-8"))
    written["base_model_name_or_path"] = base_name
    written["inference_mode"] = True
    written["target_modules"] = sorted(written["target_modules"])
    return cast("dict[str, Any]", written)


def adapter_files(network: nn.Module, base_name: str | None, weights: AdapterWeights) -> dict[str, bytes]:
    """Return the files of a stock PEFT directory of one adapter, name to content."""
    from safetensors.torch import save

    config = peft_config(network, base_name)
    return {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(weights.to_tensors(), metadata={"format": "pt"}),
    }
