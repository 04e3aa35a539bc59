"""``treelora report``: a page of scores, tree, search, time and space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from treelora_cli.commands.context import session_of


def report(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory to write; an earlier report there is replaced.")] = Path(
        "treelora-report"
    ),
) -> None:
    """Write one HTML page about the project, readable anywhere, and its figures as SVG.

    Example: treelora report --out ~/birds-report
    """
    from treelora_cli.report.write import write_report

    session = session_of(context)
    files = write_report(session.project(), out)
    size = sum(path.stat().st_size for path in files)
    session.output.result(
        {"out": str(out), "files": [path.name for path in files], "bytes": size},
        f"Wrote {files[0]} and {len(files) - 1} figures ({size / 1024:,.0f} KiB).",
    )
