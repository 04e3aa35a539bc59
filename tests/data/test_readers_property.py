"""Readers of tables, chats, images and folders, fed with what hypothesis can make of them.

Each either reads what a reference reader reads, or ends with a ``DataError`` (exit code 4); nothing else comes out.
``TREELORA_READER_EXAMPLES=20000`` runs more.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.data.pixels import open_image, pixels_of
from treelora_cli.data.tables import read_table
from treelora_cli.data.text import TextListing, list_texts
from treelora_cli.errors import DataError

EXAMPLES = int(os.environ.get("TREELORA_READER_EXAMPLES", "200"))
examples = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    derandomize=EXAMPLES < 1000,
)

_words = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20)
_names = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=1, max_size=4, unique=True)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def outcome(read: Callable[[], Any]) -> Any:
    """Return what was read, or ``None`` where it was refused with one line."""
    try:
        return read()
    except DataError:
        return None


def same(one: Any, other: Any) -> bool:
    """Compare as JSON, where NaN is itself."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def mangled(data: st.DataObject, whole: bytes) -> bytes:
    """Change, cut, insert or repeat bytes."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        if not changed:
            break
        place = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.integers(0, 3))
        if kind == 0:
            changed[place] = data.draw(st.integers(0, 255))
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = data.draw(st.binary(max_size=8))
        else:
            changed[place:place] = changed[place : place + 32]
    return bytes(changed)


def without_marks(text: str) -> str:
    """Leave out marks of byte order at the start of lines, as of files that were joined."""
    return re.sub("(?<=[\r\n])\ufeff", "", text)


# -- tables -------------------------------------------------------------------------------------------------


@examples
@given(
    _names,
    st.data(),
    st.sampled_from(",;\t|"),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.booleans(),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_a_csv_is_read_as_the_library_reads_it(
    folder: Path, names: list[str], data: st.DataObject, sign: str, encoding: str, packed: bool, quoting: Any
) -> None:
    rows = data.draw(st.lists(st.lists(_words, min_size=len(names), max_size=len(names)), min_size=1, max_size=5))
    sink = io.StringIO()
    csv.writer(sink, delimiter=sign, quoting=quoting).writerows([names, *rows])
    content = sink.getvalue().encode(encoding)
    path = folder / ("t.csv.gz" if packed else "t.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    read = csv.DictReader(io.StringIO(without_marks(sink.getvalue()), newline=""), delimiter=sign)
    wanted = [row for row in read if any(cell.strip() for cell in row.values())]
    found = outcome(lambda: [row.values for row in read_table(path, None, {})])
    if found is None:  # a head of one column does not tell what divides columns
        assert not wanted or len(names) == 1
    else:
        assert found == wanted


@examples
@given(st.integers(1, 4), st.data(), st.sampled_from(",;|"))
def test_a_csv_without_a_head_is_read_from_its_first_line_on(
    folder: Path, width: int, data: st.DataObject, sign: str
) -> None:
    rows = data.draw(st.lists(st.lists(_words, min_size=width, max_size=width), min_size=1, max_size=5))
    sink = io.StringIO()
    csv.writer(sink, delimiter=sign, quoting=csv.QUOTE_ALL).writerows(rows)
    (folder / "h.csv").write_text(f"sep={sign}\n{sink.getvalue()}", encoding="utf-8", newline="")
    found = outcome(lambda: [row.values for row in read_table(folder / "h.csv", None, {"1": "first"})])
    rows = list(csv.reader(io.StringIO(without_marks(sink.getvalue()), newline=""), delimiter=sign))
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        assert found is None, "nothing but blank lines"
    elif "1" in [cell.strip() for cell in rows[0]]:
        assert found is None or len(found) == len(rows) - 1, "a head of numbers"
    else:
        names = ["first", *(str(place) for place in range(2, width + 1))]
        assert found == [dict(zip(names, row, strict=True)) for row in rows]


@examples
@given(
    st.lists(st.dictionaries(st.text(max_size=6), _json, max_size=4), min_size=1, max_size=4),
    st.sampled_from([None, 1]),
)
def test_json_is_read_as_the_library_reads_it(folder: Path, records: list[dict[str, Any]], indent: int | None) -> None:
    (folder / "t.jsonl").write_text("\n".join(json.dumps(one, indent=indent) for one in records), encoding="utf-8")
    (folder / "t.json").write_text(json.dumps(records, indent=indent, ensure_ascii=True), encoding="utf-8")
    for name in ("t.json", "t.jsonl"):
        found = outcome(lambda name=name: [row.values for row in read_table(folder / name, None, {})])
        assert found is not None
        assert same(found, records)


@examples
@given(st.data(), st.integers(1, 4))
def test_parquet_is_read_as_arrow_reads_it(folder: Path, data: st.DataObject, count: int) -> None:
    kinds = {
        "text": (st.none() | _words, pyarrow.string()),
        "whole": (st.none() | st.integers(-(2**63), 2**63 - 1), pyarrow.int64()),
        "number": (st.none() | st.floats(width=32), pyarrow.float32()),
        "list": (st.none() | st.lists(_words, max_size=3), pyarrow.list_(pyarrow.string())),
        "moment": (st.none() | st.integers(-(2**63), 2**63 - 1), pyarrow.timestamp("us")),
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, unique=True))
    columns = {
        name: pyarrow.array(data.draw(st.lists(kinds[name][0], min_size=count, max_size=count)), kinds[name][1])
        for name in chosen
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, folder / "t.parquet")
    found = outcome(lambda: [row.values for row in read_table(folder / "t.parquet", None, {})])
    if found is None:
        assert "moment" in chosen, "only a moment that Python has no year for may be refused"
    else:
        assert repr(found) == repr(table.to_pylist())


_SEEDS = {
    "csv": b'path,label\na.png,"x, y"\nb.png,z\n',
    "tsv": b"prompt\tanswer\na\tb\n",
    "jsonl": b'{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": ["d", "e"]}\n',
    "json": b'[{"text": "a", "label": 1}, {"text": "b", "label": 2.0}]',
    "txt": "Größe\nzwei\n".encode(),
}


@examples
@given(st.data(), st.sampled_from(sorted(_SEEDS)))
def test_a_damaged_table_is_read_or_refused(folder: Path, data: st.DataObject, kind: str) -> None:
    content = data.draw(st.binary(max_size=80)) if data.draw(st.booleans()) else mangled(data, _SEEDS[kind])
    if data.draw(st.integers(0, 9)) == 0:
        content = mangled(data, gzip.compress(content))
    path = folder / f"d.{kind}"
    path.write_bytes(content)
    found = outcome(lambda: list_texts(DataRequest(path, skip_bad=data.draw(st.booleans()))))
    assert found is None or isinstance(found, TextListing)
    rows = outcome(lambda: read_table(path, None, {}))
    assert rows is None or all(isinstance(row.values, dict) for row in rows)
    outcome(lambda: list_images(DataRequest(path)))


@examples
@given(st.data())
def test_a_damaged_parquet_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "answer": ["c", "d"], "n": [1, 2]}), sink)
    (folder / "d.parquet").write_bytes(mangled(data, sink.getvalue()))
    found = outcome(lambda: list_texts(DataRequest(folder / "d.parquet")))
    assert found is None or isinstance(found, TextListing)


# -- chats --------------------------------------------------------------------------------------------------

_said = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())


@examples
@given(st.lists(st.tuples(_said, _said), min_size=1, max_size=4), st.none() | _said, st.sampled_from(["role", "from"]))
def test_a_chat_is_read_turn_by_turn(folder: Path, pairs: list[tuple[str, str]], system: str | None, key: str) -> None:
    turns = [] if system is None else [("system", system)]
    for asked, said in pairs:
        turns += [("user", asked), ("assistant", said)]
    text = {"role": "content", "from": "value"}[key]
    names = {"user": "human", "assistant": "gpt"} if key == "from" else {}
    messages = [{key: names.get(role, role), text: content} for role, content in turns]
    column = "messages" if key == "role" else "conversations"
    (folder / "c.jsonl").write_text(json.dumps({column: messages}) + "\n", encoding="utf-8")
    found = list_texts(DataRequest(folder / "c.jsonl", held_out=0))
    (one,) = found.train
    assert (found.style, one.answer) == ("chat", turns[-1][1])
    assert [(turn.role, turn.content) for turn in one.turns] == turns[:-1]


_MESSAGE = ("role", "content", "from", "value", "tool_calls", "name")


@examples
@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional=dict.fromkeys(("role", "content", "from", "value", "tool_calls", "name"), _json)
        )
        | _json,
        max_size=3,
    )
    | _json,
    st.fixed_dictionaries({}, optional=dict.fromkeys(("tools", "system", "prompt", "answer", "text", "label"), _json)),
)
def test_any_record_is_read_or_refused(folder: Path, messages: Any, beside: dict[str, Any]) -> None:
    (folder / "r.jsonl").write_text(json.dumps({"messages": messages, **beside}) + "\n" + json.dumps(beside) + "\n")
    found = outcome(lambda: list_texts(DataRequest(folder / "r.jsonl")))
    assert found is None or isinstance(found, TextListing)
    (folder / "r.jsonl").write_text(json.dumps(beside) + "\n")
    found = outcome(lambda: list_texts(DataRequest(folder / "r.jsonl", held_out=0)))
    assert found is None or all(isinstance(one.answer, str) and one.answer.strip() for one in found.train)


# -- images -------------------------------------------------------------------------------------------------

_HEIF = ["HEIF"] if importlib.util.find_spec("pillow_heif") else []
_MODES = {"L": "PNG", "RGB": "PNG", "RGBA": "PNG", "LA": "PNG", "P": "GIF", "1": "TIFF", "CMYK": "TIFF"}


@examples
@given(st.sampled_from(sorted(_MODES)), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_an_image_is_read_as_pillow_converts_it(mode: str, width: int, height: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, format=_MODES[mode])
    wanted = Image.open(io.BytesIO(buffer.getvalue()))
    wanted = wanted.convert("RGBA").convert("RGB") if wanted.mode == "P" else wanted.convert("RGB")
    assert open_image(buffer.getvalue(), "x").tobytes() == wanted.tobytes()


@examples
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=6), st.sampled_from(["PNG", "TIFF"]))
def test_sixteen_bits_are_scaled_by_their_type_or_refused(row: list[int], kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([row], np.uint16)).save(buffer, format=kind)
    found = outcome(lambda: np.asarray(open_image(buffer.getvalue(), "x"))[0, :, 0].tolist())
    known = max(row) > 65535 / 4 or max(row) == 0
    assert found == ([int(value / 65535 * 255) for value in row] if known else None)


@examples
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "deep", "float", *_HEIF]))
def test_a_damaged_image_is_read_or_refused(data: st.DataObject, kind: str) -> None:
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
    image = Image.fromarray(values)
    if kind == "deep":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 300)
    elif kind == "float":
        image = Image.fromarray(values[..., 0].astype(np.float32))
    elif kind == "HEIF":
        importlib.import_module("pillow_heif").register_heif_opener()
    buffer = io.BytesIO()
    image.save(buffer, format="TIFF" if kind in ("deep", "float") else kind)
    content = (
        data.draw(st.binary(max_size=60)) if data.draw(st.integers(0, 9)) == 0 else mangled(data, buffer.getvalue())
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = outcome(lambda: open_image(content, "x"))
        pixels = outcome(lambda: pixels_of(content, "x"))
    assert found is None or (found.mode == "RGB" and pixels == found.width * found.height)


# -- folders ------------------------------------------------------------------------------------------------

_parts = st.sampled_from(
    ["train", "test", "val", "cat", "dog", "images", "data", "unlabeled", "x_train", "x_test", "Cat", "1"]
)


@examples
@given(
    st.lists(st.lists(_parts, max_size=4), min_size=1, max_size=8),
    st.none() | st.sampled_from([("cat",), ("cat", "dog")]),
)
def test_any_layout_is_read_or_refused(folder: Path, places: list[list[str]], classes: tuple[str, ...] | None) -> None:
    root = folder / "layout"
    shutil.rmtree(root, ignore_errors=True)
    files = set()
    for index, place in enumerate(places):
        path = root.joinpath(*place, f"{index}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        files.add(str(path))
    found = outcome(lambda: list_images(DataRequest(root, classes=classes, held_out=0)))
    if found is None:
        return
    train, test = ([item.name for item in part] for part in (found.train, found.test))
    assert len({*train, *test}) == len(train) + len(test), "no file twice, none in both parts"
    assert {*train, *test} <= files
    for item in [*found.train, *found.test]:
        above = [name.lower() for name in Path(item.name).relative_to(root).parts[:-1]]
        assert item.label.lower() in above, "a label is the name of a folder above"
        assert item.label not in ("images", "data", "unlabeled") or len(found.labels) > 1 or classes
    if found.train:
        assert found.labels == tuple(sorted({item.label for item in found.train}))
