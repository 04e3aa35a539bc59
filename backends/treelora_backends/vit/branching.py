"""What a session does for branches: kind of its data, images kept out, and the branch's sums.

Symbols as in ``session``; ``B`` blocks, ``F`` features of a view, ``M`` of them read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from treelora_backends.kept import KeptRows
from treelora_backends.vit.branch import FIRST_LOOK, BranchHead, BranchSettings
from treelora_backends.vit.trunk import Entering, Features
from treelora_cli import seeds
from treelora_cli.algorithm.kinds import TokenMoments
from treelora_cli.backend.runtime import sent
from treelora_cli.heads.ridge import FeatureMap, ridge_share
from treelora_cli.heads.two_views import Examples, Judgement, judge

if TYPE_CHECKING:
    from treelora_backends.kept import Keeping
    from treelora_backends.vit.images import ImageTask
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_backends.vit.shared_head import SharedHead
    from treelora_backends.vit.trunk import Trunk
    from treelora_cli.backend.contract import Tensors
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import Memory
    from treelora_cli.config import Config

_KEPT_OUT = 5
"""One image of a class in so many is kept out of the adapter's training until it is judged."""
_FEWEST_KEPT_OUT = 8
"""With fewer images kept out nothing is judged."""
_JUDGED_AFTER = 1 / 3
"""Share of the epochs after which an adapter is judged; it goes on to learn from every image. Kept out to the end they
cost a branch of hand signs 7 points, kept out for half of the epochs 2 (recipes/RESULTS.md)."""
_MOST_JUDGED = 2000
"""Images that take part in a judgement, at most: it solves a system as large."""


class MomentSums:
    """Sums of a task's frozen tokens by class, after every block; see ``kinds.TokenMoments``.

    Args:
        trunk: The network.
        classes: Of the task.
        device: Of the network.
    """

    def __init__(self, trunk: Trunk, classes: int, device: torch.device) -> None:
        self.trunk = trunk
        shape = (classes, len(trunk.blocks), trunk.width)
        self.sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)

    @contextmanager
    def listening(self, labels: Tensor) -> Iterator[None]:
        """Count in what passes through the blocks meanwhile, images of these labels (n,)."""

        def counted(index: int, tokens: Tensor) -> None:
            patches = tokens.detach()[:, self.trunk.prefix_tokens :].float()  # (n, L, C)
            self.sums[:, index].index_add_(0, labels, patches.sum(dim=1).double())
            self.squares[:, index].index_add_(0, labels, patches.square().sum(dim=1).double())
            if index == 0:
                self.counts.index_add_(0, labels, torch.full_like(labels, patches.shape[1], dtype=torch.float64))

        hooks = [
            block.register_forward_hook(lambda _m, _i, out, index=index: counted(index, out))
            for index, block in enumerate(self.trunk.blocks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class OwnImages(Protocol):
    """What a session lends: its images, and what it knows of them; see ``VitSession``."""

    base: LoadedVit
    task: ImageTask
    memory: Memory
    runtime: Runtime
    device: torch.device
    config: Config
    seed: int
    views: int
    own: Tensor
    labels: Tensor
    shared_head: SharedHead
    at_once: int
    keeping: Keeping
    class_weights: Tensor | None

    def entering(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return the tokens before the cut of chosen views, (B, L, C)."""


@dataclass(frozen=True)
class CountedIn:
    """What a task leaves in its branch; nothing where it has none.

    Attributes:
        name: The branch.
        stored: What the branch stores.
        columns: What the task stores.
        pooled: What the network with the branch's adapter pools of each image as it is, (n, C).
    """

    name: str | None = None
    stored: Tensors = field(default_factory=dict)
    columns: Tensors = field(default_factory=dict)
    pooled: Tensor | None = None


class Branching:
    """The branch of one task while it is learned.

    Args:
        session: The task's.
    """

    def __init__(self, session: OwnImages) -> None:
        self.session = session
        self.trunk = session.base.trunk
        self.settings = BranchSettings.of(self.trunk, session.config, session.device)
        self.moments = MomentSums(self.trunk, len(session.task.labels), session.device)
        self.kept_out = torch.zeros(len(session.own), dtype=torch.bool)
        self.name: str | None = None
        self.asks = False
        self.joined = False
        self.judgement: Judgement | None = None
        self._judged = False
        self._frozen: KeptRows | None = None

    def keep(self, rows: Tensor, view: int, layered: Tensor) -> None:
        """Keep the frozen features of one view of some images, (n, F)."""
        views = self.session.views
        if self._frozen is None:
            self._frozen = KeptRows(len(self.session.own) * views, layered.shape[1:], self.session.keeping)
        self._frozen.write(rows * views + view, layered)

    def token_moments(self) -> TokenMoments:
        """Return the sums over all processes."""
        total = self.session.runtime.sum
        sums = (total(self.moments.sums), total(self.moments.squares), total(self.moments.counts))
        return TokenMoments(*(np.asarray(one.cpu().numpy(), dtype=np.float64) for one in sums))

    @property
    def trains(self) -> bool:
        """Whether the task trains an adapter."""
        return not self.joined

    def open(self, name: str, ask: bool) -> None:
        """Try a branch; ``ask`` one image in five of each class, kept out of the first epochs, whether it pays."""
        self.name, self.asks = name, ask
        if not ask:
            return
        generator = torch.Generator().manual_seed(seeds.of_kept_out(self.session.seed))
        labels = self.session.labels.cpu()
        for one in labels.unique().tolist():
            rows = (labels == one).nonzero().squeeze(1)
            chosen = rows[torch.randperm(len(rows), generator=generator)[: len(rows) // _KEPT_OUT]]
            self.kept_out[chosen] = True

    def trained_rows(self, epoch: int) -> Tensor:
        """Return which of this process's images an epoch trains on; judges the adapter first, when it is time."""
        epochs = self.session.config.train.epochs
        assert epochs is not None
        if self.asks and not self._judged and epoch >= max(1, round(epochs * _JUDGED_AFTER)):
            self._judge()
        if self.asks and not self._judged:
            return (~self.kept_out).nonzero().squeeze(1)
        return torch.arange(len(self.session.own))

    def state(self) -> Tensors:
        """Return what an interrupted task continues from, beyond the parameters."""
        found = self.judgement
        if not self._judged:
            return {}
        known = [] if found is None else [found.gain, found.asked, found.sharpness, float(found.count)]
        return {"branch.judgement": torch.tensor(known, dtype=torch.float64)}

    def load_state(self, saved: Tensors) -> None:
        """Continue from ``state``."""
        known = saved.get("branch.judgement")
        self._judged = known is not None
        if known is not None and len(known):
            gain, asked, sharpness, count = known.tolist()
            self.judgement = Judgement(gain, asked, sharpness, int(count))

    def join(self, name: str | None) -> None:
        """Train nothing: the task belongs to a branch, or to the frozen features."""
        self.name, self.joined = name, True

    @torch.no_grad()
    def finish(self) -> CountedIn:
        """Count the task into its branch, with the branch's adapter in the slot."""
        if self.name is None:
            return CountedIn()
        if self.asks and not self._judged:
            self._judge()
        if self.asks and (self.judgement is None or not self.judgement.pays):
            return CountedIn()
        pooled: list[Tensor] = []
        seen = self._both_views(pooled)
        if self.joined:
            head = BranchHead.restore(self.session.memory.branch(self.name), self.settings, self.session.runtime)
        else:
            head = BranchHead(self.settings, self.session.runtime)
            first = list(islice(seen, -(-min(len(self.session.own), FIRST_LOOK) // self.session.at_once)))
            head.standardise(torch.cat([views for views, _ in first]))
            seen = chain(first, seen)
            if self.judgement is not None:
                head.sharpness = self.judgement.sharpness
        head.learn(seen, len(self.session.task.labels), self.session.class_weights)
        return CountedIn(self.name, head.to_tensors(), head.task_tensors(), torch.cat(pooled))

    def _both_views(self, pooled: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield frozen and adapted features side by side, (n, 2 M), and labels (n,) of every view, plain ones first.

        What the network pools of the plain ones is put into ``pooled``, (n, C) each.
        """
        session = self.session
        for view in range(session.views):
            for chunk in torch.arange(len(session.own)).split(session.at_once):
                frozen, adapted = self._seen(chunk, view)
                if view == 0:
                    pooled.append(adapted.pooled)
                yield self.settings.views(frozen, adapted.layered), session.labels[sent(chunk, session.device)]

    def _seen(self, rows: Tensor, view: int) -> tuple[Tensor, Features]:
        """Return the frozen features of one view of some images, (n, F), and what the network says of it now."""
        assert self._frozen is not None
        which = torch.full_like(rows, view)
        frozen = self._frozen.read(rows * self.session.views + which).float()
        tokens = self.session.entering(rows, which)
        with self.session.runtime.autocast():
            return frozen, self.trunk.after(Entering(tokens, frozen[:, : self.trunk.early_width]))

    @torch.no_grad()
    def _judge(self) -> None:
        """Judge by the plain views; not with too few images kept out, as where classes have hardly any."""
        self._judged = True
        session, runtime = self.session, self.session.runtime
        generator = torch.Generator().manual_seed(session.seed)
        most = min(len(session.own), _MOST_JUDGED // runtime.accelerator.num_processes)
        chosen = torch.randperm(len(session.own), generator=generator)[: runtime.smallest(most)]
        out = runtime.concatenate(self.kept_out[chosen].to(session.device).float()) > 0
        if int(out.sum()) < _FEWEST_KEPT_OUT or bool(out.all()):
            return
        seen = [self._seen(rows, 0) for rows in chosen.split(session.at_once)]
        frozen = runtime.concatenate(torch.cat([one for one, _ in seen]))
        views = runtime.concatenate(torch.cat([self.settings.views(one, now.layered) for one, now in seen]))
        labels = runtime.concatenate(session.labels[chosen.to(session.device)])
        plain = cast("Any", session.shared_head.features).plain(frozen)
        both = FeatureMap.fit(views, self.settings.random, self.settings.seed, lambda one: one)(views)
        count = float((~out).sum())
        ridges = (ridge_share(self.settings.ridge, plain.shape[1], count), self.settings.share(count))
        classes = len(session.task.labels)
        self.judgement = judge(Examples(plain, labels, out), Examples(both, labels, out), ridges, classes)
