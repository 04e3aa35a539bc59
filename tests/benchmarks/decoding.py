"""Whether decoding overlaps the frozen pass: photos from files, beside a device that works while the processor is free.

    python tests/benchmarks/decoding.py [--images 400] [--batch 50]

Nothing is computed: the device is a pause of the processor time that decoding a batch takes, which is where overlapping
gains most. Decoding all before the pass, and decoding ahead of it, are measured in turn and the least counts.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from charts import table
from PIL import Image
from treelora_backends.vit.decoding import expect
from treelora_backends.vit.images import make_preprocessing, read_image_task

from treelora_cli.backend.runtime import Silent
from treelora_cli.backend.values import DataRequest


def main() -> None:
    """Read the options and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    preparing = _preprocessing()
    with tempfile.TemporaryDirectory() as folder:
        _photos(Path(folder), given.images)
        pause = _pass(Path(folder), preparing, given.batch, 0.0, ahead=False)[1] / -(-given.images // given.batch)
        least = dict.fromkeys((False, True), (float("inf"), float("inf")))
        for _ in range(given.rounds):
            for ahead in least:
                least[ahead] = min(least[ahead], _pass(Path(folder), preparing, given.batch, pause, ahead=ahead))
    names = {False: "decoded, then passed", True: "decoded ahead of the pass"}
    rows = [[names[ahead], f"{wall:.2f}", f"{cpu:.2f}"] for ahead, (wall, cpu) in least.items()]
    print(f"{given.images} photos, batches of {given.batch}, device {pause:.3f} s a batch")
    print(table(["", "seconds", "CPU seconds"], rows))


def _preprocessing() -> Any:
    import timm

    return make_preprocessing(timm.create_model("vit_tiny_patch16_224", num_classes=0), {})


def _photos(folder: Path, count: int) -> None:
    """Write JPEGs of 500 x 375 pixels in two classes."""
    for index in range(count):
        noise = np.random.default_rng(index).integers(0, 256, (47, 63, 3), dtype=np.uint8)
        path = folder / ("cat", "dog")[index % 2] / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).resize((500, 375)).save(path)


def _pass(folder: Path, preparing: Any, batch: int, pause: float, *, ahead: bool) -> tuple[float, float]:
    """Return the seconds and processor seconds from files to the end of the pass."""
    start = time.perf_counter(), time.process_time()
    task = read_image_task(DataRequest(folder), preparing, Silent(), ahead=ahead)
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
    expect(task.train.pixels, order)
    for rows in order.split(batch):
        assert len(task.train.pixels[rows]) == len(rows)
        time.sleep(pause)
    for pixels in task.test.pixels.split(batch):
        assert len(pixels)
        time.sleep(pause)
    return time.perf_counter() - start[0], time.process_time() - start[1]


if __name__ == "__main__":
    main()
