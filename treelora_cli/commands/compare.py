"""``treelora compare``: one stream under several methods, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import Session, session_of
from treelora_cli.errors import CheckError, UsageError

if TYPE_CHECKING:
    from treelora_cli.compare.results import Failure, Outcome
    from treelora_cli.compare.rows import MethodRow
    from treelora_cli.compare.runs import Run
    from treelora_cli.config import Config


def compare(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, with commas. A row of its own with other settings: treelora:reg=0,treelora:search=random;"
            " any setting of treelora.yaml, several after further colons."
        ),
    ] = "treelora,seqlora",
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0",
    data: Annotated[Path | None, typer.Option(help="Directory of the stream's data.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model, instead of the recipe's.")] = None,
    weights: options.Weights = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Most examples per class or task: a quick trial.")] = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    precision: options.Precision = None,
    settings: options.Set = None,
    score_ends: options.ScoreEnds = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory of results and projects; by default named like the recipe.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Row that ratios are taken to; by default treelora, else the first.")
    ] = None,
    target_op: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Also show the training time of methods that end at this OP, in percent."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file, one row for each method.")] = None,
    device: options.Device = None,
) -> None:
    """Run RECIPE under several methods, each with each seed in a fresh process, and compare.

    Training time is all work for the tasks but loading the base, reading data and scoring held-out examples. Peak
    memory is the process's largest resident memory above what it held when the base was loaded. What is done is kept
    in --out: the same command goes on where it stopped. A method that fails is named, the others go on, and the exit
    code is 7.

    Example: treelora compare cifar100_50classes --data ~/cifar100_50classes --methods treelora,ranpac --limit 40
    """
    from treelora_cli.compare.results import finish_runs
    from treelora_cli.compare.rows import check_baseline, summarise
    from treelora_cli.compare.runs import ignored_by_contenders, plan_runs
    from treelora_cli.config import from_flags
    from treelora_cli.config.by_name import add_set
    from treelora_cli.learning.recipes import find_recipe

    session = session_of(context)
    path = find_recipe(recipe).absolute()
    flags = from_flags(
        base__model=model,
        base__weights=None if weights is None else str(weights.absolute()),
        train__epochs=epochs,
        train__batch_size=batch_size,
        train__precision=precision,
    )
    flags = add_set(flags, settings)
    runs = plan_runs(
        _split(methods),
        _numbers(seeds),
        recipe=path,
        data=None if data is None else data.absolute(),
        flags=flags,
        limit=limit,
        device=device,
        ends=score_ends,
        offline=session.offline,
        out=(out or Path(f"{path.stem}-compare")).absolute(),
    )
    labels = list(dict.fromkeys(run.variant.label for run in runs))
    base = check_baseline(baseline, labels)
    check_stream(runs, flags)
    for ignored in ignored_by_contenders(runs):
        session.output.note(ignored)
    outcomes, failures = finish_runs(runs, lambda run: _started(session, run), lambda *done: _finished(session, *done))
    target = None if target_op is None else target_op / 100
    _show(session, runs, outcomes, failures, summarise(labels, outcomes, base, target), base, target, csv)
    if failures:
        told = ", ".join(f"{one.label} (seed {one.seed})" for one in failures)
        raise CheckError(f"No result from {told}: {failures[0].message}")


def check_stream(runs: list[Run], flags: Config) -> None:
    """Raise a usage, data or model error now that every process would raise later."""
    from treelora_cli.backend.registry import load_backend
    from treelora_cli.config import load_config, overlay, resolve
    from treelora_cli.learning.stream import StreamRequest, plan_stream, plan_watch
    from treelora_cli.methods.catalogue import choose_head, runs_in_project

    for run in runs:
        request = StreamRequest(
            run.recipe, run.out / run.name, run.data, run.flags, run.limit, resume=False, ends=run.ends
        )
        plan_stream(request)
        plan_watch(request)
    recipe = load_config(runs[0].recipe)
    name = overlay(flags, recipe).backend or "vit"
    backend = load_backend(name)
    backend.resolve_base(resolve(flags, recipe, backend.defaults()).base, offline=runs[0].offline)
    for run in runs:
        if not runs_in_project(run.variant.method):
            choose_head(run.variant.method, getattr(backend, "contender_heads", ()), name)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in _split(text)]
    except ValueError:
        raise UsageError(f"--seeds {text}: expected whole numbers with commas, such as 0,1,2.") from None


def _started(session: Session, run: Run) -> None:
    session.output.note(f"{run.variant.label}, seed {run.seed}: running, see {run.log} ...")


def _finished(session: Session, run: Run, outcome: Outcome | Failure, before: bool) -> None:
    from treelora_cli.compare.results import Failure
    from treelora_cli.views.comparison import outcome_line

    told = f"failed: {outcome.message}" if isinstance(outcome, Failure) else outcome_line(outcome)
    session.output.note(f"{run.variant.label}, seed {run.seed}: {told}{' (done before)' if before else ''}")


def _show(
    session: Session,
    runs: list[Run],
    outcomes: list[Outcome],
    failures: list[Failure],
    rows: list[MethodRow],
    baseline: str,
    target: float | None,
    csv: Path | None,
) -> None:
    import dataclasses

    from treelora_cli.compare.rows import flat_row
    from treelora_cli.views.comparison import NOTES, comparison_table, csv_text, watch_table

    if csv is not None:
        csv.parent.mkdir(parents=True, exist_ok=True)
        csv.write_text(csv_text(rows), encoding="utf-8")
    document: dict[str, Any] = {
        "recipe": str(runs[0].recipe),
        "out": str(runs[0].out),
        "baseline": baseline,
        "target_op": target,
        "methods": [flat_row(row) for row in rows],
        "runs": [{"method": one.label, "seed": one.seed, **_facts(one)} for one in outcomes],
        "failures": [dataclasses.asdict(one) for one in failures],
    }
    watch = watch_table(outcomes)
    session.output.result(
        document, comparison_table(rows, baseline, target), NOTES, *([] if watch is None else [watch])
    )


def _facts(outcome: Outcome) -> dict[str, Any]:
    """Return a result file's content without what the whole comparison shares."""
    return {key: value for key, value in outcome.record.items() if key not in ("schema", "settings", "label")}
