"""``treelora export``: a merged model or an adapter that stock code loads, reloaded and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import session_of
from treelora_cli.errors import CheckError

if TYPE_CHECKING:
    from treelora_cli.learning.export import ExportReport


def export(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; absent or empty.")],
    export_format: Annotated[str, typer.Option("--format", help="merged, adapter, routed, gguf or onnx.")] = "merged",
    task: Annotated[str | None, typer.Option(help="Task of an adapter export; the latest by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the saved weights: float32, float16 or bfloat16.")] = "float32",
    max_shard: Annotated[str, typer.Option(help="Largest file of a merged language model.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Reload with stock code and compare.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier export in OUT.")] = False,
    limit: options.Limit = None,
    device: options.Device = None,
) -> None:
    """Write a model or adapter that timm, transformers or peft loads without treelora.

    Example: treelora export ../birds-merged
    """
    from treelora_cli.backend.values import ExportOptions
    from treelora_cli.learning.export import ExportRequest

    session = session_of(context)
    request = ExportRequest(out, export_format, task, ExportOptions(dtype, max_shard), verify, force, limit)
    report = session.opened(device).write_export(request)
    session.output.result(_document(out, report), *_lines(out, report), f"Load with: {report.load_with}")
    if report.check is not None and not report.check.passed:
        raise CheckError(f"The reloaded export differs from the model in memory. It stays in {out} for inspection.")


def _document(out: Path, report: ExportReport) -> dict[str, Any]:
    check = report.check
    return {
        "out": str(out),
        "format": report.kind,
        "task": report.task,
        "files": report.files,
        "largest_logit_difference": None if check is None else check.largest_difference,
        "tolerance": None if check is None else check.tolerance,
        "same_answers": None if check is None or check.same is None else list(check.same),
        "scores": {
            name: {"project": report.project.get(name), "here": here, "reloaded": there}
            for name, (here, there) in (check.scores if check else {}).items()
        },
        "project_inference": report.inference,
        "gap": report.gap,
        "advice": report.advice,
        "load_with": report.load_with,
    }


def _lines(out: Path, report: ExportReport) -> list[str]:
    """Return what was written, how near it is, and each task's score beside the project's."""
    from treelora_cli.views.scores import percent

    check = report.check
    lines = [f"Wrote {out}: {', '.join(report.files)}"]
    if check is not None:
        lines.append(
            f"Reloaded: largest {check.measured} {check.largest_difference:.2e} (allowed {check.tolerance:.0e})"
            + ("" if check.same is None else f", {check.same[0]} of {check.same[1]} answers alike")
        )
        lines += [
            f"  {name}: project ({report.inference}) {percent(report.project.get(name))}, this export {percent(there)}"
            for name, (_, there) in check.scores.items()
        ]
    if report.advice:
        lines.append(report.advice)
    return lines
