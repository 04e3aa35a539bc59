"""``treelora demo``: the main job on data and a model that come with the installation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import session_of
from treelora_cli.commands.run import run_and_report, show_stream
from treelora_cli.errors import CheckError, UsageError

if TYPE_CHECKING:
    from treelora_cli.backend.values import ExportCheck
    from treelora_cli.learning.export import ExportReport


def demo(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where data, project and export are written.")
    ] = Path("treelora-demo"),
    device: options.Device = None,
) -> None:
    """Learn handwritten digits as five tasks of two classes, show the tree, export and verify. Offline.

    Example: treelora demo digits
    """
    from treelora_cli.backend.values import ExportOptions
    from treelora_cli.config import Config
    from treelora_cli.data.digits import write_digits
    from treelora_cli.learning.export import ExportRequest, write_export
    from treelora_cli.learning.opening import open_base, project_config
    from treelora_cli.learning.recipes import shipped_recipes
    from treelora_cli.learning.stream import StreamRequest
    from treelora_cli.project.store import write_file
    from treelora_cli.views.task_tree import tree_document, tree_view

    session = session_of(context)
    if directory.exists() and (directory.is_file() or any(directory.iterdir())):
        raise UsageError(f"{directory} is not empty. Name another directory: treelora demo DIR")
    write_digits(directory / "digits", write_file)
    session.output.note(f"Wrote scikit-learn's handwritten digits to {directory / 'digits'}.")
    recipe = shipped_recipes()["demo"]
    request = StreamRequest(recipe, directory / "project", directory / "digits", Config(), None, resume=False)
    project, reports = run_and_report(session, request, device)
    runtime = session.runtime(device)
    base = open_base(project, project_config(project, Config()), runtime, exact=True)
    out = directory / "export"
    export = write_export(project, base, ExportRequest(out, "merged", None, ExportOptions(), True, False, None))
    tree = project.tree()
    assert tree is not None and export.check is not None
    names = [task.name for task in project.state.tasks]
    layers = project.state.base["layers"]
    line, document = _exported(out, export, export.check)
    show_stream(
        session,
        project,
        reports,
        tree_view(tree, names, layers, None),
        line,
        f"Load with: {export.load_with}",
        f"Look around: treelora -C {project.root} status | eval | inspect-tree --bandit",
        tree=tree_document(tree, names, layers),
        export=document,
    )
    if not export.check.passed:
        raise CheckError("The reloaded export differs from the model in memory.")


def _exported(out: Path, export: ExportReport, check: ExportCheck) -> tuple[str, dict[str, Any]]:
    """Say how near the reloaded export is, in a line and as a document."""
    from treelora_cli.views.scores import percent

    merged = sum(there for _, there in check.scores.values()) / max(1, len(check.scores))
    own = sum(export.project.values()) / max(1, len(export.project))
    difference = check.largest_difference
    line = (
        f"Merged export {out}: reloaded with timm, largest logit difference {difference:.1e},"
        f" mean score {percent(merged)} (the project, {export.inference}: {percent(own)})."
    )
    return line, {"out": str(out), "largest_logit_difference": difference, "score": merged, "passed": check.passed}
