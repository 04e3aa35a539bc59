"""``treelora watch``: data that is scored after each task and never learned from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import parse_pairs, session_of
from treelora_cli.locations import lasting

if TYPE_CHECKING:
    from treelora_cli.project.metrics import WatchSet

watch = typer.Typer(
    help="Data that is scored after each task and never learned from.\n\n"
    "Example: treelora watch add acceptance ~/data/acceptance",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@watch.command("add")
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the set.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Image folder, manifest or table; all of it is scored.")],
    data_format: Annotated[str | None, typer.Option("--format", help="csv, jsonl, json or parquet.")] = None,
    columns: options.Mapping = None,
    metric: Annotated[str | None, typer.Option(help="Its score; chosen from the data by default.")] = None,
    limit: options.Limit = None,
    device: options.Device = None,
) -> None:
    """Register DATA as a watch set, and score it now.

    Example: treelora watch add acceptance ~/data/acceptance
    """
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.config import Config
    from treelora_cli.learning.gate import register
    from treelora_cli.learning.opening import open_base, project_config
    from treelora_cli.project import check_task_name
    from treelora_cli.project.metrics import check_new

    session = session_of(context)
    check_task_name(name)
    project = session.project()
    check_new(project.watch(), name)
    config = project_config(project, Config())
    request = DataRequest(
        path=lasting(data),
        data_format=data_format,
        columns=parse_pairs(columns, "--map"),
        metric=metric,
        test_limit=limit,
        seed=project.state.fixed["seed"],
        kept_in=project.root.absolute(),
    )
    runtime = session.runtime(device)
    with session.writer(runtime, f"watch add {name}") as project:
        project.check_decided()
        check_new(project.watch(), name)
        base = open_base(project, config, runtime)
        new = register(base, project.memory(), name, request, str(config.inference))
        if runtime.is_main:
            project.set_watch((*project.watch(), new))
    _show(context, [new])


@watch.command("list")
def list_(context: typer.Context) -> None:
    """Show every watch set and its scores.

    Example: treelora watch list
    """
    _show(context, session_of(context).project().watch())


@watch.command("remove")
def remove(
    context: typer.Context, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the set.")]
) -> None:
    """Stop scoring a watch set, and forget its scores; its data stays where it is.

    Example: treelora watch remove acceptance
    """
    from treelora_cli.project.metrics import without

    session = session_of(context)
    with session.project().lock(f"watch remove {name}") as project:
        project.check_decided()
        left = without(project.watch(), name)
        project.set_watch(left)
    session.output.result({"removed": name, "left": [one.name for one in left]}, f"Watch set '{name}' is removed.")


def _show(context: typer.Context, sets: Any) -> None:
    from treelora_cli.views.scores import watch_table

    output = session_of(context).output
    document = [_facts(one) for one in sets]
    output.result(
        {"watch": document}, watch_table(sets) if sets else "No watch set. Add one: treelora watch add NAME DATA"
    )


def _facts(one: WatchSet) -> dict[str, Any]:
    return {
        "name": one.name,
        "data": one.record["data"]["path"],
        "metric": one.metric,
        "examples": one.examples,
        "untouched": one.untouched,
        "reference": one.reference,
        "scores": dict(one.scores),
    }
