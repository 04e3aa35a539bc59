"""Images of a task, decoded once to the size the model sees, and how many are looked at together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from treelora_backends.vit.decoding import Pixels, PixelsAhead, allocated, in_threads
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import Change, DataRequest
from treelora_cli.data.held_out import content_hash, same_examples
from treelora_cli.data.images import list_images
from treelora_cli.data.manifests import ImageItem
from treelora_cli.data.paths import shown
from treelora_cli.data.pixels import holds_several, open_image
from treelora_cli.errors import SKIP_BAD, DataError, UsageError

_CHUNK = 256
_DARK = 16


@dataclass(frozen=True)
class Preprocessing:
    """The model's own preprocessing, in two parts.

    Attributes:
        geometry: Resize and crop of a PIL image to the model's input size.
        size: Height and width in pixels.
        mean, std: Per channel, of values in [0, 1].
        data_config: timm's names for all of it.
        largest: Value of white in images of more than 8 bits; by each file when ``None``.
    """

    geometry: Callable[[Any], Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_config: dict[str, Any]
    largest: float | None = None

    def to_pixels(self, data: bytes, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Decode a file and return the resized image as (3, H, W), 0 to 255.

        Raises:
            DataError: It is no whole image, or cannot be resized; the message names it.
        """
        image = open_image(data, name, self.largest)
        try:
            return self.resized(image)
        except (ValueError, OverflowError) as error:  # one pixel wide and thousands high
            raise DataError(f"{name}: {image.width} x {image.height} pixels cannot be resized ({error}).") from error

    def resized(self, image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return an 8-bit RGB image as the model sees it, (3, H, W), 0 to 255."""
        return np.ascontiguousarray(np.asarray(self.geometry(image), dtype=np.uint8).transpose(2, 0, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Turn (B, 3, H, W) bytes into the model's input."""
        mean = pixels.new_tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = pixels.new_tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return (pixels.float() / 255.0 - mean) / std


def make_preprocessing(vit: Any, overrides: dict[str, Any]) -> Preprocessing:
    """Take the preprocessing that timm records for ``vit``, with the user's overrides.

    Raises:
        UsageError: An unknown key or a value of the wrong form.
    """
    from timm.data import create_transform, resolve_data_config

    size = vit.patch_embed.img_size
    known = {"mean", "std", "interpolation", "crop_pct", "crop_mode", "range"}
    for key in overrides:
        if key not in known:
            raise UsageError(f"--preprocess {key}: known are {', '.join(sorted(known))}.")
    chosen = {
        key: (float(value),) * 3 if key in ("mean", "std") and not isinstance(value, list | tuple) else value
        for key, value in overrides.items()
        if key != "range"
    }
    largest = overrides.get("range")
    if largest is not None and (isinstance(largest, bool) or not isinstance(largest, int | float) or largest <= 0):
        raise UsageError(f"--preprocess range={largest}: expected the value of white, such as 4095.")
    try:
        config = resolve_data_config({**chosen, "input_size": (3, *size)}, pretrained_cfg=vit.pretrained_cfg, model=vit)
        steps = create_transform(**config, is_training=False).transforms
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"--preprocess: {error}") from error
    geometry_steps = steps[:-2]  # the last two turn the image into a normalised tensor

    def geometry(image: Any) -> Any:
        for step in geometry_steps:
            image = step(image)
        return image

    return Preprocessing(geometry, tuple(size), tuple(config["mean"]), tuple(config["std"]), config, largest)


@dataclass(frozen=True)
class Pictures:
    """Decoded images.

    Attributes:
        pixels: (N, 3, H, W) bytes, in memory or in a temporary file, or decoded as they are asked for.
        labels: Index into the task's label names, (N,) int64.
        hashes: Content hash of each image and its label.
    """

    pixels: Pixels
    labels: Tensor
    hashes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageTask:
    """A task for a vision transformer; meets ``TaskData``."""

    labels: tuple[str, ...]
    train: Pictures
    test: Pictures
    digest: str
    notes: tuple[str, ...]
    sample: str
    change: Change | None = None
    metric: str = "accuracy"
    tokens: tuple[tuple[str, bool], ...] = ()
    numbered: bool = False

    @property
    def held_out(self) -> tuple[str, ...]:
        """Content hash of each held-out image."""
        return self.test.hashes

    @property
    def train_size(self) -> int:
        """Training images."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """Held-out images."""
        return len(self.test)


LIKE_THEMSELVES = 2
"""Views that are not changed at random: plain, mirrored."""


def shuffled_views(count: int, views: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, views) of each step of an epoch, both (B,): every image once, each in one view drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    drawn = torch.randint(views, (count,), generator=generator)
    for rows in order.tensor_split(steps):
        yield rows, drawn[rows]


def chosen_views(images: Tensor, views: Tensor) -> Tensor:
    """Return normalised images (B, 3, H, W), mirrored where ``views`` (B,) is odd."""
    mirrored = (views % 2 == 1).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def in_parts(
    batch: tuple[Tensor, Tensor], count: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[Callable[[], Tensor]]:
    """Return functions that compute a batch's mean loss in ``count`` parts; their sum is the mean over the batch.

    Args:
        batch: Rows and views, both (B,).
        count: Parts, as equal as can be; no part is empty.
        loss: Returns the mean over a part.
    """
    rows, views = batch
    parts = [part for part in torch.arange(len(rows)).tensor_split(count) if len(part)]

    def share(part: Tensor) -> Tensor:
        return loss(rows[part], views[part]) * (len(part) / len(rows))

    return [partial(share, part) for part in parts]


def read_image_task(
    request: DataRequest, preprocessing: Preprocessing, reporter: Reporter, *, ahead: bool = False
) -> ImageTask:
    """Find and decode a task's images.

    Args:
        request: Where they lie.
        preprocessing: The model's.
        reporter: Shows the progress.
        ahead: Decode while a device works: files are read now, decoded when they are asked for, and bad ones
            found then. Not with ``skip_bad``, which has to know them all.

    Raises:
        DataError: Missing or unreadable images; without ``skip_bad`` the first bad one is named.
    """
    if request.metric not in (None, "accuracy"):
        raise DataError(f"Metric '{request.metric}' does not fit images; they are scored by accuracy.")
    listing = list_images(request)
    reading = _Reading(listing.labels, preprocessing, request.skip_bad, ahead and not request.skip_bad, reporter)
    learned: dict[bytes, ImageItem] = {}
    scored: dict[bytes, ImageItem] = {}
    empty = Pictures(torch.zeros(0, 3, *preprocessing.size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    train = empty if request.test_only else reading.pictures(listing.train, "Reading images", learned)
    test = reading.pictures(listing.test, "Reading held-out images", scored)
    notes = listing.notes
    if bad := reading.bad:
        notes = (*notes, f"{len(bad)} unreadable images were skipped, such as {bad[0]}.")
    if twice := reading.twice:
        notes = (*notes, f"{len(twice)} images are in two classes, such as {twice[0]}.")
    if several := reading.several:
        notes = (*notes, f"{len(several)} files hold several pictures, such as {several[0]}; the first is taken.")
    if shared := len(learned.keys() & scored.keys()):
        notes = (*notes, same_examples(shared, len(test), "images"))
    if not request.test_only and len(train.labels.unique()) < len(listing.labels):
        raise DataError(f"{request.path}: a class has no readable training image left.")
    _refuse_dark(request, train)
    height, width = preprocessing.size
    sample = (
        f"{shown(listing.train[0].name)} -> 3x{height}x{width}, label '{listing.train[0].label}'"
        if listing.train
        else ""
    )
    digits = reading.digest.hexdigest()
    return ImageTask(listing.labels, train, test, digits, notes, sample, listing.change, numbered=listing.numbered)


def _note_content(contents: dict[bytes, ImageItem], twice: list[str], content: bytes, item: ImageItem) -> None:
    """Take down an image by the hash of its file, and those that are in another class, too."""
    before = contents.setdefault(content, item)
    if before.label != item.label:
        twice.append(f"{shown(item.name)} ('{item.label}'), which is {shown(before.name)} ('{before.label}'), too")


def _refuse_dark(request: DataRequest, train: Pictures) -> None:
    """Raise ``DataError`` when no pixel of any image is brighter than a few of 255: numbers of classes or of 4 bits."""
    if not len(train):
        return
    brightest = 0
    for start in range(0, len(train), _FEWEST):
        brightest = max(brightest, int(train.pixels[start : start + _FEWEST].max()))
        if brightest > _DARK:
            return  # the others need not be looked at, nor decoded yet
    raise DataError(
        f"{request.path}: the brightest pixel of all {len(train)} images is {brightest} of 255; such numbers are no"
        " brightness (masks, or fewer bits). Scale them to 0 to 255."
    )


class _Reading:
    """Reads a task's images, and notes what is said of them all.

    Attributes:
        digest: Over labels and contents, SHA-256.
        bad: Names of images that are left out.
        several: Names of files that hold further pictures.
        twice: Of images that are in two classes, with both.
    """

    def __init__(
        self, labels: Sequence[str], preprocessing: Preprocessing, skip_bad: bool, ahead: bool, reporter: Reporter
    ) -> None:
        self._index_of = {label: index for index, label in enumerate(labels)}
        self._preprocessing, self._skip_bad = preprocessing, skip_bad
        self._ahead, self._reporter = ahead, reporter
        self.digest = hashlib.sha256()
        self.bad: list[str] = []
        self.several: list[str] = []
        self.twice: list[str] = []

    def pictures(self, items: Sequence[ImageItem], what: str, contents: dict[bytes, ImageItem]) -> Pictures:
        """Read images; ``contents`` takes each by the hash of its file."""
        pixels = None if self._ahead else allocated((len(items), 3, *self._preprocessing.size))
        kept: list[int] = []
        hashes: list[str] = []
        read = in_threads(self._read, items)
        for start in self._reporter.track(range(0, len(items), _CHUNK), what, -(-len(items) // _CHUNK)):
            for item, found in zip(items[start : start + _CHUNK], read, strict=False):
                if found is None:
                    self.bad.append(item.name)
                    continue
                content, own, picture, several = found
                if several:
                    self.several.append(shown(item.name))
                self.digest.update(item.label.encode() + b"\0" + content)
                _note_content(contents, self.twice, content, item)
                if pixels is not None:
                    pixels[len(kept)] = picture
                kept.append(self._index_of[item.label])
                hashes.append(own)
        labels = torch.tensor(kept, dtype=torch.int64)
        if pixels is not None:
            return Pictures(torch.from_numpy(pixels[: len(kept)]), labels, tuple(hashes))
        later = PixelsAhead(len(items), self._preprocessing.size, lambda place: self._pixels_of(items[place]))
        return Pictures(later, labels, tuple(hashes))

    def _read(self, item: ImageItem) -> tuple[bytes, str, Any, bool] | None:
        """Read an image; ``None`` for an unreadable one that is left out.

        Returns:
            The file's digest, its identity with its label, its pixels, or ``None`` for later, and whether it holds
            several pictures.
        """
        try:
            data = _bytes_of(item)
            pixels = None if self._ahead else self._preprocessing.to_pixels(data, item.name)
        except DataError:
            if not self._skip_bad:
                raise
            return None
        return hashlib.sha256(data).digest(), content_hash(item.label, data), pixels, holds_several(data)

    def _pixels_of(self, item: ImageItem) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self._preprocessing.to_pixels(_bytes_of(item), item.name)


def _bytes_of(item: ImageItem) -> bytes:
    try:
        return item.read()
    except OSError as error:
        raise DataError(f"{item.name} cannot be read: {error.strerror}.{SKIP_BAD}") from error


_FEWEST, _MOST = 32, 256
"""On a CPU what stays in its caches is faster than more; a GPU is busy with the larger number."""
_IMAGES_PER_GIB = 4
_ROWS = 16
"""Adapters see multiples of this: kernels are compiled, and kept, for each number of rows that occurs."""


def images_at_once(device: torch.device) -> int:
    """Return the images of a chunk that is only read: more, the more memory a GPU has."""
    if device.type != "cuda":
        return _FEWEST
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return max(_FEWEST, min(_MOST, int(_IMAGES_PER_GIB * gib)))


def filled(rows: Tensor) -> Tensor:
    """Return ``rows`` (n,) with the first image repeated up to a multiple of 16, whose results are left out."""
    return torch.cat([rows, rows.new_zeros(-len(rows) % _ROWS)])
