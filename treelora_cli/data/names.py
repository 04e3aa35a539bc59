"""Names that people give to parts of a dataset, to folders that mean nothing, and to classes."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Mapping

TRAIN, TEST, VAL = "train", "test", "val"
"""Parts of a dataset: ``val`` is held out where there is no ``test``."""

_PARTS = {
    **dict.fromkeys(("train", "training", "trn"), TRAIN),
    **dict.fromkeys(("test", "testing", "tst"), TEST),
    **dict.fromkeys(("val", "valid", "validation", "validate", "eval", "evaluation", "dev", "holdout", "heldout"), VAL),
    "minival": VAL,
    "trainval": TRAIN,
}
_FILLERS = {
    *("image", "images", "img", "imgs", "jpeg", "jpg", "png", "jpegimages", "picture", "pictures", "photo", "photos"),
    *("frame", "frames", "file", "files", "data", "dataset", "set", "split", "part", "folder", "dir", "sample"),
    *("samples", "all", "of", "v", "class", "classes", "text", "texts", "public", "private"),
    *("batch", "batches", "fold", "folds", "shard", "shards", "chunk", "chunks"),
}
_UNLABELLED = {
    *("unlabeled", "unlabelled", "unlabel", "unsup", "unsupervised", "nolabel", "nolabels"),
    *("unsorted", "untagged", "unannotated", "tolabel"),
}
_COPY = re.compile(r"\s*(-\s*copy(\s*\(\d+\))?|\s+copy(\s+\d+)?|\(\d+\))$", re.IGNORECASE)
"""What file managers write behind the name of a copy."""
_ASKED_FOR = {"pred", "preds", "predict", "prediction", "predictions", "inference", "submission", "submissions"}
_NO_CLASS = {*_UNLABELLED, *_ASKED_FOR, "unknown", "none"}
_ABOUT_PICTURES = {
    *("mask", "masks", "label", "labels", "annotation", "annotations", "anno", "annos", "segmentation", "trimap"),
    *("trimaps", "segmentations", "segmentationclass", "segmentationobject", "bbox", "bboxes", "box", "boxes", "xml"),
    *("xmls", "gt", "groundtruth", "depth", "depths", "keypoints", "edges", "imagesets"),
    *("thumbnail", "thumbnails", "thumbs"),
}
_LEFTOVERS = {"thumbnail", "thumbnails", "thumbs", "checkpoint", "checkpoints", "tmp", "temp", "backup", "backups"}
"""Folders that programs make beside classes, and nobody calls a class so."""
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Spaces of no width, marks of byte order and direction; joiners are parts of letters and emoji."""
_VARIANTS = re.compile("[\ufe0e\ufe0f]")
"""Behind a sign that can be drawn as a letter or as a picture."""
_DAY = re.compile(r"(19|20)\d\d[-_.]?[01]\d[-_.]?[0-3]\d")
_CAMERAS = re.compile(r"[1-9]\d\d[A-Z_]{5}")
"""What cameras call their folders: ``100CANON``, ``101APPLE``."""
_SHARD = re.compile(r"[-_.]\d+[-_]of[-_]\d+([-_.][0-9a-f]+)?$", re.IGNORECASE)
"""``-00000-of-00002``, and the hash that may follow."""
_FORMS = {
    *("mini", "tiny", "small", "medium", "large", "big", "full", "lite", "subset"),
    *("aug", "augmented", "resized", "cropped", "clean", "cleaned", "balanced", "processed", "preprocessed"),
    *("original", "orig", "new", "final", "labeled", "labelled"),
}
"""What a part is called beside its name where a dataset comes in several sizes or states."""
_AND = {"and", "plus", "n"}
_BETWEEN = "-_. "
_SIGNS = re.compile(f"[{_BETWEEN}]+")
_GLUED = ("dataset", "images", "image", "imgs", "data", "set", "split")


def _words(name: str) -> list[str]:
    """Split a name at signs, digits and humps: ``trainSet2017`` is ``train``, ``set``."""
    humps = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", _SHARD.sub("", name)))
    words = re.findall(r"[^\W\d_]+", humps.lower())
    glued = "".join(words)
    return [glued] if glued in ("heldout", "groundtruth", "tolabel") or glued in _ABOUT_PICTURES else words


def parts_among(names: Iterable[str]) -> dict[str, str | None]:
    """Return the part each of these neighbours' names means; words that all of them share say nothing.

    ``birds_train`` and ``birds_test`` are parts, and so is ``train_mini`` where no other training part is beside it.
    """
    listed = list(names)
    shared = shared_words(listed)
    meant = {name: part_of(name, shared) for name in listed}
    sized = {name: part_of(name, shared | _FORMS) for name in listed if meant[name] is None}
    once = Counter(part for part in sized.values() if part is not None and part not in meant.values())
    return {**meant, **{name: part for name, part in sized.items() if part is not None and once[part] == 1}}


def shared_words(names: Iterable[str]) -> set[str]:
    """Return the words that all of several neighbours' names have; names of parts say something nevertheless."""
    words = [set(_words(name)) for name in names]
    return set.intersection(*words) - set(_PARTS) if len(words) > 1 else set()


def part_of(name: str, beside: Container[str] = ()) -> str | None:
    """Return the part a folder's, file's or split's name means, whatever it is dressed in; ``None`` for others.

    ``train``, ``Training_Set``, ``val2017``, ``images-test``, ``train-00000-of-00002`` and ``testset`` are parts,
    ``train_masks`` and ``test tube`` are not. Words in ``beside`` are dress, too.
    """
    words = [word for word in _words(name) if word not in _FILLERS and word not in beside]
    words = [word for word in words if len(word) > 1] or words  # testA, train_x
    meant = [_PARTS.get(_unglued(word)) for word in words if word not in _AND]
    if sorted(map(str, meant)) == [TRAIN, VAL]:
        return TRAIN
    return meant[0] if len(meant) == 1 else None


def parts_and_classes(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return part and class by name where all names are of both, as ``train_cat`` and ``test_cat``; else nothing."""
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        first, last = _SIGNS.split(name)[0], _SIGNS.split(name)[-1]
        if first == last:
            return {}
        if (part := part_of(first)) is not None:
            found[name] = part, name.removeprefix(first).lstrip(_BETWEEN)
        elif (part := part_of(last)) is not None:
            found[name] = part, name.removesuffix(last).rstrip(_BETWEEN)
        else:
            return {}
    learned = {label for part, label in found.values() if part == TRAIN}
    held_out = {label for part, label in found.values() if part != TRAIN}
    return found if held_out and held_out <= learned else {}


def _unglued(word: str) -> str:
    for ending in _GLUED:
        if word.endswith(ending) and word.removesuffix(ending) in _PARTS:
            return word.removesuffix(ending)
    return word


def says_no_class(name: str) -> bool:
    """Return whether a folder's name tells of no class: ``images``, ``data2``, ``unlabeled``, ``test1``."""
    return says_files(name) or says_unlabelled(name) or part_of(name) is not None


def says_files(name: str) -> bool:
    """Return whether a name says only that there are files: ``images``, ``JPEGImages``, ``data2``."""
    words = _words(name)
    return bool(words) and all(word in _FILLERS for word in words)


def say_files(names: Iterable[str]) -> bool:
    """Return whether neighbours' names say only where files lie, whatever words they share.

    ``ham_images_part_1`` and ``ham_images_part_2`` do, so do days and the folders of a camera; ``type_1`` and
    ``type_2`` do not.
    """
    listed = list(names)
    shared = shared_words(listed) - _FILLERS
    left = [[word for word in _words(name) if word not in shared] for name in listed]
    if all(words and set(words) <= _FILLERS - {"class", "classes"} for words in left):
        return True
    return len(listed) > 1 and any(all(map(form.fullmatch, listed)) for form in (_DAY, _CAMERAS))


def says_leftover(name: str) -> bool:
    """Return whether a folder is one that programs make beside classes: ``thumbnails``, ``checkpoints``."""
    words = [word for word in _words(name) if word not in _FILLERS]
    return len(words) == 1 and words[0] in _LEFTOVERS


def says_about_pictures(name: str) -> bool:
    """Return whether a name is that of what belongs to pictures: ``masks``, ``Annotations``, ``ground_truth``."""
    words = [word for word in _words(name) if word not in _FILLERS]
    return bool(words) and all(word in _ABOUT_PICTURES for word in words)


def says_unlabelled(name: str, beside: Container[str] = ()) -> bool:
    """Return whether a name says that there are no labels: ``unlabeled``, ``train_unlabeled``, ``seg_pred``."""
    words = [word for word in _words(name) if word not in _FILLERS and word not in beside and word not in _PARTS]
    return bool(words) and all(word in _NO_CLASS for word in words)


def surely_unlabelled(name: str) -> bool:
    """Return whether no class can be called so: ``unsup``; ``none`` and ``unknown`` are classes of some."""
    words = [word for word in _words(name) if word not in _FILLERS]
    return len(words) == 1 and words[0] in _UNLABELLED


def copied_from(name: str) -> str | None:
    """Return the name that ``cat - Copy``, ``cat (1)`` or ``cat copy 2`` is a copy of; ``None`` for others."""
    found = _COPY.search(name)
    return name[: found.start()] if found and found.start() else None


def is_text(name: str) -> bool:
    """Return whether a name can be written as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_key(name: str) -> str:
    """Return that by which two class names are the same: Unicode form, case and outer spaces do not count.

    The case of a single letter counts: ``A`` and ``a`` are classes of handwriting.
    """
    plain = " ".join(unicodedata.normalize("NFC", _VARIANTS.sub("", _INVISIBLE.sub("", name))).split())
    return plain if len(plain) == 1 else unicodedata.normalize("NFC", plain.casefold())


def one_spelling(names: Iterable[str]) -> Mapping[str, str]:
    """Return the spelling to use for each name: the first in sorted order of those that are the same class."""
    chosen: dict[str, str] = {}
    return {name: chosen.setdefault(label_key(name), tidy_label(name)) for name in sorted(set(names))}


def tidy_label(name: str) -> str:
    """Return a class name in composed Unicode form without outer spaces and signs that nobody sees."""
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", name)).strip()
