"""Where tables and their images lie, and which rows are training and which are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from conftest import picture
from pyarrow import parquet
from table_files import csv_with_labels, listed, png, rows, with_features, written

from treelora_cli.data.divided import divide_rows
from treelora_cli.data.pixels import open_image
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError


@pytest.mark.parametrize("head", ["Path,Label", "Image Name,CLASS", "image_id,class_id", "Filename,Category"])
def test_columns_are_known_in_any_case(tmp_path: Path, head: str) -> None:
    assert listed(csv_with_labels(tmp_path, ["a", "b"], head)).labels == ("a", "b")


def images_in(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        picture("red", index, size=4).save(folder / name, format="PNG")
    return folder


def test_bare_names_are_found_in_the_one_folder_that_has_them_all(tmp_path: Path) -> None:
    root = images_in(tmp_path / "d" / "train_images", "a1.png", "b2.png").parent
    path = written(root / "m.csv", "image_id,label\na1,cat\nb2.png,dog\n")
    assert [Path(item.name).name for item in listed(path).train] == ["a1.png", "b2.png"]
    images_in(root / "test_images", "a1.png")
    assert len(listed(path).train) == 2, "the other folder has not all of them"
    images_in(root / "test_images", "b2.png")
    with pytest.raises(DataError, match=r"m\.csv:2: files of these names are in .*test_images, .*train_images\."):
        listed(path)
    assert {Path(item.name).parent.name for item in listed(path.rename(root / "train.csv")).train} == {"train_images"}
    with pytest.raises(DataError, match=r"n\.csv:2: sub/a1\.png not found\."):
        listed(written(root / "n.csv", "path,label\nsub/a1.png,cat\n"))


def test_addresses_file_urls_and_base64(tmp_path: Path) -> None:
    import base64

    images_in(tmp_path, "a 1.png")
    found = listed(written(tmp_path / "m.csv", f"path,label\nfile://{tmp_path}/a%201.png,cat\n"))
    assert found.train[0].name == str(tmp_path / "a 1.png")
    with pytest.raises(DataError, match=r"m\.csv:2: https://x\.org/a\.png is an address; only local files are read\."):
        listed(written(tmp_path / "m.csv", "path,label\nhttps://x.org/a.png,cat\n"))
    text = base64.b64encode(png(1)).decode()
    rows = [{"image": prefix + text, "label": "cat"} for prefix in ("", "data:image/png;base64,")]
    found = listed(written(tmp_path / "m.jsonl", "\n".join(map(json.dumps, rows))))
    assert [item.read() for item in found.train] == [png(1), png(1)]


def arrow_file(path: Path, table: Any, *, stream: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as file, opened(file, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("layout", ["repository", "save_to_disk", "csv", "metadata", "one metadata", "kaggle"])
def test_folders_whose_tables_name_the_classes(tmp_path: Path, layout: str) -> None:
    names = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = with_features(pyarrow.table({"image": [png(1), png(2)], "label": [1, 0]}), names)
    for part in ("train", "test"):
        images_in(tmp_path / part, f"{part}1.png", f"{part}2.png") if "me" in layout or layout in "csv kaggle" else None
        lines = f"file_name,label\n{part}1.png,dog\n{part}2.png,cat\n"
        if layout == "repository":
            (tmp_path / "data").mkdir(exist_ok=True)
            parquet.write_table(table, tmp_path / "data" / f"{part}-00000-of-00001.parquet")
        elif layout == "save_to_disk":
            arrow_file(tmp_path / part / "data-00000-of-00001.arrow", table)
            (tmp_path / part / "state.json").write_text("{}")
        elif layout == "metadata":
            written(tmp_path / part / "metadata.csv", lines)
        elif layout in ("csv", "kaggle"):
            written(tmp_path / f"{part}.csv", lines)
    if layout == "one metadata":
        rows = [f"{p}/{p}{n}.png,{name},{p}" for p in ("train", "test") for n, name in ((1, "dog"), (2, "cat"))]
        written(tmp_path / "metadata.csv", "\n".join(["file_name,label,split", *rows]))
    if layout == "kaggle":
        written(tmp_path / "test.csv", "file_name\ntest1.png\n")
        written(tmp_path / "sample_submission.csv", "file_name,label\ntest1.png,cat\n")
    found = listed(tmp_path)
    assert [item.label for item in found.train] == ["dog", "cat"]
    assert [item.label for item in found.test] == ([] if layout == "kaggle" else ["dog", "cat"])
    assert found.notes[0].startswith(f"No folder of {tmp_path} names a class; its labels are in ")
    assert ("The test part has no answers: its 1 images were left out." in found.notes) is (layout == "kaggle")


def test_arrow_files_of_both_kinds(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"]})
    for name, stream in (("d.arrow", True), ("e.arrow", False), ("f.feather", False)):
        assert rows(arrow_file(tmp_path / name, table, stream=stream)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"g\.arrow: invalid arrow \("):
        rows(written(tmp_path / "g.arrow", b"ARROW1 no"))


def divided(*values: Any, column: str = "split") -> tuple[list[int], list[int], list[str]]:
    notes: list[str] = []
    made = [Row({"n": number, column: value}, f"d:{number}") for number, value in enumerate(values)]
    train, test = divide_rows(made, notes, "examples")
    return [row.values["n"] for row in train], [row.values["n"] for row in test], notes


@pytest.mark.parametrize("held_out", ["test", "dev", "holdout", "Validation", "val", "eval"])
def test_a_column_of_parts_divides(held_out: str) -> None:
    assert divided("train", held_out, None, "Training", "") == ([0, 2, 3, 4], [1], [])


def test_a_validation_part_beside_a_test_part_is_unused_and_said() -> None:
    note = "Scored on the test part; the validation part (1 examples) is unused."
    assert divided("train", "val", "test", "unlabeled") == ([0], [2], [note])


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("subset", ("train", "test")),
        ("Split", ("train", "dev")),
        ("data set", ("TRAIN", "TEST")),
        ("Usage", ("Training", "PublicTest")),
        ("phase", ("train", "val")),
        ("where", ("train", "test")),
        ("is_train", (1, 0)),
        ("is_test", ("False", "True")),
        ("is_valid", (False, True)),
        ("isVal", ("0", "1")),
    ],
)
def test_columns_of_other_names_divide_and_are_named(column: str, values: tuple[Any, Any]) -> None:
    note = f"Column '{column}' tells which examples are held out."
    assert divided(*values, column=column) == ([0], [1], [note])


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("subset", ("train", "physics")),
        ("label", ("train", "test")),
        ("where", ("test", "val")),
        ("is_valid", (True, True, False)),
        ("is_train", (1, 1)),
        ("is_test", (0.5, 1)),
    ],
)
def test_columns_that_mean_something_else_divide_nothing(column: str, values: tuple[Any, ...]) -> None:
    assert divided(*values, column=column) == (list(range(len(values))), [], [])


def test_a_table_without_labelled_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"d:0: split says of all rows that they have no labels"):
        divided("unlabeled", "unsupervised")


def test_a_split_that_is_no_part_is_refused() -> None:
    with pytest.raises(DataError, match=r"d:1: split 'physics' is none of train, test, validation\."):
        divided("train", "physics")


@pytest.mark.parametrize("name", ["0.PNG", "PICS/0.png", "Pics\\0.png", "pics/caf\u00e9.png", "pics/cafe\u0301.png"])
def test_a_file_is_found_in_another_case_and_unicode_form(tmp_path: Path, name: str) -> None:
    images_in(tmp_path, "0.png")
    images_in(tmp_path / "Pics", "0.png", "Caf\u00e9.png")
    found = listed(written(tmp_path / "m.csv", f"path,label\n{name},cat\n"))
    assert Path(found.train[0].name).is_file()
    assert found.train[0].read().startswith(b"\x89PNG")


def test_two_files_that_a_name_could_mean_are_none(tmp_path: Path) -> None:
    images_in(tmp_path, "a.png", "A.png")
    with pytest.raises(DataError, match=r"^m\.csv:2: A\.PNG not found\. Paths are relative to the table's folder\."):
        listed(written(tmp_path / "m.csv", "path,label\nA.PNG,cat\n"))


@pytest.mark.parametrize("column", ["image_bytes", "jpg", "images"])
def test_images_lie_in_columns_of_many_names(tmp_path: Path, column: str) -> None:
    cells = [[png(0)], [png(1)]] if column == "images" else [png(0), png(1)]
    parquet.write_table(pyarrow.table({column: cells, "cls": ["a", "b"]}), tmp_path / "d.parquet")
    found = listed(tmp_path / "d.parquet")
    assert (found.labels, [item.read() for item in found.train]) == (("a", "b"), [png(0), png(1)])


def test_rows_of_pixels_are_an_image(tmp_path: Path) -> None:
    grey, colour = [[0, 128], [255, 7]], [[[255, 0, 0], [0, 0, 9]]]
    table = [{"image": grey, "label": "a"}, {"image": colour, "label": "b"}, {"image": [[[5], [6]]], "label": "b"}]
    found = listed(written(tmp_path / "d.json", json.dumps(table)))
    pixels = [np.asarray(open_image(item.read(), item.name)).tolist() for item in found.train]
    assert pixels[0] == [[[0] * 3, [128] * 3], [[255] * 3, [7] * 3]]
    assert pixels[1:] == [colour, [[[5] * 3, [6] * 3]]]


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        ([[0, 300]], "pixels from 0 to 300; they have to be from 0 to 255"),
        ([[0.5, 1.0]], "pixels are rows of whole numbers, or of three of them"),
        ([[1, 2], [3]], "rows of pixels of different lengths"),
        ([[]], "pixels are rows of whole numbers"),
        ([1, 2, 3], "'image' is neither a path nor image bytes"),
    ],
)
def test_rows_of_other_numbers_are_refused(tmp_path: Path, cell: Any, line: str) -> None:
    path = written(tmp_path / "d.jsonl", json.dumps({"image": cell, "label": "a"}))
    with pytest.raises(DataError, match=rf"^d\.jsonl:1: {line}"):
        listed(path)


def test_tables_in_a_folder_without_labels_are_left_out(tmp_path: Path) -> None:
    for part in ("train", "test", "unsupervised"):
        (tmp_path / part).mkdir()
        parquet.write_table(
            pyarrow.table({"image": [png(len(part))], "label": ["a"]}), tmp_path / part / "data-00000-of-00001.parquet"
        )
    found = listed(tmp_path)
    assert (len(found.train), len(found.test)) == (1, 1)
    told = f"{tmp_path / 'unsupervised'} says that it has no labels: its tables were left out."
    assert told in found.notes


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    head = ",".join(["digit", *(f"pixel{place}" for place in range(784))])
    with pytest.raises(DataError, match=r"^Found digit, pixel0, .* pixel18, \.\.\.\. This project's backend is vit"):
        listed(written(tmp_path / "d.csv", f"{head}\n" + ",".join(["0"] * 785)))


def test_a_path_from_elsewhere_is_refused_with_what_is_here(tmp_path: Path) -> None:
    images_in(tmp_path / "my images", "a.png")
    (tmp_path / "l.csv").write_text("path,label\n/content/drive/my images/a.png,cat\n")
    line = r"^l\.csv:2: /content/drive/my images/a\.png not found\. .* There is my images/a\.png: leave out what"
    with pytest.raises(DataError, match=line):
        listed(tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("path,label\nmy%20images/a.png,cat\n")
    assert [item.label for item in listed(tmp_path / "l.csv").train] == ["cat"]
