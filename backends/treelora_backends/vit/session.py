"""One image task while it is learned.

The frozen pass does three jobs at once: it fills the shared head's statistics, finds the class means that
the probe's loss needs, and keeps the activations before the first adapted block, so that training starts
there. Each image is seen plain and, by choice, mirrored and changed at random.

Symbols: ``n`` images, ``V`` views, ``L`` tokens, ``C`` width, ``k`` classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from treelora_backends.compiled import Compilation
from treelora_backends.kept import Keeping, KeptRows, each_expected
from treelora_backends.objective import Objective, class_weights, summed_in_parts
from treelora_backends.vit.branching import Branching, CountedIn
from treelora_backends.vit.decoding import expect
from treelora_backends.vit.images import (
    LIKE_THEMSELVES,
    ImageTask,
    chosen_views,
    images_at_once,
    in_parts,
    shuffled_views,
)
from treelora_backends.vit.shared_head import SharedHead, columns_of
from treelora_backends.vit.single import (
    COVARIANCE_RIDGE,
    KINDS,
    NewImages,
    extended_statistics,
    single_network_part,
)
from treelora_cli import seeds
from treelora_cli.backend import adapters
from treelora_cli.backend.arithmetic import try_gradient
from treelora_cli.backend.runtime import sent
from treelora_cli.backend.values import BranchLearned, Learned, Memory, Trial
from treelora_cli.config import Config
from treelora_cli.heads.gaussians import ClassStatistics

if TYPE_CHECKING:
    from treelora_backends.vit.augment import Augment
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_cli.algorithm.kinds import TokenMoments
    from treelora_cli.backend.contract import Tensors

_TEMPERATURE = 0.1
_CHANGED_BY = "rand-m5-mstd0.5"
"""What changes further views where the training images are not changed (recipes/RESULTS.md)."""
_FEW_TRAINED = 8
"""Images whose activations a CPU holds at once where branches adapt every block; a step takes 3 % longer."""
_SMALLEST_PROBE = 8
"""Images in a mini-batch of the probe, at least; otherwise the probe sees no image twice."""


class VitSession:
    """Meets ``TaskSession``; see the module docstring."""

    def __init__(self, base: LoadedVit, task: ImageTask, memory: Memory, config: Config) -> None:
        self.base = base
        self.task = task
        self.memory = memory
        self.runtime = base.runtime
        self.device = base.runtime.device
        assert config.train.batch_size is not None and config.seed is not None
        self.batch_size: int = config.train.batch_size
        assert config.train.accumulate is not None
        self.parts: int = config.train.accumulate
        self.seed: int = seeds.of_task(config.seed, len(memory.tasks))
        self.config = config
        assert config.head.views is not None
        self.views: int = config.head.views
        own = self.runtime.share(list(range(task.train_size)))
        self.own = torch.tensor(own, dtype=torch.int64)
        self.labels = task.train.labels[self.own].to(self.device)
        weights = class_weights(config.train.class_weights, self.labels, len(task.labels), self.runtime)
        self.objective = Objective(config.train.label_smoothing or 0.0, weights)
        self.compilation = Compilation(config.train.compile, base.trunk.compilable)
        self.class_weights = class_weights(config.head.class_weights, self.labels, len(task.labels), self.runtime)
        """What an image of each class counts in the solved heads, (k,)."""
        self.augment = base.augmenting(config)
        further = self.views > LIKE_THEMSELVES
        self.changed = self.augment or base.augmenting(config, _CHANGED_BY) if further else None
        """What makes the views beyond the second."""
        self.head = nn.Linear(base.trunk.width, len(task.labels)).to(self.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        shared = memory.shared()
        self.shared_head = SharedHead.restore(shared, base.trunk, config, self.runtime)
        self.carried = single_network_part(shared)
        self.at_once = images_at_once(self.device)
        self.keeping = Keeping.of(self.device, config.train.keep_mib)
        self.kept: KeptRows
        """Tokens before the cut, (L, C), of every view of this process's images, views side by side."""
        self.prototypes: Tensor
        self.centre: Tensor
        self.branching = None if config.tree.branch == "never" else Branching(self)

    # -- before training ------------------------------------------------------------------------------

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """Compute a loss and its gradient from the cut on, of as many images as are held at once."""
        with torch.no_grad():
            tokens = self.base.trunk.before(self._first_images(1)).tokens
        tokens = tokens.repeat(min(self._most_at_once, len(self.own)), 1, 1)
        try_gradient(self.runtime, lambda: self.base.trunk.pooled(tokens).square().mean(), parameters)

    def try_forward(self) -> None:
        """Do a part of the frozen pass."""
        images = self._first_images(self.at_once)
        with torch.no_grad(), self.runtime.autocast():
            self.base.trunk.after(self.base.trunk.before(images))

    def _first_images(self, count: int) -> Tensor:
        return self.base.preprocessing.normalise(self.task.train.pixels[self.own[:count]].to(self.device))

    @torch.no_grad()
    def prepare(self) -> None:
        """Run the frozen pass."""
        pooled_sum = torch.zeros(len(self.task.labels), self.base.trunk.width, device=self.device)
        order = torch.randperm(len(self.own), generator=torch.Generator().manual_seed(self.seed))
        chunks = order.split(self.at_once)
        expect(self.task.train.pixels, self.own[order])
        self.shared_head.open_task(len(self.task.labels), self.class_weights)
        with adapters.base_only(self.base.network):
            for rows in self.runtime.reporter.track(chunks, "Frozen pass", len(chunks)):
                self._run_frozen(rows, pooled_sum)
        if self.kept.given_up:
            self.runtime.reporter.detail(str(self.kept))
        self.shared_head.close_task()
        self._set_prototypes(pooled_sum)

    def _run_frozen(self, rows: Tensor, pooled_sum: Tensor) -> None:
        """Count some images' views in, and keep their tokens before the cut."""
        labels = self.labels[sent(rows, self.device)]
        for view, images in enumerate(self._views_of(rows)):
            with self._counting(labels, view), self.runtime.autocast():
                began = self.kept.clock() if hasattr(self, "kept") else None
                cut = self.base.trunk.before(images)
                self._keep(rows * self.views + view, cut.tokens, began)
                features = self.base.trunk.after(cut)
            if self.branching is not None:
                self.branching.keep(rows, view, features.layered)
            pooled_sum.index_add_(0, labels, features.pooled)
            self.shared_head.add(features, labels)

    def _keep(self, places: Tensor, tokens: Tensor, began: float | None) -> None:
        """Keep tokens before the cut, (B, L, C); views changed at random cannot be made again."""
        if not hasattr(self, "kept"):
            again = self.views <= LIKE_THEMSELVES
            self.kept = KeptRows(len(self.own) * self.views, tokens.shape[1:], self.keeping, again=again)
            self.runtime.reporter.detail(str(self.kept))
        self.kept.write(places, tokens, began)

    def _views_of(self, rows: Tensor) -> Iterator[Tensor]:
        """Yield every view of some images, normalised (B, 3, H, W); those of odd number are mirrored."""
        pixels = self.task.train.pixels[self.own[rows]]
        plain = self.base.preprocessing.normalise(sent(pixels, self.device))
        yield from (plain, plain.flip(-1))[: self.views]
        for view in range(LIKE_THEMSELVES, self.views):
            assert self.changed is not None
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeds.of_view(self.seed, view, int(self.own[rows[0]])))
                changed = self.changed(pixels)
            images = self.base.preprocessing.normalise(sent(changed, self.device))
            yield images.flip(-1) if view % 2 else images

    def _counting(self, labels: Tensor, view: int) -> AbstractContextManager[None]:
        """Sum the tokens of what passes, where branches ask for the kind of data; of images as they are."""
        if self.branching is None or view >= LIKE_THEMSELVES:
            return nullcontext()
        return self.branching.moments.listening(labels)

    def entering(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return the tokens before the cut of chosen views, (B, L, C)."""
        if self.kept.place == "nowhere":
            return self._entering_anew(rows, views).bfloat16().float()
        return self.kept.read(rows * self.views + views).float()

    def _set_prototypes(self, pooled_sum: Tensor) -> None:
        """Class means of the frozen features, centred: the head of the probe's loss."""
        counts = torch.bincount(self.labels, minlength=len(self.task.labels)).float() * self.views
        pooled_sum, counts = self.runtime.sum(pooled_sum), self.runtime.sum(counts)
        means = pooled_sum / counts.clamp(min=1)[:, None]
        self.centre = means.mean(dim=0)
        self.prototypes = nn.functional.normalize(means - self.centre, dim=1)

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        """Yield losses against the class means: cosine, temperature 0.1."""
        generator = torch.Generator().manual_seed(seeds.of_probe(self.seed, self.runtime.accelerator.process_index))
        followed = self.config.tree.branch in ("never", "always")  # else no step follows what the probe finds
        wanted = len(self.own) // count if followed else 0
        size = min(self.batch_size, len(self.own), max(_SMALLEST_PROBE, wanted))
        order = torch.cat(
            [torch.randperm(len(self.own), generator=generator) for _ in range(1 + count * size // len(self.own))]
        )
        for index in range(count):
            rows = order[index * size : (index + 1) * size]
            tokens = self.entering(rows, torch.zeros_like(rows))
            with self.runtime.autocast():
                pooled = self.base.trunk.pooled(tokens)
            cosine = nn.functional.normalize(pooled - self.centre, dim=1) @ self.prototypes.T
            yield nn.functional.cross_entropy(cosine / _TEMPERATURE, self.labels[sent(rows, self.device)])

    # -- training -------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass; where images are kept out, of fewer images each."""
        return -(-self.task.train_size // (self.batch_size * self.parts))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, views) of each step, both (B,)."""
        branching = self.branching
        trained = torch.arange(len(self.own)) if branching is None else branching.trained_rows(epoch)
        shuffled = shuffled_views(len(trained), self.views, self.steps_per_epoch, seeds.of_order(self.seed, epoch))
        batches = ((trained[rows], views) for rows, views in shuffled)
        if self.augment is not None:
            yield from batches
        else:
            yield from each_expected(self.kept, batches, lambda batch: batch[0] * self.views + batch[1])

    def state(self) -> Tensors:
        """Return what an interrupted task continues from, beyond the parameters."""
        return {} if self.branching is None else self.branching.state()

    def load_state(self, saved: Tensors) -> None:
        """Continue from ``state``."""
        if self.branching is not None:
            self.branching.load_state(saved)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy over the task's own classes; of accumulated batches, one after the other is in memory."""
        parts = max(self.parts, -(-len(batch[0]) // self._most_at_once))
        with self.compilation.used():
            if parts == 1:
                return self._loss_of_part(*batch)
            losses = in_parts(batch, parts, self._loss_of_part)
            trained = [one for one in self.base.network.parameters() if one.requires_grad]
            return summed_in_parts(losses, [*trained, *self.parameters()])

    @property
    def _most_at_once(self) -> int:
        """Images whose activations are held at once: few take a CPU 3 % longer, and branches adapt every block."""
        few = self.branching is not None and self.device.type == "cpu" and self.compilation.mode is None
        return _FEW_TRAINED if few else self.batch_size

    def _loss_of_part(self, rows: Tensor, views: Tensor) -> Tensor:
        tokens = self.entering(rows, views) if self.augment is None else self._entering_anew(rows, views, self.augment)
        with self.runtime.autocast():
            pooled = self.base.trunk.pooled(tokens)
        return self.objective(self.head(pooled), self.labels[sent(rows, self.device)])

    @torch.no_grad()
    def _entering_anew(self, rows: Tensor, views: Tensor, augment: Augment | None = None) -> Tensor:
        """Return the tokens before the cut, (B, L, C), computed again, on request of images changed at random."""
        pixels = self.task.train.pixels[self.own[rows]]
        pixels = pixels if augment is None else augment(pixels)
        images = chosen_views(self.base.preprocessing.normalise(sent(pixels, self.device)), views)
        with self.runtime.autocast():
            return self.base.trunk.before(images).tokens.float()

    def parameters(self) -> list[nn.Parameter]:
        """Return the task's own linear head."""
        return list(self.head.parameters())

    # -- after training -------------------------------------------------------------------------------

    def finish(self) -> Learned:
        """Collect the task's columns of every head."""
        tensors = {
            "head.weight": self.head.weight.detach().cpu().clone(),
            "head.bias": self.head.bias.detach().cpu().clone(),
        }
        trained = adapters.read_slot(self.base.network, self.base.layers, self.base.scale)
        counted = CountedIn() if self.branching is None else self.branching.finish()
        new = NewImages(self.pooled, self.labels, len(self.task.labels), self.seed, counted.pooled)
        kinds = KINDS[:1] if self.shared_head.carries_blocks else KINDS
        own = extended_statistics(self.base, self.memory, new, trained, self.carried, kinds)
        branch = self._of_branch(counted, tensors, own)
        facts: dict[str, Any] = {
            "classes": len(self.task.labels),
            "columns": len(columns_of(self.memory)) + len(self.task.labels),
            "kept": self.kept.facts(),
        }
        head = self.shared_head
        shared = partial(_shared, own, head)
        return Learned(tensors | head.task_tensors(), shared, facts, branch)

    def _of_branch(self, counted: CountedIn, tensors: Tensors, statistics: Tensors) -> BranchLearned | None:
        """Return what the branch stores; a task that trained nothing gets the linear head of its class statistics."""
        branching = self.branching
        if branching is None:
            return None
        if not branching.trains:
            every = ClassStatistics.from_tensors(statistics, "latest", self.device).discriminant(COVARIANCE_RIDGE)
            count = len(self.task.labels)
            tensors |= {"head.weight": every.weight[-count:].cpu(), "head.bias": every.bias[-count:].cpu()}
        tensors |= counted.columns
        stored = counted.stored
        judged = branching.judgement
        trial = None if judged is None else Trial(judged.gain, judged.asked, judged.count)
        # copies: scoring solves in the place of the sums, before they are committed
        return BranchLearned(counted.name, lambda: {key: value.clone() for key, value in stored.items()}, trial)

    # -- branches -------------------------------------------------------------------------------------

    def token_moments(self) -> TokenMoments:
        """Return the sums of the frozen tokens, by which the kind of data is known."""
        assert self.branching is not None
        return self.branching.token_moments()

    def open_branch(self, name: str, *, ask: bool) -> None:
        """Try a branch of this name; ``ask`` the images kept out of the training whether it pays."""
        assert self.branching is not None
        self.branching.open(name, ask)

    def join_branch(self, name: str | None) -> None:
        """Belong to a branch, or to the frozen features, and train nothing."""
        assert self.branching is not None
        self.branching.join(name)

    @torch.no_grad()
    def pooled(self, rows: Tensor) -> Tensor:
        """Return the pooled features of some of this process's images by the network as it is, (n, C)."""
        parts = []
        for chunk in rows.split(self.at_once):
            tokens = self.entering(chunk, torch.zeros_like(chunk))
            with self.runtime.autocast():
                parts.append(self.base.trunk.pooled(tokens))
        return torch.cat(parts)


def _shared(own: Tensors, head: SharedHead) -> Tensors:
    return {**own, **head.to_tensors()}
