"""Small cases by hand, at the edges where a constant or a comparison decides."""

from __future__ import annotations

import math

import pytest
import torch

from treelora_cli.heads import leave_one_out
from treelora_cli.heads.familiarity import Familiarity
from treelora_cli.heads.gaussians import (
    ClassStatistics,
    Drift,
    Gaussian,
    RandomRidge,
    best_penalty,
    class_means,
    fit_drift,
)
from treelora_cli.heads.gram import FullGram, Gram, HalfGram
from treelora_cli.heads.ridge import FeatureMap, RidgeStatistics, _centre_, ridge_share
from treelora_cli.heads.two_views import Examples, judge

CPU, ELSEWHERE = torch.device("cpu"), torch.device("meta")


# -- the solved head and its features ---------------------------------------------------------------------


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
    half = torch.arange(6.0)
    restored = Gram.restored(half, 3, CPU)
    assert isinstance(restored, HalfGram) and restored.values.data_ptr() == half.data_ptr(), "its memory is taken over"
    older = {"a.gram": half}
    for made in (
        there,
        Gram.restored(half, 3, ELSEWHERE),
        Gram.read(older, "a", 3, ELSEWHERE),
        Gram.from_dense(torch.zeros(3, 3, device=ELSEWHERE)),
    ):
        assert isinstance(made, FullGram) and (made.width, made.values.shape) == (3, (3, 3))
        assert made.values.device == ELSEWHERE


def test_sums_and_features_lie_on_the_device_asked_for() -> None:
    empty = RidgeStatistics.empty(3, 2, ELSEWHERE)
    assert empty.sums.device == empty.counts.device == ELSEWHERE
    ridge = RandomRidge(3, 4, 0, ELSEWHERE)
    assert ridge.projection.device == ridge.gram.device == ridge.sums.device == ELSEWHERE
    fitted = FeatureMap.fit(torch.zeros(5, 3, device=ELSEWHERE), 2, 0, lambda part: part)
    read = FeatureMap.from_tensors({"feature.mean": torch.zeros(3), "feature.scale": torch.ones(3)}, 2, 0, ELSEWHERE)
    for made in (fitted, read):
        assert made.mean.device == made.scale.device == made.projection.device == ELSEWHERE


def test_a_projection_is_drawn_from_its_seed_and_divided_by_the_root_of_the_width() -> None:
    drawn = torch.randn(4, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(FeatureMap.draw(4, 3, 7), drawn / 2)
    ridge = RandomRidge(4, 3, 7, CPU)
    assert torch.equal(ridge.projection, drawn)
    assert (ridge.sums.shape, ridge.penalty) == ((0, 3), 1.0)


def test_sums_begin_with_the_matrix_given() -> None:
    gram = Gram.zeros(2, CPU)
    assert RidgeStatistics.empty(2, 0, CPU, gram).gram is gram


def test_the_penalty_of_one_example_or_none_is_that_of_one() -> None:
    assert [ridge_share(0.1, 4, examples) for examples in (0, 1, 2)] == pytest.approx([3.2, 3.2, 0.1 * 2**2.5])


def test_penalties_and_sharpnesses_that_are_tried() -> None:
    shares, sharpnesses = leave_one_out._SHARES, leave_one_out._SHARPNESSES
    assert (shares[0], shares[2], shares[-1], len(shares)) == pytest.approx((1e-4, 1e-3, 1.0, 9))
    assert (sharpnesses[0], sharpnesses[2], sharpnesses[-1], len(sharpnesses)) == pytest.approx((1.0, 2.0, 64.0, 13))


# -- what contenders keep ---------------------------------------------------------------------------------


def test_a_class_without_examples_has_a_mean_of_zero() -> None:
    means = class_means(torch.tensor([[4.0, 2.0], [2.0, 0.0]]), torch.tensor([1, 1]), 3)
    assert means.tolist() == [[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]]


def test_the_covariance_of_two_examples_is_divided_by_one() -> None:
    root = Gaussian.measure(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).root
    torch.testing.assert_close(root @ root.T, torch.tensor([[2.0001, 0.0], [0.0, 1e-4]]), rtol=1e-6, atol=0)


def test_a_task_without_its_last_class_counts_nothing_for_it() -> None:
    ridge = RandomRidge(2, 3, 0, CPU)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ridge.add(features, torch.tensor([0, 1, 1]), 3)
    expanded = ridge.expand(features)
    torch.testing.assert_close(ridge.sums, torch.stack([expanded[0], expanded[1] + expanded[2], torch.zeros(3)]))


@pytest.mark.parametrize("width", [1, 2])
def test_two_examples_that_agree_ask_for_the_least_penalty(width: int) -> None:
    same = torch.zeros(2, width)
    same[:, 0] = 1  # each is foretold by the other, as 1 / (1 + penalty)
    assert best_penalty(same, torch.ones(2, 1)) == 1e-8


def test_a_system_that_is_not_positive_in_single_precision_is_solved_all_the_same() -> None:
    ridge = RandomRidge(2, 2, 0, CPU)
    ridge.gram, ridge.sums = torch.diag(torch.tensor([3.0, -2.0])), torch.tensor([[4.0, 1.0], [8.0, 3.0]])
    assert ridge.solve().tolist() == [[1.0, -1.0], [2.0, -3.0]]  # the penalty of 1 makes it diag(4, -1)
    assert ridge.solve().dtype == torch.float32


def test_refinement_brings_solutions_nearer_to_the_exact_ones() -> None:
    ridge, plain, refined = RandomRidge(2, 8, 0, CPU), 0.0, 0.0
    ridge.penalty = 1e-4
    for seed in range(20):
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -2, 8)
        ridge.gram, ridge.sums = x.T @ x, x.sum(dim=0)[None]
        system = ridge.gram + ridge.penalty * torch.eye(8)
        exact = torch.linalg.solve(system.double(), ridge.sums.T.double()).T
        once = torch.cholesky_solve(ridge.sums.T, torch.linalg.cholesky(system)).T
        plain, refined = plain + float((once - exact).norm()), refined + float((ridge.solve() - exact).norm())
    assert refined < plain  # by a quarter; twice as far where the step goes the wrong way


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_the_map_of_a_drift_is_pulled_to_the_identity_by_a_tenth_of_the_variance(size: float) -> None:
    old, new = size * torch.tensor([[-1.0], [1.0]]), size * torch.tensor([[2.0], [8.0]])
    drift = fit_drift(old, new)
    # about the means features grow by 2: sum of products 2 x 2 over a sum of squares of 2 and a tenth of it
    assert float(drift.map) == pytest.approx(1 + 4 / 2.2)
    assert (float(drift.before), float(drift.after)) == pytest.approx((0.0, 5 * size))


def test_statistics_that_are_moved_joined_or_pooled_keep_their_counts() -> None:
    one = ClassStatistics(torch.tensor([[2.0], [3.0]]), torch.tensor([1.0, 4.0]), torch.tensor([[6.0]]))
    moved = one.moved(Drift(torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([[3.0]])))
    assert (moved.means.tolist(), moved.counts.tolist()) == ([[13.0], [16.0]], [1.0, 4.0])
    assert moved.scatter.tolist() == [[54.0]]
    assert one.joined(one).counts.tolist() == [1.0, 4.0, 1.0, 4.0]
    pooled = one.by_class(torch.tensor([1, 0]), 3)
    assert (pooled.means.tolist(), pooled.counts.tolist()) == ([[3.0], [2.0], [0.0]], [4.0, 1.0, 0.0])


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_discriminant_is_shrunk_by_a_share_of_the_mean_variance(size: float) -> None:
    scatter = 10 * size * torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    head = ClassStatistics(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]), scatter).discriminant(0.5)
    assert (head.weight * size).tolist() == [pytest.approx([3 / 2, 4 / 4])]
    assert float(head.bias * size) == pytest.approx(-0.5 * (9 / 2 + 16 / 4))


def test_statistics_lie_on_the_device_of_what_they_are_made_of() -> None:
    one = ClassStatistics(*(torch.zeros(shape, device=ELSEWHERE) for shape in ((2, 3), (2,), (3, 3))))
    kept = ClassStatistics(torch.zeros(2, 3), torch.zeros(2), torch.zeros(3, 3)).to_tensors("x")
    pooled = one.by_class(torch.zeros(2, dtype=torch.int64, device=ELSEWHERE), 1)
    for made in (pooled, ClassStatistics.from_tensors(kept, "x", ELSEWHERE)):
        assert made.means.device == made.counts.device == made.scatter.device == ELSEWHERE
    features = torch.zeros(5, 3, device=ELSEWHERE)
    assert fit_drift(features, features).map.device == one.discriminant(0.1).weight.device == ELSEWHERE


# -- familiarity and the two views ------------------------------------------------------------------------


def test_a_class_of_one_image_is_one_and_small_features_are_shrunk_by_their_share() -> None:
    features = 0.1 * torch.tensor([[-2.0, 1.0], [0.0, 3.0], [4.0, 2.0]])
    sums = torch.stack([features[0] + features[1], features[2]])
    found = Familiarity.of_sums(features.T @ features, sums, torch.tensor([2.0, 1.0]))
    assert found.mean.tolist() == pytest.approx([0.2 / 3, 0.2])
    # inside classes 0.01 x (2, 2; 2, 2) / 3, and on the diagonal 0.3 of the mean variance more
    within = 0.01 * torch.tensor([[2.6, 2.0], [2.0, 2.6]], dtype=torch.double) / 3
    torch.testing.assert_close(found.within @ found.within.T, within, rtol=1e-5, atol=0)
    assert float(found(features[2:])) == pytest.approx(1.0)  # there the single image is its class's mean


def test_scores_of_those_kept_out_where_a_class_is_missing() -> None:
    features = 0.1 * torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [5.0, 7.0]])
    examples = Examples(features, torch.tensor([0, 0, 1, 2]), torch.tensor([False, False, False, True]))
    # deviations -0.2, 0, 0.2 and none in the second feature: squares 0.08, penalty 0.25 x 0.08 / 2; prior 2/3, 1/3, 0
    # weights -0.2 / 0.09 and 0.2 / 0.09, 0.3 from the mean
    scores = examples.scores(0.25, 3)
    assert scores.tolist() == [pytest.approx([2 / 3 - 2 / 3, 1 / 3 + 2 / 3, 0.0], abs=1e-6)]


def test_two_images_kept_out_have_an_error() -> None:
    kept_out = torch.tensor([False, False, True, True])
    examples = Examples(torch.tensor([[0.0], [2.0], [2.0], [0.5]]), torch.tensor([0, 1, 1, 0]), kept_out)
    asked = judge(examples, examples, (0.1, 0.1), 2).asked
    assert math.isfinite(asked) and asked <= 0
