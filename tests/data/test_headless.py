"""Tables in which no line names the columns: columns are counted, and a first record is not taken for names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.data.tables import read_table
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError

LABELLED = "Tom is happy,good\nTom is sad,bad\nTom is glad,good\n"


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def texts(path: Path, **options: Any) -> list[tuple[str, str]]:
    return [(one.prompt, one.answer) for one in list_texts(DataRequest(path, held_out=0, **options)).train]


def test_columns_that_are_counted_have_a_record_in_the_first_line(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", LABELLED)
    found = texts(table, columns={"1": "text", "2": "label"})
    assert found == [("Tom is happy", "good"), ("Tom is sad", "bad"), ("Tom is glad", "good")]
    assert texts(table, columns={"2": "answer", "1": "prompt"})[0] == ("Tom is happy", "good")


@pytest.mark.parametrize("name", ["t.tsv", "t.txt"])
def test_tabs_without_a_head(tmp_path: Path, name: str) -> None:
    table = written(tmp_path / name, 'ham\tsee "you\nspam\twin now\nham\tok\n')
    found = texts(table, data_format="tsv", columns={"1": "label", "2": "text"})
    assert found == [('see "you', "ham"), ("win now", "spam"), ("ok", "ham")]


def test_a_head_of_numbers_is_a_head(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", "1,2\na,b\n")
    assert [row.values for row in read_table(table, None, {"1": "x"})] == [{"x": "a", "2": "b"}]


def test_a_head_that_is_counted_away_is_no_record(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", "text,label\n" + LABELLED)
    line = r"^t\.csv:1: names the columns \(text, label\)\. Use these names in --map, or leave it out\.$"
    with pytest.raises(DataError, match=line):
        texts(table, columns={"1": "text", "2": "label"})
    assert len(texts(table)) == 3


def test_a_column_beyond_the_last_and_a_line_of_another_length_are_named(tmp_path: Path) -> None:
    table = written(tmp_path / "t.csv", LABELLED)
    with pytest.raises(DataError, match=r"^t\.csv:1: no column '3' to map\. Found 1, 2\.$"):
        read_table(table, None, {"3": "label"})
    with pytest.raises(DataError, match=r"^t\.csv:2: the number of fields differs from the first line's\.$"):
        read_table(written(table, "a,b\nc\n"), None, {"1": "text"})
    with pytest.raises(DataError, match=r"^d\.jsonl:1: no column '1' to map\. Found a\.$"):
        read_table(written(tmp_path / "d.jsonl", '{"a": 1}\n'), None, {"1": "text"})


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        (LABELLED, "--map 1=text --map 2=label"),
        ("ham,see you\nspam,win now\nham,ok\n", "--map 2=text --map 1=label"),
        ("What is one and one?,2\nWhat is two and two?,4\n", "--map 1=prompt --map 2=answer"),
        ("Once upon a time\nThere was a king\n", "--map 1=text"),
    ],
)
def test_a_first_record_is_not_taken_for_names(tmp_path: Path, content: str, columns: str) -> None:
    table = written(tmp_path / "t.csv", content)
    line = r"^t\.csv: its first line seems to be a record \(.*\)\. Where no line names the columns, count them: "
    with pytest.raises(DataError, match=f"{line}{columns}$"):
        texts(table)
    pairs = dict(pair.split("=") for pair in columns.split() if "=" in pair)
    assert len(texts(table, columns=pairs)) == content.count("\n")


def test_names_that_nobody_knows_are_still_names(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"^Found my prompt, reply\. .* Try --map 'my prompt=prompt' --map reply=answer$"
    ):
        texts(written(tmp_path / "t.csv", "my prompt,reply\na,b\nc,d\n"))


def test_images_that_a_table_without_a_head_lists(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("RGB", (4, 4), (90 * index, 9, 9)).save(tmp_path / f"{index}.png")
    table = written(tmp_path / "m.csv", "0.png,cat\n1.png,dog\n2.png,cat\n")
    line = r"^m\.csv: its first line is a record \(0\.png, cat\)\. .* count them: --map 1=path --map 2=label$"
    with pytest.raises(DataError, match=line):
        list_images(DataRequest(table))
    found = list_images(DataRequest(table, held_out=0, columns={"1": "path", "2": "label"}))
    assert [(Path(one.name).name, one.label) for one in found.train] == [
        ("0.png", "cat"),
        ("1.png", "dog"),
        ("2.png", "cat"),
    ]
