"""What contenders keep of classes and how it is solved: every formula against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from treelora_cli.heads.gaussians import (
    AlignSettings,
    Gaussian,
    RandomRidge,
    align,
    best_penalty,
    class_means,
    normalised_logits,
)
from treelora_cli.heads.ridge import LinearHead

WIDTH = 48
"""Random features in these tests."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_means_are_the_means() -> None:
    features = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    assert torch.equal(class_means(features, torch.tensor([1, 1, 0]), 2), torch.tensor([[5.0, 5.0], [2.0, 1.0]]))


def test_a_gaussian_has_the_mean_and_the_covariance_of_its_examples() -> None:
    features = normal(50, 4) @ normal(4, 4, seed=1) + 3
    measured = Gaussian.measure(features)
    torch.testing.assert_close(measured.mean, features.mean(dim=0))
    covariance = torch.cov(features.T)
    jitter = 1e-4 * max(1.0, float(covariance.diagonal().mean()))
    torch.testing.assert_close(
        measured.root @ measured.root.T, covariance + jitter * torch.eye(4), rtol=1e-4, atol=1e-5
    )
    drawn = measured.sample(40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0.05, atol=0.05)


def test_a_class_of_one_example_is_a_gaussian() -> None:
    measured = Gaussian.measure(torch.tensor([[2.0, 4.0]]))
    assert torch.equal(measured.mean, torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(measured.root, 0.01 * torch.eye(2))


def test_logits_are_divided_by_the_mean_of_their_tasks_norms() -> None:
    logits = torch.tensor([[3.0, 4.0, 1.0]])  # norms 5 and 1, mean 3
    torch.testing.assert_close(normalised_logits(logits, torch.tensor([0, 0, 1])), logits / 3)
    rows = torch.tensor([[3.0, 4.0, 1.0, 2.0], [0.0, 0.0, 5.0, 6.0]])  # norms 5, 1, 2 and 0, 5, 6
    wanted = rows / torch.tensor([[8 / 3], [11 / 3]])
    torch.testing.assert_close(normalised_logits(rows, torch.tensor([0, 0, 1, 2])), wanted)


def test_norms_are_held_above_zero() -> None:
    small = torch.tensor([[1e-7, 0.0]])  # norms 1e-7 and 0, each and 1e-7 more: mean 1.5e-7
    torch.testing.assert_close(normalised_logits(small, torch.tensor([0, 1])), torch.tensor([[2 / 3, 0.0]]))


@pytest.mark.parametrize("scale", [None, 0.1])
def test_alignment_raises_the_class_that_training_favoured_less(scale: float | None) -> None:
    gaussians = [Gaussian(torch.tensor([4.0 * one, 100.0, 0.0]), torch.eye(3)) for one in range(3)]
    biased = LinearHead(torch.zeros(3, 3), torch.tensor([5.0, 0.1, 0.1]))
    group = torch.tensor([0, 1, 1])
    settings = AlignSettings(epochs=100, lr=0.1, logit_scale=scale)
    head = align(biased, gaussians, range(3), settings, 0, group)
    drawn = [one.sample(500, torch.Generator().manual_seed(9)) for one in gaussians]
    right = [float((head(x).argmax(dim=1) == one).float().mean()) for one, x in enumerate(drawn)]
    assert min(right) > 0.9  # 0.97 is the best there is
    again = align(biased, gaussians, range(3), settings, 0, group)
    assert torch.equal(head.weight, again.weight)


def test_alignment_begins_at_the_head_and_does_not_depend_on_where_features_lie() -> None:
    scale, place = torch.tensor([1.0, 10.0, 100.0]), torch.tensor([0.0, 50.0, -7.0])
    plain = [Gaussian(normal(3, seed=one), torch.eye(3)) for one in range(2)]
    moved = [Gaussian(one.mean * scale + place, scale[:, None] * one.root) for one in plain]
    start = LinearHead(normal(2, 3), normal(2, seed=1))
    there = LinearHead(start.weight / scale, start.bias - (start.weight / scale) @ place)
    for epochs in (0, 3):
        settings = AlignSettings(epochs=epochs, lr=0.1, logit_scale=None)
        head, other = (align(one, two, range(2), settings, 0) for one, two in ((start, plain), (there, moved)))
        assert torch.allclose(head.weight, start.weight) == (epochs == 0)
        torch.testing.assert_close(other.weight * scale, head.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(other.bias + other.weight @ place, head.bias, rtol=1e-3, atol=1e-4)


def test_ridge_over_two_tasks_is_the_closed_form_on_all_examples() -> None:
    ridge = RandomRidge(5, WIDTH, seed=3, device=torch.device("cpu"))
    first, second = normal(60, 5), normal(90, 5, seed=1)
    classes = torch.arange(150) % 2 + 2 * (torch.arange(150) >= 60)
    ridge.add(first, classes[:60], 2)
    ridge.add(second, classes[60:], 4)
    expanded = torch.relu(torch.cat([first, second]).double() @ ridge.projection.double())
    targets = torch.nn.functional.one_hot(classes, 4).double()
    system = expanded.T @ expanded + ridge.penalty * torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(
        ridge.solve().double(), torch.linalg.solve(system, expanded.T @ targets).T, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("count", [40, 120])
def test_the_penalty_is_the_one_of_least_error_on_examples_left_out(count: int) -> None:
    expanded = torch.relu(normal(count, WIDTH)).double()
    expanded[:, -2:] = 0
    noisy = (expanded[:, :1] > 0.5).long().squeeze(1) ^ (torch.arange(count) % 4 == 0)
    targets = torch.nn.functional.one_hot(noisy.long(), 2).double()
    errors = {}
    for power in range(-8, 9):
        wrong = 0.0
        for left_out in range(count):
            fit = torch.arange(count) != left_out
            system = expanded[fit].T @ expanded[fit] + 10.0**power * torch.eye(WIDTH, dtype=torch.float64)
            weight = torch.linalg.solve(system, expanded[fit].T @ targets[fit])
            wrong += float((expanded[left_out] @ weight - targets[left_out]).square().sum())
        errors[10.0**power] = wrong
    assert best_penalty(expanded.float(), targets.float()) == min(errors, key=lambda one: errors[one])


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0])
def test_the_penalty_goes_with_the_square_of_the_features(scale: float) -> None:
    generator = torch.Generator().manual_seed(4)  # leaving out each of the six once, at scale 1, says 10
    expanded = scale * torch.randn(6, 2, generator=generator)
    targets = torch.randint(0, 2, (6, 1), generator=generator).float()
    assert best_penalty(expanded, targets) == pytest.approx(10 * scale**2)


def test_one_example_chooses_no_penalty() -> None:
    assert best_penalty(torch.ones(1, WIDTH), torch.ones(1, 1)) == 1.0
