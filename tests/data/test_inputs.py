"""What ``predict`` may be given, for images and for texts."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow
import pytest
from conftest import picture
from pyarrow import parquet

from treelora_cli.backend.values import Turn
from treelora_cli.data.inputs import image_inputs, text_inputs
from treelora_cli.errors import DataError


def nothing() -> bytes:
    raise AssertionError("standard input was read")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/c"):
        picture("red", 1, size=4).save(tmp_path / "in" / name, format="PNG")
    (tmp_path / "in" / "notes.txt").write_text("x")
    (tmp_path / "in" / "._b.png").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["in/a.JPG", "in/b.png", "in/deep/c"]


def test_a_folder_a_pattern_and_a_file_in_the_order_given(folder: Path) -> None:
    assert image_inputs(["in"], nothing) == ALL
    assert image_inputs(["in/b.png", "in/[ab].*"], nothing) == [
        "in/b.png",
        "in/a.JPG",
        "in/b.png",
    ]
    assert image_inputs(["in/**/c", f"{folder}/in/b*"], nothing) == ["in/deep/c", str(folder / "in/b.png")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.jsonl", '{"path": "in/b.png"}\n{"path": "in/deep/c", "label": 3}\n'),
        ("list.csv", "id,file_name\n1,in/b.png\n2,in/deep/c\n"),
        ("list.tsv", "image\nin/b.png\nin/deep/c\n"),
    ],
)
def test_a_table_of_paths_relative_to_it(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    assert image_inputs([name], nothing) == ["in/b.png", "in/deep/c"]


def test_standard_input_holds_an_image_or_paths_or_jsonl(folder: Path) -> None:
    buffer = io.BytesIO()
    picture("blue", 2, size=4).save(buffer, format="PNG")
    (path,) = image_inputs(["-"], buffer.getvalue)
    assert Path(path).read_bytes() == buffer.getvalue()
    wanted = ["in/b.png", "in/a.JPG"]
    assert image_inputs(["-"], lambda: b"in/b.png\n\nin/a.JPG\n") == wanted
    assert image_inputs(["-"], lambda: b'{"path": "in/b.png"}\n{"image": "in/a.JPG"}\n') == wanted
    for written in (b"in/b.png\0in/a.JPG\0", b'"in/b.png"\r\n"in\\a.JPG"\r\n'.replace(b"\\", b"/")):
        assert image_inputs(["-"], lambda written=written: written) == wanted
    with pytest.raises(DataError, match=r"^standard input:2: x\.png not found\."):
        image_inputs(["-"], lambda: b"in/b.png\nx.png\n")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("https://example.org/a.png", r"is an address; predict reads local files\. Download it first\."),
        ("s3://bucket/a.png", r"is an address; predict reads local files\."),
        ("in/c.png", r"c\.png not found\. Did you mean in/b\.png\?"),
        ("in/*.webp", r"nothing fits this pattern\."),
        ("empty", r"empty holds no images\."),
        ("HTTPS://example.org/a.png", r"is an address; predict reads local files\."),
        ("file:///no/a.png", r"/no/a\.png not found\."),
        ("list.xlsx", r"list\.xlsx not found\."),
        ("texts.jsonl", r"texts\.jsonl:1: Found prompt; need 'path'\."),
    ],
)
def test_inputs_that_are_no_images(folder: Path, given: str, line: str) -> None:
    (folder / "empty").mkdir()
    (folder / "texts.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(DataError, match=line):
        image_inputs([given], nothing)


def test_prompts_as_typed_stay_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["Why?", "what is *.jsonl for?", "http://example.org", "a/b", "see notes.txt", " two  spaces ", "x" * 5000]
    assert text_inputs(typed, nothing) == typed


@pytest.mark.parametrize("start", ["", "def f ( x ) : return [ x ", "what is a* ", "a/b.txt ", "über "])
def test_a_prompt_on_one_line_may_be_longer_than_a_files_name(start: str) -> None:
    for length in (250, 256, 257, 300, 1000, 1024, 3000):
        assert text_inputs([(start + "ü word" * length)[:length]], nothing) == [(start + "ü word" * length)[:length]]


@pytest.mark.parametrize("given", ["x" * 300 + ".png", "x[a]" * 100, "y" * 300])
def test_an_image_whose_name_is_too_long_is_not_there(given: str) -> None:
    with pytest.raises(DataError, match=r"not found|nothing fits this pattern"):
        image_inputs([given], nothing)


def test_prompts_from_tables_text_files_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"prompt": "one", "answer": "x"}\n{"prompt": "two", "answer": "y"}\n')
    Path("b.csv").write_text("sentence,label\nthree,x\n")
    Path("c.txt").write_text("four\nfive\n")
    Path("d").mkdir()
    Path("d", "1.txt").write_text("six\nseven\n")
    Path("d", "2.txt").write_text("eight")
    assert text_inputs(["a.jsonl", "b.csv", "zero"], nothing) == ["one", "two", "three", "zero"]
    assert text_inputs(["c.txt"], nothing) == ["four", "five"]
    assert text_inputs(["d"], nothing) == ["six\nseven", "eight"]
    assert text_inputs(["*.jsonl"], nothing) == ["one", "two"]
    Path("f").mkdir()
    for number in (2, 1):
        Path("f", f"part-{number}.jsonl").write_text(json.dumps({"prompt": f"p{number}", "answer": "x"}))
    Path("f", "README.md").write_text("About these.")
    assert text_inputs(["f"], nothing) == ["p1", "p2"]
    Path("e.jsonl").write_text(json.dumps({"messages": []}))
    with pytest.raises(DataError, match=r"e\.jsonl:1: Found messages; need 'prompt'\. A file of chats is given as --m"):
        text_inputs(["e.jsonl"], nothing)


def test_standard_input_is_one_prompt_or_jsonl() -> None:
    assert text_inputs(["-"], lambda: "Grüße,\nwie geht es?\n".encode()) == ["Grüße,\nwie geht es?"]
    assert text_inputs(["-"], lambda: b'{"prompt": "a"}\n{"question": "b"}\n') == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Sum up.", "input": "A b c."}, "Sum up.\n\nA b c."),
        ({"context": "In Rome.", "question": "Where?"}, "In Rome.\n\nWhere?"),
        ({"question": "Sky?", "choices": ["red", "blue"]}, "Sky?\nA. red\nB. blue"),
        ({"premise": "A.", "hypothesis": "B."}, "premise: A.\nhypothesis: B."),
        ({"question": "A?", "sentence": "B."}, "question: A?\nsentence: B."),
        ({"prompt": "p", "input": "x"}, "p"),
        ({"text": "t", "label": "x"}, "t"),
    ],
)
def test_records_are_asked_as_they_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, object], prompt: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps(record))
    assert text_inputs(["a.jsonl"], nothing) == [prompt]
    assert text_inputs(["-"], lambda: json.dumps(record).encode()) == [prompt]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("", r"A prompt is empty: give a text"),
        (" ", r"A prompt is empty"),
        ("-", r"A prompt is empty"),
        ("nowhere.jsonl", r"nowhere\.jsonl not found\."),
        ("nowhere.txt", r"nowhere\.txt not found\."),
        ("photo.png", r"photo\.png is a file, and neither a table nor a text file \(\.txt\) of prompts\."),
    ],
)
def test_what_is_no_prompt_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photo.png").write_bytes(b"x")
    Path("notes.txt").write_text("a prompt")
    with pytest.raises(DataError, match=line):
        text_inputs([given], lambda: b"\n")


def test_standard_input_without_a_picture(folder: Path) -> None:
    with pytest.raises(DataError, match=r"Standard input is empty: give an image, or paths"):
        image_inputs(["-"], lambda: b"")
    assert image_inputs([f"file://{folder}/in/b.png"], nothing) == [f"{folder}/in/b.png"]


def test_a_record_with_a_system_prompt_is_a_chat(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("System,prompt\nBe kind.,Hi\n,Ho\n")
    kind = [Turn("system", "Be kind."), Turn("user", "Hi")]
    assert text_inputs([str(tmp_path / "d.csv")], nothing) == [kind, "Ho"]
    record = b'{"system_prompt": "Be kind.", "instruction": "Hi", "input": "", "output": "x"}\n'
    assert text_inputs(["-"], lambda: record) == [kind]


def test_a_table_that_holds_images_is_not_answered(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"image": [{"bytes": b"x", "path": None}]}), path)
    with pytest.raises(DataError, match=r"t\.parquet row 1: 'image' holds the image itself; predict reads files\."):
        image_inputs([str(path)], nothing)
