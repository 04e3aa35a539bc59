"""Gradient signatures: per-layer gradients sketched to a fixed width and L2-normalised.

Pure tensor code, no model. Symbols: `D` adapted layers, `m` signature width, `n` mini-batches.

The sketch is a count-sketch with buckets of equal size: entries are put in a seeded random order,
multiplied by seeded random signs, and dealt out to `m` buckets that are summed. Inner products, and
so L2 distances, are kept in expectation. Summing dealt rows, instead of scattering into buckets,
fixes the order of summation, which an atomic scatter on an accelerator does not.

Source: TreeLoRA section 3.1 (the expected gradient of a task); the sketch is this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from treelora_cli import seeds

# Larger gradients have their order drawn again each time rather than kept in memory.
_CACHED_ENTRIES = 1 << 20


@dataclass(frozen=True, slots=True)
class SketchSpec:
    """How gradients are sketched; signatures compare only under an equal spec.

    Attributes:
        width: `m`, entries per layer, at least 1.
        seed: of the random order and signs, 0 or more.
    """

    width: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a width below 1 or a negative seed.
        """
        if self.width < 1:
            raise ValueError(f"sketch width: expected 1 or more, got {self.width}")
        if self.seed < 0:
            raise ValueError(f"sketch seed: expected 0 or more, got {self.seed}")


def sketch_layer(grad: Tensor, spec: SketchSpec, layer_index: int) -> Tensor:
    """Sketch one layer's gradient, keeping its scale.

    Args:
        grad: any shape and floating dtype.
        spec: width and seed.
        layer_index: 0-based; every layer has its own order and signs.

    Returns:
        float32 `(m,)` on the gradient's device. A gradient of at most `m` entries is kept as it is
        and padded with zeros.
    """
    flat = grad.detach().reshape(-1).to(torch.float32)
    entries = flat.numel()
    if entries > spec.width:
        order, signs = _order_and_signs(spec, layer_index, entries)
        flat = flat[order.to(flat.device)] * signs.to(flat.device)
    rows = -(-entries // spec.width)
    padded = torch.nn.functional.pad(flat, (0, rows * spec.width - entries))
    return padded.view(rows, spec.width).sum(dim=0)  # (rows, m) -> (m,)


class SignatureAccumulator:
    """Averages the sketches of mini-batch gradients into a task's signature.

    Sketches are averaged before normalising, so that the signature is that of the mean gradient.
    Each mini-batch's own normalised sketch is kept too: these are the queries of the search.
    """

    def __init__(self, spec: SketchSpec) -> None:
        """Start with no mini-batch.

        Args:
            spec: width and seed.
        """
        self.spec = spec
        self._total: Tensor | None = None  # float64 (D, m), unnormalised
        self._batches: list[Tensor] = []

    def add(self, grads: Sequence[Tensor]) -> Tensor:
        """Add one mini-batch.

        Args:
            grads: `D` gradients in network order.

        Returns:
            The mini-batch's own signature, float32 `(D, m)` on the CPU.

        Raises:
            ValueError: a NaN or infinity, or another number of layers than before.
        """
        sketch = _sketch_layers(grads, self.spec)
        if self._total is not None and self._total.shape != sketch.shape:
            known = self._total.shape[0]
            raise ValueError(f"signature: {sketch.shape[0]} layers, earlier batches had {known}")
        total = sketch.double()
        self._total = total if self._total is None else self._total + total
        self._batches.append(_normalised(sketch))
        return self._batches[-1]

    @property
    def batches(self) -> Tensor:
        """Each mini-batch's signature, float32 `(n, D, m)` on the CPU.

        Raises:
            ValueError: no mini-batch was added.
        """
        if not self._batches:
            raise ValueError("signature: no mini-batch was added")
        return torch.stack(self._batches)

    def signature(self) -> Tensor:
        """Signature of the mean gradient, float32 `(D, m)` on the CPU.

        Raises:
            ValueError: no mini-batch was added.
        """
        if self._total is None:
            raise ValueError("signature: no mini-batch was added")
        return _normalised(self._total / len(self._batches))


def _sketch_layers(grads: Sequence[Tensor], spec: SketchSpec) -> Tensor:
    """Sketch every layer, `(D, m)` on the CPU, checked to be finite."""
    if not grads:
        raise ValueError("signature: no layer gradients")
    sketches = [sketch_layer(grad, spec, layer) for layer, grad in enumerate(grads)]
    # One transfer for all layers: the check below then waits for the device once, not D times.
    sketch = torch.stack([part.to(sketches[0].device) for part in sketches]).cpu()  # (D, m)
    finite = torch.isfinite(sketch).all(dim=1)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0])
        raise ValueError(f"signature: the gradient of layer {layer} is not finite")
    return sketch


def _normalised(sketch: Tensor) -> Tensor:
    """L2-normalise each layer of `(D, m)` to float32; a zero layer stays zero."""
    rows = sketch.double()  # float32's squares would underflow for small gradients
    norm = rows.norm(dim=1, keepdim=True)  # (D, 1)
    unit: Tensor = rows / norm.clamp_min(torch.finfo(rows.dtype).tiny)
    return unit.float()


def _order_and_signs(spec: SketchSpec, layer_index: int, entries: int) -> tuple[Tensor, Tensor]:
    """Seeded order (int64) and signs (float32) of a layer's entries, `(entries,)`, on the CPU."""
    draw = _cached_draw if entries <= _CACHED_ENTRIES else _draw
    return draw(spec, layer_index, entries)


def _draw(spec: SketchSpec, layer_index: int, entries: int) -> tuple[Tensor, Tensor]:
    """Draw on the CPU, whose generator gives the same numbers whatever the accelerator."""
    generator = torch.Generator().manual_seed(seeds.of_layer(spec.seed, layer_index))
    order = torch.randperm(entries, generator=generator)
    signs = torch.randint(2, (entries,), generator=generator).float() * 2.0 - 1.0
    return order, signs


_cached_draw = lru_cache(maxsize=256)(_draw)
