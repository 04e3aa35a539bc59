"""What every command gets: the global options, as chosen anywhere on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from treelora_cli.errors import UsageError
from treelora_cli.project import Project
from treelora_cli.views.console import Output

if TYPE_CHECKING:
    from treelora_cli import api
    from treelora_cli.backend.runtime import Runtime


@dataclass
class Session:
    """The global options of one invocation.

    Attributes:
        directory: Value of ``-C``; ``None`` for the current directory.
        output: Where results and notes go.
        verbose: Show more.
        offline: Never ask the network.
    """

    directory: Path | None
    output: Output
    verbose: bool
    offline: bool

    def project(self) -> Project:
        """Open the project at ``-C``, or at or above the current directory."""
        return Project.open(Project.locate(self.directory or Path.cwd()))

    def opened(self, device: str | None) -> api.Project:
        """Open the project as Python programs do; device and processes start when the model is first needed."""
        from treelora_cli import api

        return api.Project(self.project(), lambda: self.runtime(device))

    def runtime(self, device: str | None) -> Runtime:
        """Start accelerate; in all processes but the main one nothing is shown."""
        from treelora_cli.backend.runtime import open_runtime

        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        runtime = open_runtime(device, offline=self.offline, reporter=self.output)
        self.output.silent = not runtime.is_main
        return runtime

    @contextmanager
    def writer(self, runtime: Runtime, purpose: str) -> Iterator[Project]:
        """Open the project for writing; of several processes the main one holds the lock."""
        project = self.project()
        if runtime.is_main:
            with project.lock(purpose) as locked:
                yield locked
        else:
            yield project


def session_of(context: typer.Context) -> Session:
    """Return the global options of this invocation."""
    found = context.obj
    assert isinstance(found, Session)
    return found


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    """Read ``key=value`` options.

    Raises:
        UsageError: One of them has no ``=``.
    """
    parsed = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UsageError(f"{option} {pair}: expected KEY=VALUE.")
        parsed[key] = value
    return parsed
