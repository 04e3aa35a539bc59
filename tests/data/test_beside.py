"""Images whose label is in a file beside each, as an unpacked WebDataset has them."""

import json
from pathlib import Path

import pytest
from conftest import picture

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.errors import DataError

COLOURS = ("red", "blue")


def images(folder: Path, ending: str, *texts: str) -> Path:
    """Write an image for each text, and the text beside it."""
    folder.mkdir(parents=True)
    for place, text in enumerate(texts):
        picture(COLOURS[place % 2], place).save(folder / f"{place:04d}.png")
        if text:
            (folder / f"{place:04d}{ending}").write_text(text)
    return folder


def labels(folder: Path, **request: object) -> list[str]:
    return [one.label for one in list_images(DataRequest(folder, held_out=0, **request)).train]  # type: ignore[arg-type]


def test_a_class_file_or_a_record_names_the_label(tmp_path: Path) -> None:
    assert labels(images(tmp_path / "a", ".cls", "red", "blue\n", "red")) == ["red", "blue", "red"]
    records = [json.dumps({"label": name, "key": place}) for place, name in enumerate(COLOURS)]
    assert labels(images(tmp_path / "b", ".json", *records)) == ["red", "blue"]
    listing = list_images(DataRequest(images(tmp_path / "c", ".cls", "0", "1", "0"), held_out=0))
    assert ([one.label for one in listing.train], listing.numbered) == (["0", "1", "0"], True)
    assert "The label of each image is in the .cls file beside it." in listing.notes
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    assert labels(tmp_path / "c", label_names=names) == ["cat", "dog", "cat"]


def test_parts_of_such_images(tmp_path: Path) -> None:
    for part in ("train", "val"):
        images(tmp_path / "d" / part, ".cls", "red", "blue")
    listing = list_images(DataRequest(tmp_path / "d"))
    assert ([one.label for one in listing.train], len(listing.test)) == (["red", "blue"], 2)


def test_what_cannot_be_told_is_refused(tmp_path: Path) -> None:
    line = r"3 images have a \.txt file beside them; whether it holds a class, caption or boxes cannot"
    with pytest.raises(DataError, match=line):
        labels(images(tmp_path / "a", ".txt", "0 0.5 0.5 0.1 0.1", "a photo", "cat"))
    with pytest.raises(DataError, match=r"0001\.png has no \.cls file beside it, as 2 of 3 images have\."):
        labels(images(tmp_path / "b", ".cls", "red", "", "blue"))
    with pytest.raises(DataError, match=r"0000\.json cannot be read as text or JSON"):
        labels(images(tmp_path / "c", ".json", "{", "{}"))
    with pytest.raises(DataError, match=r"Found path, key\. This project's backend is vit"):
        labels(images(tmp_path / "e", ".json", '{"key": 1}', '{"key": 2}'))
