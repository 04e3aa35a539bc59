"""Standard output carries the result, standard error everything else."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from treelora_cli.views.fitting import fitted

T = TypeVar("T")

_MORE_THAN_SPACE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_PIPE_WIDTH = 4096
"""Columns where there is no terminal: nothing is cut off."""


def harmless(text: str, *, one_line: bool = False) -> str:
    """Return a text with its control characters written out: names in data must not steer a terminal.

    Args:
        text: May hold names of files and classes.
        one_line: Write out line breaks and tabs, too.
    """
    pattern = _CONTROLS if one_line else _MORE_THAN_SPACE
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Output:
    """Where results, notes and progress go.

    Args:
        as_json: One JSON document on standard output, nothing else there.
        quiet: No notes and no progress.
        verbose: Details among the notes.
        silent: Nothing at all, as in all processes but the main one.
    """

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool = False, silent: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self.silent = silent
        self.documents = 0
        self.out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        if not self.out.is_terminal and "COLUMNS" not in os.environ:
            self.out.width = _PIPE_WIDTH
        self.err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

    def result(self, document: dict[str, Any], *views: RenderableType) -> None:
        """Print the JSON document, or its views for people."""
        if self.silent:
            return
        if self.as_json:
            self.documents += 1
            sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
            return
        for view in views:
            if isinstance(view, Table):
                for column in view.columns:
                    column._cells = [harmless(cell) if isinstance(cell, str) else cell for cell in column._cells]
                for part in fitted(view, self.out):
                    self.out.print(part, soft_wrap=False)
            else:
                self.out.print(harmless(view) if isinstance(view, str) else view)

    def line(self, text: str) -> None:
        """Write one line of a result that comes in lines, as it is, at once."""
        if not self.silent:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def note(self, message: str) -> None:
        """Print one line beside the result."""
        if not (self.quiet or self.silent):
            self.err.print(harmless(message))

    def detail(self, message: str) -> None:
        """Print one line beside the result where details are wanted."""
        if self.verbose:
            self.note(message)

    def error(self, message: str, exit_code: int) -> None:
        """Print an error line, and with ``--json`` its document unless a result was printed already."""
        self.err.print(harmless(f"Error: {message}", one_line=True), style="red")
        if self.as_json and not (self.silent or self.documents):
            sys.stdout.write(json.dumps({"error": message, "exit_code": exit_code}) + "\n")

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield ``items`` under a progress bar with rate and time left; quiet when not a terminal."""
        if self.quiet or self.silent or not self.err.is_terminal:
            yield from items
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as progress:
            bar = progress.add_task(description, total=total, rate="")
            for item in items:
                yield item
                speed = progress.tasks[bar].speed
                progress.update(bar, advance=1, rate=f"{speed:.1f}/s" if speed else "")
