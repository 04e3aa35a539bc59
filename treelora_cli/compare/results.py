"""Results of runs as files: read, checked against what is asked now, made by a process each where there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.compare.runs import Run
from treelora_cli.errors import Interrupted, ProjectError
from treelora_cli.score_matrix import ScoreMatrix

SCHEMA = 1


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
    command = [sys.executable, "-m", "treelora_cli.compare.worker", str(job)]
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
    job.unlink(missing_ok=True)
    return outcome


def _last_words(log: Path, code: int) -> str:
    if not log.is_file():
        return f"{log} was removed while it ran. Leave {log.parent} alone, and give the same command again"
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
