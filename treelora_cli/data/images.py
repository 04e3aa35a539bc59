"""Image tasks: folders, manifests and parquet, as lists of labelled images not yet decoded."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from treelora_cli.backend.values import Change, DataRequest
from treelora_cli.data.held_out import (
    OTHER_DATA,
    content_hash,
    find_recorded,
    set_aside,
    set_aside_by_position,
)
from treelora_cli.data.inputs import PICTURES
from treelora_cli.data.labels import are_numbers, label_texts, named, read_label_names
from treelora_cli.data.layout import Passed, read_layout, scan
from treelora_cli.data.names import label_key, one_spelling
from treelora_cli.data.paths import existing, named_file, paths_of
from treelora_cli.data.pixels import is_image
from treelora_cli.data.tables import Row, divide_rows, is_table, read_table, table_suffix
from treelora_cli.errors import DataError

_LABELS = ("label", "class", "category", "target", "labels", "class_name")
_TEXT_SUFFIXES = {".txt", ".md"}
_WRONG_KIND = "This project's backend is vit: give an image folder CLASS/*.png or a CSV with path,label."


@dataclass(frozen=True)
class ImageItem:
    """One labelled image.

    Attributes:
        name: For messages.
        label: Class name.
        read: Returns the encoded bytes.
        numbered: The label is a number in a table, without a name.
    """

    name: str
    label: str
    read: Callable[[], bytes]
    numbered: bool = False


Parts = tuple[list[ImageItem], list[ImageItem]]
"""Training and held-out images."""


@dataclass(frozen=True)
class ImageListing:
    """A task's images before decoding.

    Attributes:
        labels: Class names, sorted.
        train: Training images.
        test: Held-out images.
        notes: Lines for the user.
        change: What differs from the recorded held-out images, if anything.
        numbered: The labels are numbers in a table's own order.
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
    train, test = _read_all(paths_of(request), request, notes)
    if request.val is not None:
        outer, inner = _read_all([existing(request.val)], request, notes)
        test = inner or outer
    train, test = _in_one_spelling(train, test)
    train, test = _choose_classes(train, request), _choose_classes(test, request)
    labels = tuple(sorted({item.label for item in train}))
    _check_classes(request.path, labels, test, request)
    if request.recorded is not None and request.recorded.held_out is not None:
        test, change = find_recorded(test, train, request.recorded.held_out, hash_of_image)
        test = _limit(test, request.recorded.limit, request.seed)
        return ImageListing(labels, train, test, tuple(notes), change)
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
    test: list[ImageItem] = []
    for path in paths:
        more = _read(path, request, notes)
        train += more[0]
        test += more[1]
    return train, test


def _read(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    if path.is_dir():
        return _read_folder(path, request, notes)
    if table_suffix(path) in _TEXT_SUFFIXES or is_image(path):
        raise DataError(f"{path.name}: {_WRONG_KIND}")
    if request.data_format is None and not is_table(path):
        raise DataError(f"{path.name}: {_WRONG_KIND}")
    return _read_manifest(path, request, notes)


def _read_folder(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    passed = Passed()
    folder = scan(path, is_image, passed)
    if not folder.inner:
        tables = sorted(entry.name for entry in path.iterdir() if entry.is_file() and is_table(entry))
        table = f" Is {path / tables[0]} the list of them?" if tables else ""
        raise DataError(f"{path} holds no class folders. {_WRONG_KIND}{table}")
    layout = read_layout(folder, request.classes, passed, "images")
    notes += passed.lines(path, "images")
    prefix = request.label_prefix or ""
    train, test = (
        [ImageItem(str(file), prefix + label, file.read_bytes) for label, file in part]
        for part in (layout.train, layout.test)
    )
    return train, test


def _read_manifest(path: Path, request: DataRequest, notes: list[str]) -> Parts:
    rows = read_table(path, request.data_format, request.columns, notes)
    found = list(rows[0].values)
    picture = next((name for name in PICTURES if name in found), None)
    label = next((name for name in _LABELS if name in found), None)
    if picture is None or label is None:
        raise DataError(
            f"Found {', '.join(map(str, found))}. {_WRONG_KIND} "
            "Or name the columns: --map SOURCE=path --map SOURCE=label"
        )
    train_rows, test_rows = divide_rows(rows, notes, "images")
    names = _label_names(path, request)
    train, test = (
        list(_manifest_items(part, picture, label, path.parent, names, request, notes))
        for part in (train_rows, test_rows)
    )
    return train, test


def _label_names(path: Path, request: DataRequest) -> tuple[Path, tuple[str, ...]] | None:
    source = path.parent / "labels.json" if request.label_names is None else existing(request.label_names)
    if request.label_names is None and not source.is_file():
        return None
    return source, read_label_names(source)


def _manifest_items(
    rows: Sequence[Row],
    picture: str,
    column: str,
    folder: Path,
    names: tuple[Path, tuple[str, ...]] | None,
    request: DataRequest,
    notes: list[str],
) -> Iterator[ImageItem]:
    labels = label_texts(rows, column)
    if names is not None:
        labels = named(labels, rows, names[1], names[0])
    bad: list[str] = []
    for row, label in zip(rows, labels, strict=True):
        try:
            if label is None:
                raise DataError(f"{row.where}: empty label. Mend it, or pass --skip-bad.")
            yield _manifest_item(row, picture, (request.label_prefix or "") + label, folder, names is None)
        except DataError as error:
            if not request.skip_bad:
                raise
            bad.append(str(error))
    if bad:
        notes.append(f"{len(bad)} bad rows were skipped, such as {bad[0]}")


def _manifest_item(row: Row, picture: str, label: str, folder: Path, numbered: bool) -> ImageItem:
    value = row.values.get(picture)
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        content = value
        return ImageItem(row.where, label, lambda: content, numbered)
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row.where}: '{picture}' is neither a path nor image bytes.")
    file = named_file(folder, value, row.where)
    return ImageItem(str(file), label, file.read_bytes, numbered)


def _in_one_spelling(train: list[ImageItem], test: list[ImageItem]) -> Parts:
    """Give class names that are the same, see ``label_key``, one spelling."""
    spelling = one_spelling(item.label for item in [*train, *test])
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
        raise DataError(f"{request.val or path}: held-out class '{strange[0]}' has no training images.")


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
