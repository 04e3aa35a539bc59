"""What can be set, in frozen dataclasses, and the one place where precedence is decided.

Precedence: command-line flag > ``treelora.yaml`` (or recipe) > the backend's default > the default here.
A field that is ``None`` was not given, at any of these levels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

from treelora_cli.config.fields import setting

T = TypeVar("T")


@dataclass(frozen=True)
class BaseConfig:
    """The frozen pre-trained model that every adapter stands on."""

    model: str | None = setting(None, "timm name, hub id, local directory or GGUF file; none: embedded")
    weights: str | None = setting(None, "local safetensors file for a model given by name")
    model_args: dict[str, Any] = setting({}, "arguments of the architecture, such as img_size")
    preprocess: dict[str, Any] = setting({}, "overrides of the model's own image preprocessing")
    dtype: str | None = setting(None, "type the base is held in", choices=("float32", "bfloat16", "float16", "nf4"))


LAST_QUARTER = "last-quarter"
"""Targets: every linear layer, of the last quarter of the blocks unless ``blocks`` says how many."""


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and place of each task's LoRA adapter."""

    rank: int | None = setting(None, "LoRA rank r", low=1, high=1024)
    alpha: float | None = setting(None, "LoRA alpha; updates are scaled by alpha / rank", low=0)
    dropout: float | None = setting(None, "LoRA dropout probability", low=0, high=0.95)
    targets: str | None = setting(
        None,
        "'auto', 'all-linear', 'last-quarter' (all linear layers of the last quarter of a language model's blocks)"
        " or comma-separated module names",
    )
    blocks: int | None = setting(
        None,
        "adapt only the last so many blocks; 0: all; none: the backend's choice",
        low=0,
    )

    @property
    def scale(self) -> float:
        """LoRA scale alpha / rank of a complete configuration."""
        assert self.alpha is not None and self.rank is not None
        return self.alpha / self.rank


def _split_rules() -> tuple[str, ...]:
    """Names of the split rules, from their one table; numpy is imported only where a rule is named."""
    from treelora_cli.algorithm.split import RULES

    return tuple(RULES)


@dataclass(frozen=True)
class TreeConfig:
    """Gradient signatures, the K-D tree over them and the bandit search."""

    depth: int | None = setting(None, "greatest depth of the tree, in adapted layers", low=1)
    split: str | None = setting(None, "how a node divides its tasks; median-l1 as published", choices=_split_rules)
    signature_width: int | None = setting(None, "sketch width m per layer", low=8, high=65536)
    probe_batches: int | None = setting(None, "mini-batches probed before training", low=1)
    search: str | None = setting(
        None,
        "how similar tasks are found; cold, as published: without the probe's distances to all as first pulls",
        choices=("lcb", "cold", "flat", "exhaustive", "random"),
    )
    branch: str | None = setting(
        None,
        "which tasks share an adapter and a feature space: auto, those of a kind, unless images kept out of its first"
        " epochs lose by it; first: all, the first task's; always: none; never: adapters only re-rank answers. Who"
        " shares trains by default 12 epochs of 32 images at 0.001, changed at random (rand-m5-mstd0.5), in 2 views",
        choices=("auto", "first", "always", "never"),
    )
    branch_adapter: str | None = setting(
        None,
        "the adapter of a branch; random, as a control: of the same norm, nothing learned",
        choices=("trained", "random"),
    )
    width: str | None = setting(
        None, "confidence width: observed spread, or sigma = 1", choices=("observed", "literal")
    )


@dataclass(frozen=True)
class TrainConfig:
    """How one task is learned."""

    epochs: int | None = setting(None, "passes over the task's data", low=0, high=10000)
    lr: float | None = setting(None, "peak learning rate", low=0)
    batch_size: int | None = setting(None, "examples per step over all processes", low=1)
    accumulate: int | None = setting(
        None,
        "batches whose gradients make one step, computed one after the other: that of a batch so much larger",
        low=1,
    )
    warmup: float | None = setting(None, "share of the steps over which the rate rises to its peak", low=0, high=1)
    schedule: str | None = setting(
        None, "how the rate falls after the warm-up: to 0, or not at all", choices=("cosine", "linear", "constant")
    )
    clip: float | None = setting(None, "largest norm of all gradients together, clipped beyond it; 0: no limit", low=0)
    label_smoothing: float | None = setting(
        None, "share of a label's probability that is spread over all classes, or tokens", low=0, high=0.99
    )
    class_weights: str | None = setting(
        None,
        "what an example's loss counts: the same, or less, the more its class has (images, closed sets of answers)",
        choices=("none", "balanced"),
    )
    augment: str | None = setting(
        None, "timm's auto_augment for training images, such as rand-m9-mstd0.5; epochs then run the whole network"
    )
    weight_decay: float | None = setting(None, "AdamW weight decay", low=0)
    reg: float | None = setting(None, "lambda of eq. 3: pull towards the similar task", low=0)
    update: str | None = setting(None, "eq. 3 as a subgradient term or a proximal step", choices=("penalty", "prox"))
    warm_start: str | None = setting(
        None,
        "where a new adapter starts: at the most similar task's, the latest's or none; better: at the most similar"
        " task's where the new one's first batches lose less under it than under none",
        choices=("nearest", "better", "latest", "none"),
    )
    max_length: int | None = setting(None, "longest input, in tokens", low=8)
    prompt_tail: int | None = setting(
        None,
        "last tokens of a prompt through which gradients pass; 0: all; none: where a head answers 8 on a CPU, and the"
        " faster of 8 and all, as measured, on CUDA; else all",
        low=0,
    )
    learn: str | None = setting(None, "which turns of the assistant in a chat are learned", choices=("all", "last"))
    precision: str | None = setting(
        None, "arithmetic; auto measures, steps and passes without gradients apart", choices=("auto", "fp32", "bf16")
    )
    grad_checkpointing: bool | None = setting(None, "recompute activations to save memory")
    compile: str | None = setting(
        None,
        "run the trained blocks as torch.compile's mode of this name makes them: seconds for each shape of a batch,"
        " then fewer kernels; reduce-overhead: as CUDA graphs",
        choices=("none", "default", "reduce-overhead"),
    )
    keep_mib: int | None = setting(
        None,
        "most memory, in MiB, for activations kept over epochs, beyond it a file; none: half of what is free on a GPU",
        low=0,
    )


@dataclass(frozen=True)
class HeadConfig:
    """Classifiers in closed form, solved from sums and never trained."""

    width: int | None = setting(None, "random features of the shared head, beside the linear ones", low=16, high=65536)
    blocks: int | None = setting(
        None, "last blocks whose tokens feed the head; none: as many as make 3,072 features, not the first", low=1
    )
    ridge: float | None = setting(
        None, "ridge penalty at one feature per example, as a share of the mean eigenvalue", low=0
    )
    class_weights: str | None = setting(
        None,
        "what an image counts in the solved heads: the same, or less, the more its class has in its task",
        choices=("none", "balanced"),
    )
    views: int | None = setting(
        None,
        "views of an image that are learned from: itself, mirrored, and all further ones changed at random, as"
        " train.augment says or by rand-m5-mstd0.5; those help a strong base with few images (recipes/RESULTS.md)",
        low=1,
        high=64,
    )
    merged: str | None = setting(
        None, "the merged network: solved blocks on the base, or the mean of all updates", choices=("solved", "mean")
    )
    closed: str | None = setting(
        None,
        "what chooses of a closed set of answers: a head solved on frozen states, or the adapted model's likelihood",
        choices=("solved", "likelihood"),
    )


@dataclass(frozen=True)
class GateConfig:
    """What a learned task must hold to be committed; with none of it every task is."""

    max_forgetting: float | None = setting(
        None, "most forgetting, in points; also most that a watch set may lose", low=0, high=100
    )
    fail_under: float | None = setting(None, "least OP, in percent", low=0, high=100)
    task_under: float | None = setting(None, "least score of any task and watch set, in percent", low=0, high=100)


@dataclass(frozen=True)
class StreamTask:
    """One task of a recipe: a folder or file, or some classes of the stream's image folder."""

    name: str = setting("", "the task's name")
    path: str | None = setting(None, "data, relative to the stream's data directory")
    classes: tuple[str, ...] | None = setting(None, "only these classes of the folder")
    epochs: int | None = setting(None, "epochs of this task", low=0)
    metric: str | None = setting(None, "score of this task")


@dataclass(frozen=True)
class StreamConfig:
    """The order of tasks in a recipe and the published figure it aims at."""

    data: str | None = setting(None, "directory that holds the tasks' data; --data overrides")
    tasks: tuple[StreamTask, ...] = setting((), "tasks in the order they arrive")
    watch: tuple[StreamTask, ...] = setting((), "sets that are scored after each task and never learned from")
    split: int | None = setting(None, "divide the folder's classes, shuffled by the seed, into so many tasks", low=1)
    metric: str | None = setting(None, "score reported for each task")
    train_limit: int | None = setting(None, "training examples per class or task", low=1)
    test_limit: int | None = setting(None, "test examples per class or task", low=1)
    published: dict[str, Any] = setting({}, "figures of the paper, with their source")


@dataclass(frozen=True)
class Config:
    """Everything in ``treelora.yaml`` or a recipe."""

    backend: str | None = setting(None, "registered model family, such as vit")
    method: str | None = setting(None, "registered method that runs in a project, such as treelora")
    seed: int | None = setting(None, "seed of every random choice", low=0, high=2**31 - 1)
    inference: str | None = setting(None, "how a prediction is made", choices=("routed", "latest", "merged"))
    budget: int | None = setting(None, "most adapters kept; 0 means no limit", low=0)
    track: str | None = setting(
        None,
        "experiment tracker that gets each step's figures and the scores",
        choices=("none", "tensorboard", "wandb", "mlflow"),
    )
    history: int | None = setting(None, "tasks that can be rolled back; each costs the shared statistics", low=1)
    base: BaseConfig = field(default_factory=BaseConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    backend_settings: dict[str, Any] = setting({}, "settings that the backend declares")
    method_settings: dict[str, Any] = setting({}, "settings that the method declares")
    stream: StreamConfig = field(default_factory=StreamConfig)


DEFAULTS = Config(
    backend="vit",
    method="treelora",
    seed=0,
    inference="routed",
    budget=0,
    track="none",
    history=3,
    adapter=AdapterConfig(rank=8, alpha=16.0, dropout=0.0, targets="auto"),
    tree=TreeConfig(
        depth=5,
        split="principal-gap",
        signature_width=512,
        probe_batches=12,
        search="lcb",
        branch="never",
        branch_adapter="trained",
        width="observed",
    ),
    train=TrainConfig(
        epochs=3,
        lr=1e-3,
        batch_size=64,
        accumulate=1,
        warmup=0.0,
        schedule="cosine",
        clip=0.0,
        label_smoothing=0.0,
        class_weights="none",
        weight_decay=0.0,
        reg=0.1,
        update="penalty",
        warm_start="nearest",
        max_length=512,
        learn="all",
        precision="auto",
        grad_checkpointing=False,
        compile="none",
    ),
    head=HeadConfig(width=1500, ridge=0.07, class_weights="none", views=1, merged="solved", closed="solved"),
)
"""The lowest level of precedence; a backend's own defaults stand above it."""
BRANCH_DEFAULTS = Config(
    train=TrainConfig(epochs=12, lr=1e-3, batch_size=32, augment="rand-m5-mstd0.5"), head=HeadConfig(views=2)
)
"""Stands above both where tasks share adapters: who opens a branch trains the whole network (recipes/RESULTS.md)."""


def overlay(upper: T, lower: T) -> T:
    """Return ``lower`` with every value that ``upper`` gives (is not ``None`` or empty) put over it."""
    changes: dict[str, Any] = {}
    for spec in dataclasses.fields(upper):  # type: ignore[arg-type]
        high, low = getattr(upper, spec.name), getattr(lower, spec.name)
        if dataclasses.is_dataclass(high):
            changes[spec.name] = overlay(high, low)
        elif isinstance(high, dict):
            changes[spec.name] = {**low, **high}
        else:
            changes[spec.name] = low if high is None or high == () else high
    return dataclasses.replace(lower, **changes)  # type: ignore[type-var]


def resolve(flags: Config, project: Config, backend_defaults: Config) -> Config:
    """Combine the levels of precedence into a configuration without holes."""
    given, defaults = overlay(flags, project), overlay(backend_defaults, DEFAULTS)
    if overlay(given, defaults).tree.branch != "never":
        defaults = overlay(BRANCH_DEFAULTS, defaults)
    return overlay(given, defaults)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries (for task records and ``--json``)."""
    return dataclasses.asdict(config)
