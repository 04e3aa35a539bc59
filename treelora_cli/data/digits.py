"""scikit-learn's handwritten digits as an image folder: the demo's data."""

from __future__ import annotations

from pathlib import Path

from treelora_cli.project.store import write_file

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEST_EVERY = 5


def write_digits(folder: Path) -> None:
    """Write ``train/NAME/*.png`` and ``test/NAME/*.png``: 1,797 images of 8 x 8, every fifth held out."""
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if index % _TEST_EVERY == 0 else "train"
        buffer = io.BytesIO()
        Image.fromarray((values * 15.9375).astype(np.uint8)).save(buffer, format="PNG")
        write_file(folder / part / NAMES[int(label)] / f"{index:04d}.png", buffer.getvalue())
