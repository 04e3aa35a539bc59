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
from table_files import rows, written

from treelora_cli.data.tables import check_text, read_table
from treelora_cli.errors import DataError

# -- CSV ----------------------------------------------------------------------------------------------------


def test_columns_without_a_name_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.csv", "a,b,,\n1,2,,\n")) == [{"a": "1", "b": "2", "column 3": "", "column 4": ""}]
    with pytest.raises(DataError, match=r"d\.csv:2: holds a NUL byte; is this text\?"):
        rows(written(tmp_path / "d.csv", "a,b\n1,2\0\n"))


def test_rows_that_a_spreadsheet_leaves_empty_are_none(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.csv", "a,b\n1,2\n,\n3,4\n , \n")) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_tsv_without_a_tab_is_divided_by_what_it_holds(tmp_path: Path) -> None:
    assert rows(written(tmp_path / "d.tsv", "a,b\n1,2\n")) == [{"a": "1", "b": "2"}]
    assert rows(written(tmp_path / "d.tsv", "a,b\tc\n1,2\t3\n")) == [{"a,b": "1,2", "c": "3"}]


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl"])
def test_marks_inside_joined_files_are_no_text(tmp_path: Path, name: str) -> None:
    one = {"d.csv": "\ufeff1,2\n", "d.jsonl": '\ufeff{"a": "1", "b": "2"}\n'}[name]
    head = "\ufeffa,b\n" if name == "d.csv" else ""
    assert rows(written(tmp_path / name, head + one * 2)) == [{"a": "1", "b": "2"}] * 2


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


@pytest.mark.parametrize(
    "content",
    [
        '{"a": [1, 3], "b": [2, 4]}',
        '{"a": {"0": 1, "1": 3}, "b": {"0": 2, "1": 4}}',
        '{"0": {"a": 1, "b": 2}, "1": {"a": 3, "b": 4}}',
        '{"columns": ["a", "b"], "index": [0, 1], "data": [[1, 2], [3, 4]]}',
        '{"tags": ["x"], "examples": [{"a": 1, "b": 2}, {"a": 3, "b": 4}]}',
    ],
)
def test_a_table_in_one_document_however_it_is_written(tmp_path: Path, content: str) -> None:
    assert rows(written(tmp_path / "d.json", content)) == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]


@pytest.mark.parametrize("content", ['{"a": [1, 3], "b": [2]}', '{"a": {"x": 1}, "b": {"x": 2}}', '{"a": 1, "b": []}'])
def test_a_document_that_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"d\.json: (expected a list of records|holds no examples)|holds no examples"):
        rows(written(tmp_path / "d.json", content))


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
    with pytest.raises(DataError, match=r"d\.jsonl:2: 'text' holds half a surrogate pair"):
        check_text(second)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "x", "label": "y"}\n', "d.jsonl:2"),
        ("d.json", '[{"text": "b", "label": "x", "label": "y"}]', "d.json:1"),
        ("d.jsonl", '{\n"text": "b",\n"label": "x",\n"label": "y"\n}\n', "d.jsonl:1"),
    ],
)
def test_a_name_that_is_twice_in_a_record_is_refused(tmp_path: Path, name: str, content: str, where: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"^{where}: invalid JSON \('label' is there twice in one record\)\."):
        read_table(tmp_path / name, None, {})
