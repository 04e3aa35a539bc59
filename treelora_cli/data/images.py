"""Image tasks: folders, manifests and parquet, as lists of labelled images not yet decoded."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.backend.contract import Change, DataRequest
from treelora_cli.data.held_out import (
    OTHER_DATA,
    content_hash,
    find_recorded,
    set_aside,
    set_aside_by_position,
)
from treelora_cli.data.paths import existing
from treelora_cli.data.tables import TABLE_SUFFIXES, Row, read_table
from treelora_cli.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_TRAIN, _TEST = ("train", "training"), ("test", "val", "valid", "validation", "eval")
_TEXT_SUFFIXES = {".txt", ".md"}
_WRONG_KIND = "This project's backend is vit: give an image folder CLASS/*.png or a CSV with path,label."


@dataclass(frozen=True)
class ImageItem:
    """One labelled image.

    Attributes:
        name: For messages.
        label: Class name.
        read: Returns the encoded bytes.
    """

    name: str
    label: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ImageListing:
    """A task's images before decoding.

    Attributes:
        labels: Class names, sorted.
        train: Training images.
        test: Held-out images.
        notes: Lines for the user.
        change: What differs from the recorded held-out images, if anything.
    """

    labels: tuple[str, ...]
    train: list[ImageItem]
    test: list[ImageItem]
    notes: tuple[str, ...]
    change: Change | None = None


def list_images(request: DataRequest) -> ImageListing:
    """Find a task's images and classes.

    Raises:
        DataError: Missing data, an empty class folder, fewer than two classes, or data of another kind.
    """
    path = existing(request.path)
    notes: list[str] = []
    train, test = _read(path, request, notes)
    if request.val is not None:
        outer, inner = _read(existing(request.val), request, notes)
        test = inner or outer
    train, test = _choose_classes(train, request), _choose_classes(test, request)
    labels = tuple(sorted({item.label for item in train}))
    _check_classes(path, labels, test, request)
    if request.recorded is not None and request.recorded.held_out is not None:
        test, change = find_recorded(test, train, request.recorded.held_out, hash_of_image)
        test = _limit(test, request.recorded.limit, request.seed)
        return ImageListing(labels, train, test, tuple(notes), change)
    if not test and request.held_out > 0:
        train, test = _split(train, request)
        notes.append(f"No held-out data given: {len(test)} of {len(train) + len(test)} images kept for scoring.")
    train = _limit(train, request.train_limit, request.seed)
    test = _limit(test, request.test_limit, request.seed)
    if request.recorded is None:
        return ImageListing(labels, train, test, tuple(notes))
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


def _read(path: Path, request: DataRequest, notes: list[str]) -> tuple[list[ImageItem], list[ImageItem]]:
    if path.is_dir():
        return _read_folder(path, request, notes)
    if path.suffix.lower() in _TEXT_SUFFIXES or path.suffix.lower() in IMAGE_SUFFIXES:
        raise DataError(f"{path.name}: {_WRONG_KIND}")
    if request.data_format is None and path.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"{path.name}: {_WRONG_KIND}")
    return _read_manifest(path, request)


def _read_folder(path: Path, request: DataRequest, notes: list[str]) -> tuple[list[ImageItem], list[ImageItem]]:
    inner = {entry.name.lower(): entry for entry in path.iterdir() if entry.is_dir()}
    train = next((inner[name] for name in _TRAIN if name in inner), None)
    test = next((inner[name] for name in _TEST if name in inner), None)
    if train is not None and all(_is_class_parent(folder) for folder in (train, test) if folder):
        return (
            _read_classes(train, request, notes),
            [] if test is None else _read_classes(test, request, notes),
        )
    return _read_classes(path, request, notes), []


def _is_class_parent(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir())


def _read_classes(folder: Path, request: DataRequest, notes: list[str]) -> list[ImageItem]:
    directories = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if request.classes is not None:
        wanted = set(request.classes)
        directories = [directory for directory in directories if directory.name in wanted]
    if not directories:
        raise DataError(f"{folder} holds no class folders. {_WRONG_KIND}")
    items: list[ImageItem] = []
    ignored = 0
    for directory in directories:
        files = sorted(entry for entry in directory.rglob("*") if entry.is_file() and not entry.name.startswith("."))
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
        ignored += len(files) - len(images)
        if not images:
            raise DataError(f"Class folder {directory} holds no images. Remove it or add images.")
        items += [ImageItem(str(file), directory.name, file.read_bytes) for file in images]
    if ignored:
        notes.append(f"{ignored} files in {folder} are not images and were left out.")
    return items


def _read_manifest(path: Path, request: DataRequest) -> tuple[list[ImageItem], list[ImageItem]]:
    rows = read_table(path, request.data_format, request.columns)
    found = list(rows[0].values)
    picture = next((name for name in ("path", "image", "file", "file_name", "filename") if name in found), None)
    label = next((name for name in ("label", "class", "category", "target") if name in found), None)
    if picture is None or label is None:
        raise DataError(
            f"Found {', '.join(map(str, found))}. {_WRONG_KIND} "
            "Or name the columns: --map SOURCE=path --map SOURCE=label"
        )
    train: list[ImageItem] = []
    test: list[ImageItem] = []
    for row in rows:
        part = test if str(row.values.get("split") or "train").lower() in _TEST else train
        part.append(_manifest_item(row, picture, label, path.parent))
    return train, test


def _manifest_item(row: Row, picture: str, label: str, folder: Path) -> ImageItem:
    value, name = row.values.get(picture), row.values.get(label)
    if name is None or str(name).strip() == "":
        raise DataError(f"{row.where}: empty label.")
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        value = value["bytes"]
    if isinstance(value, bytes):
        content = value
        return ImageItem(row.where, str(name), lambda: content)
    if isinstance(value, dict):
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise DataError(f"{row.where}: '{picture}' is neither a path nor image bytes.")
    file = folder / value
    if not file.is_file():
        raise DataError(f"{row.where}: {value} not found.")
    return ImageItem(str(file), str(name), file.read_bytes)


def _choose_classes(items: list[ImageItem], request: DataRequest) -> list[ImageItem]:
    if request.classes is None:
        return items
    wanted = set(request.classes)
    chosen = [item for item in items if item.label in wanted]
    missing = sorted(wanted - {item.label for item in chosen})
    if items and missing:
        raise DataError(f"{request.path}: no class '{missing[0]}' there.")
    return chosen


def _check_classes(path: Path, labels: Sequence[str], test: Sequence[ImageItem], request: DataRequest) -> None:
    if len(labels) < 2:
        only = f" ('{labels[0]}')" if labels else ""
        raise DataError(
            f"{path} has {'one class only' if labels else 'no images'}{only}; a task needs two or more classes."
        )
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


def open_image(data: bytes, name: str) -> Any:
    """Decode an image to 8-bit RGB, upright; grey, palette, RGBA and 16-bit images are converted.

    Raises:
        DataError: The bytes are not a whole image; the message names it.
    """
    import io

    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                image = _to_eight_bits(image)
            return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError) as error:
        # Pillow's own words for an unknown format name an object in memory, not the file
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name}: unreadable or truncated image ({reason}). Mend it, or pass --skip-bad.") from error


def _to_eight_bits(image: Any) -> Any:
    """Scale a deep grey image (16 or 32 bits, or float) to 8 bits."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if image.mode.startswith("I") and values.max(initial=0) <= 65535 else max(values.max(initial=0), 1.0)
    top = 255.0 if values.max(initial=0) <= 255 else top
    return Image.fromarray((values.clip(min=0) / top * 255).astype(np.uint8), mode="L")
