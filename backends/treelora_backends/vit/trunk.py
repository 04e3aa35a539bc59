"""A timm vision transformer cut before its first adapted block.

What lies before the cut is the same for every task, so its result can be kept and shared; what lies after
it is run with or without an adapter. Features are read from the last blocks on the way.

Symbols: ``B`` images, ``L`` tokens, ``C`` width, ``F`` feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from treelora_cli.heads.ridge import LinearHead


@dataclass(frozen=True)
class Entering:
    """Activations before the first adapted block.

    Attributes:
        tokens: (B, L, C).
        early: Features of feature blocks before the cut, (B, F_early); F_early may be 0.
    """

    tokens: Tensor
    early: Tensor


@dataclass(frozen=True)
class Features:
    """What the network says of an image.

    Attributes:
        pooled: Input of a linear head, as the model itself pools, (B, C).
        layered: Patches of the last blocks and, last, the class token, (B, F).
        token: First token before the last norm, (B, C).
    """

    pooled: Tensor
    layered: Tensor
    token: Tensor


PLAIN_ATTENTION_TOKENS = 128
"""Tokens up to which attention is trained as plain matrix products on a CPU in bf16: for so few the backward pass of
torch's fused attention takes a third of a step (recipes/RESULTS.md); for many the scores would take much memory."""
FEATURE_LIMIT = 3072
"""Features F up to which blocks are added; the head's statistics grow with their square."""


def normalised(tokens: Tensor) -> Tensor:
    """Return tokens (..., C) with mean 0 and deviation 1, in float32; as timm's LayerNorm without weights."""
    return nn.functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


class _Reached(Exception):
    """The forward pass arrived at the cut."""


class Trunk:
    """Runs a timm transformer in two parts.

    Args:
        vit: The timm model, without classifier; its blocks may hold LoRA layers.
        cut: Index of the first adapted block.
        feature_blocks: How many of the last blocks are read as features; ``None`` for as many as make at most
            ``FEATURE_LIMIT`` features, at least one, and not the first block, which says little.
    """

    def __init__(self, vit: nn.Module, cut: int, feature_blocks: int | None) -> None:
        self.vit = vit
        self.blocks = cast("Sequence[nn.Module]", vit.blocks)
        self.cut = cut
        self.prefix_tokens = int(getattr(vit, "num_prefix_tokens", 0))
        self.has_class_token = getattr(vit, "cls_token", None) is not None
        if feature_blocks is None:
            most = (FEATURE_LIMIT - self._token_features) // self._block_features
            feature_blocks = max(1, min(most, len(self.blocks) - 1))
        self.first_feature = max(0, len(self.blocks) - feature_blocks)
        self._block_arguments: list[dict[str, Any]] | None = None
        self._pools_class_token: bool | None = None

    @property
    def width(self) -> int:
        """Width C of the network."""
        return int(cast("int", self.vit.num_features))

    @property
    def feature_width(self) -> int:
        """Width F of the layered features."""
        return self._block_features * (len(self.blocks) - self.first_feature) + self._token_features

    @property
    def mean_columns(self) -> tuple[int, ...]:
        """Which of the layered features are mean patches or the class token, in order."""
        blocks = range(0, self.feature_width - self._token_features, self._block_features)
        means = (column for start in blocks for column in range(start, start + self.width))
        return (*means, *range(self.feature_width - self._token_features, self.feature_width))

    @property
    def early_width(self) -> int:
        """Features of blocks before the cut, which an adapter leaves as they are."""
        return self._block_features * max(0, self.cut - self.first_feature)

    @property
    def _block_features(self) -> int:
        return 2 * self.width

    @property
    def _token_features(self) -> int:
        return self.width if self.has_class_token else 0

    def before(self, images: Tensor) -> Entering:
        """Run everything before the cut: (B, 3, H, W) -> tokens (B, L, C)."""
        if self._block_arguments is None:
            self._block_arguments = self._record_block_arguments(images[:1])
        early: list[Tensor] = []
        reached: list[Tensor] = []
        hooks = [
            self.blocks[index].register_forward_hook(lambda _m, _i, out: early.append(self._read(out)))
            for index in range(self.first_feature, self.cut)
        ]

        def stop(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            reached.append(inputs[0])
            raise _Reached

        hooks.append(self.blocks[self.cut].register_forward_pre_hook(stop))
        try:
            cast("Any", self.vit).forward_features(images)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        features = torch.cat(early, dim=1) if early else images.new_zeros(len(images), 0)
        return Entering(reached[0], features.float())

    def after(self, cut: Entering) -> Features:
        """Run the adapted blocks and pool."""
        assert self._block_arguments is not None, "before() runs first"
        tokens, late = cut.tokens, []
        for index in range(self.cut, len(self.blocks)):
            tokens = self.blocks[index](tokens, **self._block_arguments[index])
            if index >= self.first_feature:
                late.append(self._read(tokens))
        if self.has_class_token:
            late.append(normalised(tokens[:, 0]))
        return Features(self._pool(tokens), torch.cat([cut.early, *late], dim=1), tokens[:, 0].float())

    def pooled(self, tokens: Tensor) -> Tensor:
        """Run the adapted blocks on the tokens before the cut and pool, (B, L, C) -> (B, C): ``after`` does more."""
        assert self._block_arguments is not None, "before() runs first"
        alone = self._class_token_alone(tokens)
        with self.attention(tokens.shape[1], tokens.device):
            for index in range(self.cut, len(self.blocks) - alone):
                tokens = self.blocks[index](tokens, **self._block_arguments[index])
            return self._pool(self._last_block_of_class_token(tokens) if alone else tokens)

    def compilable(self) -> list[nn.Module]:
        """Return what ``pooled`` runs, in parts that are each called as they are."""
        adapted = list(self.blocks)[self.cut :]
        last = cast("Any", adapted[-1])
        return [*adapted[:-1], last.attn, last.mlp] if self._pools_class_token else adapted

    def whole(self, images: Tensor) -> Tensor:
        """Run the whole network and pool, as the model itself does: (B, 3, H, W) -> (B, C)."""
        vit = cast("Any", self.vit)
        height, width = vit.patch_embed.patch_size
        with self.attention(images.shape[-2] // height * (images.shape[-1] // width), images.device):
            return cast("Tensor", vit.forward_head(vit.forward_features(images), pre_logits=True)).float()

    @contextmanager
    def attention(self, tokens: int, device: torch.device) -> Iterator[None]:
        """Attend by plain matrix products where that trains faster; see ``PLAIN_ATTENTION_TOKENS``."""
        pays = device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        few = tokens <= PLAIN_ATTENTION_TOKENS
        fused = [one for one in self.vit.modules() if getattr(one, "fused_attn", False)] if pays and few else []
        for one in fused:
            one.fused_attn = cast("Any", False)
        try:
            yield
        finally:
            for one in fused:
                one.fused_attn = cast("Any", True)

    def _pool(self, tokens: Tensor) -> Tensor:
        vit = cast("Any", self.vit)
        return cast("Tensor", vit.forward_head(vit.norm(tokens), pre_logits=True)).float()

    def _last_block_of_class_token(self, tokens: Tensor) -> Tensor:
        """Return the tokens before the patches after the last block, (B, prefix, C): no other passes its MLP."""
        assert self._block_arguments is not None
        block = cast("Any", self.blocks[-1])
        attended = block.attn(block.norm1(tokens), **self._block_arguments[-1])
        token = (tokens + block.drop_path1(block.ls1(attended)))[:, : self.prefix_tokens]
        return cast("Tensor", token + block.drop_path2(block.ls2(block.mlp(block.norm2(token)))))

    @torch.no_grad()
    def _class_token_alone(self, tokens: Tensor) -> bool:
        """True when the model pools the class token and its last block is the usual one; found by comparison, once."""
        if self._pools_class_token is None:
            self._pools_class_token = False
            pools_token = getattr(self.vit, "global_pool", "") == "token" and self.prefix_tokens > 0
            if pools_token and isinstance(self.blocks[-1], Block):
                trial = tokens[:1].float()
                with torch.autocast(tokens.device.type, enabled=False):
                    whole = self.pooled(trial)
                    self._pools_class_token = True
                    alone = self.pooled(trial)
                self._pools_class_token = whole.shape == alone.shape and torch.allclose(whole, alone, atol=1e-4)
        return self._pools_class_token

    def _read(self, tokens: Tensor) -> Tensor:
        """Read a block's output (B, L, C): mean and deviation of the normalised patches, (B, 2C)."""
        patches = normalised(tokens[:, self.prefix_tokens :])
        mean, count = patches.mean(dim=1), patches.shape[1]
        spread = (patches.square().sum(dim=1) - count * mean.square()).clamp(min=0)  # faster than std, near enough
        return torch.cat([mean, (spread / max(1, count - 1)).sqrt()], dim=1)

    def _record_block_arguments(self, image: Tensor) -> list[dict[str, Any]]:
        """Find what the model passes to each block besides the tokens, such as rotary embeddings."""
        found: list[dict[str, Any]] = []

        def record(_module: nn.Module, _inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            found.append(keywords)

        hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in self.blocks]
        try:
            with torch.no_grad():
                cast("Any", self.vit).forward_features(image)
        finally:
            for hook in hooks:
                hook.remove()
        return found


@torch.no_grad()
def fill_classifier(vit: nn.Module, solved: LinearHead) -> None:
    """Put a linear head into the model's classifier; a distilled model averages two, which get the same."""
    found = cast("Any", vit).get_classifier()
    for layer in found if isinstance(found, tuple) else (found,):
        layer.weight.copy_(solved.weight)
        layer.bias.copy_(solved.bias)
