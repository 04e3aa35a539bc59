"""scikit-learn's handwritten digits as an image folder: the demo's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEST_EVERY = 5


def write_digits(folder: Path, write: Callable[[Path, bytes], None]) -> None:
    """Write ``train/NAME/*.png`` and ``test/NAME/*.png``: 1,797 images of 8 x 8, every fifth held out.

    Args:
        folder: The image folder.
        write: Writes one file, and the directories above it.
    """
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if index % _TEST_EVERY == 0 else "train"
        path = folder / part / NAMES[int(label)] / f"{index:04d}.png"
        buffer = io.BytesIO()
        Image.fromarray((values * 15.9375).astype(np.uint8)).save(buffer, format="PNG")
        write(path, buffer.getvalue())
