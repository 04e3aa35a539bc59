"""How familiar an image is, from sums alone."""

from __future__ import annotations

import pytest
import torch

from treelora_cli.heads.familiarity import Familiarity
from treelora_cli.heads.gram import FullGram, Gram, HalfGram


def sums_of(features: torch.Tensor, labels: torch.Tensor) -> Familiarity:
    count = int(labels.max()) + 1
    sums = torch.zeros(count, features.shape[1]).index_add_(0, labels, features)
    return Familiarity.of_sums(features.T @ features, sums, torch.bincount(labels).float())


def test_two_features_by_hand() -> None:
    features = torch.tensor([[-3.0, 2.0], [-1.0, -2.0], [1.0, 2.0], [3.0, -2.0]])
    familiarity = sums_of(features, torch.tensor([0, 0, 1, 1]))
    # inside classes: variances 1 and 4, covariance -2; shrunk by 0.3 of their mean, 0.75; seen from the mean, 0
    covariance = torch.tensor([[1.75, -2.0], [-2.0, 4.75]], dtype=torch.double)
    x, mean = torch.tensor([[0.5, 1.0], [4.0, 1.0]], dtype=torch.double), torch.tensor([2.0, 0.0]).double()

    def product(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ torch.linalg.solve(covariance, other))

    cosines = [product(one, mean) / (product(one, one) * product(mean, mean)) ** 0.5 for one in x]
    distances = [product(one - mean, one - mean) / 2 for one in x]
    expected = [cosine - 0.1 * distance for cosine, distance in zip(cosines, distances, strict=True)]
    assert familiarity(x).tolist() == pytest.approx(expected)


def test_of_a_single_class_the_distance_counts() -> None:
    familiarity = sums_of(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 0]))
    assert familiarity(torch.tensor([[0.0], [2.6]])).tolist() == pytest.approx([0.0, -0.1 * 2.6**2 / 1.3])


def test_a_class_without_images_is_no_direction() -> None:
    features, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    sums = torch.zeros(3, 3).index_add_(0, labels, features)
    counts = torch.tensor([20.0, 20.0, 0.0])
    with_none = Familiarity.of_sums(features.T @ features, sums, counts)
    assert torch.equal(with_none(features), sums_of(features, labels)(features))


def test_what_lies_beside_all_classes_is_less_familiar_than_what_lies_in_one() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(5, 16, generator=generator)
    labels = torch.arange(500) % 5
    features = centres[labels] + torch.randn(500, 16, generator=generator)
    familiarity = sums_of(features[:400], labels[:400])
    own = familiarity(features[400:])
    other = familiarity(4 * torch.randn(100, 16, generator=generator))
    assert float((own[:, None] > other).float().mean()) > 0.99


@pytest.mark.parametrize("width", [1, 2, 7, 8])
def test_a_block_is_that_of_the_whole_matrix(width: int) -> None:
    phi = torch.randn(5, width, generator=torch.Generator().manual_seed(width))
    half = Gram.zeros(width, torch.device("cpu"))
    assert isinstance(half, HalfGram)
    half.add_(phi)
    full = FullGram(width, torch.zeros(width, width))
    full.add_(phi)
    for start in range(width):
        for end in range(start + 1, width + 1):
            part = slice(start, end)
            assert torch.equal(half.block(part), half.dense()[part, part])
            assert torch.equal(full.block(part), full.dense()[part, part])
