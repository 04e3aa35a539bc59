"""What a folder's layout means: parts, classes, wrappers; what cannot be told is refused with what was seen."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from conftest import picture

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import ImageListing, list_images
from treelora_cli.data.names import label_key, part_of, says_no_class
from treelora_cli.errors import DataError


def build(root: Path, *files: str) -> Path:
    """Write a small image at every path; a path that ends in ``/`` is an empty folder."""
    for index, name in enumerate(files):
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        picture("red", index, size=4).save(path, format="PNG")
    return root


def listed(root: Path, **options: Any) -> ImageListing:
    return list_images(DataRequest(path=root, held_out=0, **options))


def seen(items: list[Any], root: Path) -> list[tuple[str, str]]:
    return sorted((item.label, str(Path(item.name).relative_to(root))) for item in items)


PARTS = {
    **dict.fromkeys(["train", "Train", "TRAINING", "training_set", "train2017", "trainset", "images_train"], "train"),
    **dict.fromkeys(["train-images", "trainSet", "train-00000-of-00002", "trn", "trainval"], "train"),
    **dict.fromkeys(["test", "Testing", "test_data", "test-set", "imgs.test", "testset", "test1", "tst"], "test"),
    **dict.fromkeys(["val", "valid", "VALIDATION", "val2017", "valset", "dev", "holdout", "held-out", "eval"], "val"),
}


@pytest.mark.parametrize("name", PARTS)
def test_names_of_parts_in_any_dress(name: str) -> None:
    assert part_of(name) == PARTS[name]


@pytest.mark.parametrize("name", ["train_masks", "test tube", "steam train", "trainer", "devil", "0", "cat", "latest"])
def test_other_names_are_no_parts(name: str) -> None:
    assert part_of(name) is None


def test_names_that_tell_no_class() -> None:
    assert all(says_no_class(name) for name in ("images", "data2", "unlabeled", "test1", "JPEGImages"))
    assert not any(says_no_class(name) for name in ("0", "lamp", "image of a cat"))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("training", "validation"),
        ("Train_Set", "dev"),
        ("train2017", "val2017"),
        ("trn", "holdout"),
        ("birds_train", "birds_test"),
        ("CUB train 2011", "CUB test 2011"),
        ("Training", "PrivateTest"),
        ("train", "minival"),
        ("trainA", "testA"),
    ],
)
def test_parts_of_classes(tmp_path: Path, train: str, test: str) -> None:
    root = build(tmp_path / "d", f"{train}/cat/1.png", f"{train}/dog/1.png", f"{test}/cat/2.png", f"{test}/dog/2.png")
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert seen(found.train, root) == [("cat", f"{train}/cat/1.png"), ("dog", f"{train}/dog/1.png")]
    assert seen(found.test, root) == [("cat", f"{test}/cat/2.png"), ("dog", f"{test}/dog/2.png")]


@pytest.mark.parametrize("unlabelled", ["test/1.png", "test/images/1.png", "test/test1/1.png", "test/unknown/1.png"])
def test_an_unlabelled_part_is_left_out_and_said(tmp_path: Path, unlabelled: str) -> None:
    root = build(tmp_path / "kaggle", "train/cat/1.png", "train/dog/1.png", unlabelled)
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert found.test == []
    assert found.notes == (f"{root / 'test'} has no class folders: its 1 images were left out.",)


@pytest.mark.parametrize("wrapper", ["", "dataset/", "dataset/images/", "archive/kaggle v2/"])
def test_the_dataset_may_lie_deeper(tmp_path: Path, wrapper: str) -> None:
    names = ("train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "test/dog/2.png")
    root = build(tmp_path / "d", *(wrapper + name for name in names))
    found = listed(root)
    assert seen(found.train, root) == [("cat", f"{wrapper}train/cat/1.png"), ("dog", f"{wrapper}train/dog/1.png")]
    assert seen(found.test, root) == [("cat", f"{wrapper}test/cat/2.png"), ("dog", f"{wrapper}test/dog/2.png")]
    assert len(found.notes) == wrapper.count("/")


def test_classes_may_lie_one_deeper_in_a_part(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "train/images/cat/1.png", "train/images/dog/1.png", "test/images/cat/2.png")
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert seen(found.test, root) == [("cat", "test/images/cat/2.png")]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("seg_pred/seg_pred/9.png", "seg_pred says that it has no labels"),
        ("pred/9.png", "pred says that it has no labels"),
        ("train_unlabeled/9.png", "train_unlabeled says that it has no labels"),
        ("ground_truth/cat/9.png", "ground_truth says that it has no labels"),
        ("to_be_guessed/9.png", "to_be_guessed has no class folders"),
    ],
)
def test_what_lies_beside_train_and_test_without_labels_is_left_out(tmp_path: Path, other: str, reason: str) -> None:
    names = ("seg_train", "seg_test") if other.startswith("seg") else ("train", "test")
    root = build(tmp_path / "d", *(f"{part}/{name}/1.png" for part in names for name in ("cat", "dog")), other)
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert (len(found.train), len(found.test)) == (2, 2)
    assert found.notes == (f"{tmp_path}/d/{reason}: its 1 images were left out.",)


def test_a_folder_that_is_surely_unlabelled_is_no_class_among_others(tmp_path: Path) -> None:
    found = listed(build(tmp_path / "imdb", "train/pos/1.png", "train/neg/1.png", "train/unsup/1.png"))
    assert found.labels == ("neg", "pos")
    assert found.notes == (f"{tmp_path}/imdb/train/unsup says that it has no labels: its 1 images were left out.",)
    assert listed(build(tmp_path / "d", "scratch/1.png", "none/1.png", "unknown/1.png")).labels == (
        *("none", "scratch", "unknown"),
    )


def test_files_and_masks_are_classes_where_they_are_named(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "photo/1.png", "text/1.png")
    with pytest.raises(DataError, match="photo/, text/, which name no classes"):
        listed(root)
    assert listed(root, classes=("photo", "text")).labels == ("photo", "text")
    assert listed(build(tmp_path / "e", "mask/1.png", "no mask/1.png")).labels == ("mask", "no mask")


def test_parts_inside_classes_may_lie_in_a_folder_that_says_nothing(tmp_path: Path) -> None:
    root = build(tmp_path / "d", *(f"{name}/images/{part}/1.png" for name in ("a", "b") for part in ("train", "test")))
    found = listed(root)
    assert seen(found.train, root) == [("a", "a/images/train/1.png"), ("b", "b/images/train/1.png")]
    assert seen(found.test, root) == [("a", "a/images/test/1.png"), ("b", "b/images/test/1.png")]


def test_parts_inside_classes(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "cat/train/1.png", "cat/test/2.png", "dog/train/1.png", "dog/val/3.png")
    root = build(root, "dog/test/4.png")
    found = listed(root)
    assert seen(found.train, root) == [("cat", "cat/train/1.png"), ("dog", "dog/train/1.png")]
    assert seen(found.test, root) == [("cat", "cat/test/2.png"), ("dog", "dog/test/4.png")]
    assert found.notes == ("Scored on the test part; the validation part (1 images) is unused.",)


@pytest.mark.parametrize("form", ["{part}_{name}", "{name} - {part}", "{part}.{name}"])
def test_parts_in_the_names_of_classes(tmp_path: Path, form: str) -> None:
    spelled = {
        (part, name): form.format(part=part, name=name) for part in ("train", "test") for name in ("red fox", "dog")
    }
    root = build(tmp_path / "d", *(f"{folder}/1.png" for folder in spelled.values()))
    found = listed(root)
    assert seen(found.train, root) == [(name, f"{spelled['train', name]}/1.png") for name in ("dog", "red fox")]
    assert seen(found.test, root) == [(name, f"{spelled['test', name]}/1.png") for name in ("dog", "red fox")]
    assert found.notes[0].endswith("the other folders likewise.")


def test_classes_with_names_of_parts_in_them(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "test tube/1.png", "train track/1.png")
    assert listed(root).labels == ("test tube", "train track")


def test_a_validation_part_beside_a_test_part_is_said_to_be_unused(tmp_path: Path) -> None:
    root = build(tmp_path / "d", *(f"{part}/{name}/1.png" for part in ("train", "val", "test") for name in ("a", "b")))
    found = listed(root)
    assert [Path(item.name).parts[-3] for item in found.test] == ["test", "test"]
    assert found.notes == ("Scored on the test part; the validation part (2 images) is unused.",)


def test_a_held_out_part_alone_is_learned(tmp_path: Path) -> None:
    found = listed(build(tmp_path / "d", "val/a/1.png", "val/b/1.png"))
    assert found.labels == ("a", "b")
    assert len(found.train) == 2


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    found = listed(build(tmp_path / "d", "bicycle/1.png", "bus/1.png", "train/1.png"))
    assert found.labels == ("bicycle", "bus", "train")


def test_a_class_called_train_with_folders_inside_is_not_taken_for_a_part(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "bicycle/1.png", "bus/1.png", "train/steam/1.png", "train/diesel/1.png")
    line = (
        r"d holds bicycle/ \(1\), bus/ \(1\), train/ \(diesel/, steam/\): is 'train' a part or a class\? Give .*train"
    )
    with pytest.raises(DataError, match=line):
        listed(root)
    found = listed(root, classes=("bicycle", "bus", "train"))
    assert found.labels == ("bicycle", "bus", "train")
    assert len(found.train) == 4


def test_unlabelled_folders_beside_parts_are_left_out(tmp_path: Path) -> None:
    root = build(tmp_path / "stl", "train/cat/1.png", "train/dog/1.png", "unlabeled/1.png", "unlabeled/2.png")
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert found.notes == (f"{root / 'unlabeled'} says that it has no labels: its 2 images were left out.",)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            ["train/1.png", "test/1.png"],
            r"images in test/ \(1\), train/ \(1\) but no class folders in them; there is no",
        ),
        (["images/1.png"], r"images in images/ only, which names no class; there is no label\."),
        (["train/images/1.png", "val/images/1.png"], r"no class folders in them; there is no label\."),
        (["1.png", "2.png"], r"holds no class folders\."),
        (["animals/cat/1.png", "animals/dog/1.png", "cars/vw/1.png"], r"two levels of folders could be classes\. Give"),
        (["bottle/train/good/1.png", "bottle/test/bad/1.png", "nut/train/good/1.png"], r"two levels of folders could"),
        (["train/cat/1.png", "train_masks/cat/1.png"], r"is 'train' a part or a class\?"),
        (["rps/cat/1.png", "rps-val/1.png"], r"is 'rps-val' a part or a class\? Give .*/rps, or name --classes"),
        (["test/cat/1.png", "val/cat/1.png"], r"held-out parts and no labelled training part\."),
        (
            ["train/1.png", "test/cat/1.png"],
            r"train has no class folders: there is no label to learn from\. .* give .*test",
        ),
        (["images/1.png", "masks/1.png"], r"images in images/, masks/, which name no classes\. .* with --classes\."),
        (["train/images/1.png", "train/labels/1.png"], r"images in images/, labels/, which name no classes\."),
        (["JPEGImages/1.png", "Annotations/1.png", "SegmentationClass/1.png"], r"which name no classes\."),
        (["trainA/1.png", "trainB/1.png", "testA/1.png"], r"no class folders in them; there is no label\."),
        (["train/cat/1.png", "test/cat/1.png", "extra/cat/1.png"], r"'extra' is no part that is known\. Give .*train"),
        (["cat/1.png", "cat/test/2.png", "dog/3.png"], r"only a part of .*cat is in folders of parts\. Name --classes"),
        (["cat/train/1.png", "cat/test/2.png", "dog/3.png"], r"only a part of .*cat is in folders of parts\."),
        (
            ["train/good/1.png", "test/good/2.png", "test/bad/3.png", "ground_truth/bad/1.png"],
            r"'bad' has no training im",
        ),
        (["train/cat/1.png", "test/cow/1.png", "test/cat/1.png"], r"held-out class 'cow' has no training images\."),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, files: list[str], line: str) -> None:
    with pytest.raises(DataError, match=line):
        listed(build(tmp_path / "d", *files))


def test_a_list_beside_images_in_no_class_folder_is_read(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "1.png")
    (root / "labels.csv").write_text("path,label\n1.png,cat\n")
    found = listed(root)
    assert seen(found.train, root) == [("cat", "1.png")]
    assert found.notes == (f"No folder of {root} names a class; its labels are in labels.csv.",)


def test_leftovers_of_tools_are_passed_over_and_counted(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "cat/1.png", "dog/1.png", "__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1.png")
    build(root, "@eaDir/1.png", "cat/._1.png", "fox/", "dog/deep/er/")
    for name in ("cat/Thumbs.db", "dog/.DS_Store", "desktop.ini"):
        (root / name).write_bytes(b"x")
    found = listed(root)
    assert seen(found.train, root) == [("cat", "cat/1.png"), ("dog", "dog/1.png")]
    assert found.notes == (
        "3 folders without images were passed over: dog/deep/er, dog/deep, fox.",
        "7 files and folders that tools left behind were passed over.",
    )


def test_images_are_told_by_content(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "a/1.PNG", "a/2", "a/3.dat", "b/4.jfif", "b/5.jpe", "b/6.JPEG")
    (root / "a" / "notes.txt").write_text("BMX is a sport")
    (root / "a" / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    found = listed(root)
    assert [name for _, name in seen(found.train, root)] == [
        "a/1.PNG",
        "a/2",
        "a/3.dat",
        "b/4.jfif",
        "b/5.jpe",
        "b/6.JPEG",
    ]
    assert found.notes == (f"2 files in {root} are not images and were left out (1 .mp4, 1 .txt).",)


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    build(tmp_path / "far", "1.png")
    root = build(tmp_path / "d", "dog/1.png")
    (root / "cat").symlink_to(tmp_path / "far", target_is_directory=True)
    (root / "dog" / "again").symlink_to(root, target_is_directory=True)
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert len(found.train) == 2


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["Cat", "cat"], "Cat"),
        ([unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")], "café"),
        (["cat", " cat "], "cat"),
        (["cat", "\ufeffcat"], "cat"),
        (["cat", "cat\u200b"], "cat"),
        (["big cat", "big\u00a0cat"], "big cat"),
        (["Straße", "STRASSE"], "STRASSE"),
    ],
)
def test_one_class_in_two_spellings_is_one(tmp_path: Path, names: list[str], label: str) -> None:
    root = build(tmp_path / "d", *(f"{name}/{index}.png" for index, name in enumerate(names)), "dog/9.png")
    found = listed(root)
    assert found.labels == tuple(sorted([label, "dog"]))
    assert sum(item.label == label for item in found.train) == 2


def test_the_case_of_letters_tells_handwriting_apart(tmp_path: Path) -> None:
    assert listed(build(tmp_path / "d", "a/1.png", "A/1.png")).labels == ("A", "a")
    assert label_key("A") != label_key("a")
    assert label_key("Ab") == label_key("aB")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "cat/1.png")
    strange = os.fsdecode(b"\xff\xfe")
    try:
        build(root, f"{strange}/1.png")
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    with pytest.raises(DataError, match=r"the class name '.udcff.udcfe' is no text \(UTF-8\)\. Rename it\."):
        listed(root)
    with pytest.raises(DataError, match=r"a path that is no text \(UTF-8\)\. Rename it\."):
        listed(root / strange)
    kept = build(tmp_path / "e", f"cat/{strange}.png", "dog/2.png")
    assert listed(kept).labels == ("cat", "dog")
    (tmp_path / "m.jsonl").write_text('{"path": "d/cat/1.png", "label": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"1\.png: the class name '.ud800' is no text"):
        listed(tmp_path / "m.jsonl")


def test_folders_that_wait_to_be_sorted_are_no_classes(tmp_path: Path) -> None:
    root = build(tmp_path, "cat/0.png", "dog/1.png", "unsorted/2.png", "to_label/3.png")
    found = listed(root)
    assert found.labels == ("cat", "dog")
    assert [note.split(": its")[0] for note in found.notes] == [
        f"{root / name} says that it has no labels" for name in ("to_label", "unsorted")
    ]
    inside = build(tmp_path / "more", "sorted/cat/0.png", "sorted/dog/1.png", "unsorted/2.png")
    assert listed(inside).labels == ("cat", "dog")


@pytest.mark.parametrize("copy", ["cat - Copy", "cat (1)", "cat copy", "cat - Copy (2)", "cat copy 2"])
def test_a_copy_of_a_class_folder_is_refused_unless_asked_for(tmp_path: Path, copy: str) -> None:
    root = build(tmp_path, "cat/0.png", f"{copy}/1.png", "dog/2.png")
    with pytest.raises(DataError, match=r"seems to be a copy of 'cat'\. Remove one of them, or name the classes with"):
        listed(root)
    assert listed(root, classes=("cat", copy)).labels == tuple(sorted(("cat", copy)))


def test_numbered_names_are_no_copies(tmp_path: Path) -> None:
    assert listed(build(tmp_path, "Apple Red 1/0.png", "Apple Red 2/1.png", "(1)/2.png")).labels == (
        "(1)",
        "Apple Red 1",
        "Apple Red 2",
    )


@pytest.mark.parametrize("places", [("", "masks/"), ("images/", "masks/"), ("JPEGImages/", "Annotations/")])
def test_masks_beside_the_pictures_of_a_class_are_left_out(tmp_path: Path, places: tuple[str, str]) -> None:
    root = build(tmp_path, *(f"{name}/{place}{name}.png" for name in ("cat", "dog") for place in places))
    found = listed(root)
    assert seen(found.train, root) == [(name, f"{name}/{places[0]}{name}.png") for name in ("cat", "dog")]
    assert f"{root}/cat/{places[1][:-1]} holds no pictures of the class: its 1 images were left out." in found.notes


def test_people_with_and_without_masks_are_classes(tmp_path: Path) -> None:
    assert listed(build(tmp_path, "mask/0.png", "no mask/1.png", "2.png")).labels == ("mask", "no mask")


def test_folders_inside_a_class_are_said(tmp_path: Path) -> None:
    found = listed(build(tmp_path, "cat/0.png", "dog/pug/1.png", "dog/corgi/2.png"))
    assert found.notes == (f"Images in folders of {tmp_path / 'dog'} (corgi/, pug/) are of its class.",)


@pytest.mark.parametrize("name", ["train-00000-of-00001-0a1b2c3d4e5f", "train-00000-of-00001", "train_0_of_3"])
def test_shards_with_a_hash_are_parts(name: str) -> None:
    assert part_of(name) == "train"


def test_a_held_out_class_that_nobody_learns_is_refused_with_what_to_do(tmp_path: Path) -> None:
    root = build(tmp_path, "train/good/0.png", "test/good/1.png", "test/broken/2.png")
    with pytest.raises(DataError, match=r"held-out class 'broken' has no training images\. Remove it, or name the cl"):
        listed(root)
    assert listed(root, classes=("good",)).labels == ("good",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.tfrecord-00000-of-00002", "a TFRecord of TensorFlow"),
        ("1.0.0/b.tfrecord", "a TFRecord"),
        ("x.h5", "HDF5"),
        ("cat/a.nii.gz", "a volume of"),
        ("cat/a.MP4", "a video"),
    ],
)
def test_data_of_other_tools_is_named(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0" * 16)
    for given in (tmp_path, path):
        with pytest.raises(DataError, match=rf"{path.name} is {kind}.*it is not read here\. Write images in folders"):
            listed(given)


@pytest.mark.parametrize(
    ("files", "line"),
    [
        (
            ["a/1.png", "b/1.png", "animals/a/2.png", "animals/b/2.png"],
            r"'a' is here and in .*animals, too\. Give that",
        ),
        (["Cat/1.png", "b/1.png", "set1/cat/2.png", "set1/c/2.png"], r"'cat' is here and in .*set1, too"),
        (["data/a/1.png", "data/b/1.png", "docs/1.png"], r"is 'data' a class, or what is in it\? Give .*data, or name"),
        (["amazon/images/a/1.png", "amazon/images/b/1.png", "dslr/images/a/1.png"], r"two levels of folders could be"),
    ],
)
def test_a_dataset_beside_classes_or_in_them_is_no_class(tmp_path: Path, files: list[str], line: str) -> None:
    root = build(tmp_path / "d", *files)
    with pytest.raises(DataError, match=line):
        listed(root)
    names = tuple(sorted({name.split("/")[0] for name in files}))
    assert listed(root, classes=names).labels == names


@pytest.mark.parametrize(
    "names",
    [
        ("HAM10000_images_part_1", "HAM10000_images_part_2"),
        ("fold_1", "fold_2"),
        ("batch1", "batch2"),
        ("2024-05-01", "2024-05-02"),
        ("20240501", "20240502"),
        ("100CANON", "101CANON"),
    ],
)
def test_names_that_say_only_where_files_lie_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    root = build(tmp_path / "d", *(f"{name}/1.png" for name in names))
    with pytest.raises(DataError, match=r"which name no classes\. If they do, name them with --classes\."):
        listed(root)
    assert listed(root, classes=names).labels == names


def test_names_that_share_a_word_may_be_classes(tmp_path: Path) -> None:
    for index, names in enumerate([("Type_1", "Type_2"), ("cat images", "dog images"), ("2019", "2020"), ("0", "1")]):
        assert listed(build(tmp_path / str(index), *(f"{name}/1.png" for name in names))).labels == names


@pytest.mark.parametrize("form", ["train_augmented", "train-resized", "train_labeled", "train+val", "train_and_val"])
def test_a_state_beside_the_name_of_a_part(tmp_path: Path, form: str) -> None:
    root = build(tmp_path / "d", f"{form}/cat/1.png", "test/cat/2.png", "train_unlabeled/3.png")
    assert seen(listed(root).train, root) == [("cat", f"{form}/cat/1.png")]


def test_a_part_that_holds_itself_is_unlabelled(tmp_path: Path) -> None:
    root = build(
        tmp_path / "d", "abc_train/abc_train/A/1.png", "abc_train/abc_train/B/2.png", "abc_test/abc_test/A.png"
    )
    found = listed(root)
    assert (found.labels, found.test) == (("A", "B"), [])
    assert found.notes == (f"{root / 'abc_test'} has no class folders: its 1 images were left out.",)


def test_folders_that_programs_make_beside_classes_are_left_out(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "cat/1.png", "cat/thumbs/1.png", "dog/2.png", "thumbnails/1.png", "checkpoints/3.png")
    found = listed(root)
    assert seen(found.train, root) == [("cat", "cat/1.png"), ("dog", "dog/2.png")]
    assert f"{root / 'thumbnails'} is no class by its name: its 1 images were left out." in found.notes


def test_one_folder_beside_a_table_is_a_class_only_where_it_is_named(tmp_path: Path) -> None:
    root = build(tmp_path / "faces", "img_aligned/1.png", "img_aligned/2.png")
    (root / "attributes.csv").write_text("image_id,Smiling\n1.png,1\n2.png,-1\n")
    with pytest.raises(
        DataError, match=r"all images are in img_aligned/, .*: --classes img_aligned; if the table names"
    ):
        listed(root)
    assert listed(root, classes=("img_aligned",)).labels == ("img_aligned",)


def test_an_example_of_what_a_contest_wants_is_no_table_of_labels(tmp_path: Path) -> None:
    root = build(tmp_path / "d", "train/cat.1.png", "test1/1.png")
    (root / "sampleSubmission.csv").write_text("id,label\n1,0\n")
    with pytest.raises(DataError, match=r"no class folders in them; there is no label\. Put them into folders CLASS"):
        listed(root)


def test_a_held_out_part_that_lacks_classes_is_said(tmp_path: Path) -> None:
    found = listed(build(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png"))
    assert found.notes == ("The held-out part has no images of 1 of 2 classes, which no score tells of: dog.",)


def test_signs_that_nobody_sees_tell_no_classes_apart() -> None:
    assert label_key("\u202ecat\u202c") == label_key("cat") == label_key("\u2066cat\u2069")
    assert label_key("\u2764\ufe0f") == label_key("\u2764")
