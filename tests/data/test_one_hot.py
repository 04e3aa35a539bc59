"""A column for each class: its name is the label where it holds 1."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import list_images
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError

CLASSES = ("healthy", "rust", "scab")


def table(folder: Path, ones: list[str], head: str = "image,healthy,rust,scab", ending: str = "") -> Path:
    """Write a table of images, and the images; ``ones`` are the cells of each row."""
    folder.mkdir()
    for place in range(len(ones)):
        Image.fromarray(np.full((4, 4, 3), 20 * place, np.uint8)).save(folder / f"{place}.png")
    rows = [f"{place}{ending},{cells}" for place, cells in enumerate(ones)]
    (folder / "d.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "d.csv"


def labels(path: Path, **request: object) -> dict[str, str]:
    listing = list_images(DataRequest(path, held_out=0, **request))  # type: ignore[arg-type]
    return {Path(item.name).stem: item.label for item in listing.train}


@pytest.mark.parametrize("one", ["1", "1.0", "True"])
def test_the_column_that_holds_one_is_the_label(tmp_path: Path, one: str) -> None:
    """As Plant Pathology (names without endings) and ISIC 2018 (``1.0``) write it."""
    zero = {"1": "0", "1.0": "0.0", "True": "False"}[one]
    cells = [",".join(one if at == place % 3 else zero for at in range(3)) for place in range(6)]
    path = table(tmp_path / "d", cells)
    assert labels(path) == {str(place): CLASSES[place % 3] for place in range(6)}
    listing = list_images(DataRequest(path, held_out=0))
    assert "The label is the column that holds 1: healthy, rust, scab." in listing.notes


def test_a_row_of_several_classes_or_none_is_named(tmp_path: Path) -> None:
    path = table(tmp_path / "d", ["1,0,0", "0,1,0", "0,1,1", "0,0,1", "1,0,0"])
    with pytest.raises(DataError, match=r"d\.csv:4: label names several classes \(rust, scab\), not one\. Mend it, or"):
        labels(path)
    assert labels(path, skip_bad=True) == {"0": "healthy", "1": "rust", "3": "scab", "4": "healthy"}
    path = table(tmp_path / "e", ["1,0,0", "0,1,0", "0,0,0", "0,0,1"])
    with pytest.raises(DataError, match=r"d\.csv:4: empty label\. Mend it, or pass --skip-bad\."):
        labels(path)


def test_columns_that_mostly_name_several_are_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "d", ["1,1,0", "0,1,1", "0,0,0", "0,0,1"])
    line = r"columns of 0 and 1 \(healthy, rust, scab\) name several classes or none in 3 of 4 rows; an example has one"
    with pytest.raises(DataError, match=line):
        labels(path)
    assert labels(path, columns={"rust": "label"}) == {"0": "1", "1": "1", "2": "0", "3": "0"}


def test_a_column_of_parts_is_no_class(tmp_path: Path) -> None:
    path = table(tmp_path / "d", ["1,0,0", "0,1,0", "1,0,1", "0,1,0"], "image,cat,dog,is_test", ".png")
    listing = list_images(DataRequest(path))
    assert ([one.label for one in listing.train], [one.label for one in listing.test]) == (
        ["cat", "dog", "dog"],
        ["cat"],
    )


def test_texts_with_a_column_for_each_class(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    rows = [f"text {n},x{n},{int(n % 3 == 0)},{int(n % 3 == 1)},{int(n % 3 == 2)}" for n in range(30)]
    path.write_text("\n".join(["text,id,joy,anger,fear", *rows]))
    listing = list_texts(DataRequest(path))
    assert (listing.style, listing.labels, len(listing.train)) == ("labels", ("anger", "fear", "joy"), 27)
    rows = [f"comment {n},{n % 2},{int(n % 3 == 0)}" for n in range(30)]
    path.write_text("\n".join(["comment_text,toxic,insult", *rows]))
    with pytest.raises(DataError, match=r"columns of 0 and 1 \(toxic, insult\) name several classes or none"):
        list_texts(DataRequest(path))
