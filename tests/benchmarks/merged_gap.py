"""Where the score goes between ``routed`` and the one stock model that ``export --format merged`` writes.

::

    python tests/benchmarks/merged_gap.py PROJECT [HELD_OUT_IMAGES_PER_CLASS]

For a project of the vit backend: accuracy over all classes of the routed answers, of the merged network, and of ridge
heads on parts of the shared head's features, solved from the project's own sums, with one view of an image and with its
mirror image.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from frozen_head import FrozenHead
from torch import Tensor
from treelora_backends.vit.predictor import ANCHOR_SHARPNESS, VitPredictor
from treelora_backends.vit.shared_head import SharedHead

from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import LinearHead, RidgeStatistics


def parts_of(width: int, features: int, everything: int) -> dict[str, list[int]]:
    """Columns of the head's features by what they are: C wide, F of them layered, W in all."""
    token, random = list(range(features - width, features)), list(range(features, everything))
    blocks = [range(start, start + 2 * width) for start in range(0, features - width, 2 * width)]
    means = [place for block in blocks for place in block[:width]]
    return {
        "class token and random features: the merged network": token + random,
        "and mean patches of the last block": token + random + list(blocks[-1][:width]),
        "and their deviation": token + random + list(blocks[-1]),
        "class token, random, mean patches of all blocks": token + random + means,
        "everything: the router": list(range(everything)),
    }


def solved(head: SharedHead, memory: Any, chosen: list[int]) -> LinearHead:
    """A ridge head on some of the features."""
    statistics = head._statistics(memory)
    rows = torch.tensor(chosen)
    gram = Gram.from_dense(statistics.gram.dense()[rows][:, rows].clone())
    own = RidgeStatistics(gram, statistics.sums[:, rows].clone(), statistics.counts)
    return own.solve(head._share(own))


class Counter:
    """Right answers by what gave them."""

    def __init__(self) -> None:
        self.right: dict[str, int] = {}
        self.total = 0

    def add(self, name: str, scores: Tensor, truth: Tensor) -> None:
        self.right[name] = self.right.get(name, 0) + int((scores.argmax(dim=1) == truth).sum())

    def show(self) -> None:
        for name, right in self.right.items():
            print(f"| {name} | {100 * right / self.total:.1f} |")
        print(f"{self.total} images")


@torch.no_grad()
def main() -> None:
    project = FrozenHead(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
    base, memory, names = project.base, project.memory, project.names
    parts = parts_of(base.trunk.width, base.trunk.feature_width, project.features.width)
    heads = {name: (torch.tensor(chosen), solved(project.head, memory, chosen)) for name, chosen in parts.items()}
    routed, merged = (VitPredictor(base, memory, kind) for kind in ("routed", "merged"))
    count = Counter()
    for task in project.tasks:
        for pixels, truth in zip(task.test.pixels.split(128), project.truth(task).split(128), strict=True):
            images = base.preprocessing.normalise(pixels)
            count.total += len(truth)
            count.add("routed", routed.class_scores(images)[0], truth)
            once = merged.class_scores(images)[0]
            count.add("merged", once, truth)
            count.add("merged, both views", once + merged.class_scores(images.flip(-1))[0], truth)
            seen = project.views(images)
            for name, (chosen, linear) in heads.items():
                scores = [linear(phi[:, chosen]) for phi in seen]
                for views, what in ((scores[:1], "one view"), (scores, "both views")):
                    columns = (ANCHOR_SHARPNESS * torch.stack(views).mean(dim=0)).log_softmax(dim=1)
                    by_class = VitPredictor._by_group(columns, project.class_of, len(names))
                    count.add(f"{name}, {what}", by_class, truth)
    count.show()


if __name__ == "__main__":
    main()
