"""Which statistic of a project's own sums tells images of no learned class, on frozen class tokens.

::

    python tests/benchmarks/unknown_images.py DIR [--model NAME --model-arg img_size=112 --weights FILE]
           [--learned 10] [--train 24] [--test 8] [--splits 3] [--sets NAME,...]

DIR holds image folders ``SET/train/CLASS/*`` and ``SET/test/CLASS/*``. Of each set in turn some classes, drawn at
random, are learned; foreign are its other classes (near) and those of the other sets (far). Prints for each statistic
the mean AUROC, and the share of foreign test images below what 5 % of the learned classes' test images fall below.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from treelora_cli import Project
from treelora_cli.backend import adapters
from treelora_cli.heads.familiarity import Familiarity, _factor, _unit, _whitened
from treelora_cli.heads.gram import Gram
from treelora_cli.heads.ridge import RidgeStatistics

Class = tuple[Tensor, Tensor]
"""Features of training and of test images, (n, C)."""


@torch.no_grad()
def tokens(base: Any, files: Sequence[Path]) -> Tensor:
    """Class tokens after the last block, the mean of an image's and its mirror image's, (n, C)."""
    found = []
    for start in range(0, len(files), 32):
        read = [base.preprocessing.to_pixels(file.read_bytes(), str(file)) for file in files[start : start + 32]]
        images = base.preprocessing.normalise(torch.stack([torch.from_numpy(one) for one in read]))
        with adapters.base_only(base.network):
            views = [base.trunk.after(base.trunk.before(one)).layered for one in (images, images.flip(-1))]
        found.append(torch.stack(views).mean(dim=0)[:, -base.trunk.width :])
    return torch.cat(found)


def read_set(base: Any, folder: Path, given: argparse.Namespace) -> list[Class]:
    """Features of every class of a set."""
    classes = sorted(one.name for one in (folder / "train").iterdir() if one.is_dir())[: given.classes]
    parts = (("train", given.train), ("test", given.test))
    files = [[sorted((folder / part / name).iterdir())[:count] for part, count in parts] for name in classes]
    return [(tokens(base, train), tokens(base, test)) for train, test in files]


def statistics(learned: Sequence[Class]) -> Any:
    """Return a function from features (n, C) to the statistics by name, (n,): higher is more familiar."""
    x = torch.cat([train for train, _ in learned])
    labels = torch.cat([torch.full((len(train),), index) for index, (train, _) in enumerate(learned)])
    mean, deviation = x.mean(dim=0), x.std(dim=0, unbiased=False).clamp(min=1e-6)
    z = (x - mean) / deviation
    own = RidgeStatistics(Gram.from_dense(z.T @ z), torch.zeros(0), torch.zeros(0))
    counts = torch.bincount(labels).float()
    own.sums, own.counts = torch.zeros(len(counts), z.shape[1]).index_add_(0, labels, z), counts
    familiarity, head = Familiarity.of_sums(own.gram.dense(), own.sums, counts), own.solve(1.0)
    means = (own.sums / counts[:, None]).double()
    total = own.gram.dense().double() / counts.sum()
    within = _factor(total - means.T @ own.sums.double() / counts.sum(), 1.0)
    overall = _factor(total, 1.0)
    values, vectors = torch.linalg.eigh(total)
    kept = vectors[:, values.flip(0).cumsum(0).flip(0) <= 0.8 * values.sum()]

    def found(features: Tensor) -> dict[str, Tensor]:
        one = ((features - mean) / deviation).double()
        near = torch.cdist(_whitened(within, one), _whitened(within, means)).square().amin(dim=1)
        far = _whitened(overall, one).square().sum(dim=1)
        cosine = _unit(_whitened(familiarity.within, one)) @ _unit(familiarity.classes).T
        scores = head(one.float())
        return {
            "direction and distance (in use)": familiarity(one),
            "direction alone": cosine.amax(dim=1),
            "relative Mahalanobis (Ren et al., 2021)": far - near,
            "Mahalanobis (Lee et al., 2018)": -near,
            "residual of 80 % of the variance (ViM)": -(one - one @ kept @ kept.T).square().sum(dim=1),
            "largest score of the ridge head": scores.amax(dim=1),
            "its probability": (16 * scores).softmax(dim=1).amax(dim=1),
            "its energy": (16 * scores).logsumexp(dim=1),
            "nearest mean, cosine, not whitened": nn.functional.cosine_similarity(
                one[:, None], means[None], dim=2
            ).amax(dim=1),
        }

    return found


def compared(own: Tensor, foreign: Tensor) -> tuple[float, float]:
    """Return (AUROC, share of foreign below what 5 % of own fall below)."""
    higher = (own[:, None] > foreign).double() + 0.5 * (own[:, None] == foreign).double()
    limit = own.sort().values[int(0.05 * len(own))]
    return float(higher.mean()), float((foreign < limit).double().mean())


def compare(sets: Mapping[str, list[Class]], given: argparse.Namespace) -> None:
    """Print the table."""
    rows: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, classes in sets.items():
        for seed in range(given.splits if len(classes) > given.learned else 0):
            drawn = random.Random(seed).sample(range(len(classes)), given.learned)
            found = statistics([classes[index] for index in drawn])
            own = found(torch.cat([classes[index][1] for index in drawn]))
            rest = [one[1] for index, one in enumerate(classes) if index not in drawn]
            others = {other: torch.cat([test for _, test in some]) for other, some in sets.items() if other != name}
            for kind, foreign in [("near", torch.cat(rest)), *(("far", some) for some in others.values())]:
                for key, value in found(foreign).items():
                    rows[key][kind].append(compared(own[key], value))
    print("| statistic | near: AUROC | near: unknown | far: AUROC | far: unknown |\n|" + " --- |" * 5)
    for key, kinds in rows.items():
        means = [torch.tensor(kinds[kind] or [(torch.nan, torch.nan)]).mean(dim=0) for kind in ("near", "far")]
        print(
            f"| {key} | " + " | ".join(f"{a:.3f} | {100 * b:.0f} %" for a, b in (one.tolist() for one in means)) + " |"
        )


def main() -> None:
    """Read the images once, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--model-arg")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sets")
    for name, default in (("learned", 10), ("train", 24), ("test", 8), ("splits", 3), ("classes", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    key, _, value = (given.model_arg or "").partition("=")
    settings = {"base.model_args": {key: int(value)}} if key else {}
    folders = [given.data / name for name in given.sets.split(",")] if given.sets else sorted(given.data.iterdir())
    with tempfile.TemporaryDirectory() as root:
        project = Project.create(
            Path(root) / "p", model=given.model, weights=given.weights, settings=settings, device="cpu", offline=True
        )
        base: Any = project._loaded(project._config())
        compare({folder.name: read_set(base, folder, given) for folder in folders}, given)


if __name__ == "__main__":
    main()
