"""What the core and a backend hand each other: requests, memories, what was learned, answers.

Symbols: ``D`` adapted layers, ``r`` LoRA rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

if TYPE_CHECKING:
    import torch

    from treelora_cli.backend.adapters import AdapterWeights

    Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Recorded:
    """What is known of a learned task's examples, to find the held-out ones again.

    Attributes:
        held_out: Content hashes of the held-out examples, ``DIGITS`` hex digits each; ``None`` for a task that was
            learned before they were kept.
        digest: SHA-256 over all examples, as ``TaskData.digest``.
        limit: Most examples to take of them, per class or in all, as ``DataRequest.test_limit``; all when ``None``.
    """

    held_out: tuple[str, ...] | None
    digest: str
    limit: int | None = None

    DIGITS: ClassVar[int] = 16

    @classmethod
    def from_task(cls, record: Mapping[str, Any], limit: int | None = None) -> Recorded:
        """Read what ``task.json`` keeps.

        Raises:
            ValueError: The hashes are not what was written.
        """
        text, digits = record.get("held_out"), cls.DIGITS
        if text is None:
            return cls(None, str(record.get("data_sha256", "")), limit)
        if not isinstance(text, str) or len(text) % digits or not set(text) <= set("0123456789abcdef"):
            raise ValueError("held_out is no list of hashes")
        hashes = tuple(text[start : start + digits] for start in range(0, len(text), digits))
        return cls(hashes, str(record.get("data_sha256", "")), limit)


@dataclass(frozen=True)
class Change:
    """How a task's data differs from what was recorded.

    Attributes:
        text: One line.
        scorable: All recorded held-out examples are still there, so that a score means what it meant.
    """

    text: str
    scorable: bool


@dataclass(frozen=True)
class DataRequest:
    """Where a task's data lies and which part of it is wanted.

    Attributes:
        path: File or directory the user named.
        val: Held-out data, when it lies elsewhere than ``path``.
        classes: Only these classes (image folders); all when ``None``.
        data_format: Name of the format; detected when ``None``.
        columns: Source column by the name expected, from ``--map``.
        metric: Score of the task; chosen from the data when ``None``.
        train_limit: Most training examples per class (images) or in all (text).
        test_limit: Most held-out examples per class (images) or in all (text).
        skip_bad: Leave out unreadable examples and count them instead of failing.
        held_out: Share of the training data kept for scoring when there is no other.
        seed: Seed of the held-out split and of the limits' choice.
        split: How held-out examples are chosen where there is no such part: by ``content``; by ``position`` in older
            projects.
        test_only: Read the held-out part only, as ``eval`` does.
        known_as: Where the data lay when the task was learned, if it has moved since.
        recorded: Take the held-out examples that a task was learned with, and say what changed; ``None`` takes what is
            there now. Not part of ``to_json``.
        more: Further files or directories of the same task; ``path`` and these may be patterns (``part-*.jsonl``).
        label_prefix: Put before every class name; empty says that numbers mean what they meant in earlier tasks.
        label_names: File of class names, for labels that are numbers.
        kept_in: Directory of the project that keeps this, then; data that moved along with it is found.
    """

    path: Path
    val: Path | None = None
    classes: tuple[str, ...] | None = None
    data_format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    skip_bad: bool = False
    held_out: float = 0.1
    seed: int = 0
    split: str = "content"
    test_only: bool = False
    known_as: Path | None = None
    recorded: Recorded | None = None
    more: tuple[Path, ...] = ()
    label_prefix: str | None = None
    label_names: Path | None = None
    kept_in: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what ``task.json`` keeps, so that ``eval`` finds the same held-out examples again."""
        return {
            "path": str(self.path),
            "val": None if self.val is None else str(self.val),
            "classes": None if self.classes is None else list(self.classes),
            "data_format": self.data_format,
            "columns": dict(self.columns),
            "metric": self.metric,
            "train_limit": self.train_limit,
            "test_limit": self.test_limit,
            "skip_bad": self.skip_bad,
            "held_out": self.held_out,
            "seed": self.seed,
            "split": self.split,
            **({} if self.known_as is None else {"known_as": str(self.known_as)}),
            **({} if self.kept_in is None else {"kept_in": str(self.kept_in)}),
            "more": [str(path) for path in self.more],
            "label_prefix": self.label_prefix,
            "label_names": None if self.label_names is None else str(self.label_names),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> DataRequest:
        """Rebuild a recorded request; it reads the held-out part only."""
        values = {"split": "position", **record}
        if values["split"] not in ("content", "position"):
            raise ValueError("split")
        values["path"] = Path(values["path"])
        values["val"] = None if values["val"] is None else Path(values["val"])
        for key in ("known_as", "kept_in"):
            if values.get(key) is not None:
                values[key] = Path(values[key])
        values["more"] = tuple(Path(path) for path in values.get("more", ()))
        names = values.get("label_names")
        values["label_names"] = None if names is None else Path(names)
        classes = values["classes"]
        values["classes"] = None if classes is None else tuple(classes)
        return cls(**values, test_only=True)


Layout: TypeAlias = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type of number and shape of each tensor in a file, by the tensor's name."""


def layout_of(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Return what ``Layout`` says of ``tensors``."""
    return {name: (str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in tensors.items()}


@dataclass(frozen=True)
class TaskMemory:
    """What is kept of one learned task; tensors are read from disk when first asked for.

    ``layout`` returns that of ``stored()`` when the task was committed; ``None`` where it is not known. ``branch``
    names the branch that the task belongs to, ``None`` where it has none.
    """

    name: str
    labels: tuple[str, ...]
    metric: str
    adapter: Callable[[], AdapterWeights]
    tensors: Callable[[], Tensors]
    layout: Callable[[], Layout | None] = lambda: None
    branch: str | None = None

    def stored(self) -> Tensors:
        """Return everything stored for this task: its tensors, and the adapter's under PEFT's names."""
        return {**self.tensors(), **self.adapter().to_tensors()}


@dataclass(frozen=True)
class Memory:
    """All learned tasks in order of arrival, and the statistics they share.

    Attributes:
        tasks: The tasks.
        shared: Reads the statistics, anew at each call: whoever asks may use them up.
        layout: Returns that of ``shared`` when the last task was committed; ``None`` where it is not known.
        branch: Reads the statistics of a branch, by its name, anew at each call.
    """

    tasks: tuple[TaskMemory, ...]
    shared: Callable[[], Tensors]
    layout: Callable[[], Layout | None] = lambda: None
    branch: Callable[[str], Tensors] = lambda _name: {}

    def with_task(
        self, task: TaskMemory, shared: Callable[[], Tensors], branch: Callable[[], Tensors] | None = None
    ) -> Memory:
        """Return the memory after one more task, which this process learned: it is as it was handed over.

        Args:
            task: The task.
            shared: As the attribute.
            branch: Reads the statistics of the task's branch; those of the others stay.
        """
        stored = task.stored
        task = replace(task, layout=lambda: layout_of(stored()))
        before = self.branch

        def read(name: str) -> Tensors:
            return branch() if branch is not None and name == task.branch else before(name)

        return Memory((*self.tasks, task), shared, lambda: layout_of(shared()), read)


@dataclass(frozen=True)
class Trial:
    """What images kept out of an adapter's training said of it.

    Attributes:
        gain: What they gained by it, in nats each.
        asked: What was asked of it.
        count: Images.
    """

    gain: float
    asked: float
    count: int


@dataclass(frozen=True)
class BranchLearned:
    """What a session that branches hands over beside the rest.

    Attributes:
        name: The branch that the task belongs to; ``None`` where no branch pays.
        tensors: Reads the branch's statistics, this task included, anew at each call as in ``Memory``; replaces the
            former.
        trial: Where an adapter was tried and could be judged.
    """

    name: str | None
    tensors: Callable[[], Tensors]
    trial: Trial | None


@dataclass(frozen=True)
class Learned:
    """What a session hands over when its task is learned.

    Attributes:
        tensors: Kept with the task (``head.safetensors``).
        shared: Reads the statistics shared by all tasks, this one included, as in ``Memory``; replaces the former.
        facts: JSON-able facts for ``task.json``.
        branch: Of a session that branches.
    """

    tensors: Tensors
    shared: Callable[[], Tensors]
    facts: dict[str, Any]
    branch: BranchLearned | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a chat.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: Its text; may be empty beside calls of tools.
        more: What else the message holds for the chat template, such as ``tool_calls``, as JSON; empty for nothing.
        learned: False for a message of the assistant that its data excludes from learning.
    """

    role: str
    content: str
    more: str = ""
    learned: bool = True

    def fields(self) -> dict[str, Any]:
        """Return the message as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.more) if self.more else {})}


@dataclass(frozen=True)
class Picture:
    """An image that is no file.

    Attributes:
        name: For messages.
        data: What the file would hold.
    """

    name: str
    data: bytes


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        output: Label name or generated text.
        task: Name of the task whose adapter answered; ``None`` when no single one did.
        confidence: Probability given to ``output``, in [0, 1]; ``None`` where there is none.
        others: What else could be answered and its probability, likeliest first; empty where nothing is chosen from.
        task_confidence: Probability that the input is from the likeliest task, whether that answered or the untouched
            model did; ``None`` where nothing is chosen from.
        task_margin: How far that task is ahead of the next.
        familiarity: How like what was learned the input is, on a scale of the backend's; ``None`` where it has none.
        known: False where a threshold was asked for and the input is below it; ``output`` is ``unknown`` then.
    """

    output: str
    task: str | None
    confidence: float | None
    others: tuple[tuple[str, float], ...] = ()
    task_confidence: float | None = None
    task_margin: float | None = None
    familiarity: float | None = None
    known: bool = True

    @property
    def margin(self) -> float | None:
        """How far ``output`` is ahead of the next, in probability; ``None`` where there is no next."""
        return None if self.confidence is None or not self.others else self.confidence - self.others[0][1]


@dataclass(frozen=True)
class Answers:
    """What was answered to held-out examples whose right answers are names.

    Attributes:
        confusion: Examples by (right answer, given answer).
        places: Examples whose right answer came first, second, ... among the likeliest, as far as that is known.
        sure: (probability given to the answer, whether it was right) of each example.
        familiar: ``Prediction.familiarity`` of each example; empty where there is none.
    """

    confusion: Mapping[tuple[str, str], int]
    places: tuple[int, ...]
    sure: tuple[tuple[float, bool], ...]
    familiar: tuple[float, ...] = ()


@dataclass(frozen=True)
class Score:
    """A task's score on held-out examples.

    Attributes:
        value: In [0, 1]; higher is better.
        count: Examples scored.
        routed: Share of examples answered by the task's own adapter; ``None`` where nothing routes.
        answers: What was answered for what; ``None`` where answers are free text.
        beside: The same answers under other definitions of the score, by name.
        routes: Examples by the task that answered; empty where nothing routes.
    """

    value: float
    count: int
    routed: float | None
    answers: Answers | None = None
    beside: Mapping[str, float] = field(default_factory=dict)
    routes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written.

    Attributes:
        dtype: Type of the saved weights: ``float32``, ``float16`` or ``bfloat16``.
        max_shard: Largest file, as ``5GB``.
    """

    dtype: str = "float32"
    max_shard: str = "5GB"


@dataclass(frozen=True)
class ExportCheck:
    """What a reloaded export showed against the model in memory.

    Attributes:
        largest_difference: Largest absolute difference, of logits unless ``measured`` says otherwise.
        tolerance: What the types allow in which the base is held and the export written.
        scores: Mean score in memory and reloaded, by task name; empty without held-out data.
        score_tolerance: By how much a score may move: rounding can turn an answer that was close.
        measured: What the differences are of.
        same: Examples that were answered alike, and how many were asked; ``None`` where that was not counted.
    """

    largest_difference: float
    tolerance: float
    scores: dict[str, tuple[float, float]]
    score_tolerance: float = 0.01
    measured: str = "logit difference"
    same: tuple[int, int] | None = None

    @property
    def passed(self) -> bool:
        """True when logits agree within the tolerance, and neither scores nor answers moved by more than their own."""
        agree = self.largest_difference <= self.tolerance
        if self.same is not None:
            agree = agree and self.same[1] - self.same[0] <= self.score_tolerance * self.same[1]
        return agree and all(abs(ours - theirs) <= self.score_tolerance for ours, theirs in self.scores.values())


def rounded_scores(counts: Iterable[int]) -> float:
    """Return by how much scores may move when two networks of different types answer (the smallest set counts).

    Two examples, or one in twenty: those whose best two answers lie closer than the types tell apart.
    """
    return max(0.05, 2 / max(1, min(counts, default=1)))
