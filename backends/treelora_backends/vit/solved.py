"""Transformer blocks that are solved instead of trained: everything learned, in one stock timm model.

The frozen network is followed by a few blocks of its own kind whose attention is silent and whose MLPs hold
random features of the class token; what they write is solved by ridge regression from sums over every task.
The frozen network never changes, so the sums are exact whatever the order of tasks, and the result is a
plain vision transformer of greater depth that timm builds and loads by itself.

How the blocks keep apart what they read from what they write. With ``z`` the class token after LayerNorm,
``U`` (C, k) an orthonormal basis of the directions in which ``z`` varies least, and ``Q`` the projection
onto the rest:

- the first block adds ``a Q z`` with a large ``a`` (any odd part of an activation is linear:
  ``gelu(x) - gelu(-x) = x``). Afterwards the token is ``Q z`` up to scale, and what lay along ``U`` is negligible;
- every block reads through ``Q`` only and writes scores along ``U`` only;
- the last LayerNorm is positive scaling, and the classifier reads along ``U``.

The sums are the shared head's own (``shared_head.py``): what the blocks compute is the last part of its features, up
to a linear map of the class token.

Symbols: ``C`` width, ``H`` hidden width of an MLP, ``R`` random features, ``W`` = C + R, ``K`` columns.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.vit.trunk import fill_classifier, normalised
from treelora_cli import seeds
from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import LinearHead, RidgeStatistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from treelora_backends.vit.trunk import Trunk

_WRITTEN_SHARE = 4
"""One direction in so many is given up for scores; more columns than that are written in their main directions."""
_AMPLIFICATION = 1000.0
"""Size of the amplified token beside the token itself, as far as half precision's range allows."""
_LARGEST = 6000.0
_SCORE_GAIN = 0.1
"""Size of scores along U beside the token, as a share of its norm: small enough to leave the norm as it is."""


_STORED = ("axes", "means", "scales", "size")


def fits(trunk: Trunk) -> bool:
    """Return whether this architecture can carry solved blocks."""
    vit = cast("Any", trunk.vit)
    block = cast("Any", trunk.blocks[-1])
    plain = all(hasattr(getattr(block, "mlp", None), name) for name in ("fc1", "act", "fc2"))
    plain = plain and isinstance(getattr(block, "norm2", None), nn.LayerNorm) and isinstance(vit.norm, nn.LayerNorm)
    plain = plain and isinstance(getattr(block, "attn", None), nn.Module) and hasattr(block.attn, "proj")
    pooled = getattr(vit, "global_pool", "") == "token" and trunk.has_class_token and vit.attn_pool is None
    head = isinstance(getattr(vit, "fc_norm", None), nn.Identity) and not hasattr(vit, "head_dist")
    return bool(plain and pooled and head and block.mlp.fc1.out_features >= 2 * trunk.width)


@dataclass(frozen=True)
class SolvedFeatures:
    """The random features that the blocks compute of a class token.

    Attributes:
        axes: U, (C, k).
        means, scales: Of ``Q z`` and of its normalised form over the first task, both (2, C).
        size: Root mean square of the first task's tokens, a scalar.
        projection: Seeded normal, (R, C).
        first: Random features in the first block; the others have H each.
        hidden: H.
        activation: The MLP's activation.
    """

    axes: Tensor
    means: Tensor
    scales: Tensor
    size: Tensor
    projection: Tensor
    first: int
    hidden: int
    activation: nn.Module

    @classmethod
    def fit(cls, tokens: Tensor, trunk: Trunk, random: int, seed: int) -> SolvedFeatures:
        """Choose the axes by the first task's class tokens, (n, C); ``random`` features at most, in whole MLPs."""
        z = normalised(tokens).double()
        width = z.shape[1]
        ones = torch.full((width, 1), width**-0.5, dtype=z.dtype, device=z.device)
        covariance = torch.cov(z.T) + 1e6 * torch.outer(ones[:, 0], ones[:, 0])
        axes = torch.linalg.eigh(covariance).eigenvectors[:, : width // _WRITTEN_SHARE].float()
        size = (tokens - tokens.mean(dim=1, keepdim=True)).square().mean().sqrt().reshape(1)
        blank = cls.assemble(axes, torch.zeros(2, width), torch.ones(2, width), size, trunk, random, seed)
        raw = blank.parts(tokens)
        means = torch.stack([part.mean(dim=0) for part in raw])
        deviations = torch.stack([part.std(dim=0) for part in raw])
        scales = deviations + 1e-2 * deviations.mean() + 1e-6
        return cls.assemble(axes, means, scales, size, trunk, random, seed)

    @classmethod
    def assemble(
        cls, axes: Tensor, means: Tensor, scales: Tensor, size: Tensor, trunk: Trunk, random: int, seed: int
    ) -> SolvedFeatures:
        """Put the stored parts together with what follows from the architecture and the seed."""
        mlp = cast("Any", trunk.blocks[-1]).mlp
        hidden, width = int(mlp.fc1.out_features), trunk.width
        first = hidden - 2 * width
        count = first + max(0, (random - first) // hidden) * hidden
        generator = torch.Generator().manual_seed(seeds.of_blocks(seed))
        projection = torch.randn(count, width, generator=generator) / width**0.5
        device = axes.device
        return cls(
            axes,
            means.to(device),
            scales.to(device),
            size.to(device),
            projection.to(device),
            first,
            hidden,
            copy.deepcopy(mlp.act),
        )

    @classmethod
    def restore(cls, shared: Mapping[str, Tensor], trunk: Trunk, random: int, seed: int) -> SolvedFeatures:
        """Rebuild what ``to_tensors`` returned."""
        device = next(trunk.vit.parameters()).device
        axes, means, scales, size = (shared[f"solved.{name}"].to(device) for name in _STORED)
        return cls.assemble(axes, means, scales, size, trunk, random, seed)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what cannot be drawn again from the seed."""
        return {f"solved.{name}": getattr(self, name).cpu().contiguous() for name in _STORED}

    def read(self, z: Tensor) -> Tensor:
        """Project out U and the mean: ``Q z``."""
        kept = z - (z @ self.axes) @ self.axes.T
        return kept - kept.mean(dim=-1, keepdim=True)

    def parts(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first and the later blocks see of class tokens (n, C): ``Q z``, and normalised."""
        first = self.read(normalised(tokens))
        later = first * (first.shape[-1] ** 0.5 / first.norm(dim=-1, keepdim=True).clamp(min=1e-6))
        return first, later

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the random features in order of blocks: (n, C) -> (n, R)."""
        inputs = [(part - m) / s for part, m, s in zip(self.parts(tokens), self.means, self.scales, strict=True)]
        random = [inputs[0] @ self.projection[: self.first].T, inputs[1] @ self.projection[self.first :].T]
        return self.activation(torch.cat(random, dim=1))  # type: ignore[no-any-return]

    @property
    def projector(self) -> Tensor:
        """``Q`` without the mean, (C, C): ``read`` as a matrix, for column vectors."""
        width = self.axes.shape[0]
        matrix = torch.eye(width, device=self.axes.device) - self.axes @ self.axes.T
        return matrix - matrix.mean(dim=0, keepdim=True)


def solved_statistics(shared: RidgeStatistics, features: SolvedFeatures, scale: Tensor) -> RidgeStatistics:
    """Return the statistics of what the blocks compute: standardised ``Q z`` and the random features.

    Args:
        shared: Of the shared head, whose features end with the standardised class token and the random features.
        features: The blocks' features.
        scale: By which the shared head divides the class token, (C,).
    """
    width, count = scale.shape[0], features.projection.shape[0]
    turn = features.projector * scale / features.scales[0][:, None]  # (C, C): standardised token -> linear part
    gram = shared.gram.dense()[-width - count :, -width - count :].clone()
    gram[:width] = turn @ gram[:width]
    gram[:, :width] = gram[:, :width] @ turn.T
    sums = shared.sums[:, -width - count :].clone()
    sums[:, :width] = sums[:, :width] @ turn.T
    return RidgeStatistics(Gram.from_dense(gram), sums, shared.counts)


def grow(
    vit: nn.Module,
    features: SolvedFeatures,
    statistics: RidgeStatistics,
    share: float,
    mean: Tensor,
    class_of: Tensor,
    classes: int,
) -> None:
    """Append the blocks to a frozen ``vit`` with a classifier for ``classes``, and fill them, in place.

    Args:
        vit: The frozen model.
        features: What the blocks compute.
        statistics: As ``solved_statistics`` returns them.
        share: Ridge penalty, see ``RidgeStatistics.solve``.
        mean: Of the normalised class token, which the linear part lacks, (C,).
        class_of: Class of each column, (K,).
        classes: Distinct classes.
    """
    solved = statistics.solve(share)
    weight = torch.zeros(classes, solved.weight.shape[1], device=mean.device).index_add_(0, class_of, solved.weight)
    bias = torch.zeros(classes, device=mean.device).index_add_(0, class_of, solved.bias)
    spread = (weight @ statistics.gram.dense() @ weight.T).double()
    count = min(features.axes.shape[1], classes)
    directions = torch.linalg.eigh(spread).eigenvectors[:, -count:].float()  # in which scores vary most
    _fill(cast("Any", vit), features, weight, bias, directions, mean)


@torch.no_grad()
def _fill(vit: Any, features: SolvedFeatures, weight: Tensor, bias: Tensor, directions: Tensor, mean: Tensor) -> None:
    """Append and fill the blocks; see the module docstring."""
    width = features.axes.shape[0]
    amplification = min(_LARGEST, _AMPLIFICATION * float(features.size))
    gain = _SCORE_GAIN * width**0.5
    axes = features.axes[:, : directions.shape[1]]
    write = amplification * gain * axes @ directions.T  # (C, classes): scores -> token
    project = features.projector
    first = _silent_block(vit, features)
    linear = (weight[:, :width] / features.scales[0]) @ project
    pair = torch.eye(width, device=axes.device)
    constant = bias - linear @ mean
    passed = amplification * project + write @ linear
    first.mlp.fc1.weight[: 2 * width] = torch.cat([pair, -pair])
    first.mlp.fc2.weight[:, : 2 * width] = torch.cat([passed, -passed], dim=1)
    first.mlp.fc2.bias.copy_(write @ constant)
    blocks, start, room = [first], 0, slice(2 * width, features.hidden)
    while start < features.projection.shape[0]:
        count = room.stop - room.start
        rows = slice(start, start + count)
        kind = 0 if start == 0 and features.first else 1
        block = first if kind == 0 else _silent_block(vit, features)
        if block is not first:
            blocks.append(block)
        scaled = features.projection[rows] / features.scales[kind]
        block.mlp.fc1.weight[room] = scaled @ project
        block.mlp.fc1.bias[room] = -scaled @ features.means[kind]
        block.mlp.fc2.weight[:, room] = write @ weight[:, width + rows.start : width + rows.stop]
        start, room = rows.stop, slice(0, features.hidden)
    vit.blocks = nn.Sequential(*vit.blocks, *blocks)
    vit.norm.weight.fill_(1)
    vit.norm.bias.zero_()
    fill_classifier(vit, LinearHead(directions @ axes.T / gain, torch.zeros_like(bias)))


def _silent_block(vit: Any, features: SolvedFeatures) -> Any:
    """Return a block of the model's kind that passes its input on unchanged."""
    block = copy.deepcopy(vit.blocks[-1]).to(features.axes.device)
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    block.norm2.weight.fill_(1)
    block.norm2.bias.zero_()
    for scale in ("ls1", "ls2"):
        gamma = getattr(getattr(block, scale), "gamma", None)
        if gamma is not None:
            gamma.fill_(1)
    return block
