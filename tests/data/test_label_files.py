"""Files that say what numbers of labels mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import picture

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError

ROWS = "text,label\na,0\nb,1\n"


def answers(folder: Path, name: str, content: str | bytes, rows: str = ROWS) -> list[str]:
    """Return the label of each example, named by a file."""
    (folder / "d.csv").write_text(rows)
    names = folder / name
    names.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [one.answer for one in list_texts(DataRequest(folder / "d.csv", held_out=0.0, label_names=names)).train]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.txt", "cat\ndog\n"),
        ("n.txt", "\ufeffcat\r\ndog\r\n\r\n"),
        ("n.txt", "0: cat\n1: dog\n"),
        ("n.txt", "0\tcat\n1\tdog"),
        ("n.csv", "id,name\n0,cat\n1,dog\n"),
        ("n.csv", "name,id\ndog,1\ncat,0\n"),
        ("n.json", '["cat", "dog"]'),
        ("n.json", '{"1": "dog", "0": "cat"}'),
        ("n.json", '{"dog": 1, "cat": 0}'),
        ("config.json", '{"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}}'),
        ("n.json", '{"categories": [{"id": 1, "name": "dog"}, {"id": 0, "name": "cat"}]}'),
        ("data.yaml", "nc: 2\nnames: [cat, dog]\n"),
        ("data.yaml", "nc: 2\nnames:\n- cat\n- dog\n"),
        ("data.yaml", "names:\n  0: cat\n  1: dog\n"),
    ],
)
def test_names_however_they_are_written(tmp_path: Path, name: str, content: str) -> None:
    assert answers(tmp_path, name, content) == ["cat", "dog"]


def test_numbers_of_the_file_count_not_its_lines(tmp_path: Path) -> None:
    assert answers(tmp_path, "n.txt", "1: cat\n2: dog\n", "text,label\na,2\nb,1\n") == ["dog", "cat"]
    with pytest.raises(DataError, match=r"d\.csv:2: label 0 is not among the 2 names in .*n\.txt"):
        answers(tmp_path, "n.txt", "1: cat\n2: dog\n")


def test_names_in_windows_1252(tmp_path: Path) -> None:
    assert answers(tmp_path, "n.txt", "caf\u00e9\ndog\n".encode("cp1252")) == ["caf\u00e9", "dog"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("n.txt", "1 star\n2 stars\n", r"n\.txt: every line begins with a number"),
        ("n.txt", "cat\n\ndog\n", r"n\.txt:2: an empty line between label names"),
        ("n.txt", "cat\ncat\n", r"n\.txt: expected distinct names"),
        ("n.txt", "0: cat\n0: dog\n", r"n\.txt: expected distinct names"),
        ("n.json", '{"a.png": "cat"}', r"n\.json: expected distinct names"),
        ("n.json", "[1, 2]", r"n\.json: expected distinct names"),
        ("n.json", "[", r"n\.json: no list of label names"),
        ("n.yaml", "names: [", r"n\.yaml: no list of label names"),
    ],
)
def test_what_names_nothing_is_refused(tmp_path: Path, name: str, content: str, line: str) -> None:
    with pytest.raises(DataError, match=line):
        answers(tmp_path, name, content)


@pytest.mark.parametrize("name", ["classes.txt", "class_names.json", "data.yaml", "label-map.json"])
def test_a_file_that_may_name_numbers_is_pointed_out(tmp_path: Path, name: str) -> None:
    (tmp_path / "d.csv").write_text(ROWS)
    (tmp_path / name).write_text(json.dumps(["cat", "dog"]))
    found = list_texts(DataRequest(tmp_path / "d.csv", held_out=0.0))
    assert found.labels == ("0", "1")
    assert f"If {name} beside them says what they mean: --label-names {tmp_path / name}" in found.notes[0]


def test_class_folders_called_by_numbers_are_named(tmp_path: Path) -> None:
    for number in "01":
        (tmp_path / "d/train" / number).mkdir(parents=True)
        picture("red", int(number), size=4).save(tmp_path / "d/train" / number / "a.png")
    (tmp_path / "d/classes.txt").write_text("cat\ndog\n")
    found = list_images(DataRequest(tmp_path / "d", held_out=0.0))
    assert found.labels == ("0", "1")
    assert any("If classes.txt beside them says what they mean: --label-names" in note for note in found.notes)
    named = list_images(DataRequest(tmp_path / "d", held_out=0.0, label_names=tmp_path / "d/classes.txt"))
    assert [(item.label, Path(item.name).parent.name) for item in named.train] == [("cat", "0"), ("dog", "1")]
    (tmp_path / "n.txt").write_text("0: cat\n2: dog\n")
    with pytest.raises(DataError, match=r"/1/a\.png: label 1 is not among the 2 names in .*n\.txt"):
        list_images(DataRequest(tmp_path / "d", held_out=0.0, label_names=tmp_path / "n.txt"))


def test_options_that_nothing_is_there_for_are_said(tmp_path: Path) -> None:
    (tmp_path / "d/cat").mkdir(parents=True)
    picture("red", 1, size=4).save(tmp_path / "d/cat/a.png")
    request = DataRequest(tmp_path / "d", held_out=0.0, columns={"x": "y"}, data_format="csv")
    assert list_images(request).notes == (
        "All images are of one class, 'cat'.",
        "--map is not used: d is a folder of classes and no table.",
        "--format is not used: d is a folder of classes and no table.",
    )
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    assert list_texts(DataRequest(tmp_path / "d.jsonl", held_out=0.0, label_prefix="x")).notes == (
        "--label-prefix is not used: no column of labels is read here.",
    )
