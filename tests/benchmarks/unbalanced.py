"""Unbalanced tasks: what class weights in the shared ridge head do to rare and to common classes.

Run: python tests/benchmarks/unbalanced.py DIR [--seeds 0] [--only NAME]   (train/CLASS, test/CLASS, one called lamp)
Two tasks on the embedded ViT; 60 held-out images a class, answered over the classes of both, by the head alone.
``task`` is ``head.class_weights: balanced``; ``global`` weighs each class by 1 / n_c over all tasks, ``adjust`` leaves
the sums alone and takes the logarithm of each class's share from its scores.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor
from treelora_backends.vit.backend import VitBackend, VitBase
from treelora_backends.vit.images import ImageTask, Pictures
from treelora_backends.vit.shared_head import HeadFeatures

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import Memory
from treelora_cli.config import Config, resolve
from treelora_cli.heads.ridge import RidgeStatistics, ridge_share

Spec = list[tuple[str, int]]
KINDS = ("none", "task", "global", "adjust")
RARE = 20
LIKELIEST = 6


def scenarios(classes: list[str], seed: int) -> dict[str, list[Spec]]:
    """Return the images of each class in both tasks, by name."""
    rest = [one for one in classes if one != "lamp"]
    random.Random(seed).shuffle(rest)
    five = [(one, 60) for one in rest[1:6]]
    ten = [(one, 60) for one in rest[1:11]]
    return {
        **{
            f"{many} lamp, {few} other / 10 x 60": [[("lamp", many), (rest[0], few)], ten]
            for many, few in ((150, 6), (60, 6), (150, 20))
        },
        "150 lamp, 6 other / 5 x 60": [[("lamp", 150), (rest[0], 6)], five],
        "150 lamp, 5 x 6 / 5 x 60": [
            [("lamp", 150), *((one, 6) for one in rest[1:6])],
            [(one, 60) for one in rest[6:11]],
        ],
        "5 x 60 / 6 lamp, 150 other": [five, [("lamp", 6), (rest[0], 150)]],
        "5 x 400 / 5 x 20": [
            [("lamp", 400), *((one, 400) for one in rest[1:5])],
            [(one, 20) for one in rest[5:10]],
        ],
    }


def pixels_of(base: VitBase, folder: Path, count: int, seed: int) -> Tensor:
    """Return some images of a class as bytes, (n, 3, H, W)."""
    files = sorted(folder.iterdir())
    random.Random(f"{seed}{folder.name}{folder.parent.name}").shuffle(files)
    return torch.stack(
        [torch.from_numpy(base.preprocessing.to_pixels(one.read_bytes(), str(one))) for one in files[:count]]
    )


def task_of(base: VitBase, data: Path, spec: Spec, seed: int) -> ImageTask:
    """Return a task of so many training images of each class."""
    parts = [pixels_of(base, data / "train" / name, count, seed) for name, count in spec]
    labels = torch.cat([torch.full((len(part),), index) for index, part in enumerate(parts)])
    pictures = Pictures(torch.cat(parts), labels)
    return ImageTask(tuple(name for name, _ in spec), pictures, pictures, "", (), "")


@torch.no_grad()
def seen(base: VitBase, features: HeadFeatures, pixels: Tensor) -> Tensor:
    """Return the head's features of the plain and the mirrored view, (n, 2, W)."""
    parts = []
    for chunk in pixels.split(64):
        images = base.preprocessing.normalise(chunk)
        views = [features(base.trunk.after(base.trunk.before(view))) for view in (images, images.flip(-1))]
        parts.append(torch.stack(views, dim=1))
    return torch.cat(parts)


def weights_of(kind: str, counts: Tensor, usual: float) -> Tensor | None:
    """Return what an image of each class counts."""
    if kind == "task":
        return counts.sum() / (len(counts) * counts)
    return usual / counts if kind == "global" else None


def show(base: VitBase, data: Path, name: str, specs: list[Spec], seed: int) -> None:
    """Print accuracy over all classes, over the rare ones and over lamp."""
    tasks = [task_of(base, data, spec, seed) for spec in specs]
    session = base.session(tasks[0], Memory((), dict), base.config)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
    session.prepare()
    features = session.shared_head.features
    assert features is not None
    learned = [seen(base, features, task.train.pixels)[:, 0] for task in tasks]
    names = [one for spec in specs for one in spec]
    tests = [seen(base, features, pixels_of(base, data / "test" / one, 60, seed)) for one, _ in names]
    counts = [torch.bincount(task.train.labels).float() for task in tasks]
    for kind in KINDS:
        sums = RidgeStatistics.empty(features.width, len(names), torch.device("cpu"))
        for index, (task, phi) in enumerate(zip(tasks, learned, strict=True)):
            weights = weights_of(kind, counts[index], float(counts[0].mean()))
            columns = task.train.labels + index * len(specs[0])
            sums.add(phi, columns, None if weights is None else weights[task.train.labels])
        head = sums.solve(ridge_share(0.07, features.width, float(sum(map(len, learned)))))
        share = torch.cat(counts) / torch.cat(counts).sum()
        moved = -share.log() if kind == "adjust" else torch.zeros_like(share)
        scores = [16 * (head(one[:, 0]) + head(one[:, 1])) / 2 + moved for one in tests]
        right = [float((one.argmax(dim=1) == index).float().mean()) for index, one in enumerate(scores)]
        rare = [value for value, (_, count) in zip(right, names, strict=True) if count <= RARE]
        place = [one for one, _ in names].index("lamp")
        among = float((scores[place].topk(LIKELIEST, dim=1).indices == place).any(dim=1).float().mean())
        mean = sum(right) / len(right)
        print(
            f"{name:28} seed {seed} {kind:6} all {100 * mean:5.1f} rare {100 * sum(rare) / len(rare):5.1f}"
            f" lamp {100 * right[place]:5.1f} among six {100 * among:5.1f}",
            flush=True,
        )


def main() -> None:
    """Print every scenario."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="part of a scenario's name")
    given = parser.parse_args()
    backend = VitBackend()
    config = resolve(Config(), Config(), backend.defaults())
    config = Config(**{**vars(config), "base": backend.resolve_base(config.base, offline=True)})
    base = backend.load(config, open_runtime("cpu", offline=True, reporter=Silent()))
    classes = sorted(one.name for one in (given.data / "train").iterdir())
    for seed in given.seeds:
        for name, specs in scenarios(classes, seed).items():
            if given.only in name:
                show(base, given.data, name, specs, seed)


if __name__ == "__main__":
    main()
