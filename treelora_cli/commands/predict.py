"""``treelora predict``: answer inputs with everything learned so far."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from treelora_cli.commands import options
from treelora_cli.commands.context import session_of
from treelora_cli.errors import DataError, UsageError


def predict(
    context: typer.Context,
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT...", help="Image files, or prompts.")],
    inference: options.Inference = None,
    device: options.Device = None,
) -> None:
    """Answer each INPUT: a label for an image, text for a prompt; no task identity given."""
    from treelora_cli.config import from_flags
    from treelora_cli.learning.evaluation import blamed
    from treelora_cli.learning.opening import open_base, project_config
    from treelora_cli.views.scores import percent

    session = session_of(context)
    project = session.project()
    if not project.state.tasks:
        raise UsageError("Nothing is learned yet. Run: treelora train-task DATA")
    config = project_config(project, from_flags(inference=inference))
    base = open_base(project, config, session.runtime(device))
    try:
        memory = project.memory()
        with blamed(memory):
            answers = base.predictor(memory, str(config.inference)).predict(inputs)
    except OSError as error:
        if error.filename is None:
            raise
        raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
    table = Table()
    for heading in ("input", "output", "task", "confidence"):
        table.add_column(heading)
    for given, answer in zip(inputs, answers, strict=True):
        table.add_row(given, answer.output, answer.task or "-", percent(answer.confidence))
    found = [
        {"input": given, "output": answer.output, "task": answer.task, "confidence": answer.confidence}
        for given, answer in zip(inputs, answers, strict=True)
    ]
    session.output.result({"inference": config.inference, "predictions": found}, table)
