"""Heads on two views, and what images kept out say of an adapter."""

from __future__ import annotations

import math

import pytest
import torch

from treelora_cli.heads.two_views import SMALLEST_GAIN, Examples, TwoViews, judge


def test_the_map_standardises_and_projects_and_comes_back_from_what_is_stored() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    views = TwoViews.fit(features, (4, 2), seed=5)
    z = (features - features.mean(dim=0)) / views.scale
    assert torch.allclose(views(features)[:, :4], z @ views.linear, atol=1e-6)
    assert torch.allclose(views(features)[:, 4:], torch.nn.functional.gelu(z @ views.random), atol=1e-6)
    assert views.width == 6
    again = TwoViews.from_tensors(views.to_tensors(), (4, 2), 5, torch.device("cpu"))
    assert torch.equal(again(features), views(features))


def test_a_projection_keeps_lengths_on_average() -> None:
    views = TwoViews.of_moments(torch.zeros(300), torch.ones(300), (2000, 1), seed=0)
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(1))
    assert views(x)[:, :2000].norm(dim=1) == pytest.approx(x.norm(dim=1), rel=0.1)


def test_scores_of_those_kept_out_are_ridge_regression_on_the_others() -> None:
    features = torch.tensor([[0.0], [2.0], [1.5]])
    examples = Examples(features, torch.tensor([0, 1, 1]), torch.tensor([False, False, True]))
    # mean 1, centred -1 and 1: gram 2, penalty 0.5 x 2; weight of class 1: (0.5 + 0.5) / 3
    assert examples.scores(0.5, 2)[0].tolist() == pytest.approx([0.5 - 0.5 / 3, 0.5 + 0.5 / 3])


def _noisy(separation: float) -> Examples:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    features = torch.randn(200, 3, generator=generator)
    features[:, 0] += separation * (labels * 2 - 1)
    return Examples(features, labels, torch.arange(200) % 5 == 0)


def test_an_adapter_pays_where_images_kept_out_gain_and_not_where_they_do_not() -> None:
    better = judge(_noisy(0.3), _noisy(2.0), (0.01, 0.01), 2)
    assert better.pays and better.gain > 0.3 and better.count == 40
    assert better.asked >= SMALLEST_GAIN and 1.0 <= better.sharpness <= 64.0
    same = judge(_noisy(0.3), _noisy(0.3), (0.01, 0.01), 2)
    assert (same.gain, same.asked, same.pays) == (0.0, SMALLEST_GAIN, False)
    assert not judge(_noisy(2.0), _noisy(0.3), (0.01, 0.01), 2).pays


def test_one_image_kept_out_proves_nothing() -> None:
    one = Examples(torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([0, 1, 1]), torch.tensor([False, False, True]))
    assert judge(one, one, (0.1, 0.1), 2).asked == math.inf
