"""Image folders, manifests and parquet: what is found, split, limited and converted."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_images, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import ImageListing, list_images
from treelora_cli.data.paths import existing
from treelora_cli.data.pixels import open_image
from treelora_cli.data.tables import read_table
from treelora_cli.errors import DataError


def listed(path: Path, **options: Any) -> ImageListing:
    return list_images(DataRequest(path=path, **options))


def counts(items: list[Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for item in items:
        found[item.label] = found.get(item.label, 0) + 1
    return found


# -- folders ----------------------------------------------------------------------------------------------


def test_train_and_test_folders_are_kept_apart(tmp_path: Path) -> None:
    listing = listed(make_images(tmp_path / "d", ["red", "blue"], train=5, test=3))
    assert listing.labels == ("blue", "red")
    assert counts(listing.train) == {"blue": 5, "red": 5}
    assert counts(listing.test) == {"blue": 3, "red": 3}
    assert listing.notes == ()


@pytest.mark.parametrize("name", ["val", "Validation", "valid", "test", "eval"])
def test_held_out_folders_go_by_many_names(tmp_path: Path, name: str) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"])
    (folder / "test").rename(folder / name)
    assert counts(listed(folder).test) == {"blue": 8, "red": 8}


def test_a_plain_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=20, test=0) / "train"
    listing = listed(folder)
    assert counts(listing.train) == {"blue": 18, "red": 18}
    assert counts(listing.test) == {"blue": 2, "red": 2}
    assert listing.notes == ("No held-out data given: 4 of 40 images kept for scoring.",)
    names = {item.name for item in listing.train} | {item.name for item in listing.test}
    assert len(names) == 40
    again, other = listed(folder), listed(folder, seed=1)
    assert [item.name for item in again.test] == [item.name for item in listing.test]
    assert [item.name for item in other.test] != [item.name for item in listing.test]


def test_a_class_of_one_image_is_kept_for_training(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=1, test=0)
    listing = listed(folder)
    assert counts(listing.train) == {"blue": 1, "red": 1}
    assert listing.test == []


def test_held_out_data_elsewhere(tmp_path: Path) -> None:
    train = make_images(tmp_path / "a", ["red", "blue"], test=0)
    other = make_images(tmp_path / "b", ["red", "blue"], train=3, test=2)
    assert counts(listed(train, val=other).test) == {"blue": 2, "red": 2}
    assert counts(listed(train, val=other / "train").test) == {"blue": 3, "red": 3}


def test_limits_are_per_class_and_seeded(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"])
    listing = listed(folder, train_limit=3, test_limit=100)
    assert counts(listing.train) == {"blue": 3, "red": 3}
    assert counts(listing.test) == {"blue": 8, "red": 8}
    larger = listed(folder, train_limit=5)
    assert {item.name for item in listing.train} < {item.name for item in larger.train}


def test_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], test=0)
    (folder / "train" / "red" / "notes.txt").write_text("x")
    (folder / "train" / "red" / ".hidden.png").write_text("x")
    (folder / "train" / ".git").mkdir()
    nested = folder / "train" / "blue" / "deeper"
    nested.mkdir()
    picture("blue", 77).save(nested / "UPPER.PNG")
    listing = listed(folder)
    assert f"Images in folders of {nested.parent} (deeper/) are of its class." in listing.notes
    assert listing.notes[1].startswith("1 files in ")
    assert sum(counts(listing.train).values()) + len(listing.test) == 17


# -- tables -----------------------------------------------------------------------------------------------


def rows_for(folder: Path) -> list[tuple[str, str]]:
    return [(str(path.relative_to(folder)), path.parent.name) for path in sorted(folder.rglob("*.png"))]


def test_csv_manifest(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"])
    lines = [f"{path},{label},{path.split('/')[0]}" for path, label in rows_for(folder)]
    (folder / "m.csv").write_text("\n".join(["\ufeffpath,label,split", *lines]), encoding="utf-8")
    listing = listed(folder / "m.csv")
    assert counts(listing.train) == counts(listing.test) == {"blue": 8, "red": 8}
    assert listing.train[0].read() == Path(listing.train[0].name).read_bytes()


def test_jsonl_manifest_with_mapped_columns(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], test=0)
    lines = [json.dumps({"where": path, "what": label}) for path, label in rows_for(folder)]
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n\n")
    listing = listed(folder / "m.jsonl", columns={"where": "path", "what": "label"}, held_out=0.25)
    assert counts(listing.train) == {"blue": 6, "red": 6}
    with pytest.raises(DataError, match=r"m\.jsonl:1: no column 'which' to map\. Found where, what\."):
        listed(folder / "m.jsonl", columns={"which": "label"})


def test_parquet_with_image_bytes(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder = make_images(tmp_path / "d", ["red", "blue"], test=0)
    files = [(folder / path, label) for path, label in rows_for(folder)]
    table = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path, _ in files],
        "label": [7 if label == "red" else 3 for _, label in files],
    }
    parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet")
    listing = listed(tmp_path / "m.parquet", held_out=0)
    assert listing.labels == ("3", "7")
    assert [item.read() for item in listing.train] == [path.read_bytes() for path, _ in files]
    assert listing.train[0].name == "m.parquet row 1"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("m.csv", b"path,label\n", r"m\.csv holds no examples\."),
        ("m.csv", b'path,label\n"a,b\n', r"m\.csv:\d+: (invalid CSV|the number of fields)"),
        ("m.csv", b"path,label\nx.png,\n", r"m\.csv:2: empty label\."),
        ("m.csv", b"path,label\n\xff\x81,x\n", r"m\.csv: not UTF-8 text \(byte \d+\)\."),
        ("m.jsonl", b"[1]\n", r"m\.jsonl:1: expected a record with named fields, got list\."),
        ("m.jsonl", b'{"path": true, "label": "x"}\n', r"m\.jsonl:1: 'path' is neither a path nor image bytes\."),
        ("m.json", b'{"a": [], "b": []}', r"m\.json: expected a list of records\."),
        ("m.json", b"3", r"m\.json: expected a list of records\."),
        ("m.json", b'[{"x": 1}\n, {', r"m\.json:2: invalid JSON \("),
        ("m.json", b"[" * 100_000, r"m\.json: JSON nested too deeply\."),
    ],
)
def test_malformed_tables_name_file_and_line(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=line):
        listed(tmp_path / name)


@settings(max_examples=200)
@given(st.binary(max_size=120), st.sampled_from(["csv", "jsonl", "json", "parquet"]))
def test_any_bytes_are_a_table_or_a_data_error(tmp_path_factory: Any, content: bytes, kind: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    path.write_bytes(content)
    try:
        rows = read_table(path, None, {})
    except DataError as error:
        message = str(error)
    else:
        assert rows and all(isinstance(row.values, dict) for row in rows)
        return
    assert "fuzz." in message


# -- images -----------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_conversions_to_rgb() -> None:
    grey = Image.fromarray(np.array([[0, 128, 255]], np.uint8))
    assert np.asarray(open_image(encoded(grey), "x")).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(open_image(encoded(deep), "x"))[0, :, 0].tolist() == [0, 127, 255]
    clear = Image.fromarray(np.array([[[10, 20, 30, 0]]], np.uint8))
    assert open_image(encoded(clear), "x").getpixel((0, 0)) == (10, 20, 30)
    palette = Image.new("RGB", (2, 2), (200, 10, 20)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert open_image(encoded(palette), "x").getpixel((1, 1)) == (200, 10, 20)
    assert open_image(encoded(Image.new("1", (3, 3), 1)), "x").getpixel((0, 0)) == (255, 255, 255)
    floats = Image.fromarray(np.array([[0.0, 50.0, 200.0]], np.float32))
    assert np.asarray(open_image(encoded(floats, "TIFF"), "x"))[0, :, 2].tolist() == [0, 50, 200]


def test_rotation_in_the_camera_record_is_applied() -> None:
    image = Image.new("RGB", (4, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    assert open_image(encoded(image, "JPEG", exif=exif), "x").size == (2, 4)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_image_or_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError, match=r"^pic: unreadable or truncated image"):
        open_image(content, "pic")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL")
@given(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), st.data())
def test_a_damaged_image_is_an_image_or_a_data_error(kind: str, data: st.DataObject) -> None:
    content = bytearray(encoded(picture("red", 1), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    try:
        image = open_image(bytes(content), "pic")
    except DataError as error:
        message = str(error)
    else:
        assert image.mode == "RGB"
        return
    assert message.startswith("pic: unreadable or truncated image")


def test_a_missing_path_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "fomc.jsonl").touch()
    with pytest.raises(DataError, match=r"fmoc\.jsonl not found\. Did you mean .*fomc\.jsonl\?"):
        existing(tmp_path / "fmoc.jsonl")
    with pytest.raises(DataError, match=r"zzz not found\.$"):
        existing(tmp_path / "zzz")
    with pytest.raises(DataError, match=r"x not found\.$"):
        existing(tmp_path / "no" / "such" / "x")


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe", "/dev/null"])
def test_a_pipe_or_device_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not path.exists():
        os.mkfifo(path)
    with pytest.raises(DataError, match=r"is a pipe or device; data is read more than once\."):
        listed(path)


def test_a_pipe_among_images_is_passed_over(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=2, test=0) / "train"
    os.mkfifo(folder / "red" / "pipe.png")
    (folder / "red" / "link.png").symlink_to("pipe.png")
    assert counts(listed(folder, held_out=0).train) == {"blue": 2, "red": 2}


def test_twenty_thousand_images_are_listed_in_seconds(tmp_path: Path) -> None:
    """Each file is looked at once and not opened."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10_000):
            (tmp_path / name / f"{index}.png").touch()
    began = time.process_time()
    assert len(listed(tmp_path, held_out=0).train) == 20_000
    assert time.process_time() - began < 5


@pytest.mark.parametrize(("given", "there"), [("IT'S.JPG", "it's.jpg"), ("it's.jpeg", "it's.jpg"), ("CATS", "cats")])
def test_a_suggestion_is_a_whole_name_in_its_own_case(tmp_path: Path, given: str, there: str) -> None:
    (tmp_path / there).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{given} not found\. Did you mean .*/{there}\?$"):
        list_images(DataRequest(path=tmp_path / given))
