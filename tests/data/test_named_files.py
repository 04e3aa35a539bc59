"""Files that hold data but are not read: what they are is said, and what to do."""

from __future__ import annotations

import gzip
import json
import shlex
import subprocess
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError

READERS = (list_images, list_texts)
TAR = b"\0" * 257 + b"ustar"


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        (
            "d.zip",
            b"PK\x03\x04",
            r"d\.zip is a zip archive\. Unpack it and give what is inside: unzip -q .*zip -d .*/d$",
        ),
        ("d.csv", b"PK\x03\x04", r"d\.csv is a zip archive\. .* -d .*/d\.csv-unpacked$"),
        ("d.tar", TAR, r"d\.tar is a tar archive\. .*: mkdir .*/d && tar -xf .*/d\.tar -C .*/d$"),
        (
            "d.tar.gz",
            gzip.compress(TAR, mtime=0),
            r"d\.tar\.gz is a tar archive\. .*: mkdir .*/d && tar -xf .*tar\.gz -C .*/d$",
        ),
        ("d.tgz", b"x", r"d\.tgz is a tar archive\. .* -C .*/d$"),
        ("d.rar", b"Rar!\x1a\x07", r"d\.rar is a rar archive\. .*: unrar x .*rar .*/d/$"),
        ("d.7z", b"7z\xbc\xaf\x27\x1c", r"d\.7z is a 7z archive\. .*: 7z x .*7z -o.*/d$"),
        ("d.xlsx", b"PK\x03\x04", r"d\.xlsx is a spreadsheet: save it as CSV and give that\.$"),
        ("d.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"is a pointer of Git LFS and not the data\."),
    ],
)
def test_archives_spreadsheets_and_pointers_are_named(
    tmp_path: Path, read: Any, name: str, content: bytes, line: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=line):
        read(DataRequest(tmp_path / name))


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("name", "kind"), [("images.zip", "zip archive"), ("birds.xlsx", "spreadsheet")])
def test_a_folder_that_holds_nothing_else_names_them(tmp_path: Path, read: Any, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=rf"{name} is a {kind}"):
        read(DataRequest(tmp_path))


@pytest.mark.parametrize("name", ["my birds.tar.gz", "my birds.zip"])
def test_the_command_for_unpacking_works_as_printed(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.txt").write_text("a text")
    packed = tmp_path / name
    if packed.suffix == ".zip":
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(tmp_path / "0.txt", "0.txt")
    else:
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(tmp_path / "0.txt", "0.txt")
    with pytest.raises(DataError) as raised:
        list_texts(DataRequest(packed))
    command = str(raised.value).partition("what is inside: ")[2]
    if packed.suffix == ".zip":  # unzip is not everywhere; Python's own takes the same two paths
        _, _, file, _, folder = shlex.split(command)
        zipfile.ZipFile(file).extractall(folder)
    else:
        subprocess.run(["sh", "-c", command], check=True)
    assert [one.answer for one in list_texts(DataRequest(tmp_path / "my birds", held_out=0)).train] == ["a text"]


COCO = {
    "images": [{"id": 1, "file_name": "0.png"}],
    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
    "categories": [{"id": 1, "name": "cat"}],
}
STUDIO = {"id": 1, "data": {"image": "/data/upload/0.png"}, "annotations": [{"result": []}]}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            COCO,
            r"^d\.json is COCO: what is where in an image, not one class an image\. Crop .* a table of path,label\.$",
        ),
        ({"shapes": [], "imagePath": "0.png", "imageData": None}, r"^d\.json is LabelMe's: what is where in an image,"),
        ([STUDIO, STUDIO], r"^d\.json is Label Studio's own JSON\. Export as JSON-MIN or CSV there, and give that\.$"),
    ],
)
def test_what_labelling_tools_write_for_themselves_is_named(tmp_path: Path, read: Any, content: Any, line: str) -> None:
    (tmp_path / "d.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=line):
        read(DataRequest(tmp_path / "d.json"))
