"""Labels in tables: names in the schema, numbers without names, what is missing."""

from __future__ import annotations

import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import picture
from pyarrow import parquet
from table_files import csv_with_labels, listed, png, rows, with_features, written

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.labels import label_notes
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError


def parquet_with_names(path: Path, numbers: list[Any], names: list[str] | None) -> Path:
    """Write images and labels as ``datasets`` does, class names in the schema's metadata."""
    import io

    images = []
    for index in range(len(numbers)):
        buffer = io.BytesIO()
        picture("red", index, size=4).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = pyarrow.table({"image": images, "label": pyarrow.array(numbers, pyarrow.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, path)
    return path


def test_names_in_the_schema_are_used(tmp_path: Path) -> None:
    found = listed(parquet_with_names(tmp_path / "d.parquet", [1, 0, 1], ["cat", "dog"]))
    assert [item.label for item in found.train] == ["dog", "cat", "dog"]
    assert not found.numbered
    renamed = parquet_with_names(tmp_path / "e.parquet", [1, 0], ["cat", "dog"])
    assert [row["class"] for row in rows(renamed, label="class")] == ["dog", "cat"]


def test_a_label_of_minus_one_is_missing_and_one_beyond_the_names_is_refused(tmp_path: Path) -> None:
    path = parquet_with_names(tmp_path / "d.parquet", [1, -1, 0], ["cat", "dog"])
    with pytest.raises(DataError, match=r"d\.parquet row 2: empty label\."):
        listed(path)
    found = listed(path, skip_bad=True)
    assert found.labels == ("cat", "dog")
    assert found.notes == ("1 bad rows were skipped, such as d.parquet row 2: empty label.",)
    with pytest.raises(DataError, match=r"row 1: label 7 is not among the file's 2 class names\."):
        listed(parquet_with_names(path, [7], ["cat", "dog"]))


def test_numbers_without_names_are_marked(tmp_path: Path) -> None:
    path = parquet_with_names(tmp_path / "d.parquet", [1, 0, 1], None)
    assert (listed(path).labels, listed(path).numbered) == (("0", "1"), True)
    assert not listed(path, label_prefix="").numbered
    prefixed = listed(path, label_prefix="birds ")
    assert (prefixed.labels, prefixed.numbered) == (("birds 0", "birds 1"), False)
    names = written(tmp_path / "names.txt", "cat\ndog\n")
    assert listed(path, label_names=names).labels == ("cat", "dog")
    written(tmp_path / "labels.json", '["ant", "bee"]')
    assert listed(path).labels == ("ant", "bee")
    with pytest.raises(DataError, match=r"row 1: label 1 is not among the 1 names in .*names\.txt\."):
        listed(path, label_names=written(names, "cat\n"))


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "null", "<NA>", " ", "None", "NA"])
def test_missing_labels_among_numbers_are_no_class(tmp_path: Path, missing: str) -> None:
    path = csv_with_labels(tmp_path, ["1.0", "0.0", missing])
    with pytest.raises(DataError, match=r"m\.csv:4: empty label\. Mend it, or pass --skip-bad\."):
        listed(path)
    assert listed(path, skip_bad=True).labels == ("0", "1")


@pytest.mark.parametrize("missing", ["", "nan", "null"])
def test_missing_labels_among_names_are_no_class(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=r"m\.csv:4: empty label\."):
        listed(csv_with_labels(tmp_path, ["cat", "dog", missing]))


def test_none_may_be_a_class_among_names_and_fractions_stay(tmp_path: Path) -> None:
    assert listed(csv_with_labels(tmp_path, ["scratch", "none"])).labels == ("none", "scratch")
    assert listed(csv_with_labels(tmp_path, ["1.5", "2.0"])).labels == ("1.5", "2.0")


@pytest.mark.parametrize(
    ("values", "labels"), [([1.0, 0.0], ("0", "1")), ([1, True], ("1", "True")), (["a", [" b"]], ("a", "b"))]
)
def test_labels_of_other_types(tmp_path: Path, values: list[Any], labels: tuple[str, ...]) -> None:
    csv_with_labels(tmp_path, ["", ""])
    content = "\n".join(json.dumps({"path": f"{index}.png", "label": one}) for index, one in enumerate(values))
    assert listed(written(tmp_path / "m.jsonl", content)).labels == labels


@pytest.mark.parametrize("value", ["null", "NaN", '""'])
def test_missing_labels_in_json(tmp_path: Path, value: str) -> None:
    csv_with_labels(tmp_path, [""])
    with pytest.raises(DataError, match=r"m\.jsonl:1: empty label\."):
        listed(written(tmp_path / "m.jsonl", f'{{"path": "0.png", "label": {value}}}'))


def test_several_manifests_and_a_pattern(tmp_path: Path) -> None:
    for part in "ab":
        (tmp_path / part).mkdir()
        csv_with_labels(tmp_path / part, [f"{part}1", f"{part}2"])
    both = ("a1", "a2", "b1", "b2")
    assert listed(tmp_path / "a" / "m.csv", more=(tmp_path / "b" / "m.csv",)).labels == both
    assert listed(tmp_path / "*" / "m.csv").labels == both
    with pytest.raises(DataError, match=r"\*\.csv: nothing fits this pattern\."):
        listed(tmp_path / "*.csv")


def test_paths_in_a_manifest_may_be_windows_paths(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    picture("red", 1, size=4).save(tmp_path / "in" / "1.png")
    found = listed(written(tmp_path / "m.csv", "path,label\nin\\1.png,a\n"))
    assert found.train[0].name == str(tmp_path / "in" / "1.png")
    with pytest.raises(DataError, match=r"m\.csv:2: .* is no path"):
        listed(written(tmp_path / "m.csv", f"path,label\n{'x' * 5000}.png,a\n"))


def test_names_are_used_wherever_they_stand(tmp_path: Path) -> None:
    """In a list's feature, in a column beside the numbers, and not where two share one."""
    table = pyarrow.table({"image": [png(1), png(2)], "labels": [[1], [0]]})
    features = {"labels": {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    parquet.write_table(with_features(table, features), tmp_path / "list.parquet")
    assert [item.label for item in listed(tmp_path / "list.parquet").train] == ["dog", "cat"]
    twice = {"labels": {"names": ["cat", "cat"], "_type": "ClassLabel"}}
    parquet.write_table(with_features(table, twice), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: the class names of 'labels' in its schema are not distinct"):
        listed(tmp_path / "twice.parquet")


@pytest.mark.parametrize("column", ["label_name", "class", "label_text", "class_name"])
def test_names_beside_numbers_are_used_where_each_has_one(tmp_path: Path, column: str) -> None:
    path = csv_with_labels(tmp_path, ["0,cat", "1,dog", "0,cat"], f"path,label,{column}")
    assert (listed(path).labels, listed(path).numbered) == (("cat", "dog"), False)
    path = csv_with_labels(tmp_path, ["0,screw", "1,screw", "0,nut"], f"path,label,{column}")
    assert (listed(path).labels, listed(path).numbered) == (("0", "1"), True)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([b"cat", b"dog"], ("cat", "dog")),
        ([date(2024, 1, 2), date(2024, 1, 3)], ("2024-01-02", "2024-01-03")),
        ([Decimal("1.0"), Decimal("2.0")], ("1", "2")),
        (pyarrow.array(["cat", "dog"]).dictionary_encode(), ("cat", "dog")),
        ([True, False], ("False", "True")),
    ],
)
def test_labels_of_arrows_types(tmp_path: Path, values: Any, labels: tuple[str, ...]) -> None:
    parquet.write_table(pyarrow.table({"image": [png(1), png(2)], "label": values}), tmp_path / "d.parquet")
    assert listed(tmp_path / "d.parquet").labels == labels


@pytest.mark.parametrize("missing", ["(null)", "\\N", "#DIV/0!", "#VALUE!", "-nan", "NaT"])
def test_what_programs_write_for_nothing_is_no_class(tmp_path: Path, missing: str) -> None:
    with pytest.raises(DataError, match=r"m\.csv:4: empty label\."):
        listed(csv_with_labels(tmp_path, ["cat", "dog", missing]))


def test_labels_that_may_mean_nothing_are_said(tmp_path: Path) -> None:
    found = listed(csv_with_labels(tmp_path, ["scratch", "None", "None"]))
    assert found.notes == ("Label 'None' is a class of that name here (2 times), no missing label.",)
    found = listed(csv_with_labels(tmp_path, ["0", "1", "-1"]))
    assert found.notes == ("Label -1 is a class like the others here (1 times), no missing label.",)
    assert listed(csv_with_labels(tmp_path, ["1", "-1"])).notes == ()


def test_numbers_with_a_decimal_comma_are_whole(tmp_path: Path) -> None:
    path = csv_with_labels(tmp_path, ["", ""])
    assert listed(written(path, "path;label\n0.png;1,0\n1.png;2,0\n")).labels == ("1", "2")
    assert listed(written(path, "path;label\n0.png;1,5\n1.png;2,0\n")).labels == ("1,5", "2,0")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (["cat", "dog", '"cat, dog"'], r"m\.csv:4: label 'cat, dog' names 2 classes; an image has one\."),
        (["cat", "dog", "cat|dog"], r"m\.csv:4: label 'cat\|dog' names 2 classes"),
        (["x" * 501, "dog"], r"m\.csv:2: a label of 501 characters; is 'label' the column of labels\?"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path: Path, labels: list[str], line: str) -> None:
    with pytest.raises(DataError, match=line):
        listed(csv_with_labels(tmp_path, labels))
    assert "dog" in listed(csv_with_labels(tmp_path, ["crane", '"crane, machine"', "dog"])).labels


def test_an_image_in_several_rows_has_one_class(tmp_path: Path) -> None:
    csv_with_labels(tmp_path, ["", ""])
    path = written(tmp_path / "m.csv", "path,label\n0.png,cat\n1.png,dog\n0.png,cat\n")
    assert len(listed(path).train) == 2
    assert listed(path).notes == ("1 rows name an image that an earlier one names; each is learned once.",)
    with pytest.raises(DataError, match=r"m\.csv:3: .*0\.png is 'dog' here and 'cat' before; an image has one class\."):
        listed(written(path, "path,label\n0.png,cat\n0.png,dog\n"))


@pytest.mark.parametrize(("labels", "names"), [(["['a']", "['b']"], ("a", "b")), (["[a]", "[b"], ("[a]", "[b"))])
def test_a_list_that_a_text_spells_is_a_list(tmp_path: Path, labels: list[str], names: tuple[str, ...]) -> None:
    assert listed(csv_with_labels(tmp_path, labels)).labels == names


def test_several_labels_are_refused_or_skipped(tmp_path: Path) -> None:
    path = csv_with_labels(tmp_path, ["['cat']", "\"['cat', 'dog']\"", "[]", "['dog']"])
    with pytest.raises(
        DataError, match=r"^m\.csv:3: label names several classes \(cat, dog\), not one\. Mend it, or pa"
    ):
        listed(path)
    found = listed(path, skip_bad=True)
    assert ([item.label for item in found.train], found.labels) == (["cat", "dog"], ("cat", "dog"))
    assert found.notes == (
        "2 bad rows were skipped, such as m.csv:3: label names several classes (cat, dog), not one.",
    )


def test_several_labels_in_parquet_go_by_their_names(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [png(0), png(1)], "labels": [[0, 1], [1]]})
    features = {"labels": {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}}
    parquet.write_table(with_features(table, features), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"^d\.parquet row 1: label names several classes \(cat, dog\)"):
        listed(tmp_path / "d.parquet")


LABELS = (["joy"], ["joy", "fear"], ["fear"])


def test_several_labels_of_a_text_are_refused_or_skipped(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "labels": ["joy"]},
        {"text": "b", "labels": ["joy", "fear"]},
        {"text": "c", "labels": ["fear"]},
    ]
    path = written(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"^d\.jsonl:2: label names several classes \(joy, fear\), not one"):
        list_texts(DataRequest(path, held_out=0.0))
    found = list_texts(DataRequest(path, held_out=0.0, skip_bad=True, label_prefix="x "))
    assert [one.answer for one in found.train] == ["x joy", "x fear"]


@pytest.mark.parametrize(
    ("labels", "note"),
    [
        (["007", "7"], "Labels '007' and '7' are the same number, and two classes here."),
        (["1e3", "1000"], "Labels '1000' and '1e3' are the same number, and two classes here."),
        (["scab", "rust", "scab rust"], "Label 'scab rust' is a class of its own here, beside those it names (1 exam"),
        (["TRUE", "true"], "Class names that differ only in case or Unicode form are one class: 'true' as 'TRUE'."),
        ([f"c{i}" for i in range(11)], "11 of 11 labels, such as 'c0', have one example each."),
    ],
)
def test_labels_that_may_not_mean_what_they_say_are_said(tmp_path: Path, labels: list[str], note: str) -> None:
    (found,) = listed(csv_with_labels(tmp_path, labels)).notes
    assert found.startswith(note)


def test_quantities_are_no_classes(tmp_path: Path) -> None:
    path = csv_with_labels(tmp_path, [f"{i}.5" for i in range(21)])
    with pytest.raises(
        DataError, match=r"^m\.csv:2: labels are 21 different numbers such as 0\.5: a quantity, and no c"
    ):
        listed(path)
    assert listed(path, label_prefix="v").labels[0] == "v0.5"
    assert len(listed(csv_with_labels(tmp_path, [f"{i}.5" for i in range(20)])).labels) == 20
    scores = written(tmp_path / "s.csv", "text,label\n" + "".join(f"t{i},{i}.25\n" for i in range(21)))
    with pytest.raises(DataError, match=r"^s\.csv:2: labels are 21 different numbers such as 0\.25"):
        list_texts(DataRequest(scores, held_out=0.0))


def test_another_column_of_labels_and_places_in_the_image_are_named(tmp_path: Path) -> None:
    lines = ["path,label,species,xmin,class_id"]
    lines += [f"{i}.png,{'ab'[i % 2]},{'xyz'[i % 3]},1,{i % 2}" for i in range(6)]
    csv_with_labels(tmp_path, ["a"] * 6)
    assert listed(written(tmp_path / "d.csv", "\n".join(lines))).notes == (
        "The label is column 'label'; not used: species.",
        "xmin are not used: each image is learned as a whole.",
    )


def test_bytes_that_are_no_text_are_no_label(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"image": [png(0)], "label": [b"\xff"]}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"^d\.parquet row 1: a label of bytes that are no text \(UTF-8\)"):
        listed(tmp_path / "d.parquet")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (("7", "007"), "Labels '007' and '7' are the same number, and two classes here."),
        (("1.23457E+11", "dog"), "Label '1.23457E+11' is a number as a spreadsheet shortens it: several may have"),
        (
            ("1-Mar", "TP53"),
            "Label '1-Mar' beside labels of other kinds: a spreadsheet may have made a date of a name.",
        ),
        (("Mar-01", "TP53"), "Label 'Mar-01' beside labels of other kinds"),
    ],
)
def test_what_spreadsheets_do_to_labels_is_said(labels: tuple[str, ...], line: str) -> None:
    (note,) = label_notes(labels)
    assert note.startswith(line)


@pytest.mark.parametrize(
    "labels", [("123456789012345678901", "123456789012345678902"), ("1-Mar", "2-Mar"), ("E", "1E")]
)
def test_labels_of_which_nothing_is_said(labels: tuple[str, ...]) -> None:
    assert label_notes(labels) == []


@pytest.mark.parametrize("column", ["name", "target_name", "label_names", "Label", "breed"])
def test_names_of_numbers_go_by_many_names(tmp_path: Path, column: str) -> None:
    path = csv_with_labels(tmp_path, ["0,cat", "1,dog", "0,cat"], f"path,label,{column}")
    assert (listed(path).labels, listed(path).numbered) == (("cat", "dog"), False)
    path = csv_with_labels(tmp_path, ["0,Tom", "1,Rex"], "path,label,name")
    assert listed(path).labels == ("0", "1")


def test_truth_values_in_two_spellings_are_said(tmp_path: Path) -> None:
    found = listed(csv_with_labels(tmp_path, ["true", "1", "false"]))
    assert "Labels 'false' and '1' may mean the same, and are two classes here." in found.notes


def test_a_field_of_a_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "t.jsonl").write_text('{"image": "1.png", "label": {"id": 3, "name": "cat"}}\n')
    with pytest.raises(DataError, match=r"not a name but dict\. To take a name in it: --map label\.name=label"):
        listed(tmp_path / "t.jsonl")
    assert listed(tmp_path / "t.jsonl", columns={"label.name": "label"}).labels == ("cat",)
    (tmp_path / "n.jsonl").write_text('{"file": {"path": "1.png"}, "about": {"kind": "cat"}}\n')
    with pytest.raises(DataError, match=r"Found file\.path, about\.kind\."):
        listed(tmp_path / "n.jsonl")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["1.png"]), pyarrow.array(["cat"]), pyarrow.array(["dog"])]
    table = pyarrow.Table.from_arrays(columns, names=["path", "label", "label"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "t.arrow"), table.schema) as file:
        file.write_table(table)
    for name in ("t.parquet", "t.arrow"):
        with pytest.raises(DataError, match=rf"{name}: two columns are called 'label'\."):
            listed(tmp_path / name)


def test_numbers_that_name_no_parts_are_said(tmp_path: Path) -> None:
    path = csv_with_labels(tmp_path, ["cat,0", "dog,0", "cat,1"], "path,label,partition")
    line = "Column 'partition' (0, 1) is not used: its numbers name no parts. Write train and test in it."
    assert line in listed(path).notes
    path = csv_with_labels(tmp_path, ["cat,1", "dog,1", "cat,0"], "path,label,is_training_image")
    assert (len(listed(path).train), len(listed(path).test)) == (2, 1)
    path = csv_with_labels(tmp_path, ["cat,1", "dog,0", "cat,0"], "path,label,is_valid_image")
    assert listed(path).test == []


def test_a_table_may_have_any_ending_where_its_format_is_given(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "list.txt").write_text("path,label\n1.png,cat\n")
    assert listed(tmp_path / "list.txt", data_format="csv").labels == ("cat",)


@pytest.mark.parametrize("label", ["np.int64(3)", "tensor(3)", "b'cat'", "numpy.str_('cat')"])
def test_values_as_python_shows_them_are_said(tmp_path: Path, label: str) -> None:
    found = listed(csv_with_labels(tmp_path, [label, "cat (small)"]))
    assert (
        f"Label {label} is how Python shows a value, not the value; a later task may spell it otherwise." in found.notes
    )
    assert not label_notes(["cat (small)", "array"])


def test_a_document_of_labels_by_path_is_no_table_without_a_head(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text('{"1.png": "cat", "2.png": "dog"}')
    with pytest.raises(DataError, match=r"^Found 1\.png, 2\.png\. .* a CSV with path,label\."):
        listed(tmp_path / "d.json")
