"""Closed-form heads: equal to solving on the raw data, in any order of arrival."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from conftest import plain_runtime
from torch import Tensor

from treelora_cli.backend.runtime import Runtime
from treelora_cli.heads.gaussians import ClassStatistics, fit_drift
from treelora_cli.heads.gram import Gram, HalfGram, NotPositiveError
from treelora_cli.heads.ridge import FeatureMap, LinearHead, RidgeStatistics, ridge_share

CPU = torch.device("cpu")


def sample(count: int = 60, width: int = 6, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = torch.randn(count, width, generator=generator) + labels[:, None] * torch.linspace(-1, 1, width)
    return features, labels


def ridge_by_hand(phi: Tensor, labels: Tensor, classes: int, share: float) -> LinearHead:
    """Centred ridge regression on the examples themselves."""
    x, y = phi.double(), torch.nn.functional.one_hot(labels, classes).double()
    centred = x - x.mean(dim=0)
    gram = centred.T @ centred
    gram += share * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(dim=0))).T
    return LinearHead(weight.float(), (y.mean(dim=0) - weight @ x.mean(dim=0)).float())


# -- the ridge head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_solving_from_sums_equals_solving_on_the_data(share: float) -> None:
    features, labels = sample()
    statistics = RidgeStatistics.empty(6, 3, CPU)
    statistics.add(features, labels)
    found, expected = statistics.solve(share), ridge_by_hand(features, labels, 3, share)
    torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.bias, expected.bias, atol=1e-5, rtol=1e-4)


def test_examples_that_arrive_in_parts_give_the_joint_solution() -> None:
    features, labels = sample()
    joint, parts = RidgeStatistics.empty(6, 3, CPU), RidgeStatistics.empty(6, 3, CPU)
    joint.add(features, labels)
    for rows in torch.randperm(60, generator=torch.Generator().manual_seed(1)).split(7):
        parts.add(features[rows], labels[rows])
    torch.testing.assert_close(parts.solve(0.1).weight, joint.solve(0.1).weight, atol=1e-5, rtol=1e-4)


def test_tasks_that_arrive_one_after_the_other_give_the_joint_solution() -> None:
    features, labels = sample()
    first, second = labels < 2, labels == 2
    old, new = RidgeStatistics.empty(6, 2, CPU), RidgeStatistics.empty(6, 1, CPU)
    old.add(features[first], labels[first])
    new.add(features[second], torch.zeros(int(second.sum()), dtype=torch.int64))
    streamed = RidgeStatistics(
        old.gram.like(old.gram.values + new.gram.values),
        torch.cat([old.sums, new.sums]),
        torch.cat([old.counts, new.counts]),
    ).solve(0.1)
    expected = ridge_by_hand(features, labels, 3, 0.1)
    torch.testing.assert_close(streamed.weight, expected.weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(streamed(features), expected(features), atol=1e-4, rtol=1e-4)


def test_no_ridge_on_separable_data_reproduces_the_indicators() -> None:
    features = torch.eye(4)
    statistics = RidgeStatistics.empty(4, 4, CPU)
    statistics.add(features, torch.arange(4))
    torch.testing.assert_close(statistics.solve(0.0)(features), torch.eye(4), atol=1e-3, rtol=1e-3)


def test_solving_in_place_overwrites_the_gram_matrix_and_needs_no_other() -> None:
    features, labels = sample()
    kept = RidgeStatistics.empty(6, 3, CPU)
    kept.add(features, labels)
    before = kept.gram.values.clone()
    used = RidgeStatistics(kept.gram.like(before.clone()), kept.sums, kept.counts)
    place = used.gram.values.data_ptr()
    solved, again = kept.solve(0.1), used.solve_(0.1, unasked)
    assert torch.equal(kept.gram.values, before)
    assert used.gram.values.data_ptr() == place and not torch.equal(used.gram.values, before)
    assert torch.equal(solved.weight, again.weight) and torch.equal(solved.bias, again.bias)


def unasked() -> Gram:
    raise AssertionError("single precision did not do")


def test_what_single_precision_cannot_solve_is_solved_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample()
    statistics = RidgeStatistics.empty(6, 3, CPU)
    statistics.add(features, labels)
    before = statistics.gram.like(statistics.gram.values.clone())

    def fail(gram: HalfGram, _right: Tensor) -> Tensor:
        gram.values.fill_(float("nan"))  # it was overwritten
        raise NotPositiveError

    monkeypatch.setattr(HalfGram, "solve_", fail)
    expected = ridge_by_hand(features, labels, 3, 0.1)
    for found in (statistics.solve(0.1), statistics.solve_(0.1, lambda: before)):
        torch.testing.assert_close(found.weight, expected.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.bias, expected.bias, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prior", [None, "beside", "within"])
def test_sums_over_processes_count_what_came_before_once(prior: str | None) -> None:
    phi, columns = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
    before = Gram.zeros(2, CPU)
    before.add_(torch.tensor([[10.0, 0.0]]))
    own = RidgeStatistics.empty(2, 1, CPU, before if prior == "within" else None)
    own.add(phi, columns)
    two = cast("Runtime", SimpleNamespace(sum=lambda tensor: tensor if prior == "within" else 2 * tensor))
    total = own.over_processes(None if prior is None else before, two)
    # two processes with the same example; or one, whose sums were added to those before
    wanted = {None: [2.0, 8.0], "beside": [102.0, 8.0], "within": [101.0, 4.0]}[prior]
    assert total.gram.diagonal().tolist() == wanted
    assert total.counts.tolist() == [1.0 if prior == "within" else 2.0]
    assert total.sums.tolist() == [[1.0, 2.0] if prior == "within" else [2.0, 4.0]]


def test_the_feature_map_by_hand() -> None:
    drawn = FeatureMap.of_moments(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), 3, 5)
    expanded = drawn(torch.tensor([[3.0, 1.0]]))
    z = torch.tensor([[2.0 / 2.003, -1.0 / 4.003]])  # by the deviation and a thousandth of the mean one
    torch.testing.assert_close(expanded[:, :2], z)
    torch.testing.assert_close(expanded[:, 2:], torch.nn.functional.gelu(z @ drawn.projection))


def test_the_feature_map_is_redrawn_from_its_seed() -> None:
    features, _ = sample()
    drawn = FeatureMap.of_moments(features.mean(dim=0), features.std(dim=0), 20, 5)
    assert drawn(features).shape == (60, drawn.width)
    again = FeatureMap.from_tensors(drawn.to_tensors(), 20, 5, CPU)
    assert torch.equal(again(features), drawn(features))
    assert not torch.equal(FeatureMap.from_tensors(drawn.to_tensors(), 20, 6, CPU)(features), drawn(features))


def test_two_processes_fit_the_map_that_one_would() -> None:
    features, _ = sample()
    mine, theirs = features[:20], features[20:]
    whole = FeatureMap.fit(features, 20, 5, lambda part: part)
    mean, variance = features.mean(dim=0), features.var(dim=0, correction=0)
    others = iter([torch.tensor([40.0]), theirs.sum(dim=0), (theirs - mean).square().sum(dim=0)])
    shared = FeatureMap.fit(mine, 20, 5, lambda part: part + next(others))
    torch.testing.assert_close(whole.mean, mean)
    torch.testing.assert_close(whole(features), FeatureMap.of_moments(mean, variance.sqrt(), 20, 5)(features))
    torch.testing.assert_close(shared(features), whole(features))


def test_a_constant_feature_does_not_blow_up() -> None:
    features, _ = sample()
    features[:, 0] = 3.0
    drawn = FeatureMap.of_moments(features.mean(dim=0), features.std(dim=0), 20, 5)
    assert drawn(features).isfinite().all()


# -- drift and the discriminant ---------------------------------------------------------------------------


def test_drift_recovers_a_known_linear_map() -> None:
    old, _ = sample(400, 5)
    generator = torch.Generator().manual_seed(3)
    turn = torch.eye(5) + 0.3 * torch.randn(5, 5, generator=generator)
    shift = torch.randn(5, generator=generator)
    drift = fit_drift(old, old @ turn + shift, ridge=1e-6)
    torch.testing.assert_close(drift.map, turn, atol=1e-3, rtol=1e-3)
    other, _ = sample(10, 5, seed=9)
    moved = (other - drift.before) @ drift.map + drift.after
    torch.testing.assert_close(moved, other @ turn + shift, atol=1e-2, rtol=1e-3)


def test_drift_of_an_unchanged_network_is_the_identity() -> None:
    old, _ = sample()
    drift = fit_drift(old, old)
    torch.testing.assert_close(drift.map, torch.eye(6))
    torch.testing.assert_close(drift.before, drift.after)


def test_drift_stays_near_the_identity_where_data_is_thin() -> None:
    old, _ = sample(3, 20)
    drift = fit_drift(old, old + 1.0)
    torch.testing.assert_close(drift.map, torch.eye(20), atol=1e-4, rtol=0)
    torch.testing.assert_close(drift.after - drift.before, torch.ones(20))


def test_class_statistics_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 4.0]])
    found = ClassStatistics.measure(features, torch.tensor([0, 0, 1]), 2, plain_runtime())
    assert found.means.tolist() == [[1.0, 0.0], [10.0, 4.0]]
    assert found.counts.tolist() == [2.0, 1.0]
    assert found.scatter.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    # another process has the last class
    more = ClassStatistics.measure(features, torch.tensor([0, 0, 1]), 3, plain_runtime())
    assert (more.means.tolist(), more.counts.tolist()) == ([[1.0, 0.0], [10.0, 4.0], [0.0, 0.0]], [2.0, 1.0, 0.0])


def test_moved_statistics_are_those_of_the_moved_features() -> None:
    features, labels = sample(300, 4)
    turn = torch.eye(4) + 0.2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    old = ClassStatistics.measure(features, labels, 3, plain_runtime())
    new = ClassStatistics.measure(features @ turn + 2.0, labels, 3, plain_runtime())
    moved = old.moved(fit_drift(features, features @ turn + 2.0, ridge=1e-6))
    torch.testing.assert_close(moved.means, new.means, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(moved.scatter, new.scatter, atol=0.5, rtol=1e-2)


def test_columns_of_one_class_pool_to_the_statistics_of_all_its_examples() -> None:
    features, labels = sample(90, 4, classes=3)
    columns = ClassStatistics.measure(features, labels, 3, plain_runtime())
    pooled = columns.by_class(torch.tensor([0, 1, 0]), 2)
    direct = ClassStatistics.measure(features, torch.tensor([0, 1, 0])[labels], 2, plain_runtime())
    torch.testing.assert_close(pooled.means, direct.means)
    torch.testing.assert_close(pooled.counts, direct.counts)
    torch.testing.assert_close(pooled.scatter, direct.scatter, atol=1e-3, rtol=1e-4)


def test_joined_statistics_keep_both() -> None:
    features, labels = sample(30, 4)
    one = ClassStatistics.measure(features[labels < 2], labels[labels < 2], 2, plain_runtime())
    two = ClassStatistics.measure(features[labels == 2], labels[labels == 2] - 2, 1, plain_runtime())
    whole = ClassStatistics.measure(features, labels, 3, plain_runtime())
    torch.testing.assert_close(one.joined(two).means, whole.means)
    torch.testing.assert_close(one.joined(two).scatter, whole.scatter)
    back = ClassStatistics.from_tensors(whole.to_tensors("x"), "x", CPU)
    assert torch.equal(back.scatter, whole.scatter)


def test_discriminant_by_hand() -> None:
    statistics = ClassStatistics(
        torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([50.0, 50.0]), 100 * torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    )
    head = statistics.discriminant(1e-9)
    # covariance diag(1, 4): weight = mean / (1, 4), bias = -half of weight . mean
    torch.testing.assert_close(head.weight, torch.tensor([[0.0, 0.0], [2.0, 1.0]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(head.bias, torch.tensor([0.0, -4.0]), atol=1e-4, rtol=0)
    halfway = head(torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(halfway[0, 0], halfway[0, 1], atol=1e-4, rtol=0)


def test_discriminant_scores_are_log_densities_up_to_a_constant() -> None:
    features, labels = sample(200, 4)
    statistics = ClassStatistics.measure(features, labels, 3, plain_runtime())
    covariance = statistics.scatter / statistics.counts.sum()
    normals = [torch.distributions.MultivariateNormal(mean, covariance) for mean in statistics.means]
    expected = torch.stack([normal.log_prob(features) for normal in normals], dim=1)
    found = statistics.discriminant(1e-9)(features)
    torch.testing.assert_close(found - found[:, :1], expected - expected[:, :1], atol=1e-2, rtol=1e-2)


def test_ridge_share_grows_with_a_power_of_features_per_example_up_to_ten():
    assert ridge_share(0.36, 1000, 1000) == pytest.approx(0.36)
    assert ridge_share(0.36, 1000, 4000) == pytest.approx(0.36 / 32)
    assert ridge_share(0.36, 1000, 10) == 10.0


def test_four_views_of_an_image_count_as_two_images():
    assert ridge_share(0.36, 1000, 4 * 1000, 4) == pytest.approx(ridge_share(0.36, 1000, 2 * 1000))


def test_weighted_examples_count_as_if_they_were_there_so_often() -> None:
    generator = torch.Generator().manual_seed(0)
    phi, labels = torch.randn(6, 4, generator=generator), torch.tensor([0, 0, 0, 0, 1, 1])
    weighted = RidgeStatistics.empty(4, 2, torch.device("cpu"))
    weighted.add(phi, labels, torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0]))
    repeated = RidgeStatistics.empty(4, 2, torch.device("cpu"))
    repeated.add(torch.cat([phi, phi[4:], phi[4:]]), torch.cat([labels, labels[4:], labels[4:]]))
    assert weighted.counts.tolist() == repeated.counts.tolist() == [4.0, 6.0]
    half = RidgeStatistics.empty(4, 2, CPU)
    half.add(phi, labels, torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0, 3.0], dtype=torch.bfloat16))
    assert (half.counts.dtype, half.counts.tolist()) == (torch.float32, [4.0, 6.0])
    one, other = weighted.solve(0.1), repeated.solve(0.1)
    torch.testing.assert_close(one.weight, other.weight)
    torch.testing.assert_close(one.bias, other.bias)
