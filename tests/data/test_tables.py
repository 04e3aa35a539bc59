"""Tables as people have them: encodings, dialects, packings, names of classes, missing cells, parts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import picture
from pyarrow import parquet

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import ImageListing, list_images
from treelora_cli.data.tables import Row, check_text, divide_rows, read_table
from treelora_cli.errors import DataError


def rows(path: Path, notes: list[str] | None = None, **columns: str) -> list[dict[str, Any]]:
    return [row.values for row in read_table(path, None, columns, notes)]


def written(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


# -- CSV ----------------------------------------------------------------------------------------------------

AB = [{"a": "1", "b": "2, too"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", 'a,b\n1,"2, too"\n'),
        ("d.csv", 'a, b\n1, "2, too"\n'),
        ("d.csv", "a;b\n1;2, too\n"),
        ("d.csv", "sep=;\na;b\n1;2, too\n"),
        ("d.csv", "SEP=|\r\na|b\r\n1|2, too\r\n"),
        ("d.csv", "a\tb\n1\t2, too\n"),
        ("d.tsv", "a\tb\n1\t2, too\n"),
        ("d.csv", '\n" a ",b\n\n1,"2, too"\n\n'),
    ],
)
def test_csv_as_people_have_it(tmp_path: Path, name: str, content: str) -> None:
    assert rows(written(tmp_path / name, content)) == AB


def test_a_text_may_hold_the_other_signs(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", "prompt;full, answer\na, b; c\nx; y, z, w\n")
    assert rows(path) == [{"prompt": "a, b", "full, answer": " c"}, {"prompt": "x", "full, answer": " y, z, w"}]


def test_spaces_in_cells_are_kept_where_the_head_has_none(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.csv", "a,b\n1,  return x\n")) == [{"a": "1", "b": "  return x"}]


def test_lines_are_counted_with_the_sep_line_and_long_fields_are_read(tmp_path: Path) -> None:
    path = written(tmp_path / "d.csv", f"sep=;\na;b\n1;{'x' * 200_000}\n1\n")
    with pytest.raises(DataError, match=r"d\.csv:4: the number of fields differs from the header's\."):
        rows(path)
    with pytest.raises(DataError, match=r"d\.csv:1: two columns are called 'a'\."):
        rows(written(path, "a,b,a\n1,2,3\n"))


@pytest.mark.parametrize(
    ("encoding", "note"),
    [
        ("cp1252", "d.csv is not UTF-8; it was read as Windows-1252."),
        ("utf-16", "d.csv was read as UTF-16."),
        ("utf-16-le", "d.csv was read as UTF-16."),
        ("utf-16-be", "d.csv was read as UTF-16."),
        ("utf-32", "d.csv was read as UTF-32."),
        ("utf-8-sig", None),
    ],
)
def test_encodings_are_told_and_said(tmp_path: Path, encoding: str, note: str | None) -> None:
    text = "name;label\nGrüße, schön;café\nplain words go here;other words\n"
    notes: list[str] = []
    found = rows(written(tmp_path / "d.csv", text, encoding), notes)
    assert found[0] == {"name": "Grüße, schön", "label": "café"}
    assert notes == ([] if note is None else [note])


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis", "gb18030", "koi8-r"])
def test_other_encodings_are_refused_and_not_garbled(tmp_path: Path, encoding: str) -> None:
    text = "text\n" + {"shift_jis": "これは日本語の文です", "gb18030": "这是一个中文句子"}.get(encoding, "Привет, мир")
    with pytest.raises(DataError, match=r"d\.csv: not UTF-8 text \(byte 5\)\. Convert it to UTF-8\."):
        rows(written(tmp_path / "d.csv", text, encoding))


# -- packed -------------------------------------------------------------------------------------------------


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("d.jsonl.gz", gzip.compress),
        ("d.json.gz", gzip.compress),
        ("d.jsonl.zst", zstd),
        ("d.jsonl.bz2", bz2.compress),
        ("d.jsonl.xz", lzma.compress),
        ("d.jsonl", gzip.compress),
    ],
)
def test_packed_tables(tmp_path: Path, name: str, pack: Any) -> None:
    data = pack(b'{"text": "a"}\n{"text": "b"}\n')
    assert rows(written(tmp_path / name, data)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r": damaged \w+ file \("):
        rows(written(tmp_path / name, data[: len(data) // 2]))


# -- JSON ---------------------------------------------------------------------------------------------------

RECORDS = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", "\n".join(json.dumps(one) for one in RECORDS)),
        ("d.jsonl", "\n".join(json.dumps(one, indent=2) for one in RECORDS)),
        ("d.jsonl", json.dumps(RECORDS, indent=2)),
        ("d.jsonl", json.dumps(RECORDS)),
        ("d.json", "\n".join(json.dumps(one) for one in RECORDS)),
        ("d.json", json.dumps({"version": 1, "data": RECORDS})),
        ("d.ndjson", "\r\n".join(json.dumps(one) for one in RECORDS)),
    ],
)
def test_json_in_one_line_or_many(tmp_path: Path, name: str, content: str) -> None:
    assert rows(written(tmp_path / name, content)) == RECORDS


def test_a_line_separator_inside_a_json_text_ends_no_line(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.jsonl", '{"text": "a\u2028b\x85c"}\n')) == [{"text": "a\u2028b\x85c"}]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", r"d\.jsonl:2: invalid JSON \(Exceeds the limit"),
        ('{"a": 1}\n{"a" 1}\n', r"d\.jsonl:2: invalid JSON \("),
        ('{\n "a": 1\n}\n{\n "a" 1\n}\n', r"d\.jsonl:5: invalid JSON \("),
        ('{"a": 1}\n' + "[" * 100_000, r"d\.jsonl:2: JSON nested too deeply\."),
    ],
)
def test_bad_json_names_its_line(tmp_path: Path, content: str, line: str) -> None:
    with pytest.raises(DataError, match=line):
        rows(written(tmp_path / "d.jsonl", content))


def test_a_text_file_is_one_text_a_line(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.txt", "one\n\n  two\n")) == [{"text": "one"}, {"text": "  two"}]


def test_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", '{"text": "fine \\ud83d\\ude00"}\n{"text": {"in": ["a \\ud83d b"]}}\n')
    first, second = read_table(path, None, {})
    check_text(first)
    with pytest.raises(DataError, match=r"d\.jsonl:2: ''text'' holds half a surrogate pair"):
        check_text(second)


# -- class names --------------------------------------------------------------------------------------------


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


def listed(path: Path, **options: Any) -> ImageListing:
    return list_images(DataRequest(path=path, held_out=0, **options))


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
    assert found.notes == (
        "1 bad rows were skipped, such as d.parquet row 2: empty label. Mend it, or pass --skip-bad.",
    )
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


def csv_with_labels(folder: Path, labels: list[str], head: str = "path,label") -> Path:
    for index in range(len(labels)):
        picture("red", index, size=4).save(folder / f"{index}.png")
    return written(folder / "m.csv", "\n".join([head, *(f"{index}.png,{one}" for index, one in enumerate(labels))]))


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


# -- parts --------------------------------------------------------------------------------------------------


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


def test_other_columns_divide_only_where_all_their_values_are_parts() -> None:
    assert divided("train", "test", column="subset") == ([0], [1], [])
    assert divided("train", "physics", column="subset") == ([0, 1], [], [])
    with pytest.raises(DataError, match=r"d:1: split 'physics' is none of train, test, validation\."):
        divided("train", "physics")
