"""Small cases by hand, at the edges where a constant or a comparison decides."""

from __future__ import annotations

import pytest
import torch

from treelora_cli.heads import leave_one_out
from treelora_cli.heads.gram import FullGram, Gram, HalfGram
from treelora_cli.heads.ridge import FeatureMap, _centre_

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


def test_features_are_divided_by_their_deviation_and_a_thousandth_of_the_mean_one() -> None:
    made = FeatureMap.of_moments(torch.zeros(3), torch.tensor([0.0, 2.0, 4.0]), random=5, seed=0)
    torch.testing.assert_close(made.scale, torch.tensor([0.002, 2.002, 4.002]), rtol=1e-6, atol=0)
    assert made.projection.shape == (3, 5)


def test_features_that_never_vary_are_divided_by_something_above_zero() -> None:
    made = FeatureMap.of_moments(torch.zeros(2), torch.zeros(2), random=1, seed=0)
    torch.testing.assert_close(made.scale, torch.full((2,), 1e-12), rtol=1e-6, atol=0)


def test_the_penalty_of_no_variation_is_hardly_above_zero() -> None:
    gram = Gram.zeros(2, CPU)
    assert _centre_(gram, torch.zeros(2), 3.0, 0.5) == pytest.approx(0.5e-12)
    torch.testing.assert_close(gram.diagonal(), torch.full((2,), 0.5e-12), rtol=1e-6, atol=0)


def test_half_of_a_matrix_is_held_on_the_cpu_and_all_of_it_elsewhere() -> None:
    here, there = Gram.zeros(3, CPU), Gram.zeros(3, ELSEWHERE)
    assert isinstance(here, HalfGram) and here.values.tolist() == [0.0] * 6
    assert isinstance(there, FullGram) and there.values.shape == (3, 3)
    half = torch.arange(6.0)
    restored = Gram.restored(half, 3, CPU)
    assert isinstance(restored, HalfGram) and restored.values.data_ptr() == half.data_ptr(), "its memory is taken over"


def test_penalties_and_sharpnesses_that_are_tried() -> None:
    shares, sharpnesses = leave_one_out._SHARES, leave_one_out._SHARPNESSES
    assert (shares[0], shares[2], shares[-1], len(shares)) == pytest.approx((1e-4, 1e-3, 1.0, 9))
    assert (sharpnesses[0], sharpnesses[2], sharpnesses[-1], len(sharpnesses)) == pytest.approx((1.0, 2.0, 64.0, 13))
