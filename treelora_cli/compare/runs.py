"""The same stream under several methods: what to run, one fresh process for each, and what the results say.

::

    plan_runs          one run for each method and seed, checked before anything starts
    finish_runs        a run whose result file agrees is left alone; every other gets a process of its own
    comparison_rows    mean and spread over seeds, and ratios to the baseline, one row for each method

Nothing here imports a model library; ``worker`` is what runs in the process.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treelora_cli.config import DEFAULTS, Config, from_flags, load_config, overlay, to_dict
from treelora_cli.config.by_name import known_settings
from treelora_cli.config.fields import coerce
from treelora_cli.errors import UsageError, suggest
from treelora_cli.methods.catalogue import check_method, runs_in_project
from treelora_cli.version import __version__

_CONTENDERS_OWN = ("adapter.", "train.", "head.width")
"""Settings that mean something to contenders begin so; the rest are TreeLoRA's."""


# -- what to run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A method, and settings in which this row differs: ``treelora:reg=0:search=random``.

    Attributes:
        label: As written; names the row.
        method: The method's name.
        settings: What differs.
    """

    label: str
    method: str
    settings: Config

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.label)


def parse_variant(text: str) -> Variant:
    """Read ``METHOD[:KEY=VALUE...]``; a key is a setting's full name or any unique last part of it.

    Raises:
        UsageError: Unknown method or key, a key that fits several settings, or a value out of range.
    """
    method, *pairs = text.strip().split(":")
    if "=" in method:
        raise UsageError(
            f"--methods: '{text}' is no method. Colons divide a row's settings: METHOD:KEY=VALUE:KEY=VALUE."
        )
    check_method(method)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"--methods {text}: expected {method}:KEY=VALUE.")
        name, kind = _setting_named(key, method, text)
        values[name.replace(".", "__")] = coerce(kind, yaml.safe_load(value), name, f"--methods {text}")
    return Variant(text.strip(), method, from_flags(**values))


def _setting_named(key: str, method: str, text: str) -> tuple[str, type]:
    """Return the full name and the type of the one setting of a method that ``key`` names."""
    known = _settings()
    anywhere = [name for name in known if name == key or name.endswith(f".{key}")]
    found = [name for name in anywhere if runs_in_project(method) or name.startswith(_CONTENDERS_OWN)]
    if len(found) == 1:
        return found[0], known[found[0]]
    if anywhere and not found:
        raise UsageError(f"--methods {text}: '{anywhere[0]}' means nothing to {method}.")
    if found:
        raise UsageError(f"--methods {text}: '{key}' fits {' and '.join(found)}. Write one of them.")
    short = {name.rpartition(".")[2] for name in known}
    raise UsageError(f"--methods {text}: unknown setting '{key}'{suggest(key, short)}.")


def _settings() -> dict[str, type]:
    """Return every scalar setting but those of the stream, the base and the seed, with its type."""
    without = ("stream", "base", "seed", "backend", "method")
    return {name: kind for name, kind in known_settings(without).items() if kind is not dict}


@dataclass(frozen=True)
class Run:
    """One method with one seed: the job of one process.

    Attributes:
        variant: The method.
        seed: Of every random choice.
        recipe: Recipe file, absolute.
        data: In place of the recipe's data directory; absolute.
        flags: Settings over the recipe's, this method's own included.
        limit: Most examples per class or task.
        device: ``cpu``, ``cuda``, ...; the best there is when ``None``.
        offline: Never ask the network.
        out: Directory of the results.
        ends: Score a task when it is learned and all in the end, in place of all after each task.
    """

    variant: Variant
    seed: int
    recipe: Path
    data: Path | None
    flags: Config
    limit: int | None
    device: str | None
    offline: bool
    out: Path
    ends: bool = False

    @property
    def name(self) -> str:
        """File name of everything that belongs to this run, without its ending."""
        return f"{self.variant.slug}-seed{self.seed}"

    @property
    def result(self) -> Path:
        """The result file, there once the run is done."""
        return self.out / f"{self.name}.json"

    @property
    def log(self) -> Path:
        """What the process says."""
        return self.out / f"{self.name}.log"

    def settings(self) -> dict[str, Any]:
        """Return what a result depends on, as kept in its file."""
        flags = {key: value for key, value in to_dict(self.flags).items() if key != "stream"}
        record = {
            "treelora": __version__,
            "method": self.variant.method,
            "seed": self.seed,
            "recipe": self.recipe.read_text(encoding="utf-8"),
            "data": None if self.data is None else str(self.data),
            "flags": flags,
            "limit": self.limit,
            "device": self.device,
            **({"score_ends": True} if self.ends else {}),
        }
        return typing.cast("dict[str, Any]", json.loads(json.dumps(record)))

    def to_json(self) -> dict[str, Any]:
        """Return the job as its file holds it."""
        return {
            "label": self.variant.label,
            "recipe": str(self.recipe),
            "data": None if self.data is None else str(self.data),
            "seed": self.seed,
            "flags": {key: value for key, value in to_dict(self.flags).items() if key != "stream"},
            "limit": self.limit,
            "device": self.device,
            "ends": self.ends,
            "offline": self.offline,
            "out": str(self.out),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Run:
        """Read what ``to_json`` returned."""
        values = dict(record)
        flags: dict[str, Any] = {}
        for key, value in values.pop("flags").items():
            nested = value.items() if isinstance(value, dict) else ()
            flags |= {f"{key}__{inner}": one for inner, one in nested} if nested else {key: value}
        variant = parse_variant(values.pop("label"))
        recipe, out = Path(values.pop("recipe")), Path(values.pop("out"))
        data = values.pop("data")
        return cls(variant, recipe=recipe, out=out, data=data and Path(data), flags=from_flags(**flags), **values)


def plan_runs(methods: Sequence[str], seeds: Sequence[int], **shared: Any) -> list[Run]:
    """Return the runs, seeds outermost, so that an early stop leaves whole rows.

    Args:
        methods: As written after ``--methods``.
        seeds: Seeds.
        shared: The other fields of ``Run``; ``flags`` without what a method changes.

    Raises:
        UsageError: Nothing to run, a method named twice, or one that is unknown.
    """
    variants = [parse_variant(text) for text in methods]
    labels = [one.slug for one in variants]
    twice = next((one.label for one in variants if labels.count(one.slug) > 1), None)
    if twice is not None or not variants:
        raise UsageError(f"--methods names '{twice}' twice." if twice else "--methods names nothing.")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise UsageError("--seeds needs one or more different numbers.")
    flags = shared.pop("flags")
    of_project = {one.method: one.method if runs_in_project(one.method) else None for one in variants}
    return [
        Run(
            one,
            seed,
            flags=overlay(Config(seed=seed, method=of_project[one.method]), overlay(one.settings, flags)),
            **shared,
        )
        for seed in seeds
        for one in variants
    ]


def ignored_by_contenders(runs: Sequence[Run]) -> list[str]:
    """Return a line where the settings weigh classes in solved heads and contenders, which have others, do not."""
    without = dict.fromkeys(one.variant.label for one in runs if not runs_in_project(one.variant.method))
    if not runs or not without:
        return []
    weights = overlay(runs[0].flags, load_config(runs[0].recipe)).head.class_weights
    if weights in (None, DEFAULTS.head.class_weights):
        return []
    return [f"head.class_weights {weights} is for treelora's solved heads alone; without it: {', '.join(without)}."]


# -- results ---------------------------------------------------------------------------------------
