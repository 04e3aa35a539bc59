"""Write an export aside, check it, and put it in its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from treelora_cli.backend.contract import Base, ExportingBase, FurtherExport, TaskData
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory
from treelora_cli.errors import ResourceError, UsageError, suggest
from treelora_cli.learning.evaluation import HeldOut, blamed, read_held_out, score_tasks
from treelora_cli.learning.model_card import CardScores, complete_card
from treelora_cli.project import Project

FORMATS = {
    "merged": "one stock model that holds every task",
    "adapter": "one task's LoRA, a PEFT directory",
    "routed": "base, adapters, router and heads with a loader script: keeps the score",
    "gguf": "a merged language model as the base's own GGUF file, adapted",
    "onnx": "the merged image model as one file",
}
"""What can be written, and what it is."""
_LARGE_GAP = 0.05
"""From so far below the project's score on, an export says what keeps it."""
_CAST = ("merged", "adapter", "gguf")
"""Exports that may be written in another type."""
_KEEPS = "This keeps the score, without treelora: treelora export OUT --format routed."
_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and where to.

    Attributes:
        out: Target directory.
        kind: One of ``FORMATS``.
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
        if self.kind not in FORMATS:
            raise UsageError(
                f"--format is one of {', '.join(FORMATS)}; got '{self.kind}'{suggest(self.kind, FORMATS)}."
            )
        if self.options.dtype not in _DTYPES:
            raise UsageError(f"--dtype is one of {', '.join(_DTYPES)}; got '{self.options.dtype}'.")
        project.check_learned()
        if self.kind != "adapter" and self.task is not None:
            raise UsageError(f"--task goes with --format adapter; a {self.kind} export holds every task.")
        if self.kind not in _CAST and self.options.dtype != "float32":
            raise UsageError(f"--dtype goes with --format {', '.join(_CAST)}; {self.kind} is written in float32.")
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
        kind: One of ``FORMATS``.
        task: Task of an adapter export.
        files: File names.
        check: Comparison after reloading; ``None`` when not asked for.
        load_with: The line of code that loads it.
        inference: How the project itself answers.
        project: The project's own scores on the same examples, by task; empty when not compared.
    """

    kind: str
    task: str | None
    files: list[str]
    check: ExportCheck | None
    load_with: str
    inference: str
    project: dict[str, float]

    @property
    def gap(self) -> float | None:
        """By how much the project's mean score is above the export's, in [0, 1]; ``None`` without scores."""
        names = [name for name in (self.check.scores if self.check else {}) if name in self.project]
        if self.check is None or not names:
            return None
        return sum(self.project[name] - self.check.scores[name][1] for name in names) / len(names)

    @property
    def advice(self) -> str:
        """What keeps the project's score where the export does not, one line; else empty."""
        if self.gap is None or self.gap <= _LARGE_GAP:
            return ""
        if self.task is not None:
            return (
                f"This adapter alone scores {100 * self.gap:.1f} points below the project ('{self.inference}'), which"
                f" chooses among adapters and heads. {_KEEPS}"
            )
        return (
            f"This model scores {100 * self.gap:.1f} points below the project ('{self.inference}'), which chooses among"
            f" its tasks' adapters and heads with a router that no single model holds. {_KEEPS}"
        )


def write_export(project: Project, base: Base, request: ExportRequest, inference: str = "routed") -> ExportReport:
    """Write the export beside its target, check it there, then rename it.

    Args:
        project: What to export.
        base: Its loaded base.
        request: What is wanted and where to.
        inference: How the project itself answers; its score stands beside the export's.

    Raises:
        ResourceError: The disk is full; nothing is left behind.
    """
    memory = project.memory()
    task = None
    if request.kind == "adapter":
        task = project.state.tasks[-1].name if request.task is None else project.entry(request.task).name
    out = request.out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{request.out} cannot be written: {error.strerror}.") from error
    try:
        with blamed(memory):
            _write(base, request, memory, task, aside)
        report = _checked(project, base, request, aside, task, inference)
        _complete_card(aside / "README.md", project, report, out.name)
        files = sorted(path.name for path in aside.iterdir())
        _move_into_place(aside, out)
    except OSError as error:
        raise ResourceError(f"{request.out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return replace(report, files=files)


def _write(base: Base, request: ExportRequest, memory: Memory, task: str | None, out: Path) -> None:
    if request.kind == "merged":
        base.export_merged(memory, out, request.options)
    elif task is not None:
        base.export_adapter(memory, task, out)
    else:
        _further(base, request.kind).write(memory, out, request.options)


def _further(base: Base, kind: str) -> FurtherExport:
    """Return a base's export that is neither a merged model nor an adapter.

    Raises:
        UsageError: The base has none such.
    """
    if not isinstance(base, ExportingBase):
        raise UsageError(f"This project's backend has no --format {kind}.")
    return base.further_export(kind)


def _checked(
    project: Project, base: Base, request: ExportRequest, aside: Path, task: str | None, inference: str
) -> ExportReport:
    """Reload the export and score it beside the project on the same examples."""
    further = None if request.kind in ("merged", "adapter") else _further(base, request.kind)
    load_with = base.load_line(request.out, task) if further is None else further.load_line(request.out)
    report = ExportReport(request.kind, task, [], None, load_with, inference, {})
    if not request.verify:
        return report
    memory, held_out = project.memory(), _held_out(project, base, request, task)
    if further is None:
        check = base.check_export(memory, aside, task, held_out)
    else:
        check = further.check(memory, aside, held_out)
    own = score_tasks(base, memory, inference, [HeldOut(name, data) for name, data in held_out])
    return replace(report, check=check, project={name: one.value for name, one in own.items()})


def _complete_card(card: Path, project: Project, report: ExportReport, name: str) -> None:
    """Add to the model card what only the project knows: scores, data, method, limits."""
    names = [report.task] if report.task is not None else [entry.name for entry in project.state.tasks]
    records = [project.task_record(one) for one in names]
    scores = {one: there for one, (_, there) in (report.check.scores if report.check else {}).items()}
    complete_card(card, name, records, CardScores(scores, report.project, report.inference, report.advice))


def _held_out(project: Project, base: Base, request: ExportRequest, task: str | None) -> list[tuple[str, TaskData]]:
    names = [task] if task is not None else [entry.name for entry in project.state.tasks]
    records = {name: project.task_record(name) for name in names}
    most = getattr(base, "export_examples", None)
    limit = request.limit if most is None else min(most, request.limit or most)
    found = read_held_out(base, records, limit)
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
    for path in aside.rglob("*"):
        if path.is_file():
            target = out / path.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
