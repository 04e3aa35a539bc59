"""Do kind signatures tell kinds of images apart, and who would join whom.

    OMP_NUM_THREADS=1 python tests/benchmarks/kinds.py DATA --weights FILE

DATA is the data of the recipe ``datasets9``, FILE its ViT-S. Each draw deals the classes of six kinds to tasks of 3 to
10 classes, no class twice, in random order; 12 training images a class. Shown: how often the nearest task, and the
nearest earlier one, is of its kind; the area under the curve of distances, same kind against other; and, learning the
tasks in order, how many joined another kind and how many opened a branch that their kind already had.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from charts import table
from treelora_backends.vit.branching import MomentSums
from treelora_backends.vit.images import make_preprocessing
from treelora_backends.vit.loading import create_vit
from treelora_backends.vit.trunk import Trunk

from treelora_cli.algorithm.kinds import (
    SAME_KIND,
    Kind,
    KindSignature,
    TokenMoments,
    choose_branch,
    kind_distance,
)
from treelora_cli.config import BaseConfig

KINDS = ("cifar100_50classes", "caltech", "signs", "sign", "pacs_sketch", "pacs_cartoon")
DEALS = {
    "20 tasks of 5 or 3 classes": ((6, 5), (4, 5), (4, 5), (2, 5), (2, 3), (2, 3)),
    "9 tasks of 10 or 7": ((2, 10), (2, 10), (2, 10), (1, 10), (1, 7), (1, 7)),
    "16 tasks of 7 to 3": ((4, 7), (3, 6), (3, 6), (2, 4), (2, 3), (2, 3)),
}
"""Tasks and classes of each, by kind."""
_IMAGES = 12


@dataclass(frozen=True)
class Measured:
    """One draw: shares, area, and counts of tasks."""

    nearest: float
    earlier: float
    area: float
    wrong: int
    missed: int


@torch.no_grad()
def class_moments(folder: Path, trunk: Trunk, preprocessing) -> TokenMoments:  # type: ignore[no-untyped-def]
    """Return the sums over some training images of one class."""
    files = sorted(folder.iterdir())
    chosen = np.random.default_rng(len(files)).permutation(len(files))[:_IMAGES]
    pixels = [preprocessing.to_pixels(files[index].read_bytes(), str(files[index])) for index in chosen]
    images = preprocessing.normalise(torch.stack([torch.from_numpy(one) for one in pixels]))
    sums = MomentSums(trunk, 1, torch.device("cpu"))
    entered = trunk.before(images)
    with sums.listening(torch.zeros(len(images), dtype=torch.int64)):
        trunk.after(entered)
    return TokenMoments(sums.sums.numpy(), sums.squares.numpy(), sums.counts.numpy())


def dealt(
    classes: dict[str, list[TokenMoments]], deal: Sequence[tuple[int, int]], seed: int
) -> list[tuple[str, KindSignature]]:
    """Return the kind and signature of each task of a draw."""
    rng = np.random.default_rng(seed)
    tasks = []
    for (kind, held), (count, size) in zip(classes.items(), deal, strict=True):
        order = rng.permutation(len(held))
        for start in range(0, min(count * size, len(held) - size + 1), size):
            own = [held[index] for index in order[start : start + size]]
            moments = TokenMoments(
                *(np.concatenate([getattr(one, part) for one in own]) for part in ("sums", "squares", "counts"))
            )
            tasks.append((kind, moments.signature()))
    return [tasks[index] for index in rng.permutation(len(tasks))]


def measure(tasks: Sequence[tuple[str, KindSignature]]) -> Measured:
    """Compare all tasks, then learn them in order."""
    kinds = np.array([kind for kind, _ in tasks])
    apart = np.array([[kind_distance(one, other) for _, other in tasks] for _, one in tasks])
    np.fill_diagonal(apart, np.inf)
    has_other = [(kinds == kind).sum() > 1 for kind in kinds]
    nearest = [kinds[row.argmin()] == kind for row, kind, other in zip(apart, kinds, has_other, strict=True) if other]
    earlier = [kinds[row[:i].argmin()] == kinds[i] for i, row in enumerate(apart) if kinds[i] in kinds[:i]]
    upper = np.triu_indices(len(tasks), 1)
    same = kinds[upper[0]] == kinds[upper[1]]
    close, far = apart[upper][same], apart[upper][~same]
    area = float((close[:, None] < far[None]).mean())
    learned: list[Kind] = []
    wrong = missed = 0
    for kind, signature in tasks:
        choice = choose_branch(signature, learned, "auto", 0)
        known = {str(one.branch).partition(" ")[0] for one in learned}
        branch = choice.branch if choice.joins else f"{kind} {len(learned)}"
        wrong += choice.joins and str(branch).partition(" ")[0] != kind
        missed += not choice.joins and kind in known
        learned.append(Kind(signature, branch))
    return Measured(float(np.mean(nearest)), float(np.mean(earlier)), area, wrong, missed)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--draws", type=int, default=12)
    given = parser.parse_args()
    model = "vit_small_patch14_dinov2.lvd142m"
    base = BaseConfig(model=model, weights=given.weights, model_args={"img_size": 112})
    vit = create_vit(base, offline=True).eval()
    trunk, preprocessing = Trunk(vit, 0, None), make_preprocessing(vit, {})
    classes = {
        kind: [
            class_moments(one, trunk, preprocessing)
            for one in sorted((given.data / kind / "train").iterdir())
            if one.is_dir()
        ]
        for kind in KINDS
    }
    rows = []
    for name, deal in DEALS.items():
        draws = [measure(dealt(classes, deal, seed)) for seed in range(given.draws)]
        rows.append([
            name,
            f"{np.mean([one.nearest for one in draws]):.3f}",
            f"{np.mean([one.earlier for one in draws]):.3f}",
            f"{np.mean([one.area for one in draws]):.4f}",
            f"{min(one.area for one in draws):.4f}",
            str(sum(one.wrong for one in draws)),
            str(sum(one.missed for one in draws)),
        ])  # fmt: skip
    print(f"{given.draws} draws each; limit {SAME_KIND}")
    print(table(["tasks", "nearest", "nearest earlier", "AUC", "least AUC", "joined wrongly", "opened twice"], rows))


if __name__ == "__main__":
    main()
