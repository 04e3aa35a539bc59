"""The report: one page that needs nothing else, bounded, and refused where it would do harm."""

from __future__ import annotations

import errno
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Cli, check_error, run_python, tree_hash

from treelora_cli.algorithm.bandit import pull_summary
from treelora_cli.project.metrics import TaskAnswers, WatchSet
from treelora_cli.report.charts import shade, ticks
from treelora_cli.report.drawing import COLOURS, STYLE, Drawing, plain, short
from treelora_cli.report.facts import Pulls, TaskFacts
from treelora_cli.report.figures import CELLS, curves_figure, matrix_figure, memory_figure, overall_figure
from treelora_cli.report.training import class_figures, search_figures, watch_figure
from treelora_cli.score_matrix import ScoreMatrix

_VOID = {"meta", "br", "link", "img", "input"}
FIGURES = {"matrix", "overall", "curves", "tree", "pulls", "time", "disk"}
FIGURES |= {"loss", "selections", "classes", "confusion", "routes", "counts", "bounds", "memory"}


class Balance(HTMLParser):
    """Collects tags that are closed by another than their own, and every attribute that points elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for key, value in attrs if key in ("href", "src")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def written(learned_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from treelora_cli.project import Project
    from treelora_cli.report.write import write_report

    out = tmp_path_factory.mktemp("report") / "r"
    write_report(Project.open(learned_project), out)
    return out


def test_command_writes_one_page_and_every_figure(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    before = tree_hash(learned_project)
    done = cli("--json", "-C", learned_project, "report", "--out", tmp_path / "r")
    assert done.code == 0, done.err
    assert set(done.json["files"]) == {"index.html", *(f"{name}.svg" for name in FIGURES)}
    assert done.json["bytes"] == sum(path.stat().st_size for path in (tmp_path / "r").iterdir())
    assert tree_hash(learned_project) == before, "a report changes nothing"


def test_page_is_balanced_and_needs_nothing_else(written: Path) -> None:
    page = (written / "index.html").read_text()
    seen = Balance()
    seen.feed(page)
    assert seen.wrong == [] and seen.open == []
    assert all(link.startswith("#") for link in seen.links), "no file and no network"
    assert "script" not in seen.tags and "url(" not in page and "@import" not in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in seen.links} <= set(ids)


def test_page_tells_the_projects_figures(written: Path, learned_project: Path) -> None:
    from treelora_cli.project import Project

    matrix = Project.open(learned_project).matrix()
    page = (written / "index.html").read_text()
    overall = matrix.overall()
    assert overall is not None
    assert f"<dd>{100 * overall:.1f}</dd>" in page
    for row, after in zip(matrix.rows, matrix.tasks, strict=True):
        for score, on in zip(row, matrix.tasks, strict=False):
            assert score is not None
            assert f"{after}, {on}: {100 * score:.1f}%" in page


def test_the_last_search_is_told_step_by_step_and_memory_by_task(written: Path, learned_project: Path) -> None:
    from treelora_cli.project import Project

    project = Project.open(learned_project)
    page = (written / "index.html").read_text()
    saved, last = project.bandit(), project.state.tasks[-1].name
    assert saved is not None
    counts, _ = pull_summary(saved[0])
    steps, total = project.steps(last), counts.sum(axis=0)
    first = total - np.bincount([arm for one in steps[1:] for arm in one.selected], minlength=len(total))
    for name, before, after in zip(saved[1]["tasks"], first, total, strict=True):
        assert f'<th scope="row">{name}</th><td>{before:,}</td><td>{after:,}</td>' in page
    peaks = [project.task_record(one.name)["peak_bytes"] for one in project.state.tasks]
    assert all(f"{peak / 2**20:,.0f} MiB</text>" in page for peak in peaks)


def test_records_without_memory_and_steps_have_no_such_figures() -> None:
    task = TaskFacts("a", 2, {}, 10)
    assert memory_figure([task]) is None
    told = Pulls("b", ("a",), np.ones((1, 1), int), np.ones((1, 1)), "lcb, 1 steps, width observed")
    assert search_figures(told) == []


def test_figures_are_images_with_a_name_and_a_description(written: Path) -> None:
    for name in FIGURES:
        root = ElementTree.parse(written / f"{name}.svg").getroot()
        assert root.get("role") == "img"
        told = {child.get("id"): child.text for child in root if child.get("id")}
        assert str(root.get("aria-labelledby")).split() == list(told)
        assert all(told.values())


def test_a_later_report_replaces_it_and_other_files_stay(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert cli("-C", learned_project, "report", "--out", out).code == 0
    first = (out / "index.html").read_bytes()
    (out / "notes.txt").write_text("mine")
    (out / "matrix.svg").unlink()
    assert cli("-C", learned_project, "report", "--out", out).code == 0
    assert (out / "index.html").read_bytes() == first, "the same project gives the same page"
    assert (out / "matrix.svg").exists()
    assert (out / "notes.txt").read_text() == "mine"


def test_no_heavy_library_is_imported(learned_project: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom treelora_cli.app import run_command\nassert run_command(sys.argv[1:]) == 0\n"
        "print(sorted({'torch', 'timm', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = run_python(code, "-C", str(learned_project), "report", "--out", str(tmp_path / "r"))
    assert done.out.splitlines()[-1] == "[]", done.err


def test_no_report_without_a_task(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    check_error(cli("-C", empty_project, "report", "--out", tmp_path / "r"), 2, "Nothing to report: no task is learned")
    assert not (tmp_path / "r").exists()


def test_no_report_over_other_peoples_files(cli: Cli, project: Path, tmp_path: Path) -> None:
    before = tree_hash(project)
    for inside in (project, project / "tasks", project / ".treelora" / "x", project.parent):
        check_error(cli("-C", project, "report", "--out", inside), 2, "holds the project's own files")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<h1>Mine</h1>")
    check_error(cli("-C", project, "report", "--out", tmp_path / "site"), 2, "index.html is not a report")
    check_error(cli("-C", project, "report", "--out", tmp_path / "site" / "index.html"), 2, "is a file")
    assert (tmp_path / "site" / "index.html").read_text() == "<h1>Mine</h1>"
    assert tree_hash(project) == before


def test_full_disk_leaves_the_earlier_report(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    assert cli("-C", learned_project, "report", "--out", out).code == 0
    before = tree_hash(out)

    def full(self: Path, *_arguments: Any, **_keywords: Any) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    check_error(cli("-C", learned_project, "report", "--out", out), 6, "could not be written: No space left on device")
    assert tree_hash(out) == before, "nothing half written, nothing left aside"


def test_a_damaged_project_is_said(cli: Cli, project: Path, tmp_path: Path) -> None:
    (project / "metrics" / "matrix.json").write_text("{}")
    shutil.rmtree(project / ".treelora" / "objects", ignore_errors=True)
    check_error(cli("-C", project, "report", "--out", tmp_path / "r"), 3, "matrix.json")


def test_scores_that_are_not_known_leave_gaps() -> None:
    matrix = ScoreMatrix(("a", "b"), ((None,), (0.25, None)))
    drawn = matrix_figure(matrix)
    assert drawn is not None
    assert "b, a: 25.0%" in drawn.svg()
    assert matrix_figure(ScoreMatrix(("a",), ((None,),))) is None
    assert curves_figure(ScoreMatrix(("a",), ((None,),))) is None
    assert "OP is not known" in overall_figure(ScoreMatrix(("a",), ((None,),))).description


def test_a_thousand_tasks_are_bounded() -> None:
    names = tuple(f"task-{index:04d}" for index in range(1000))
    matrix = ScoreMatrix(names, tuple(tuple([index % 7 / 7] * (index + 1)) for index in range(1000)))
    drawn = [matrix_figure(matrix), overall_figure(matrix), curves_figure(matrix)]
    sizes = [len(one.svg()) for one in drawn if one is not None]
    assert len(sizes) == 3
    assert sum(sizes) < 700_000
    assert drawn[0] is not None
    assert f"mean of about {1000 // CELLS} tasks" in drawn[0].description


def test_no_name_of_a_number_leaves_the_figure() -> None:
    matrix = ScoreMatrix(tuple(map(str, range(1000))), tuple(tuple([0.5] * (index + 1)) for index in range(1000)))
    drawn = overall_figure(matrix)
    placed = re.findall(r'x="([\d.]+)" y="[\d.]+" class="soft" text-anchor="middle">([\d,]+)<', drawn.svg())
    assert ("1,000" in dict(map(reversed, placed))) and len(placed) >= 5  # type: ignore[arg-type]
    assert all(float(x) + 3.5 * len(text) <= drawn.width for x, text in placed)


def test_a_small_matrix_has_room_for_its_scale_and_tasks_are_counted_in_whole_numbers() -> None:
    matrix = ScoreMatrix(("a", "b"), ((0.5,), (0.25, 0.75)))
    drawn = matrix_figure(matrix)
    assert drawn is not None
    scale = re.search(r'x="([\d.]+)" y="([\d.]+)" class="soft">100%<', drawn.svg())
    assert scale is not None
    assert float(scale[1]) + 7 * len("100%") <= drawn.width
    assert drawn.height < 160, "no more room above than the names need"
    counted = re.findall(r'class="soft" text-anchor="middle">([^<]+)<', overall_figure(matrix).svg())
    assert counted[:2] == ["1", "2"]


def test_no_branch_of_the_tree_is_drawn_through_the_name_of_a_layer(learned_project: Path) -> None:
    from treelora_cli.project import Project
    from treelora_cli.report.facts import read_facts
    from treelora_cli.report.figures import tree_figure

    drawn = tree_figure(read_facts(Project.open(learned_project))).svg()
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="note"', drawn)
    branches = re.findall(r'<path d="M([\d.]+) [^"]*L[\d.]+ ([\d.]+)" class="axis"', drawn)
    assert len(branches) == 2 * len(names) > 0
    for x, y in names:
        beside = [float(height) for start, height in branches if float(start) + 6 == float(x)]
        assert beside
        assert all(not float(y) - 9 < height < float(y) + 3 for height in beside)


def test_watch_sets_are_drawn_with_their_reference() -> None:
    drawn = watch_figure([WatchSet("acceptance", {}, "accuracy", 8, 0.5, {"a": 0.6, "b": 0.4})], ["a", "b"])
    assert drawn is not None
    assert "acceptance, reference" in drawn.svg()
    assert watch_figure([], ["a"]) is None


def test_shares_of_confusion_are_by_row() -> None:
    answers = {"t": TaskAnswers({("a", "a"): 3, ("a", "b"): 1, ("b", "b"): 2}, {"t": 6})}
    _, confusion = class_figures(answers)
    assert "a, b: 25.0%" in confusion.svg() and "b, b: 100.0%" in confusion.svg()


def test_names_cannot_break_out_of_the_page() -> None:
    drawing = Drawing("n", "<script>alert(1)</script>", 'a "quoted" & \x00\x1b thing', 10, 10)
    drawing.text(0, 0, "</text><script>")
    ElementTree.fromstring(drawing.svg(alone=True))
    assert "<script>" not in drawing.svg()
    assert plain("\x00&") == "\N{REPLACEMENT CHARACTER}&amp;"
    assert short("a" * 40, 10) == "aaaaaa…aaa"


@pytest.mark.parametrize(("part", "ground"), [(0, "#ffffff"), (1, "#14181d")])
def test_every_colour_stands_out_from_its_ground(part: int, ground: str) -> None:
    def luminance(colour: str) -> float:
        shares = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in shares]
        return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    colours = dict(re.findall(r"\.(f\d|ink|soft|note|leaf)\{fill:(#\w{6})", STYLE.split("@media")[part]))
    assert len(colours) == COLOURS + 4
    for name, colour in colours.items():
        low, high = sorted((luminance(colour), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def test_ticks_are_round_and_enclose() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.3, 0.3)[0] <= 0.3 < ticks(0.3, 0.3)[-1]
    assert shade(0) == "#f7fbff" and shade(1) == shade(2) == "#08306b"
