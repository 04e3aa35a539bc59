"""Image tasks: folders, manifests and parquet, as lists of labelled images not yet decoded."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from treelora_cli.backend.values import Change, DataRequest
from treelora_cli.data.beside import read_beside, refuse_unclear
from treelora_cli.data.files import refuse_archive, refuse_archives_in
from treelora_cli.data.folders import Passed, scan
from treelora_cli.data.held_out import (
    OTHER_DATA,
    content_hash,
    find_recorded,
    set_aside,
    set_aside_by_position,
)
from treelora_cli.data.label_files import label_names, named, names_beside
from treelora_cli.data.labels import are_numbers
from treelora_cli.data.layout import Labelled, NoLabelError, read_layout, val_unused
from treelora_cli.data.manifests import WRONG_KIND, ImageItem, Parts, read_manifest, read_manifests
from treelora_cli.data.names import TEST, VAL, is_text, label_key, one_spelling, tidy_label
from treelora_cli.data.paths import existing, once, parts_given, paths_of
from treelora_cli.data.pixels import is_image
from treelora_cli.data.table_folders import tables_in
from treelora_cli.data.tables import TABLE_SUFFIXES, Row, is_table, table_suffix
from treelora_cli.errors import DataError

_TEXT_SUFFIXES = {".txt", ".md"}
_SHOWN = 4


@dataclass(frozen=True)
class ImageListing:
    """A task's images before decoding.

    Attributes:
        labels: Class names, sorted.
        train: Training images.
        test: Held-out images.
        notes: Lines for the user.
        change: What differs from the recorded held-out images, if anything.
        numbered: The labels are numbers in a table's or folder's own order.
    """

    labels: tuple[str, ...]
    train: list[ImageItem]
    test: list[ImageItem]
    notes: tuple[str, ...]
    change: Change | None = None
    numbered: bool = False


def list_images(request: DataRequest) -> ImageListing:
    """Find a task's images and classes.

    Raises:
        DataError: Missing data, no class, a layout or a label that cannot be told, or data of another kind.
    """
    notes: list[str] = []
    train, test = _read_all(once(paths_of(request), notes), request, notes)
    if request.val is not None:
        outer, inner = _read_all([existing(request.val)], request, notes)
        test = inner or outer
    _check_names(train + test)
    train, test = _in_one_spelling(train, test, notes)
    train, test = _choose_classes(train, request), _choose_classes(test, request)
    labels = tuple(sorted({item.label for item in train}))
    _check_classes(request.path, labels, test, request)
    if request.recorded is not None and request.recorded.held_out is not None:
        drawn = None if request.test_limit is None else _limit(test, request.test_limit, request.seed)
        test, change = find_recorded(test, train, request.recorded.held_out, hash_of_image, drawn)
        test = _limit(test, request.recorded.limit, request.seed)
        return ImageListing(labels, train, test, tuple(notes), change)
    notes += _unscored(labels, test)
    if not test and request.held_out > 0:
        train, test = _split(train, request)
        notes.append(f"No held-out data given: {len(test)} of {len(train) + len(test)} images kept for scoring.")
    numbered = request.label_prefix is None and any(item.numbered for item in train) and are_numbers(labels)
    train = _limit(train, request.train_limit, request.seed)
    test = _limit(test, request.test_limit, request.seed)
    if request.recorded is None:
        return ImageListing(labels, train, test, tuple(notes), numbered=numbered)
    same = request.skip_bad or digest_of([*train, *test]) == request.recorded.digest
    test = _limit(test, request.recorded.limit, request.seed)
    return ImageListing(labels, train, test, tuple(notes), None if same else OTHER_DATA)


def _check_names(items: Sequence[ImageItem]) -> None:
    """Raise ``DataError`` for a class name that is no text: bytes of a folder's name, or half a surrogate pair."""
    kept: set[str] = set()
    for item in items:
        if item.label not in kept and not is_text(item.label):
            raise DataError(f"{item.name}: the class name {item.label!a} is no text (UTF-8). Rename it.")
        kept.add(item.label)


def hash_of_image(item: ImageItem) -> str:
    """Return the hash of an image's label and file, by which a held-out one is known again."""
    try:
        return content_hash(item.label, item.read())
    except OSError:
        return content_hash(item.name)  # whoever decodes it says what is wrong


def digest_of(items: Sequence[ImageItem]) -> str:
    """Return SHA-256 over labels and files in order, hex."""
    digest = hashlib.sha256()
    for item in items:
        try:
            digest.update(item.label.encode() + b"\0" + hashlib.sha256(item.read()).digest())
        except OSError as error:
            raise DataError(f"{item.name} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def _read_all(paths: Sequence[Path], request: DataRequest, notes: list[str]) -> Parts:
    train: list[ImageItem] = []
    found: dict[str, list[ImageItem]] = {TEST: [], VAL: []}
    _refuse_classes_given(paths)
    held_out = parts_given(paths, notes)
    for path in paths:
        more = _read(path, request, notes)
        if path in held_out:
            found[held_out[path]] += [*more[0], *more[1]]
        else:
            train += more[0]
            found[TEST] += more[1]
    if found[TEST] and found[VAL]:
        notes.append(val_unused(len(found[VAL]), "images"))
    return train, found[TEST] or found[VAL]


def _refuse_classes_given(paths: Sequence[Path]) -> None:
    """Raise ``DataError`` where all of several paths are folders of images beside one another, as of ``animals/*``."""
    above = {path.parent for path in paths}
    if len(paths) > 1 and len(above) == 1 and all(path.is_dir() for path in paths):
        found = (scan(path, is_image, Passed()) for path in paths)  # no further than the first with folders
        if all(folder.files and not folder.inner for folder in found):
            raise DataError(f"{paths[0]} and {paths[1].name} hold images and no class folders. Give {above.pop()}.")


def _read(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    if path.is_dir():
        return _read_folder(path, request, notes)
    refuse_archive(path)
    if (table_suffix(path) in _TEXT_SUFFIXES and request.data_format is None) or is_image(path):
        raise DataError(f"{path.name}: {WRONG_KIND}")
    if request.data_format is None and not is_table(path):
        raise DataError(f"{path.name}: {WRONG_KIND}")
    return read_manifest(path, request, notes)


def _read_folder(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    """Read class folders or, where no folder names a class, the tables that name them."""
    passed = Passed()
    folder = scan(path, is_image, passed)
    try:
        if not folder.inner:
            raise NoLabelError(f"{path} holds no class folders. {WRONG_KIND}")
        layout = read_layout(folder, request.classes, passed, "images")
    except NoLabelError:
        beside = read_beside(folder, request, notes)
        if beside is not None:
            return beside
        tables = tables_in(path, notes)
        if tables is None:
            refuse_unclear(folder)
            refuse_archives_in(path)
            raise
        listed = ", ".join(file.name for file in [*tables.train, *tables.test, *tables.val][:_SHOWN])
        notes.append(f"No folder of {path} names a class; its labels are in {listed}.")
        return read_manifests(tables, request, notes)
    _refuse_doubtful_class(path, layout.train, passed, request)
    notes += passed.lines(path, "images")
    if len(names := {label for label, _ in layout.train}) == 1 and request.classes is None:
        notes.append(f"All images are of one class, '{names.pop()}'.")
    given = (("--map", request.columns), ("--format", request.data_format))
    notes += [f"{flag} is not used: {path.name} is a folder of classes and no table." for flag, one in given if one]
    if request.label_names is None:
        notes += names_beside(sorted({label for label, _ in layout.train}), path)
    train, test = (_items(part, request, path) for part in (layout.train, layout.test))
    return train, test


def _refuse_doubtful_class(path: Path, train: Sequence[Labelled], passed: Passed, request: DataRequest) -> None:
    """Raise ``DataError`` where one folder holds all images, and tables beside it may tell their classes."""
    names = {label for label, _ in train}
    tables = [ending for ending in passed.others if ending in TABLE_SUFFIXES and ending != ".json"]
    if len(names) == 1 and tables and request.classes is None:
        name = names.pop()
        raise DataError(
            f"{path}: all images are in {name}/, and there is a table ({tables[0]}) beside them. If the folder names"
            f" their class: --classes {quote(name)}; if the table names classes, give the table."
        )


def _items(part: Sequence[Labelled], request: DataRequest, path: Path) -> list[ImageItem]:
    """Return the images of class folders; those called by numbers are named where a file says what they mean.

    Raises:
        DataError: That file does not say it of one.
    """
    labels: Sequence[str | None] = [label for label, _ in part]
    if request.label_names is not None and (found := label_names(request.label_names, path)) is not None:
        labels = named(labels, [Row({}, str(file)) for _, file in part], found[1], found[0])
    prefix = request.label_prefix or ""
    return [
        ImageItem(str(file), prefix + str(label), file.read_bytes, numbered=request.label_names is None)
        for label, (_, file) in zip(labels, part, strict=True)
    ]


def _in_one_spelling(train: list[ImageItem], test: list[ImageItem], notes: list[str]) -> Parts:
    """Give class names that are the same, see ``label_key``, one spelling, and say so."""
    spelling = one_spelling(item.label for item in [*train, *test])
    if other := sorted(name for name, kept in spelling.items() if tidy_label(name) != kept):
        told = ", ".join(f"'{name}' as '{spelling[name]}'" for name in other[:_SHOWN])
        notes.append(f"Class names that differ only in case or Unicode form are one class: {told}.")
    changed, kept = (
        [item if spelling[item.label] == item.label else replace(item, label=spelling[item.label]) for item in part]
        for part in (train, test)
    )
    return changed, kept


def _choose_classes(items: list[ImageItem], request: DataRequest) -> list[ImageItem]:
    if request.classes is None:
        return items
    wanted = {label_key((request.label_prefix or "") + name): name for name in request.classes}
    chosen = [item for item in items if label_key(item.label) in wanted]
    missing = sorted(set(wanted) - {label_key(item.label) for item in chosen})
    if items and missing:
        raise DataError(f"{request.path}: no class '{wanted[missing[0]]}' there.")
    return chosen


def _check_classes(path: Path, labels: Sequence[str], test: Sequence[ImageItem], request: DataRequest) -> None:
    if not labels:
        raise DataError(f"{path} has no images for training.")
    strange = sorted({item.label for item in test} - set(labels))
    if strange:
        raise DataError(
            f"{request.val or path}: held-out class '{strange[0]}' has no training images. Remove it, or name"
            " the classes to learn with --classes."
        )


def _unscored(labels: Sequence[str], test: Sequence[ImageItem]) -> list[str]:
    """Return a line on the classes that a held-out part has no images of."""
    lacking = sorted(set(labels) - {item.label for item in test})
    if not test or not lacking:
        return []
    named = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
    return [
        f"The held-out part has no images of {len(lacking)} of {len(labels)} classes, which no score tells of: {named}."
    ]


def _split(items: Sequence[ImageItem], request: DataRequest) -> tuple[list[ImageItem], list[ImageItem]]:
    """Set aside ``request.held_out`` of each class that has at least two images."""
    train: list[ImageItem] = []
    test: list[ImageItem] = []
    for label, members in _by_label(items).items():
        if request.split == "position":
            kept, aside = set_aside_by_position(members, request.held_out, f"{request.seed}/{label}")
        else:
            kept, aside = set_aside(members, request.held_out, str(request.seed), hash_of_image)
        train += kept
        test += aside
    return train, test


def _limit(items: list[ImageItem], limit: int | None, seed: int) -> list[ImageItem]:
    if limit is None:
        return items
    kept: list[ImageItem] = []
    for label, members in _by_label(items).items():
        order = list(members)
        random.Random(f"limit/{seed}/{label}").shuffle(order)
        kept += order[:limit]
    return kept


def _by_label(items: Sequence[ImageItem]) -> Mapping[str, list[ImageItem]]:
    groups: dict[str, list[ImageItem]] = defaultdict(list)
    for item in items:
        groups[item.label].append(item)
    return dict(sorted(groups.items()))
