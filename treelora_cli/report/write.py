"""Write a report: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from treelora_cli.errors import ResourceError, UsageError
from treelora_cli.project import Project
from treelora_cli.report.facts import read_facts
from treelora_cli.report.figures import figures
from treelora_cli.report.page import GENERATOR, page

PAGE = "index.html"
"""The page's file name."""


def write_report(project: Project, out: Path) -> list[Path]:
    """Write the page and each of its figures into ``out``; an earlier report there is replaced.

    Returns:
        The files, the page first.

    Raises:
        UsageError: Nothing is learned yet, or ``out`` cannot be a report's directory.
        ResourceError: The disk is full; what was in ``out`` is as it was.
    """
    _check_place(project, out)
    facts = read_facts(project)
    drawings = figures(facts)
    contents = {PAGE: page(facts, drawings), **{f"{one.name}.svg": one.svg(alone=True) for one in drawings}}
    try:
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}.") from error
    try:
        for name, text in contents.items():
            (aside / name).write_text(text, encoding="utf-8")
        for name in contents:
            os.replace(aside / name, out / name)
    except OSError as error:
        raise ResourceError(f"The report in {out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [out / name for name in contents]


def _check_place(project: Project, out: Path) -> None:
    full, root = out.resolve(), project.root.resolve()
    own = {"tasks", "metrics", ".treelora"}
    if full == root or full in root.parents or (root in full.parents and full.relative_to(root).parts[0] in own):
        raise UsageError(f"{out} holds the project's own files. Choose another directory for the report.")
    if full.is_file():
        raise UsageError(f"{out} is a file. Choose a directory for the report.")
    page_there = full / PAGE
    if page_there.exists() and GENERATOR not in page_there.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise UsageError(f"{page_there} is not a report. Choose another directory.")
