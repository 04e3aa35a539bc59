"""Configuration: frozen dataclasses, a strict YAML reader and the one place where precedence is decided.

Precedence: command-line flag > ``treelora.yaml`` (or recipe) > the backend's default > the default here.
A field that is ``None`` was not given, at any of these levels.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, cast

import yaml

from treelora_cli.errors import ConfigError, suggest
from treelora_cli.fields import check_range, coerce
from treelora_cli.fields import setting as _setting

T = TypeVar("T")
_NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True)
class BaseConfig:
    """The frozen pre-trained model that every adapter stands on."""

    model: str | None = _setting(None, "timm name, hub id, local directory or GGUF file; none: embedded")
    weights: str | None = _setting(None, "local safetensors file for a model given by name")
    model_args: dict[str, Any] = _setting({}, "arguments of the architecture, such as img_size")
    preprocess: dict[str, Any] = _setting({}, "overrides of the model's own image preprocessing")
    dtype: str | None = _setting(None, "type the base is held in", choices=("float32", "bfloat16", "float16", "nf4"))


@dataclass(frozen=True)
class AdapterConfig:
    """Shape and place of each task's LoRA adapter."""

    rank: int | None = _setting(None, "LoRA rank r", low=1, high=1024)
    alpha: float | None = _setting(None, "LoRA alpha; updates are scaled by alpha / rank", low=0)
    dropout: float | None = _setting(None, "LoRA dropout probability", low=0, high=0.95)
    targets: str | None = _setting(None, "'auto', 'all-linear' or comma-separated module names")
    blocks: int | None = _setting(
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

    depth: int | None = _setting(None, "greatest depth of the tree, in adapted layers", low=1)
    split: str | None = _setting(None, "how a node divides its tasks; median-l1 as published", choices=_split_rules)
    signature_width: int | None = _setting(None, "sketch width m per layer", low=8, high=65536)
    probe_batches: int | None = _setting(None, "mini-batches probed before training", low=1)
    search: str | None = _setting(
        None,
        "how similar tasks are found; cold, as published: without the probe's distances to all as first pulls",
        choices=("lcb", "cold", "flat", "exhaustive", "random"),
    )
    branch: str | None = _setting(
        None,
        "which tasks share an adapter and a feature space: auto, those of a kind, where images kept out of its training"
        " gain by it; first: all, the first task's; always: none; never: adapters only re-rank answers",
        choices=("auto", "first", "always", "never"),
    )
    branch_adapter: str | None = _setting(
        None,
        "the adapter of a branch; random, as a control: of the same norm, nothing learned",
        choices=("trained", "random"),
    )
    width: str | None = _setting(
        None, "confidence width: observed spread, or sigma = 1", choices=("observed", "literal")
    )


@dataclass(frozen=True)
class TrainConfig:
    """How one task is learned."""

    epochs: int | None = _setting(None, "passes over the task's data", low=0, high=10000)
    lr: float | None = _setting(None, "peak learning rate", low=0)
    batch_size: int | None = _setting(None, "examples per step over all processes", low=1)
    weight_decay: float | None = _setting(None, "AdamW weight decay", low=0)
    reg: float | None = _setting(None, "lambda of eq. 3: pull towards the similar task", low=0)
    update: str | None = _setting(None, "eq. 3 as a subgradient term or a proximal step", choices=("penalty", "prox"))
    warm_start: str | None = _setting(None, "where a new adapter starts", choices=("nearest", "latest", "none"))
    max_length: int | None = _setting(None, "longest input, in tokens", low=8)
    prompt_tail: int | None = _setting(
        None,
        "last tokens of a prompt through which gradients pass; 0: all; none: 8 on a CPU, all on a GPU",
        low=0,
    )
    learn: str | None = _setting(None, "which turns of the assistant in a chat are learned", choices=("all", "last"))
    precision: str | None = _setting(
        None, "arithmetic; auto measures, steps and passes without gradients apart", choices=("auto", "fp32", "bf16")
    )
    grad_checkpointing: bool | None = _setting(None, "recompute activations to save memory")
    keep_mib: int | None = _setting(
        None,
        "most memory, in MiB, for activations kept over epochs, beyond it a file; none: half of what is free on a GPU",
        low=0,
    )


@dataclass(frozen=True)
class HeadConfig:
    """Classifiers in closed form, solved from sums and never trained."""

    width: int | None = _setting(None, "random features of the shared head, beside the linear ones", low=16, high=65536)
    blocks: int | None = _setting(
        None, "last blocks whose tokens feed the head; none: as many as make 3,072 features, not the first", low=1
    )
    ridge: float | None = _setting(
        None, "ridge penalty at one feature per example, as a share of the mean eigenvalue", low=0
    )
    views: int | None = _setting(None, "views of an image that are learned from: itself, and mirrored", low=1, high=2)
    merged: str | None = _setting(
        None, "the merged network: solved blocks on the base, or the mean of all updates", choices=("solved", "mean")
    )
    closed: str | None = _setting(
        None,
        "what chooses of a closed set of answers: a head solved on frozen states, or the adapted model's likelihood",
        choices=("solved", "likelihood"),
    )


@dataclass(frozen=True)
class GateConfig:
    """What a learned task must hold to be committed; with none of it every task is."""

    max_forgetting: float | None = _setting(
        None, "most forgetting, in points; also most that a watch set may lose", low=0, high=100
    )
    fail_under: float | None = _setting(None, "least OP, in percent", low=0, high=100)
    task_under: float | None = _setting(None, "least score of any task and watch set, in percent", low=0, high=100)


@dataclass(frozen=True)
class StreamTask:
    """One task of a recipe: a folder or file, or some classes of the stream's image folder."""

    name: str = _setting("", "the task's name")
    path: str | None = _setting(None, "data, relative to the stream's data directory")
    classes: tuple[str, ...] | None = _setting(None, "only these classes of the folder")
    epochs: int | None = _setting(None, "epochs of this task", low=0)
    metric: str | None = _setting(None, "score of this task")


@dataclass(frozen=True)
class StreamConfig:
    """The order of tasks in a recipe and the published figure it aims at."""

    data: str | None = _setting(None, "directory that holds the tasks' data; --data overrides")
    tasks: tuple[StreamTask, ...] = _setting((), "tasks in the order they arrive")
    split: int | None = _setting(None, "divide the folder's classes, shuffled by the seed, into so many tasks", low=1)
    metric: str | None = _setting(None, "score reported for each task")
    train_limit: int | None = _setting(None, "training examples per class or task", low=1)
    test_limit: int | None = _setting(None, "test examples per class or task", low=1)
    published: dict[str, Any] = _setting({}, "figures of the paper, with their source")


@dataclass(frozen=True)
class Config:
    """Everything in ``treelora.yaml`` or a recipe."""

    backend: str | None = _setting(None, "registered model family, such as vit")
    method: str | None = _setting(None, "registered method that runs in a project, such as treelora")
    seed: int | None = _setting(None, "seed of every random choice", low=0, high=2**31 - 1)
    inference: str | None = _setting(None, "how a prediction is made", choices=("routed", "latest", "merged"))
    budget: int | None = _setting(None, "most adapters kept; 0 means no limit", low=0)
    history: int | None = _setting(None, "tasks that can be rolled back; each costs the shared statistics", low=1)
    base: BaseConfig = field(default_factory=BaseConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    backend_settings: dict[str, Any] = _setting({}, "settings that the backend declares")
    method_settings: dict[str, Any] = _setting({}, "settings that the method declares")
    stream: StreamConfig = field(default_factory=StreamConfig)


DEFAULTS = Config(
    backend="vit",
    method="treelora",
    seed=0,
    inference="routed",
    budget=0,
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
        weight_decay=0.0,
        reg=0.1,
        update="penalty",
        warm_start="nearest",
        max_length=512,
        learn="all",
        precision="auto",
        grad_checkpointing=False,
    ),
    head=HeadConfig(width=1500, ridge=0.07, views=1, merged="solved", closed="solved"),
)
"""The lowest level of precedence; a backend's own defaults stand above it."""


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
    return overlay(flags, overlay(project, overlay(backend_defaults, DEFAULTS)))


def load_config(path: Path) -> Config:
    """Read a recipe or ``treelora.yaml`` strictly.

    Raises:
        ConfigError: The file is missing or malformed, or holds an unknown key or a value out of range;
            the message names file, line and, for a key, the nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} not found.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return parse_config(text, path.name)


def parse_config(text: str, source: str) -> Config:
    """Parse configuration text; ``source`` is the file name used in messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{where}: invalid YAML ({problem}).") from error
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
        return Config()
    parsed = _read_dataclass(Config, node, source)
    assert isinstance(parsed, Config)
    return parsed


def _where(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _read_dataclass(kind: type[Any], node: yaml.Node, source: str) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_where(source, node)}: expected a mapping of settings.")
    specs = {spec.name: spec for spec in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key not in specs:
            raise ConfigError(f"{_where(source, key_node)}: unknown key '{key}'{_key_hint(key, list(specs))}.")
        if key in values:
            raise ConfigError(f"{_where(source, key_node)}: '{key}' is given twice.")
        values[key] = _read_value(hints[key], value_node, source, key)
        check_range(kind, key, values[key], _where(source, value_node))
    return kind(**values)


def _key_hint(key: str, here: list[str]) -> str:
    """Say where an unknown key belongs, which known one is nearest, or which are known here."""
    sections = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    elsewhere = {spec.name: name for name, kind in sections.items() for spec in dataclasses.fields(kind)}
    if key in elsewhere:
        return f" here; it belongs under '{elsewhere[key]}'"
    known = [*here, *elsewhere, *(spec.name for spec in dataclasses.fields(Config))]
    near = suggest(key, known) or suggest(key.rpartition("_")[2], known)
    return near or f". Known here: {', '.join(here)}"


def _read_value(hint: Any, node: yaml.Node, source: str, key: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
        if type(None) in options:
            return None
        raise ConfigError(f"{_where(source, node)}: '{key}' needs a value.")
    wanted = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(wanted):
        return _read_dataclass(typing.cast("type[Any]", wanted), node, source)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise ConfigError(f"{_where(source, node)}: '{key}' needs a list.")
        item = typing.get_args(wanted)[0]
        return tuple(_read_value(item, child, source, key) for child in node.value)
    value = _plain(node, source)
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{_where(source, node)}: '{key}' needs a mapping.")
        return value
    return coerce(wanted, value, key, _where(source, node))


def _plain(node: yaml.Node, source: str) -> Any:
    try:
        return yaml.safe_load(yaml.serialize(node))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{_where(source, node)}: invalid value.") from error


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def from_flags(**sections: Any) -> Config:
    """Build the uppermost level from command-line values, ``None`` where a flag was not given.

    Keyword ``section__field=value`` sets a nested field; a plain keyword a top-level one.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """
    hints = typing.get_type_hints(Config)
    kinds = {name: cast("type[Any]", kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    nested: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in sections.items():
        section, _, key = name.rpartition("__")
        check_range(kinds[section] if section else Config, key, value, f"--{key.replace('_', '-')}")
        (nested.setdefault(section, {}) if section else top)[key] = value
    top |= {name: kinds[name](**values) for name, values in nested.items()}
    return Config(**top)


def to_yaml(config: Config, heading: str) -> str:
    """Render the settings that are given, one commented line each, as ``treelora.yaml``."""
    lines = [f"# {line}" for line in heading.splitlines()]
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if spec.name == "stream":
            continue
        if not dataclasses.is_dataclass(value):
            if value not in (None, {}):
                lines.append(_yaml_line(spec, value, ""))
            continue
        inner = [
            _yaml_line(child, getattr(value, child.name), "  ")
            for child in dataclasses.fields(value)
            if getattr(value, child.name) not in (None, {}, ())
        ]
        if inner:
            lines += ["", f"{spec.name}:", *inner]
    return "\n".join(lines) + "\n"


def _yaml_line(spec: Any, value: Any, indent: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    text = text.removesuffix("...").strip()
    return f"{indent}{spec.name}: {text}  # {spec.metadata['doc']}"


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries (for task records and ``--json``)."""
    return dataclasses.asdict(config)
