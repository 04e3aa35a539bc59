"""The same stream under several methods: what to run, one fresh process for each, and what the results say.

::

    plan_runs          one run for each method and seed, checked before anything starts
    finish_runs        a run whose result file agrees is left alone; every other gets a process of its own
    comparison_rows    mean and spread over seeds, and ratios to the baseline, one row for each method

Nothing here imports a model library; ``contest`` is what runs in the process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treelora_cli import __version__
from treelora_cli.config import Config, coerce, from_flags, overlay, to_dict
from treelora_cli.errors import Interrupted, ProjectError, UsageError, suggest
from treelora_cli.methods.catalogue import OURS, check_method
from treelora_cli.metrics import ScoreMatrix

SCHEMA = 1
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
    found = [name for name in anywhere if method == OURS or name.startswith(_CONTENDERS_OWN)]
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
    found: dict[str, type] = {}
    for section, hint in typing.get_type_hints(Config).items():
        if section in ("stream", "base", "seed", "backend"):
            continue
        if not dataclasses.is_dataclass(hint):
            found[section] = _scalar(hint)
            continue
        for key, inner in typing.get_type_hints(hint).items():
            found[f"{section}.{key}"] = _scalar(inner)
    return found


def _scalar(hint: Any) -> type:
    return next(one for one in (*typing.get_args(hint), hint) if isinstance(one, type) and one is not type(None))


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
    return [
        Run(one, seed, flags=overlay(Config(seed=seed), overlay(one.settings, flags)), **shared)
        for seed in seeds
        for one in variants
    ]


# -- results ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        label: The row it belongs to.
        seed: Its seed.
        matrix: Scores after each task; of ``joint`` only the last row is known.
        train_seconds: All work for the tasks but reading data and scoring held-out examples.
        train_cpu_seconds: Processor time of the same, which other work on the machine does not lengthen; ``None`` in
            results of older versions.
        peak_bytes: Largest resident memory of the process above what it was right after the base was loaded.
        cuda_peak_bytes: The same of CUDA memory; ``None`` where there is none.
        kept_bytes: All that is kept after the last task, the base aside.
        trained_parameters: Most numbers trained for one task.
        record: The whole result file.
    """

    label: str
    seed: int
    matrix: ScoreMatrix
    train_seconds: float
    train_cpu_seconds: float | None
    peak_bytes: int
    cuda_peak_bytes: int | None
    kept_bytes: int
    trained_parameters: int
    record: dict[str, Any]

    @property
    def forgetting(self) -> float | None:
        """Forgetting in the end; ``None`` unless every task was scored when it was learned."""
        learned = [row[-1] for row in self.matrix.rows]
        return None if None in learned else self.matrix.forgetting()

    @property
    def bwt(self) -> float | None:
        """Backward transfer in the end, with the same reservation."""
        return None if self.forgetting is None else self.matrix.backward_transfer()

    def seconds_to(self, target: float) -> float | None:
        """Return the training time when the stream ended at least at ``target`` OP, in [0, 1]; else ``None``."""
        overall = self.matrix.overall()
        return self.train_seconds if overall is not None and overall >= target else None


def read_outcome(run: Run) -> Outcome | None:
    """Read a run's result; ``None`` when there is none yet.

    Raises:
        ProjectError: The file is damaged, or of a run with other settings.
    """
    try:
        record = json.loads(run.result.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ProjectError(f"{run.result} cannot be read ({error}). Delete it to measure anew.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ProjectError(f"{run.result} is not a result of this version. Delete it or choose another --out.")
    differing = _first_difference(record["settings"], run.settings())
    if differing is not None:
        raise ProjectError(
            f"{run.result} was measured with other settings ({differing})."
            " Delete it to measure anew, or choose another --out."
        )
    return Outcome(
        label=run.variant.label,
        seed=run.seed,
        matrix=ScoreMatrix.from_json(record["matrix"]),
        train_seconds=record["train_seconds"],
        train_cpu_seconds=record.get("train_cpu_seconds"),
        peak_bytes=record["peak_bytes"],
        cuda_peak_bytes=record["cuda_peak_bytes"],
        kept_bytes=record["kept_bytes"],
        trained_parameters=record["trained_parameters"],
        record=record,
    )


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str | None:
    """Say which setting differs, by name and both values where they are short."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = _first_difference(before, after, f"{prefix}{key}.")
            if inner is not None:
                return inner
        elif before != after:
            name = f"{prefix}{key}".removeprefix("flags.")
            return f"the {name} has changed" if key == "recipe" else f"{name}: {before}, now {after}"
    return None


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result: its row, its seed, its one line and its exit code."""

    label: str
    seed: int
    message: str
    exit_code: int


def finish_runs(
    runs: Sequence[Run], start: Callable[[Run], None], done: Callable[[Run, Outcome | Failure, bool], None]
) -> tuple[list[Outcome], list[Failure]]:
    """Run what has no result yet, one process at a time.

    Args:
        runs: What to run.
        start: Called before a process starts.
        done: Called after each run with its result, and whether it was there before.

    Raises:
        ProjectError: A result is there, but of other settings, and nothing was started; or the results turn out to be
            of different bases or data.
        Interrupted: Stopped by the user.
    """
    known = {run.name: read_outcome(run) for run in runs}
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    for run in runs:
        outcome: Outcome | Failure | None = known[run.name]
        before = outcome is not None
        if outcome is None:
            start(run)
            outcome = run_process(run)
        if isinstance(outcome, Failure):
            failures.append(outcome)
        else:
            outcomes.append(outcome)
        done(run, outcome, before)
    _check_same_stream(outcomes)
    return outcomes, failures


def _check_same_stream(outcomes: Sequence[Outcome]) -> None:
    """Raise ``ProjectError`` unless all results are of one base and, seed by seed, of the same examples."""
    first: dict[int, Outcome] = {}
    for one in outcomes:
        other = first.setdefault(one.seed, one)
        for key, what in (("base_sha256", "base model"), ("data_sha256", "data")):
            if one.record[key] != other.record[key]:
                raise ProjectError(
                    f"The {what} changed between {other.label} and {one.label} (seed {one.seed}): the results are not"
                    " comparable. Choose another --out."
                )


def run_process(run: Run) -> Outcome | Failure:
    """Run one job in a fresh process; what it says goes to a log beside the result.

    Raises:
        Interrupted: The process, or this one, was told to stop.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    job = run.out / f"{run.name}.job"
    job.write_text(json.dumps(run.to_json(), indent=1), encoding="utf-8")
    command = [sys.executable, "-m", "treelora_cli.contest", str(job)]
    stopped = Interrupted(f"Interrupted. What is done stays in {run.out}; the same command goes on from there.")
    try:
        with run.log.open("w", encoding="utf-8") as sink:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, check=False).returncode
    except KeyboardInterrupt:
        raise stopped from None
    if code == Interrupted.exit_code:
        raise stopped
    outcome = read_outcome(run) if code == 0 else None
    if outcome is None:
        return Failure(run.variant.label, run.seed, _last_words(run.log, code), code if code > 0 else 1)
    job.unlink()
    return outcome


def _last_words(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; see {log}"
    told = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    return (told or lines or [f"exit code {code} without a word"])[-1]


def write_result(run: Run, record: Mapping[str, Any]) -> None:
    """Write a run's result file at once: whole or not at all."""
    document = {"schema": SCHEMA, "label": run.variant.label, "settings": run.settings(), **record}
    aside = run.result.with_suffix(f".{os.getpid()}.new")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(run.result)
