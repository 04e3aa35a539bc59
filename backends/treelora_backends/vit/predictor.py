"""Answer images over all classes ever seen, without being told the task.

``routed``: the anchor, a ridge head on frozen features, says how likely each (task, class) column is; the
adapters of the likeliest tasks then say which of their own classes it is, and both opinions are
multiplied. Where tasks share adapters, those of the likeliest branches say it (``branch_answers``), and of tasks
without a branch their own.
``latest`` and ``merged``: one network, one linear head.

Symbols: ``B`` images, ``K`` columns, ``C`` width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treelora_backends.vit.branch_answers import BranchAnswers, Seen
from treelora_backends.vit.decoding import Bytes, expect, in_threads
from treelora_backends.vit.images import ImageTask, Pictures, filled, images_at_once
from treelora_backends.vit.shared_head import HeadFeatures, SharedHead, class_names, class_of_column, columns_of
from treelora_backends.vit.single import SingleNetwork
from treelora_backends.vit.trunk import Entering
from treelora_cli.backend import adapters
from treelora_cli.backend.contract import OTHERS
from treelora_cli.backend.values import Answers, Memory, Picture, Prediction, Score, Turn
from treelora_cli.data.names import label_key
from treelora_cli.data.paths import existing
from treelora_cli.errors import DataError, UsageError
from treelora_cli.heads.familiarity import Familiarity
from treelora_cli.heads.ridge import LinearHead

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit

ANCHOR_SHARPNESS = 16.0
"""Factor on ridge scores, which lie between about 0 and 1, before the softmax."""
ADAPTER_SHARE = 0.25
"""Weight of the adapter's log-probabilities beside the anchor's, within a task."""
TASKS_ASKED = 2
"""Adapters run for each image: those of its likeliest tasks."""


class VitPredictor:
    """Meets ``Predictor``; see the module docstring."""

    def __init__(self, base: LoadedVit, memory: Memory, inference: str) -> None:
        if inference not in ("routed", "latest", "merged"):
            raise UsageError(f"--inference {inference}: image models answer routed, latest or merged.")
        self.base = base
        self.memory = memory
        self.inference = inference
        self.device = base.runtime.device
        self.columns = columns_of(memory)
        self.names = class_names(self.columns)
        self.class_of = class_of_column(self.columns).to(self.device)
        self.task_of = torch.tensor([column.task for column in self.columns], device=self.device)

    def evaluate(self, task: ImageTask) -> Score:
        """Score the held-out images of a task over all classes."""
        position = {label_key(name): index for index, name in enumerate(self.names)}
        truth = torch.tensor([position.get(label_key(label), -1) for label in task.labels], device=self.device)
        rows = [torch.zeros(0, 6, device=self.device)]
        for pixels, labels in self._shares(task.test):
            scores, asked, familiar = self.class_scores(self.base.preprocessing.normalise(pixels))
            confidence, best = scores.softmax(dim=1).max(dim=1)
            right = truth[labels]
            above = scores > scores.gather(1, right.clamp(min=0)[:, None])
            place = torch.where(right < 0, len(self.names), above.sum(dim=1))
            routed = torch.full_like(best, -1) if asked is None else asked
            familiar = torch.full_like(confidence, torch.nan) if familiar is None else familiar
            rows.append(torch.stack([labels, best, routed, place, confidence, familiar], dim=1))
        return self._score(task, self.base.runtime.gather_rows(torch.cat(rows)).cpu())

    def _score(self, task: ImageTask, rows: Tensor) -> Score:
        """Count rows of (label, class answered, task asked, place of the right class, confidence, familiarity)."""
        labels, best, asked, place = rows[:, :4].long().T.tolist() if len(rows) else ([], [], [], [])
        given = [self.names[one] for one in best]
        right = [
            label_key(task.labels[label]) == label_key(answer) for label, answer in zip(labels, given, strict=True)
        ]
        routed = None
        if self.inference == "routed":
            holders = set(self._tasks_with(task.labels).tolist())
            routed = sum(one in holders for one in asked) / max(1, len(rows))
        answers = Answers(
            confusion=Counter(zip((task.labels[label] for label in labels), given, strict=True)),
            places=tuple(sum(one == rank for one in place) for rank in range(OTHERS + 1)),
            sure=tuple(zip(rows[:, 4].tolist(), right, strict=True)),
            familiar=tuple(rows[:, 5].tolist()) if self.tells_familiarity else (),
        )
        routes = Counter(self.memory.tasks[one].name for one in asked if one >= 0)
        return Score(sum(right) / max(1, len(rows)), len(rows), routed, answers, routes=routes)

    def _tasks_with(self, labels: Sequence[str]) -> Tensor:
        """Indices of the tasks that hold one of these classes: any of them is a right route."""
        wanted = {label_key(label) for label in labels}
        holders = [
            index
            for index, task in enumerate(self.memory.tasks)
            if wanted & {label_key(label) for label in task.labels}
        ]
        return torch.tensor(holders, device=self.device)

    def _shares(self, pictures: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
        own = torch.tensor(self.base.runtime.share(list(range(len(pictures)))), dtype=torch.int64)
        expect(pictures.pixels, own)
        chunks = own.split(images_at_once(self.device))
        for rows in self.base.runtime.reporter.track(chunks, "Answering", len(chunks)):
            yield pictures.pixels[rows].to(self.device), pictures.labels[rows].to(self.device)

    def predict(self, inputs: Sequence[str | Sequence[Turn] | Picture]) -> list[Prediction]:
        """Answer image files and images in memory.

        Raises:
            DataError: Messages of a chat, or a file that is no image.
        """
        given = [one for one in inputs if isinstance(one, str | Picture)]
        if len(given) < len(inputs):
            raise DataError("This project's backend is vit: give image files. --messages and --system are for chats.")
        answers = []
        count = images_at_once(self.device)
        pictures = in_threads(self._pixels_of, given, ahead=2 * count)
        while chunk := [torch.from_numpy(picture) for picture in islice(pictures, count)]:
            images = torch.stack(chunk).to(self.device)
            scores, asked, familiar = self.class_scores(self.base.preprocessing.normalise(images))
            likely = scores.softmax(dim=1).topk(min(OTHERS + 1, len(self.names)), dim=1)
            for row in range(len(chunk)):
                task = None if asked is None else self.memory.tasks[int(asked[row])].name
                classes = [self.names[index] for index in likely.indices[row].tolist()]
                (best, sure), *others = zip(classes, likely.values[row].tolist(), strict=True)
                like = None if familiar is None else float(familiar[row])
                answers.append(Prediction(best, task, sure, tuple(others), familiarity=like))
        return answers

    def _pixels_of(self, given: str | Picture) -> Bytes:
        """Return an image as the model sees it, (3, H, W)."""
        one = given if isinstance(given, Picture) else _read(given)
        return self.base.preprocessing.to_pixels(one.data, one.name)

    @torch.no_grad()
    def class_scores(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log-scores over class names (B, classes), and where routed the likeliest task and familiarity (B,)."""
        if self.inference != "routed":  # as stock timm computes it; solved blocks lose their answers in bf16
            return self.single(images).float(), None, None
        return self._routed(images)

    @cached_property
    def single(self) -> SingleNetwork:
        """The one network of ``latest`` or ``merged``, with its linear head."""
        return SingleNetwork(self.base, self.memory, self.inference)

    # -- routed ---------------------------------------------------------------------------------------

    @property
    def tells_familiarity(self) -> bool:
        """Whether answers say how familiar an image is."""
        return self.inference == "routed"

    @cached_property
    def _anchor(self) -> tuple[HeadFeatures, Familiarity, LinearHead]:
        head = SharedHead.restore(self.memory.shared(), self.base.trunk, self.base.config, self.base.runtime)
        assert head.features is not None
        return head.features, head.familiarity(self.memory), head.solve_(self.memory)

    def _routed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with adapters.base_only(self.base.network):
            plain, scores, phi = self._anchor_scores(images)
            other, mirrored, phi_mirrored = self._anchor_scores(images.flip(-1))
        familiar = self._anchor[1]((phi + phi_mirrored) / 2)
        log_columns = (ANCHOR_SHARPNESS * (scores + mirrored) / 2).log_softmax(dim=1)  # (B, K)
        if self._branches is not None:
            by_branch = self._by_group(log_columns, self._branches.group_of, len(self._branches.names))
            self._branches.refine_(log_columns, by_branch, (plain, other))
        log_tasks = self._by_group(log_columns, self.task_of, len(self.memory.tasks))
        asked = log_tasks.topk(min(TASKS_ASKED, log_tasks.shape[1]), dim=1).indices
        if self._branches is None:  # where tasks share adapters, one without a branch has none that pays
            for task in asked.unique().tolist():
                rows = (asked == task).any(dim=1).nonzero().squeeze(1)
                self._ask_adapter(task, rows, plain.cut, log_columns, log_tasks)
        return self._by_group(log_columns, self.class_of, len(self.names)), asked[:, 0], familiar

    @cached_property
    def _branches(self) -> BranchAnswers | None:
        """The heads of the branches; ``None`` where tasks share no adapters."""
        if self.base.config.tree.branch == "never":
            return None
        return BranchAnswers(self.base, self.memory, self.task_of)

    def _anchor_scores(self, images: Tensor) -> tuple[Seen, Tensor, Tensor]:
        """Return what the frozen network sees of one view, the anchor's scores (B, K), and its last features (B, C)."""
        features, _, solved = self._anchor
        with self.base.runtime.autocast():
            cut = self.base.trunk.before(images)
            seen = self.base.trunk.after(cut)
        phi = features(seen)
        return Seen(cut, seen.layered), solved(phi), phi[:, features.last]

    def _ask_adapter(self, task: int, rows: Tensor, cut: Entering, log_columns: Tensor, log_tasks: Tensor) -> None:
        """Multiply the adapter's opinion into the task's columns of the given rows, in place."""
        tensors = self.memory.tasks[task].tensors()
        adapters.write_slot(self.base.network, self.memory.tasks[task].adapter())
        weight, bias = tensors["head.weight"].to(self.device), tensors["head.bias"].to(self.device)
        with self.base.runtime.autocast():
            pooled = self.base.trunk.pooled(cut.tokens[filled(rows)])[: len(rows)]
        own = (self.task_of == task).nonzero().squeeze(1)
        anchor = log_columns[rows][:, own] - log_tasks[rows, task][:, None]
        opinion = (pooled @ weight.T + bias).log_softmax(dim=1)
        fused = (anchor + ADAPTER_SHARE * opinion).log_softmax(dim=1)
        log_columns[rows[:, None], own[None, :]] = fused + log_tasks[rows, task][:, None]

    @staticmethod
    def _by_group(log_columns: Tensor, group: Tensor, groups: int) -> Tensor:
        """Sum probabilities of columns of the same group, in logarithms: (B, K) -> (B, groups)."""
        top = log_columns.max(dim=1, keepdim=True).values
        sums = torch.zeros(len(log_columns), groups, device=log_columns.device)
        sums.index_add_(1, group, (log_columns - top).exp())
        return sums.clamp(min=1e-30).log() + top


def _read(path: str) -> Picture:
    """Read an image file."""
    found = existing(Path(path))
    try:
        return Picture(str(found), found.read_bytes())
    except OSError as error:
        raise DataError(f"{found} cannot be read: {error.strerror}.") from error
