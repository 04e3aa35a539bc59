"""Prompts on a frozen timm vision transformer, L2P's and DualPrompt's, and a task learned through them.

Sources: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022 (L2P); Wang et al., "DualPrompt:
Complementary Prompting for Rehearsal-free Continual Learning", ECCV 2022.

Symbols: ``n`` images of a task, ``B`` of a batch, ``V`` views, ``L`` tokens, ``C`` width, ``M`` prompts of a pool,
``P`` tokens of a prompt, ``h`` attention heads.

Both ask the frozen network first: ``q(x)`` is its class token after the last norm. A prompt has a key ``k``, and the
surrogate loss of both draws chosen keys towards the images that chose them:

    loss = cross-entropy over the task's own classes + pull * mean over images of sum over chosen keys (1 - cos(q, k))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from treelora_backends.vit.contenders.plain import CHUNK, VIEWS, PlainSession
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import try_gradient
from treelora_cli.backend.values import Learned
from treelora_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit


# -- prompts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class L2PSettings:
    """The paper's for CIFAR-100.

    Attributes:
        pool: Prompts in the pool.
        chosen: Prompts chosen for an image.
        length: Tokens of a prompt.
        pull: Weight of the key term, the paper's lambda.
    """

    pool: int = 10
    chosen: int = 5
    length: int = 5
    pull: float = 0.5


@dataclass(frozen=True)
class DualPromptSettings:
    """The paper's.

    Attributes:
        general_length: Tokens of the G-prompt, one for all tasks.
        general_blocks: Blocks that hold it, from 0.
        expert_length: Tokens of a task's E-prompt.
        expert_blocks: Blocks that hold it.
        pull: Weight of the key term.
    """

    general_length: int = 5
    general_blocks: tuple[int, ...] = (0, 1)
    expert_length: int = 20
    expert_blocks: tuple[int, ...] = (2, 3, 4)
    pull: float = 1.0

    @classmethod
    def of_depth(cls, depth: int) -> DualPromptSettings:
        """Return the paper's choice of blocks: the first two, then three; fewer where a network has fewer than five."""
        general = min(2, depth - 1)
        return cls(general_blocks=tuple(range(general)), expert_blocks=tuple(range(general, min(general + 3, depth))))


class PromptedVit(ABC):
    """What both methods share: the frozen network, its queries, and values to start from.

    Args:
        vit: A timm transformer in evaluation mode; its weights are left alone.
        pull: Weight of the key term.
        seed: Of initial prompts and keys.

    Raises:
        ModelError: The network has no class token, or blocks that a prompt does not fit.
    """

    def __init__(self, vit: nn.Module, pull: float, seed: int) -> None:
        self.vit = cast("Any", vit)
        _check_architecture(self.vit)
        self.pull = pull
        self.width = int(self.vit.embed_dim)
        self.device = next(vit.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def query(self, images: Tensor) -> Tensor:
        """Return ``q(x)`` of normalised images (B, 3, H, W): (B, C)."""
        return cast("Tensor", self.vit.forward_features(images)[:, 0]).float()

    def kept_bytes(self) -> int:
        """Return the bytes of prompts and keys."""
        return sum(one.nbytes for one in self.kept())

    # -- what each method says ------------------------------------------------------------------------

    @abstractmethod
    def begin(self) -> None:
        """Prepare for one more task."""

    @abstractmethod
    def trained(self) -> list[nn.Parameter]:
        """Return the prompts and keys that the current task trains."""

    @abstractmethod
    def kept(self) -> list[nn.Parameter]:
        """Return all prompts and keys."""

    @abstractmethod
    def prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Run the network with the prompts that ``queries`` choose.

        Args:
            images: Normalised, (B, 3, H, W).
            queries: ``q(x)`` of the same images, (B, C) float32.
            training: The current task is known to be the images'.

        Returns:
            Features for the linear head (B, C), and the key term, a scalar.
        """

    # -- parts ----------------------------------------------------------------------------------------

    def _embedded(self, images: Tensor) -> Tensor:
        """Tokens before the first block, (B, L, C)."""
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        return cast("Tensor", self.vit.norm_pre(self.vit.patch_drop(tokens)))

    def _drawn(self, *shape: int) -> nn.Parameter:
        """New values, uniform in [-1, 1]."""
        return nn.Parameter((torch.rand(shape, generator=self.generator) * 2 - 1).to(self.device))


class L2P(PromptedVit):
    """A pool of prompts; each image brings those whose keys are nearest to it, put before its tokens.

    Source: L2P eq. 3 to 5. The features are the mean of the outputs at the prompts' places. Prompts are chosen per
    image; the authors' code may let a batch vote while training, which is not done here.
    """

    def __init__(self, vit: nn.Module, settings: L2PSettings, seed: int) -> None:
        super().__init__(vit, settings.pull, seed)
        if not 1 <= settings.chosen <= settings.pool:
            raise ValueError(f"chosen prompts: expected 1 to {settings.pool}, got {settings.chosen}")
        self.chosen = settings.chosen
        self.keys = self._drawn(settings.pool, self.width)
        self.prompts = self._drawn(settings.pool, settings.length, self.width)

    def begin(self) -> None:
        """One pool serves all tasks."""

    def trained(self) -> list[nn.Parameter]:
        """Return the pool."""
        return [self.keys, self.prompts]

    def kept(self) -> list[nn.Parameter]:
        """Return the pool."""
        return [self.keys, self.prompts]

    def prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Put the chosen prompts first; see ``PromptedVit``."""
        nearest, places = _distances(queries, self.keys).topk(self.chosen, dim=1, largest=False)  # (B, chosen)
        prompts = self.prompts[places].flatten(1, 2)  # (B, chosen * P, C)
        tokens = torch.cat([prompts, self._embedded(images)], dim=1)
        for block in self.vit.blocks:
            tokens = block(tokens)
        tokens = self.vit.norm(tokens)
        return tokens[:, : prompts.shape[1]].mean(dim=1), nearest.sum(dim=1).mean()


class DualPrompt(PromptedVit):
    """A general prompt for all tasks and an expert prompt for each, as prefixes of attention's keys and values.

    Source: DualPrompt eq. 4 to 8: prefix tuning puts the first half of a prompt before the keys and the second
    before the values. In training the task's own E-prompt is used; later the one whose key is nearest.
    """

    def __init__(self, vit: nn.Module, settings: DualPromptSettings, seed: int) -> None:
        super().__init__(vit, settings.pull, seed)
        depth = len(self.vit.blocks)
        if max((*settings.general_blocks, *settings.expert_blocks), default=0) >= depth:
            raise ValueError(f"prompted blocks: expected 0 to {depth - 1}")
        if set(settings.general_blocks) & set(settings.expert_blocks):
            raise ValueError("prompted blocks: a block holds the general or the expert prompt, not both")
        self.settings = settings
        # (blocks, key and value, P, C)
        self.general = self._drawn(len(settings.general_blocks), 2, settings.general_length, self.width)
        self.experts: list[nn.Parameter] = []
        self.keys: list[nn.Parameter] = []

    def begin(self) -> None:
        """Draw the task's expert and key; the earlier ones stay as they are."""
        for old in (*self.experts, *self.keys):
            old.requires_grad_(False)
        blocks = len(self.settings.expert_blocks)
        self.experts.append(self._drawn(blocks, 2, self.settings.expert_length, self.width))
        self.keys.append(self._drawn(self.width))

    def trained(self) -> list[nn.Parameter]:
        """Return the general prompt and the task's own expert and key."""
        return [self.general, self.experts[-1], self.keys[-1]]

    def kept(self) -> list[nn.Parameter]:
        """Return the general prompt, all experts and their keys."""
        return [self.general, *self.experts, *self.keys]

    def prompted(self, images: Tensor, queries: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """Put prefixes into the chosen blocks; see ``PromptedVit``."""
        distances = _distances(queries, torch.stack(list(self.keys)))  # (B, tasks)
        own = len(self.keys) - 1
        chosen = torch.full((len(images),), own, device=distances.device) if training else distances.argmin(dim=1)
        # (B, blocks, 2, P, C)
        experts = self.experts[-1].expand(len(images), -1, -1, -1, -1) if training else self._experts(chosen)
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
        return self.vit.norm(tokens)[:, 0], distances.gather(1, chosen[:, None]).mean()

    def _experts(self, chosen: Tensor) -> Tensor:
        return torch.stack(list(self.experts))[chosen]


def prefixed_block(block: nn.Module, tokens: Tensor, prefix: Tensor) -> Tensor:
    """Run a timm block with a prefix before the keys and values of its attention.

    Args:
        block: Of timm's vision transformer, in evaluation mode.
        tokens: (B, L, C).
        prefix: Keys and values, (B, 2, P, C); P may be 0.
    """
    part = cast("Any", block)
    attention = part.attn
    batch, length, _ = tokens.shape
    heads = attention.num_heads
    qkv = attention.qkv(part.norm1(tokens)).reshape(batch, length, 3, heads, -1)  # (B, L, 3, h, C / h)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, L, C / h) each
    before = prefix.reshape(batch, 2, prefix.shape[2], heads, q.shape[-1]).permute(1, 0, 3, 2, 4)  # (2, B, h, P, C / h)
    q, k = attention.q_norm(q), attention.k_norm(k)
    k, v = torch.cat([before[0].to(k.dtype), k], dim=2), torch.cat([before[1].to(v.dtype), v], dim=2)
    mixed = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, h, L, C / h)
    mixed = mixed.transpose(1, 2).reshape(batch, length, -1)  # (B, L, C)
    if hasattr(attention, "norm"):  # timm has it since 1.0.16 or so
        mixed = attention.norm(mixed)
    tokens = tokens + part.ls1(attention.proj(mixed))
    return cast("Tensor", tokens + part.ls2(part.mlp(part.norm2(tokens))))


def _distances(queries: Tensor, keys: Tensor) -> Tensor:
    """``1 - cos`` of queries (B, C) and keys (M, C): (B, M), in [0, 2]; float32, since it decides what is chosen."""
    with torch.autocast(queries.device.type, enabled=False):
        return 1 - nn.functional.normalize(queries, dim=1) @ nn.functional.normalize(keys, dim=1).T


def _check_architecture(vit: Any) -> None:
    if getattr(vit, "cls_token", None) is None:
        raise ModelError(
            "Prompts need a transformer with a class token. Choose another --model or leave the method out."
        )
    for block in vit.blocks:
        attention = getattr(block, "attn", None)
        plain = type(block) is Block and type(attention) is Attention and getattr(attention, "gate", None) is None
        if not plain:
            raise ModelError(
                f"Prompts do not fit this model's blocks ({type(block).__name__}, {type(attention).__name__})."
                " Choose another --model or leave the method out."
            )


# -- a task ----------------------------------------------------------------------------------------


@contextmanager
def bare(base: LoadedVit) -> Iterator[None]:
    """Run the frozen network without its adapter slot, in the chosen arithmetic."""
    with adapters.base_only(base.network), base.runtime.autocast():
        yield


class PromptSession:
    """Meets ``TaskSession``: what is trained are prompts, keys and the classifier's rows, never the adapter slot.

    Args:
        plain: The same tasks without prompts: images, order and classifier.
        prompts: The prompts, ready for the task.
    """

    def __init__(self, plain: PlainSession, prompts: PromptedVit) -> None:
        if plain.augment is not None:
            raise UsageError(
                "train.augment: prompts are chosen by what the frozen network says of each image, looked up once."
                " Leave it out, or leave out l2p and dualprompt."
            )
        if plain.compilation.mode is not None:
            raise UsageError(
                "train.compile: prompts are trained as they are. Leave it out, or leave out l2p and dualprompt."
            )
        self.plain = plain
        self.prompts = prompts
        self.queries: Tensor
        """Of every view, (n, V, C)."""

    @torch.no_grad()
    def prepare(self) -> None:
        """Ask the frozen network once for each view; epochs then look the queries up."""
        base = self.plain.base
        chunks = torch.arange(len(self.plain.labels)).split(CHUNK)
        found = []
        with bare(base):
            for rows in base.runtime.reporter.track(chunks, "Queries", len(chunks)):
                views = (self.plain.images(rows, torch.full_like(rows, view)) for view in range(VIEWS))
                found.append(torch.stack([self.prompts.query(images) for images in views], dim=1))
        self.queries = torch.cat(found)

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """Compute a loss and its gradient through the prompts on one full-sized batch."""
        rows = torch.arange(min(self.plain.batch_size, len(self.plain.labels)))
        try_gradient(
            self.plain.base.runtime, lambda: self._prompted(rows, torch.zeros_like(rows))[0].square().mean(), parameters
        )

    @torch.no_grad()
    def try_forward(self) -> None:
        """Ask for the queries of one full-sized batch."""
        rows = torch.arange(min(self.plain.batch_size, len(self.plain.labels)))
        with bare(self.plain.base):
            self.prompts.query(self.plain.images(rows, torch.zeros_like(rows)))

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield losses of the first plain mini-batches of one shuffle, the same at every call."""
        yield from (self._loss_of_part(*batch) for batch in self.plain.probe_batches(count))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass."""
        return self.plain.steps_per_epoch

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, views) of each step, both (B,), in everyone's order."""
        yield from self.plain.batches(epoch)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy over the tasks' own classes, and the key term."""
        return self.plain.summed(batch, self._loss_of_part, self.parameters())

    def _loss_of_part(self, rows: Tensor, views: Tensor) -> Tensor:
        features, distance = self._prompted(rows, views)
        return self.plain.misfit(features, rows) + self.prompts.pull * distance

    def parameters(self) -> list[nn.Parameter]:
        """Return prompts, keys and the classifier's rows of the tasks' classes."""
        return [*self.prompts.trained(), *self.plain.parameters()]

    def finish(self) -> Learned:
        """Nothing is handed over: the contender reads what it needs."""
        return self.plain.finish()

    def _prompted(self, rows: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, C) float32 and the key term of chosen views."""
        device = self.queries.device
        queries = self.queries[rows.to(device), views.to(device)]
        with bare(self.plain.base):
            features, distance = self.prompts.prompted(self.plain.images(rows, views), queries, training=True)
        return features.float(), distance
