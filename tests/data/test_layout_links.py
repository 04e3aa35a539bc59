"""Links, paths named twice, and parts of a dataset that comes in several sizes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import make_images

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.folders import _repeated
from treelora_cli.data.images import list_images
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError


def test_a_link_to_what_lies_beside_it_counts_once(tmp_path: Path) -> None:
    """A class, a file, and a held-out part that is the training part."""
    folder = make_images(tmp_path / "d", ["red", "blue"], train=6, test=0)
    (folder / "train/crimson").symlink_to("red")
    (folder / "train/blue/again.png").symlink_to("00.png")
    (folder / "test").symlink_to("train")
    listing = list_images(DataRequest(folder, held_out=0))
    counts = {label: sum(one.label == label for one in listing.train) for label in listing.labels}
    assert (counts, listing.test) == ({"blue": 6, "red": 6}, [])
    line = "3 links to what lies beside them were passed over (test to train, train/blue/again.png to 00.png,"
    assert [note for note in listing.notes if note.startswith(line)] == [f"{line} train/crimson to red)."]


def test_of_two_links_to_the_same_folder_the_first_counts(tmp_path: Path) -> None:
    pool = make_images(tmp_path / "pool", ["red", "blue"], train=3, test=0) / "train"
    (tmp_path / "d").mkdir()
    for name, target in (("red", "red"), ("blue", "blue"), ("scarlet", "red")):
        (tmp_path / "d" / name).symlink_to(pool / target)
    listing = list_images(DataRequest(tmp_path / "d", held_out=0))
    assert (listing.labels, len(listing.train)) == (("blue", "red"), 6)


def test_what_is_named_twice_is_read_once(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=3, test=0) / "train"
    link = tmp_path / "link"
    link.symlink_to(folder)
    listing = list_images(DataRequest(folder, more=(folder, link), held_out=0))
    assert len(listing.train) == 6
    assert listing.notes == tuple(f"{path} is named twice, and read once." for path in (folder, link))


@pytest.mark.parametrize(("train", "test"), [("train_mini", "val"), ("train-small", "test"), ("train", "val_tiny")])
def test_a_size_beside_the_name_of_a_part(tmp_path: Path, train: str, test: str) -> None:
    made = make_images(tmp_path / "made", ["red", "blue"], train=3, test=2)
    (tmp_path / "d").mkdir()
    (made / "train").rename(tmp_path / "d" / train)
    (made / "test").rename(tmp_path / "d" / test)
    listing = list_images(DataRequest(tmp_path / "d"))
    assert (listing.labels, len(listing.train), len(listing.test)) == (("blue", "red"), 6, 4)


def test_two_sizes_of_the_training_part_are_not_mixed(tmp_path: Path) -> None:
    made = make_images(tmp_path / "made", ["red", "blue"], train=3, test=2)
    (tmp_path / "d").mkdir()
    (made / "train").rename(tmp_path / "d/train_mini")
    (made / "test").rename(tmp_path / "d/test")
    (make_images(tmp_path / "large", ["red", "blue"], train=9, test=0) / "train").rename(tmp_path / "d/train")
    with pytest.raises(DataError, match=r"'train_mini' is no part that is known\. Give .*/d/train, or name"):
        list_images(DataRequest(tmp_path / "d"))


def test_many_links_are_each_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing each with each took minutes for a class of some thousand linked images."""
    pool, folder = tmp_path / "pool", tmp_path / "d"
    pool.mkdir(), folder.mkdir()
    for number in range(60):
        (pool / f"{number:02}.png").write_bytes(b"")
        (folder / f"a{number:02}.png").symlink_to(pool / f"{number // 2:02}.png")
        (folder / f"b{number:02}.png").write_bytes(b"")
    followed: list[str] = []
    real, compared = os.path.realpath, Path.__eq__
    pairs: list[object] = []
    monkeypatch.setattr(os.path, "realpath", lambda path: (followed.append(str(path)), real(path))[1])
    monkeypatch.setattr(Path, "__eq__", lambda self, other: (pairs.append(self), compared(self, other))[1])
    found = _repeated(sorted(folder.iterdir()))
    monkeypatch.undo()
    assert {path.name: one for path, one in found.items()} == {
        f"a{number:02}.png": f"a{number - 1:02}.png" for number in range(1, 60, 2)
    }
    assert len(followed) == 61, "each link, and the folder"
    assert len(pairs) < 10 * 60


def test_a_link_to_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """As of a disk that is not mounted: without it the held-out part would be learned."""
    folder = make_images(tmp_path / "d", ["red", "blue"], train=0, test=4)
    (folder / "train").symlink_to("/nowhere/train")
    with pytest.raises(
        DataError, match=r"d/train leads to /nowhere/train, which is not there\. Mend the link or remov"
    ):
        list_images(DataRequest(path=folder))


def test_parts_that_are_given_one_by_one_are_parts(tmp_path: Path) -> None:
    """As a shell writes out ``data/*``."""
    folder = make_images(tmp_path / "d", ["red", "blue"], train=3, test=2)
    for given in ((folder / "test", folder / "train"), (folder / "*",)):
        found = list_images(DataRequest(path=given[0], more=given[1:]))
        assert (len(found.train), len(found.test)) == (6, 4)
        assert found.notes == ("Held out, as its name says: test.",)
    make_images(tmp_path / "more", ["green"], train=1, test=0)
    found = list_images(DataRequest(path=folder / "train", more=(tmp_path / "more",), held_out=0))
    assert (len(found.train), found.labels) == (7, ("blue", "green", "red"))


def test_tables_of_parts_that_are_given_one_by_one_are_parts(tmp_path: Path) -> None:
    for name, labels in (("train", "ab"), ("test", "a"), ("val", "b"), ("extra", "b")):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{name} {one},{one}\n" for one in labels))
    found = list_texts(DataRequest(path=tmp_path / "*.csv"))
    assert sorted(one.prompt for one in found.train) == ["extra b", "train a", "train b"]
    assert [one.prompt for one in found.test] == ["test a"]
    assert "Held out, as their names say: test.csv, val.csv." in found.notes
    assert "Scored on the test part; the validation part (1 examples) is unused." in found.notes
    (tmp_path / "test.csv").write_text("text,label\ntest a,\n")
    found = list_texts(DataRequest(path=tmp_path / "train.csv", more=(tmp_path / "test.csv",)))
    assert "The test part has no answers: its 1 examples were left out." in found.notes


def test_class_folders_that_are_given_one_by_one_are_refused(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=2, test=0) / "train"
    with pytest.raises(DataError, match=r"blue and red hold images and no class folders\. Give .*/d/train\.$"):
        list_images(DataRequest(path=folder / "*"))


def test_a_folder_of_one_class_is_said_to_be(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red"], train=4, test=0)
    assert "All images are of one class, 'red'." in list_images(DataRequest(path=folder)).notes
    assert "All images are of one class, 'red'." not in list_images(DataRequest(path=folder, classes=("red",))).notes
