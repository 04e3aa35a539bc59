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


def test_one_feature_by_hand() -> None:
    familiarity = sums_of(torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]), torch.tensor([0, 0, 1, 1]))
    # inside classes the variance is 1, of all data 5; shrunk by as much again they are 2 and 10
    x = torch.tensor([2.0, 0.0, 12.0])
    expected = x.square() / 10 - torch.tensor([0.0, 4.0, 100.0]) / 2
    assert familiarity(x[:, None]).tolist() == pytest.approx(expected.tolist())


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
