"""The command line; the only place where an error becomes an exit code."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.backend.runtime import quiet_libraries, yield_while_waiting
from treelora_cli.commands.compare import compare
from treelora_cli.commands.context import Session
from treelora_cli.commands.data import data
from treelora_cli.commands.demo import demo
from treelora_cli.commands.doctor import doctor
from treelora_cli.commands.evaluate import evaluate
from treelora_cli.commands.export import export
from treelora_cli.commands.init import init
from treelora_cli.commands.inspect_tree import inspect_tree
from treelora_cli.commands.predict import predict
from treelora_cli.commands.report import report
from treelora_cli.commands.rollback import rollback
from treelora_cli.commands.run import run
from treelora_cli.commands.serve import serve
from treelora_cli.commands.settings import settings
from treelora_cli.commands.status import status
from treelora_cli.commands.train_task import train_task
from treelora_cli.commands.watch import watch
from treelora_cli.errors import Interrupted, UsageError, describe_error
from treelora_cli.project.lock import terminate_like_interrupt
from treelora_cli.version import __version__
from treelora_cli.views.console import Output

_EPILOG = "Global options (-C, --json, -q, -v, --offline, --debug) stand before or after the command."
_FLAGS = {"--json", "-q", "--quiet", "-v", "--verbose", "--offline", "--debug"}
_WITH_VALUE = {"-C", "--project"}

app = typer.Typer(
    name="treelora",
    help="Continual learning of large pre-trained models: one adapter per task, a tree of how tasks relate.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for _name, _command in (
    ("init", init),
    ("train-task", train_task),
    ("eval", evaluate),
    ("inspect-tree", inspect_tree),
    ("export", export),
    ("predict", predict),
    ("serve", serve),
    ("status", status),
    ("report", report),
    ("settings", settings),
    ("rollback", rollback),
    ("data", data),
    ("doctor", doctor),
    ("run", run),
    ("compare", compare),
    ("demo", demo),
):
    app.command(_name, epilog=_EPILOG, no_args_is_help=False)(_command)

app.add_typer(watch, name="watch", epilog=_EPILOG)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"treelora {__version__}")
        raise typer.Exit


@app.callback()
def globals_(
    context: typer.Context,
    project: Annotated[
        Path | None, typer.Option("--project", "-C", help="Project directory; default: here or the nearest above.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes, no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show details and library warnings.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Global options."""
    output = context.obj if isinstance(context.obj, Output) else Output(as_json=as_json, quiet=quiet)
    output.as_json, output.quiet, output.verbose = as_json, quiet, verbose
    context.obj = Session(project, output, verbose, offline)


def hoist_globals(arguments: list[str]) -> list[str]:
    """Move global options that stand after the command to the front, where the parser expects them."""
    front: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            rest += arguments[index:]
            break
        if argument in _WITH_VALUE and index + 1 < len(arguments):
            front += [argument, arguments[index + 1]]
            index += 1
        elif argument in _FLAGS or argument.startswith("--project="):
            front.append(argument)
        else:
            rest.append(argument)
        index += 1
    return front + rest


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    given = hoist_globals(sys.argv[1:] if arguments is None else arguments)
    if not {"-v", "--verbose", "--debug"} & set(given):
        quiet_libraries()
    yield_while_waiting()
    terminate_like_interrupt()
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text, nor a terminal know every sign
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.exit(run_command(given))


def _refuse_empty(given: list[str]) -> None:
    """Raise ``UsageError`` for an empty argument, which as a path would be the current directory.

    ``predict`` says it of prompts and images in its own words; after an option an empty value may be meant.
    """
    for before, one in zip(["", *given], given, strict=False):
        if not one.strip() and not before.startswith("-") and "predict" not in given:
            raise UsageError(f"An argument after '{before}' is empty: an unset variable of the shell?")


def run_command(given: list[str]) -> int:
    """Run one command and return its exit code; errors become one line on standard error."""
    output = Output(as_json="--json" in given, quiet=False)
    try:
        _refuse_empty(given)
        result = app(args=given, standalone_mode=False, obj=output)
        if result == Interrupted.exit_code:  # what the parser makes of Ctrl-C, without a word
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            import traceback

            traceback.print_exc()
        message, code = describe_error(error)
        output.error(message, code)
        return code
