"""Write an export aside, check it, and put it in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.backend.contract import Base, ExportCheck, ExportOptions, TaskData
from treelora_cli.errors import ResourceError, UsageError, suggest
from treelora_cli.learning.evaluation import blamed, read_held_out
from treelora_cli.project import Project

_FORMATS = ("merged", "adapter")
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and where to.

    Attributes:
        out: Target directory.
        kind: ``merged`` or ``adapter``.
        task: Task of an adapter export; the latest when ``None``.
        options: Data type and shard size.
        verify: Reload and compare.
        force: Replace an earlier export.
        limit: Most held-out examples per class or task in the comparison.
    """

    out: Path
    kind: str
    task: str | None
    options: ExportOptions
    verify: bool
    force: bool
    limit: int | None

    def check(self, project: Project) -> None:
        """Raise ``UsageError`` when this cannot be exported, before anything is loaded."""
        if self.kind not in _FORMATS:
            raise UsageError(
                f"--format is one of {', '.join(_FORMATS)}; got '{self.kind}'{suggest(self.kind, _FORMATS)}."
            )
        if self.options.dtype not in _DTYPES:
            raise UsageError(f"--dtype is one of {', '.join(_DTYPES)}; got '{self.options.dtype}'.")
        if not project.state.tasks:
            raise UsageError("Nothing is learned yet. Run: treelora train-task DATA")
        if self.kind == "merged" and self.task is not None:
            raise UsageError("--task goes with --format adapter; a merged model holds every task.")
        if self.task is not None:
            project.entry(self.task)
        out, root = self.out.resolve(), project.root.resolve()  # "../out" is beside the project, not below it
        if out == root or out in root.parents or root in out.parents:
            raise UsageError(f"{self.out} overlaps the project. Choose a directory outside it.")
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not self.force):
            raise UsageError(f"{self.out} is not empty. Choose another directory, or pass --force.")


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        task: Task of an adapter export.
        files: File names.
        check: Comparison after reloading; ``None`` when not asked for.
        load_with: The line of code that loads it.
    """

    task: str | None
    files: list[str]
    check: ExportCheck | None
    load_with: str


def write_export(project: Project, base: Base, request: ExportRequest) -> ExportReport:
    """Write the export beside its target, check it there, then rename it.

    Raises:
        ResourceError: The disk is full; nothing is left behind.
    """
    memory = project.memory()
    task = None
    if request.kind == "adapter":
        task = request.task or project.state.tasks[-1].name
    out = request.out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{request.out} cannot be written: {error.strerror}.") from error
    try:
        with blamed(memory):
            if task is None:
                base.export_merged(memory, aside, request.options)
            else:
                base.export_adapter(memory, task, aside)
        check = (
            base.check_export(memory, aside, task, _held_out(project, base, request, task)) if request.verify else None
        )
        files = sorted(path.name for path in aside.iterdir())
        _move_into_place(aside, out)
    except OSError as error:
        raise ResourceError(f"{request.out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return ExportReport(task, files, check, base.load_line(request.out, task))


def _held_out(project: Project, base: Base, request: ExportRequest, task: str | None) -> list[tuple[str, TaskData]]:
    names = [task] if task is not None else [entry.name for entry in project.state.tasks]
    records = {name: project.task_record(name) for name in names}
    found = read_held_out(base, records, request.limit)
    return [(one.name, one.data) for one in found if one.data is not None]


def _move_into_place(aside: Path, out: Path) -> None:
    """Move the files; those of an earlier export with the same names are replaced, others stay."""
    umask = os.umask(0o022)
    os.umask(umask)
    os.chmod(aside, 0o777 & ~umask)
    for path in aside.rglob("*"):  # safetensors makes its files readable by their owner only
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
    if not out.exists():
        aside.rename(out)
        return
    for path in aside.iterdir():
        os.replace(path, out / path.name)
