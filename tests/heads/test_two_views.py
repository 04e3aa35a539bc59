"""Heads on two views, and what images kept out say of an adapter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from treelora_cli.heads import two_views
from treelora_cli.heads.two_views import LEAST_SHARP, MOST_SHARP, Examples, Judgement, fused, judge


def test_both_heads_multiply() -> None:
    frozen = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    both = fused(torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]]), 1.0, frozen).exp()
    assert both[0].tolist() == pytest.approx([0.25, 0.75])  # an even frozen opinion changes nothing
    assert both[1].tolist() == pytest.approx([0.75, 0.25])  # the roots of 0.9 and 0.1 are as 3 to 1


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
    assert better.asked < 0 and LEAST_SHARP <= better.sharpness <= MOST_SHARP
    same = judge(_noisy(0.3), _noisy(0.3), (0.01, 0.01), 2)
    assert abs(same.gain) < 0.01  # twice the same opinion
    assert not judge(_noisy(2.0), _noisy(0.3), (0.01, 0.01), 2).pays


def test_each_head_has_its_own_penalty() -> None:
    examples = _noisy(2.0)
    # a frozen head under so large a penalty says nothing: ln 2 nats are to be gained, and the other head gains them
    assert judge(examples, examples, (1e6, 0.01), 2).gain == pytest.approx(math.log(2), abs=1e-3)
    assert judge(examples, examples, (0.01, 1e6), 2).gain == pytest.approx(0.0, abs=1e-3)


def test_sharpnesses_that_are_tried_are_powers_of_the_root_of_two_from_1_to_64() -> None:
    tried = two_views._SHARPNESSES
    assert (tried[0], tried[-1]) == (1.0, 64.0)
    assert [b / a for a, b in itertools.pairwise(tried)] == pytest.approx([2**0.5] * 12)


def test_a_gain_of_what_is_asked_pays() -> None:
    assert [Judgement(gain, 0.1, 8.0, 40).pays for gain in (0.09, 0.1, 0.11)] == [False, True, True]


def test_one_image_kept_out_proves_nothing() -> None:
    one = Examples(torch.tensor([[0.0], [2.0], [2.0]]), torch.tensor([0, 1, 1]), torch.tensor([False, False, True]))
    assert judge(one, one, (0.1, 0.1), 2).asked == math.inf
