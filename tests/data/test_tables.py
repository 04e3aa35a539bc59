"""Tables as people have them: encodings, dialects, packings, names of classes, missing cells, parts."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from conftest import picture
from pyarrow import parquet

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.divided import divide_rows
from treelora_cli.data.images import ImageListing, list_images
from treelora_cli.data.tables import Row, check_text, read_table
from treelora_cli.errors import DataError


def rows(path: Path, notes: list[str] | None = None, **columns: str) -> list[dict[str, Any]]:
    return [row.values for row in read_table(path, None, columns, notes)]


def written(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


# -- CSV ----------------------------------------------------------------------------------------------------


def test_columns_without_a_name_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.csv", "a,b,,\n1,2,,\n")) == [{"a": "1", "b": "2", "column 3": "", "column 4": ""}]
    with pytest.raises(DataError, match=r"d\.csv:2: holds a NUL byte; is this text\?"):
        rows(written(tmp_path / "d.csv", "a,b\n1,2\0\n"))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tlabel\n"hello there\t1\nfine\t0\nwell" said\t1\n', ['"hello there', "fine", 'well" said']),
        ('text\tlabel\nWhy "?\t1\n"a" b\t0\n', ['Why "?', '"a" b']),
        ('text\tlabel\n"one\t1\ntwo"\t0\n', ['"one', 'two"']),
        ('text\tlabel\n"say ""hi"""\t1\n"two\nlines"\t0\n', ['say "hi"', "two\nlines"]),
    ],
)
def test_quotes_between_tabs_are_signs_unless_they_enclose(tmp_path: Path, content: str, texts: list[str]) -> None:
    assert [row["text"] for row in rows(written(tmp_path / "d.tsv", content))] == texts


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
    with pytest.raises(DataError, match=r"d\.csv:4: the number of fields differs from the first line's\."):
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


def test_parts_in_one_document_are_told_apart(tmp_path: Path) -> None:
    content = json.dumps({"train": RECORDS[:1], "validation": RECORDS[1:], "version": 1})
    parts = [{**RECORDS[0], "split": "train"}, {**RECORDS[1], "split": "validation"}]
    assert rows(written(tmp_path / "d.json", content)) == parts


def test_a_text_file_is_one_text_a_line(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.txt", "a\x0cb\x0bc\u2028d\r\ne\rf")) == [
        *({"text": "a\x0cb\x0bc\u2028d"}, {"text": "e"}, {"text": "f"})
    ]
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


def with_features(table: Any, features: dict[str, Any]) -> Any:
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def png(seed: int) -> bytes:
    import io

    buffer = io.BytesIO()
    picture("red", seed, size=4).save(buffer, format="PNG")
    return buffer.getvalue()


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


# -- where tables and their images lie ----------------------------------------------------------------------


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
