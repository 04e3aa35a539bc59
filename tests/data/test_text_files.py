"""Files of a text task: parts, shards, folders of texts, labels kept elsewhere, missing cells."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.text import TextListing, list_texts
from treelora_cli.errors import DataError


def build(root: Path, **files: str | bytes) -> Path:
    """Write files; in their names ``__`` stands for ``/`` and the last ``_`` of a part for ``.``."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def pairs(*names: str) -> str:
    return "".join(json.dumps({"prompt": name, "answer": f"to {name}"}) + "\n" for name in names)


def listed(path: Path, **options: Any) -> TextListing:
    return list_texts(DataRequest(path=path, held_out=0, **options))


def prompts(listing: TextListing) -> tuple[list[str], list[str]]:
    return [one.prompt for one in listing.train], [one.prompt for one in listing.test]


@pytest.mark.parametrize(
    ("files", "test"),
    [
        ({"train.jsonl": "ab", "test.jsonl": "c"}, "c"),
        ({"train.jsonl": "ab", "dev.jsonl": "c"}, "c"),
        ({"Training.jsonl": "ab", "validation.jsonl": "c"}, "c"),
        ({"imdb_train.jsonl": "ab", "imdb_holdout.jsonl": "c"}, "c"),
        ({"train-00000-of-00002.jsonl": "a", "train-00001-of-00002.jsonl": "b", "test-00000-of-00001.jsonl": "c"}, "c"),
        ({"data/train-00000-of-00001.jsonl": "ab", "data/test-00000-of-00001.jsonl": "c"}, "c"),
        ({"train/1.jsonl": "a", "train/2.jsonl": "b", "val/1.jsonl": "c"}, "c"),
        ({"part-1.jsonl": "a", "part-2.jsonl": "b"}, ""),
    ],
)
def test_parts_and_shards(tmp_path: Path, files: dict[str, str], test: str) -> None:
    root = build(tmp_path / "d", **{name: pairs(*names) for name, names in files.items()})
    assert prompts(listed(root)) == (["a", "b"], list(test))


def test_a_validation_table_beside_a_test_table_is_unused_and_others_are_named(tmp_path: Path) -> None:
    parts = {"train.jsonl": "a", "val.jsonl": "b", "test.jsonl": "c", "extra.jsonl": "d"}
    found = listed(build(tmp_path, **{name: pairs(*names) for name, names in parts.items()}))
    assert prompts(found) == (["a"], ["c"])
    assert found.notes == (
        "Not read, beside train and test: extra.jsonl.",
        "Scored on the test part; the validation part (1 examples) is unused.",
    )


def test_a_column_of_parts_is_held_out_and_not_called_unused(tmp_path: Path) -> None:
    rows = [{"prompt": name, "answer": "x", "split": part} for name, part in (("a", "train"), ("b", "dev"))]
    found = listed(build(tmp_path, **{"d.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}) / "d.jsonl")
    assert prompts(found) == (["a"], ["b"])
    assert found.notes == ()


def test_several_files_and_packed_ones(tmp_path: Path) -> None:
    build(tmp_path, **{"a.jsonl": pairs("a"), "b.jsonl.gz": gzip.compress(pairs("b").encode())})
    assert prompts(listed(tmp_path / "a.jsonl", more=(tmp_path / "b.jsonl.gz",))) == (["a", "b"], [])
    assert prompts(listed(tmp_path / "*.jsonl*")) == (["a", "b"], [])


def test_texts_a_line_and_a_folder_of_texts(tmp_path: Path) -> None:
    build(tmp_path, **{"lines.txt": "one\n\ntwo\n", "f/1.txt": "a\nb\n", "f/2.txt": "c", "g/train/1.txt": "d"})
    build(tmp_path, **{"g/test/1.txt": "e"})
    assert [one.answer for one in listed(tmp_path / "lines.txt").train] == ["one", "two"]
    assert [one.answer for one in listed(tmp_path / "f").train] == ["a\nb\n", "c"]
    found = listed(tmp_path / "g")
    assert ([one.answer for one in found.train], [one.answer for one in found.test]) == (["d"], ["e"])


def test_texts_in_class_folders_are_labelled(tmp_path: Path) -> None:
    files = {
        f"imdb/{part}/{label}/{n}.txt": f"{label} {n}"
        for part in ("train", "test")
        for label in ("pos", "neg")
        for n in "12"
    }
    found = listed(build(tmp_path, **files) / "imdb")
    assert (found.style, found.labels) == ("labels", ("neg", "pos"))
    assert [(one.prompt, one.answer) for one in found.test] == [
        ("neg 1", "neg"), ("neg 2", "neg"), ("pos 1", "pos"), ("pos 2", "pos"),
    ]  # fmt: skip


def test_numbers_of_labels_have_names_in_the_schema_a_file_or_none(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0]})
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    named = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(named, tmp_path / "named.parquet")
    parquet.write_table(table, tmp_path / "bare.parquet")
    assert [one.answer for one in listed(tmp_path / "named.parquet").train] == ["good", "bad"]
    assert [one.answer for one in listed(tmp_path / "bare.parquet").train] == ["1", "0"]
    (tmp_path / "names.txt").write_text("no\nyes\n")
    found = listed(tmp_path / "bare.parquet", label_names=tmp_path / "names.txt")
    assert ([one.answer for one in found.train], found.labels) == (["yes", "no"], ("no", "yes"))


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ('{"prompt": "a", "answer": NaN}', r"d\.jsonl:1: empty answer\."),
        ('{"text": NaN}', r"d\.jsonl:1: empty text\."),
        ('{"text": "a", "label": NaN}', r"d\.jsonl:1: empty label\."),
        ('{"prompt": "a \\ud800", "answer": "b"}', r"d\.jsonl:1: .*half a surrogate pair"),
        ('{"messages": [{"role": "user", "content": "\\udfff"}, {"role": "assistant", "content": "b"}]}', r"surrogate"),
    ],
)
def test_missing_and_broken_texts_are_refused(tmp_path: Path, row: str, line: str) -> None:
    (tmp_path / "d.jsonl").write_text(row + "\n")
    with pytest.raises(DataError, match=line):
        listed(tmp_path / "d.jsonl")


def test_whole_numbers_that_became_floats_are_whole(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "1+1", "answer": 2.0}\n{"prompt": "1/2", "answer": 0.5}\n')
    assert [one.answer for one in listed(tmp_path / "d.jsonl").train] == ["2", "0.5"]


def test_an_answer_keeps_its_spaces(tmp_path: Path) -> None:
    answer = "    return x\n\n\tpass\n"
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "def f(x):\n", "answer": answer}))
    assert listed(tmp_path / "d.jsonl").train[0].answer == answer


def texts(listing: TextListing) -> tuple[list[str], list[str]]:
    return [one.answer for one in listing.train], [one.answer for one in listing.test]


@pytest.mark.parametrize(
    "names",
    [("train.txt", "test.txt"), ("ptb.train.txt", "ptb.valid.txt"), ("Training.txt", "dev.txt")],
)
def test_text_files_of_parts_are_kept_apart(tmp_path: Path, names: tuple[str, str]) -> None:
    build(tmp_path, **{names[0]: "a\nb\n", names[1]: "c\n"})
    assert texts(listed(tmp_path)) == (["a", "b"], ["c"])


@pytest.mark.parametrize("beside", ["", "a text", "\0\1"])
def test_texts_beside_those_of_parts_are_named_and_not_read(tmp_path: Path, beside: str) -> None:
    found = listed(build(tmp_path, **{"train.txt": "a\nb\n", "test.txt": "c\n", "vocabulary.txt": beside}))
    assert texts(found) == (["a", "b"], ["c"])
    assert found.notes == ("Not read, beside train and test: vocabulary.txt.",)


def test_texts_about_the_data_are_left_out(tmp_path: Path) -> None:
    build(tmp_path / "d", **{"pos/1.txt": "a", "neg/1.txt": "b", "README.txt": "r", "LICENSE.txt": "l"})
    found = listed(tmp_path / "d")
    assert texts(found) == (["neg", "pos"], [])
    assert found.notes[0] == "2 texts about the data were left out."
    build(tmp_path / "d", **{"3.txt": "c"})
    with pytest.raises(
        DataError, match=r"holds 1 texts beside folders of texts \(neg/, pos/\): are the folders labels\?"
    ):
        listed(tmp_path / "d")
    assert texts(listed(build(tmp_path / "e", **{"1.md": "a", "2.md": "b", "README.md": "r"}))) == (["a", "b"], [])


def test_one_folder_of_texts_is_a_label_only_if_that_is_said(tmp_path: Path) -> None:
    build(tmp_path / "d", **{"my notes/1.txt": "a", "my notes/2.txt": "b"})
    line = r"/d holds texts in my notes/ only\. If they are texts to learn, give that folder; if 'my notes' is their "
    with pytest.raises(DataError, match=line + "label, pass --classes 'my notes'$"):
        listed(tmp_path / "d")
    assert texts(listed(tmp_path / "d/my notes")) == (["a", "b"], [])
    assert texts(listed(tmp_path / "d", classes=("my notes",))) == (["my notes", "my notes"], [])


def test_unsup_is_no_label_and_files_may_have_no_ending(tmp_path: Path) -> None:
    files = {"train/pos/1.txt": "a", "train/neg/1.txt": "b", "train/unsup/1.txt": "c", "test/pos/1.txt": "d"}
    assert texts(listed(build(tmp_path / "imdb", **files))) == (["neg", "pos"], ["pos"])
    names = {f"20news-bydate-{part}/{label}/{n}": "x" for part in ("train", "test") for label in "ab" for n in (1, 2)}
    found = listed(build(tmp_path / "news", **names, **{"20news-bydate-train/a/3": b"\0\1"}))
    assert (len(found.train), len(found.test), found.labels) == (4, 4, ("a", "b"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "ham\thello\nspam\twin\n",
            r"every line has as many tabs\. .* pass --format tsv --map 1=label --map 2=text; .* pass --format text\.",
        ),
        ("text\tlabel\nhello\tham\n", r"every line has as many tabs\. The first names columns: pass --format tsv; if"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', r"every line is a JSON record\. Pass --format jsonl"),
        ("__label__pos good\n__label__neg bad\n", r"every line begins with __label__\. Write it as a table"),
    ],
)
def test_a_text_file_of_records_is_no_text_unless_it_is_said(tmp_path: Path, content: str, line: str) -> None:
    build(tmp_path, **{"d.txt": content})
    with pytest.raises(DataError, match=line):
        listed(tmp_path / "d.txt")
    assert len(listed(tmp_path / "d.txt", data_format="text").train) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"part-00000-3fa.jsonl": "a", "part-00001-bc2.jsonl": "b"}, (["a", "b"], [])),
        ({"d.jsonl": "ab", "config.json": None, "metadata.json": None}, (["a", "b"], [])),
        ({"train.jsonl": "a", "sample_submission.csv": None, "test.jsonl": "b"}, (["a"], ["b"])),
    ],
)
def test_shards_by_hash_and_files_that_are_no_data(
    tmp_path: Path, files: dict[str, str | None], expected: tuple[list[str], list[str]]
) -> None:
    build(tmp_path, **{name: "{}" if names is None else pairs(*names) for name, names in files.items()})
    assert prompts(listed(tmp_path)) == expected


def test_a_part_in_two_formats_is_not_learned_twice(tmp_path: Path) -> None:
    for other in ("train.jsonl.gz", "train.csv"):
        content = gzip.compress(pairs("a").encode()) if other.endswith("gz") else "prompt,answer\na,b\n"
        build(tmp_path / other, **{"train.jsonl": pairs("a"), other: content})
        with pytest.raises(DataError, match=r"are the same part in two formats\. Name one of them\."):
            listed(tmp_path / other)


@pytest.mark.parametrize(
    ("test", "dev", "held_out", "note"),
    [
        ("index\tsentence\n0\tx\n", "sentence\tlabel\nok\t1\n", ["ok"], True),
        ("sentence\tlabel\nx\t-1\n", "sentence\tlabel\nok\t1\n", ["ok"], True),
        ("sentence\tlabel\nx\t\n", "sentence\tlabel\nok\t1\n", ["ok"], True),
        ("sentence\tlabel\nx\t1\n", "sentence\tlabel\nok\t1\n", ["x"], False),
    ],
)
def test_a_test_part_without_answers_is_left_out(
    tmp_path: Path, test: str, dev: str, held_out: list[str], note: bool
) -> None:
    build(tmp_path, **{"train.tsv": "sentence\tlabel\nit's \"good\t1\nbad\t0\n", "test.tsv": test, "dev.tsv": dev})
    found = listed(tmp_path)
    assert prompts(found) == (["it's \"good", "bad"], held_out)
    assert ("The test part has no answers: its 1 examples were left out." in found.notes) is note


def test_a_held_out_label_that_was_not_learned_is_refused(tmp_path: Path) -> None:
    build(tmp_path, **{"train.tsv": "text\tlabel\na\t1\nb\t0\n", "test.tsv": "text\tlabel\nc\t1\nd\t2\n"})
    with pytest.raises(DataError, match=r"test\.tsv:3: held-out label '2' has no training examples\."):
        listed(tmp_path)


def test_a_label_in_two_spellings_is_one(tmp_path: Path) -> None:
    labels = ["Good", "good ", "bad", "cafe\u0301", "caf\u00e9", "bad\u200b"]
    rows = [json.dumps({"text": f"t{n}", "label": label}) for n, label in enumerate(labels)]
    found = listed(build(tmp_path, **{"d.jsonl": "\n".join(rows)}) / "d.jsonl")
    assert [one.answer for one in found.train] == ["Good", "Good", "bad", "café", "café", "bad"]
    assert found.notes == ("Labels that differ only in case or Unicode form are one label: 'good' as 'Good'.",)


def test_a_head_in_the_middle_of_a_table_is_no_example(tmp_path: Path) -> None:
    build(tmp_path, **{"d.csv": "prompt,answer\na,b\nprompt,answer\nc,d\n"})
    with pytest.raises(DataError, match=r"d\.csv:3: repeats the head of the table; were several joined\?"):
        listed(tmp_path / "d.csv")
    assert prompts(listed(tmp_path / "d.csv", skip_bad=True)) == (["a", "c"], [])


@pytest.mark.parametrize("parts", [("test", "test"), ("val", "test")])
def test_a_table_of_held_out_parts_alone_is_refused(tmp_path: Path, parts: tuple[str, str]) -> None:
    rows = [json.dumps({"prompt": "a", "answer": "b", "split": part}) for part in parts]
    with pytest.raises(DataError, match=r"holds no training examples, but [12] held-out ones\."):
        listed(build(tmp_path, **{"d.jsonl": "\n".join(rows)}) / "d.jsonl")
