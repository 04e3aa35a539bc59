"""Prompt-based contenders on a frozen timm vision transformer: L2P and DualPrompt, with a growing linear head.

Sources: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022 (L2P); Wang et al., "DualPrompt:
Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022.

Symbols: ``B`` images, ``L`` tokens, ``C`` width, ``M`` prompts of a pool, ``P`` tokens of a prompt, ``h`` attention
heads.

Both ask the frozen network first: ``q(x)`` is its class token after the last norm. A prompt has a key ``k``, and the
surrogate loss of both draws chosen keys towards the images that chose them:

    loss = cross-entropy over the task's own classes + pull * mean over images of sum over chosen keys (1 - cos(q, k))

Scores of all classes seen so far come from one linear head whose earlier rows are frozen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

_CHUNK = 128
"""Images run at a time where no gradient is needed."""


@dataclass(frozen=True)
class PromptSettings:
    """Settings of both methods; the defaults are those of the papers where they give them.

    Attributes:
        epochs: Passes over a task.
        batch_size: Images a step.
        lr: Of Adam, constant.
        pull: Weight of the key term (L2P: lambda 0.5; DualPrompt: 1).
        seed: Of the initial prompts, keys and head, and of the order of images.
        pool: L2P: prompts in the pool.
        chosen: L2P: prompts chosen for an image.
        prompt_length: L2P: tokens of a prompt.
        general_length: DualPrompt: tokens of the G-prompt, one for all tasks.
        general_blocks: DualPrompt: blocks that hold it, from 0.
        expert_length: DualPrompt: tokens of a task's E-prompt.
        expert_blocks: DualPrompt: blocks that hold it.
    """

    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.005
    pull: float = 0.5
    seed: int = 0
    pool: int = 10
    chosen: int = 5
    prompt_length: int = 5
    general_length: int = 5
    general_blocks: tuple[int, ...] = (0, 1)
    expert_length: int = 20
    expert_blocks: tuple[int, ...] = (2, 3, 4)


class PromptLearner(ABC):
    """What both methods share: queries, the head, the loop, scores.

    Args:
        vit: A timm transformer with a class token; frozen here and left in evaluation mode.
        settings: See ``PromptSettings``.
    """

    def __init__(self, vit: nn.Module, settings: PromptSettings) -> None:
        self.vit = cast("Any", vit)
        if getattr(self.vit, "cls_token", None) is None:
            raise ValueError("prompts need a transformer with a class token")
        self.vit.eval().requires_grad_(False)
        self.settings = settings
        self.width = int(self.vit.embed_dim)
        self.device = next(vit.parameters()).device
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.heads: list[nn.Linear] = []

    def train(self, images: Tensor, labels: Tensor, classes: int) -> float:
        """Learn a task.

        Args:
            images: Normalised as the network expects, (n, 3, H, W).
            labels: Within the task, from 0, int64 (n,).
            classes: Of the task.

        Returns:
            Mean loss over the last epoch.
        """
        self._begin()
        head = nn.Linear(self.width, classes, device=self.device)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=self.generator))
        self.heads.append(head)
        queries = self._queries(images)
        parameters = [*self._trained(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.settings.lr)
        losses: list[Tensor] = []
        for _ in range(self.settings.epochs):
            losses = []
            for rows in torch.randperm(len(images), generator=self.generator).split(self.settings.batch_size):
                features, distance = self._prompted(images[rows].to(self.device), queries[rows], training=True)
                fit = nn.functional.cross_entropy(head(features), labels[rows].to(self.device))
                loss = fit + self.settings.pull * distance
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        head.requires_grad_(False)
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def scores(self, images: Tensor) -> Tensor:
        """Return the logits of all classes in order of arrival, (n, classes), without being told the task."""
        parts = []
        for chunk in images.split(_CHUNK):
            features, _ = self._prompted(chunk.to(self.device), self._queries(chunk), training=False)
            parts.append(torch.cat([head(features) for head in self.heads], dim=1).cpu())
        return torch.cat(parts)

    def kept_bytes(self) -> int:
        """Return the bytes of prompts and keys, heads aside."""
        return sum(one.nbytes for one in self._kept())

    # -- what each method says ------------------------------------------------------------------------

    @abstractmethod
    def _begin(self) -> None:
        """Prepare for one more task."""

    @abstractmethod
    def _trained(self) -> list[nn.Parameter]:
        """Prompts and keys that the current task trains."""

    @abstractmethod
    def _kept(self) -> list[nn.Parameter]:
        """All prompts and keys."""

    @abstractmethod
    def _prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Features (B, C) of the prompted network and the mean distance of queries to their chosen keys."""

    # -- the frozen network ---------------------------------------------------------------------------

    @torch.no_grad()
    def _queries(self, images: Tensor) -> Tensor:
        """``q(x)`` of images (n, 3, H, W), (n, C)."""
        parts = [self.vit.forward_features(chunk.to(self.device))[:, 0] for chunk in images.split(_CHUNK)]
        return torch.cat(parts)

    def _embedded(self, images: Tensor) -> Tensor:
        """Tokens before the first block, (B, L, C)."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        return cast("Tensor", self.vit.norm_pre(self.vit.patch_drop(tokens)))

    def _drawn(self, *shape: int) -> nn.Parameter:
        """New values, uniform in [-1, 1]."""
        return nn.Parameter((torch.rand(shape, generator=self.generator) * 2 - 1).to(self.device))


class L2P(PromptLearner):
    """A pool of prompts; each image brings those whose keys are nearest to it, put before its tokens.

    Source: L2P eq. 3 to 5. The features are the mean of the outputs at the prompts' places. Prompts are chosen per
    image; the authors' code may let a batch vote while training, which is not done here.
    """

    def __init__(self, vit: nn.Module, settings: PromptSettings) -> None:
        super().__init__(vit, settings)
        if not 1 <= settings.chosen <= settings.pool:
            raise ValueError(f"chosen prompts: expected 1 to {settings.pool}, got {settings.chosen}")
        self.keys = self._drawn(settings.pool, self.width)
        self.prompts = self._drawn(settings.pool, settings.prompt_length, self.width)

    def _begin(self) -> None:
        """One pool serves all tasks."""

    def _trained(self) -> list[nn.Parameter]:
        return [self.keys, self.prompts]

    def _kept(self) -> list[nn.Parameter]:
        return [self.keys, self.prompts]

    def _prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        distances = _distances(queries, self.keys)  # (B, M)
        nearest, places = distances.topk(self.settings.chosen, dim=1, largest=False)
        prompts = self.prompts[places].flatten(1, 2)  # (B, chosen * P, C)
        tokens = torch.cat([prompts, self._embedded(images)], dim=1)
        for block in self.vit.blocks:
            tokens = block(tokens)
        tokens = self.vit.norm(tokens)
        return tokens[:, : prompts.shape[1]].mean(dim=1), nearest.sum(dim=1).mean()


class DualPrompt(PromptLearner):
    """A general prompt for all tasks and an expert prompt for each, as prefixes of attention's keys and values.

    Source: DualPrompt eq. 4 to 8: prefix tuning puts the first half of a prompt before the keys and the second
    before the values. In training the task's own E-prompt is used; later the one whose key is nearest.
    """

    def __init__(self, vit: nn.Module, settings: PromptSettings) -> None:
        super().__init__(vit, settings)
        depth = len(self.vit.blocks)
        if max((*settings.general_blocks, *settings.expert_blocks), default=0) >= depth:
            raise ValueError(f"prompted blocks: expected 0 to {depth - 1}")
        if set(settings.general_blocks) & set(settings.expert_blocks):
            raise ValueError("prompted blocks: a block holds the general or the expert prompt, not both")
        # (blocks, key and value, P, C)
        self.general = self._drawn(len(settings.general_blocks), 2, settings.general_length, self.width)
        self.experts: list[nn.Parameter] = []
        self.keys: list[nn.Parameter] = []

    def _begin(self) -> None:
        for old in (*self.experts, *self.keys):
            old.requires_grad_(False)
        blocks = len(self.settings.expert_blocks)
        self.experts.append(self._drawn(blocks, 2, self.settings.expert_length, self.width))
        self.keys.append(self._drawn(self.width))

    def _trained(self) -> list[nn.Parameter]:
        return [self.general, self.experts[-1], self.keys[-1]]

    def _kept(self) -> list[nn.Parameter]:
        return [self.general, *self.experts, *self.keys]

    def _prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        distances = _distances(queries, torch.stack(list(self.keys)))  # (B, tasks)
        own = len(self.keys) - 1
        chosen = torch.full((len(images),), own, device=distances.device) if training else distances.argmin(dim=1)
        experts = torch.stack(list(self.experts))[chosen]  # (B, blocks, 2, P, C)
        tokens = self._embedded(images)
        for index, block in enumerate(self.vit.blocks):
            if index in self.settings.general_blocks:
                prefix = self.general[self.settings.general_blocks.index(index)].expand(len(images), -1, -1, -1)
            elif index in self.settings.expert_blocks:
                prefix = experts[:, self.settings.expert_blocks.index(index)]
            else:
                tokens = block(tokens)
                continue
            tokens = prefixed_block(block, tokens, prefix)
        distance = distances.gather(1, chosen[:, None]).mean()
        return self.vit.norm(tokens)[:, 0], distance


def prefixed_block(block: nn.Module, tokens: Tensor, prefix: Tensor) -> Tensor:
    """Run a timm block with a prefix before the keys and values of its attention.

    Args:
        block: Of timm's vision transformer, in evaluation mode.
        tokens: (B, L, C).
        prefix: Keys and values, (B, 2, P, C); P may be 0.
    """
    part = cast("Any", block)
    attention = part.attn
    if getattr(attention, "gate", None) is not None:
        raise ValueError("prefixes do not fit gated attention")
    batch, length, _ = tokens.shape
    heads = attention.num_heads
    qkv = attention.qkv(part.norm1(tokens)).reshape(batch, length, 3, heads, -1)  # (B, L, 3, h, C / h)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, L, C / h) each
    before = prefix.reshape(batch, 2, prefix.shape[2], heads, q.shape[-1]).permute(1, 0, 3, 2, 4)  # (2, B, h, P, C / h)
    q, k = attention.q_norm(q), attention.k_norm(k)
    k, v = torch.cat([before[0], k], dim=2), torch.cat([before[1], v], dim=2)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, h, L, C / h)
    mixed = attention.norm(mixed.transpose(1, 2).reshape(batch, length, -1))
    tokens = tokens + part.ls1(attention.proj(mixed))
    return cast("Tensor", tokens + part.ls2(part.mlp(part.norm2(tokens))))


def _distances(queries: Tensor, keys: Tensor) -> Tensor:
    """``1 - cos`` of queries (B, C) and keys (M, C): (B, M), in [0, 2]."""
    return 1 - nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(keys, dim=1).T
