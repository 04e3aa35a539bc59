"""What was answered for what: ``eval`` by class, ``predict`` in several forms."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from conftest import STREAM, Cli, check_error

from treelora_cli.views.answers import class_scores, confusion_csv, within
from treelora_cli.views.delimited import csv_line

CLASSES = [name for _, classes in STREAM for name in classes]


@pytest.fixture(scope="module")
def images(data: Path) -> list[Path]:
    return [path for name, _ in STREAM for path in sorted((data / name / "test").glob("*/0[0-3].png"))]


def test_eval_by_class_agrees_with_the_score_of_each_task(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    file = tmp_path / "confusion.csv"
    done = cli("--json", "-C", learned_project, "eval", "--per-class", "--top", "7", "--confusion", file).json
    by_class = {one["label"]: one for one in done["classes"]}
    assert set(by_class) == set(CLASSES)
    for name, classes in STREAM:
        right = sum(by_class[one]["accuracy"] * by_class[one]["examples"] for one in classes)
        count = sum(by_class[one]["examples"] for one in classes)
        assert done["tasks"][name]["score"] == pytest.approx(right / count)
    assert done["top"] == {"k": 7, "share": 1.0, "examples": 8 * 7}, "there are seven classes"
    rows = list(csv.DictReader(file.open()))
    for row in rows:
        counts = {key: int(value) for key, value in row.items() if key != "right answer"}
        told = by_class[row["right answer"]]
        assert sum(counts.values()) == told["examples"]
        assert counts[row["right answer"]] == round(told["accuracy"] * told["examples"])
        if told["confused_with"] is not None:
            assert counts[told["confused_with"]] == told["confused"]
    accuracies = [one["accuracy"] for one in done["classes"]]
    assert accuracies == sorted(accuracies)


def test_top_one_is_the_score(cli: Cli, learned_project: Path) -> None:
    done = cli("--json", "-C", learned_project, "eval", "--top", "1", "--inference", "latest").json
    assert done["top"]["share"] == pytest.approx(sum(8 * len(c) * done["tasks"][n]["score"] for n, c in STREAM) / 56)


def test_eval_shows_classes_as_a_table(cli: Cli, learned_project: Path) -> None:
    shown = cli("-C", learned_project, "eval", "--per-class", "--top", "2").out
    assert "confused most with" in shown
    assert "The right answer is among the 2 likeliest for" in shown


def test_confusion_that_cannot_be_written(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    check_error(
        cli("-C", learned_project, "eval", "--confusion", tmp_path / "no" / "x.csv"), 2, "--confusion .*No such"
    )
    check_error(cli("-C", learned_project, "eval", "--top", "11"), 2, "Invalid value for '--top'")


def test_class_scores_by_hand() -> None:
    confusion = {("a", "a"): 3, ("a", "b"): 1, ("a", "c"): 1, ("b", "b"): 2}
    first, second = class_scores(confusion)
    assert (first.label, first.accuracy, first.count, first.confused_with, first.confused) == ("a", 0.6, 5, "b", 1)
    assert (second.label, second.accuracy, second.confused_with) == ("b", 1.0, None)
    assert confusion_csv(confusion) == "right answer,a,b,c\na,3,1,1\nb,0,2,0\n"
    assert within(1, [None]) == (None, 0)


def test_predictions_agree_in_every_form(cli: Cli, learned_project: Path, images: list[Path]) -> None:
    document = cli("--json", "-C", learned_project, "predict", *images, "--top", "3").json["predictions"]
    lines = cli("-C", learned_project, "predict", *images, "--top", "3", "--format", "jsonl").out.splitlines()
    assert [json.loads(line) for line in lines] == document
    rows = list(csv.DictReader(cli("-C", learned_project, "predict", *images, "--format", "csv").out.splitlines()))
    assert [(row["input"], row["output"], row["task"]) for row in rows] == [
        (one["input"], one["output"], one["task"]) for one in document
    ]
    for one in document:
        assert len(one["others"]) == 2
        shares = [one["confidence"], *(other["confidence"] for other in one["others"])]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) <= 1 + 1e-6
        assert one["output"] not in {other["output"] for other in one["others"]}


def test_explained_predictions_name_margin_and_leaf(cli: Cli, learned_project: Path, images: list[Path]) -> None:
    plain = cli("--json", "-C", learned_project, "predict", images[0], "--top", "2").json["predictions"][0]
    told = cli("--json", "-C", learned_project, "predict", images[0], "--explain").json["predictions"][0]
    assert told["margin"] == pytest.approx(plain["confidence"] - plain["others"][0]["confidence"])
    assert told["task"] in told["branch"]
    shown = cli("-C", learned_project, "predict", images[0], "--explain").out
    assert "margin" in shown and "branch" in shown


def test_an_unknown_form_is_refused_before_anything_is_loaded(cli: Cli, learned_project: Path) -> None:
    done = cli("-C", learned_project, "predict", "x.png", "--format", "jsonlines")
    check_error(done, 2, r"--format is one of table, csv, jsonl; got 'jsonlines' \(did you mean 'jsonl'\?\)")


def test_inputs_that_cannot_be_read_are_skipped_where_asked(
    cli: Cli, learned_project: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    for place, image in enumerate(images[:3]):
        (folder / f"{place}.png").write_bytes(image.read_bytes())
    (folder / "1a.png").write_bytes(images[0].read_bytes()[:90])
    (folder / "2a.png").write_bytes(b"no image")
    root = ("-C", learned_project, "predict")
    check_error(cli(*root, folder), 4, r"1a\.png: unreadable or truncated image \(.*\)\. Mend it, or pass --skip-bad\.")
    done = cli(*root, folder, "--skip-bad", "--format", "csv")
    assert (done.code, [row["input"] for row in csv.DictReader(done.out.splitlines())]) == (
        0,
        [str(folder / f"{place}.png") for place in range(3)],
    )
    assert "2 bad inputs were skipped, such as " in done.err and "1a.png: unreadable or truncated image" in done.err
    alone = cli(*root, *images[:3], "--format", "csv").out.splitlines()
    assert [line.split(",")[1:] for line in done.out.splitlines()] == [line.split(",")[1:] for line in alone]


def test_what_is_no_image_is_said(cli: Cli, learned_project: Path, images: list[Path], tmp_path: Path) -> None:
    root = ("-C", learned_project, "predict")
    paths = tmp_path / "paths.txt"
    paths.write_text(f"{images[0]}\n")
    check_error(cli(*root, paths), 4, rf"paths\.txt is a text and no image\. .*: treelora predict - < {paths}")
    check_error(cli(*root, ""), 4, r"An INPUT is empty: give images, folders, patterns or tables\.")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    check_error(cli(*root, tmp_path / "gone.png"), 4, r"gone\.png is a link to nowhere\.png, which is not there\.")
    check_error(cli(*root, "/proc/self/mem"), 4, r"/proc/self/mem cannot be read: Input/output error\.")


def test_an_empty_path_is_not_the_current_directory(
    cli: Cli, empty_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's unset variable would have the current directory learned."""
    monkeypatch.chdir(data / "warm")
    root = ("-C", empty_project)
    for command in (["train-task", ""], ["train-task", ".", " "], ["data", "warm", ""], ["watch", "add", "w", ""]):
        line = rf"An argument after '{command[-2]}' is empty: an unset variable of the shell\?"
        check_error(cli(*root, *command), 2, line)
    done = cli(*root, "train-task", ".", "--label-prefix", "", "--dry-run", "--device", "cpu")
    assert done.code == 0, done.err


def test_a_cell_of_csv_may_hold_several_lines() -> None:
    cells = ["a\nb", "c\rd", 'say "x"', "e,f", "g"]
    line = csv_line(cells)
    assert line == '"a\nb","c\rd","say ""x""","e,f",g'
    assert list(csv.reader(io.StringIO(line, newline=""))) == [cells]
    assert confusion_csv({("a\nb", "a\nb"): 1}) == 'right answer,"a\nb"\n"a\nb",1\n'
