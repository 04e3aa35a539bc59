"""``treelora predict``: answer inputs with everything learned so far."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import Session, session_of
from treelora_cli.errors import UsageError, skipped, suggest

if TYPE_CHECKING:
    from treelora_cli.api import Project
    from treelora_cli.backend.values import Prediction, Turn
    from treelora_cli.views.predictions import Shape


def predict(
    context: typer.Context,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...", help="Images or prompts: files, folders, patterns, tables, texts; - is standard input."
        ),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help="JSON of a chat's messages, or JSONL with a chat a line, to be answered; - is standard input."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt of every INPUT; else its task's own.")] = None,
    inference: options.Inference = None,
    threshold: options.Threshold = None,
    top: Annotated[int, typer.Option(min=1, max=10, help="Name so many of the likeliest answers.")] = 1,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also show the margin to the next answer, and the task's leaf in the tree."),
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Count and skip inputs that cannot be read.")] = False,
    output_format: Annotated[str, typer.Option("--format", help="table, or as answers come: csv or jsonl.")] = "table",
    device: options.Device = None,
) -> None:
    """Answer each INPUT: a label for an image, text for a prompt; no task identity given.

    Example: treelora predict photos/*.jpg --top 3 --format csv > answers.csv
    """
    from treelora_cli.views.predictions import FORMATS, Shape, leaves

    session = session_of(context)
    if output_format not in FORMATS:
        hint = suggest(output_format, FORMATS)
        raise UsageError(f"--format is one of {', '.join(FORMATS)}; got '{output_format}'{hint}.")
    project = session.opened(device)
    given: Sequence[str | Sequence[Turn]] = _written_out(project, inputs or []) if project.tasks else inputs or []
    asked = _asked(given, messages, system)
    tree = project.tree if explain else None
    beside = None if tree is None else leaves(tree, project.tasks)
    bad: list[str] | None = [] if skip_bad else None
    answered = project.answers(asked, inference=inference, threshold=threshold, bad=bad)
    shape = Shape(top, explain, beside, known=threshold is not None)
    _show(session, project.inference(inference), answered, shape, output_format)
    if bad:
        session.output.note(skipped(bad, "inputs"))


def _show(
    session: Session, inference: str, answered: Iterator[tuple[str, Prediction]], shape: Shape, output_format: str
) -> None:
    """Write lines as answers come, or everything at the end."""
    from treelora_cli.views.delimited import csv_line
    from treelora_cli.views.predictions import json_line, prediction_table

    if output_format == "table" or session.output.as_json:
        pairs: Sequence[tuple[str, Prediction]] = list(answered)
        unknown = sum(not one.known for _, one in pairs)
        foreign = sum(one.known and one.task is None and one.task_confidence is not None for _, one in pairs)
        if unknown:
            session.output.note(f"{unknown} of {len(pairs)} inputs are unknown.")
        if foreign:
            told = f"{foreign} of {len(pairs)} inputs belong to no task"
            session.output.note(f"{told}: the untouched model answered them.")
        found: list[dict[str, Any]] = [shape.record(*pair) for pair in pairs]
        table = prediction_table([shape.cells(*pair) for pair in pairs], shape)
        session.output.result({"inference": inference, "predictions": found}, table)
        return
    if output_format == "csv":
        session.output.line(csv_line(shape.columns))
    for pair in answered:
        session.output.line(csv_line(shape.cells(*pair)) if output_format == "csv" else json_line(shape.record(*pair)))


def _written_out(project: Project, inputs: Sequence[str]) -> Sequence[str | Sequence[Turn]]:
    """Return each image file or prompt that inputs mean, before any model is loaded."""
    from treelora_cli.data.inputs import image_inputs, text_inputs

    def standard_input() -> bytes:
        return sys.stdin.buffer.read()

    return image_inputs(inputs, standard_input) if project.takes_images else text_inputs(inputs, standard_input)


def _asked(
    inputs: Sequence[str | Sequence[Turn]], messages: Path | None, system: str | None
) -> Sequence[str | Sequence[Turn]]:
    """Return what is to be answered: prompts as typed, or chats where a system prompt or messages are given."""
    from treelora_cli.backend.values import Turn
    from treelora_cli.data.chats import chats_in, read_chats
    from treelora_cli.data.inputs import STANDARD_INPUT

    if not inputs and messages is None:
        raise UsageError("predict needs INPUT, or --messages FILE.")
    if system is not None and not system.strip():
        raise UsageError("--system is empty.")
    chats: list[list[Turn]] = []
    if messages is not None:
        from_input = str(messages) == STANDARD_INPUT
        chats = chats_in(sys.stdin.buffer.read(), "standard input") if from_input else read_chats(messages)
    asked = [*inputs, *chats]
    if system is None:
        return asked
    opening = Turn("system", system)
    own = next((place for place, one in enumerate(asked) if not isinstance(one, str) and one[0].role == "system"), None)
    if own is not None:
        held = "INPUT" if own < len(inputs) else str(messages)
        raise UsageError(f"{held} has system prompts of its own; leave out --system.")
    return [[opening, Turn("user", one)] if isinstance(one, str) else [opening, *one] for one in asked]
