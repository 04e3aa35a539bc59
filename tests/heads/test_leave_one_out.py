"""Leaving out in closed form equals solving anew without the example."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from treelora_cli.backend.runtime import Runtime, Silent
from treelora_cli.heads import leave_one_out
from treelora_cli.heads.leave_one_out import LeaveOneOut


def sample(count: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + width)
    labels = torch.arange(count) % 3
    features = 2 + torch.randn(count, width, generator=generator) * torch.linspace(0.5, 3, width)
    features[:, :3] += torch.nn.functional.one_hot(labels, 3)
    return features, labels


def ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with a free intercept, on examples: weight (F, K) and intercept (K,)."""
    centred = x - x.mean(dim=0)
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(dim=0)))
    return weight, y.mean(dim=0) - x.mean(dim=0) @ weight


@pytest.mark.parametrize("width", [5, 18, 40])
def test_scores_and_head_equal_refits_by_hand(width: int) -> None:
    features, labels = sample(18, width)
    fitted = LeaveOneOut.fit(features, labels, 3)
    x = features.double()
    x = x / (x.std(dim=0) + 1e-2 * x.std(dim=0).mean())
    y = torch.nn.functional.one_hot(labels, 3).double()
    values = torch.linalg.eigvalsh((x - x.mean(dim=0)).T @ (x - x.mean(dim=0)))
    penalty = fitted.share * float(values[values > 1e-8].mean())
    left_out = []
    for place in range(len(x)):
        rest = torch.arange(len(x)) != place
        weight, intercept = ridge(x[rest], y[rest], penalty)
        left_out.append(x[place] @ weight + intercept)
    torch.testing.assert_close(fitted.scores, torch.stack(left_out).float(), rtol=1e-4, atol=1e-4)
    weight, intercept = ridge(x, y, penalty)
    torch.testing.assert_close(fitted.head(features), (x @ weight + intercept).float(), rtol=1e-4, atol=1e-4)
    right = torch.stack(left_out).argmax(dim=1) == labels
    assert fitted.accuracy(labels) == pytest.approx(float(right.double().mean()))


@pytest.mark.parametrize("apart", [0, 2])
def test_penalty_and_sharpness_are_the_best_of_those_tried(apart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample(30, 12)
    features[:, :3] += apart * torch.nn.functional.one_hot(labels, 3)
    chosen = LeaveOneOut.fit(features, labels, 3)
    wanted = torch.nn.functional.one_hot(labels, 3)
    errors = {}
    for share in leave_one_out._SHARES:
        monkeypatch.setattr(leave_one_out, "_SHARES", (share,))
        errors[share] = float((wanted - LeaveOneOut.fit(features, labels, 3).scores).square().sum())
    assert chosen.share == min(errors, key=errors.__getitem__)
    losses = {
        factor: float(torch.nn.functional.cross_entropy(factor * chosen.scores, labels))
        for factor in leave_one_out._SHARPNESSES
    }
    assert chosen.sharpness == min(losses, key=losses.__getitem__)


def test_many_wide_features_are_projected_and_the_head_reads_them_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave_one_out, "_WIDEST", 16)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(3, 40, generator=generator)[labels] + 0.1 * torch.randn(60, 40, generator=generator)
    fitted = LeaveOneOut.fit(features, labels, 3)
    assert fitted.head.weight.shape == (3, 40)
    assert torch.equal(fitted.head(features).argmax(dim=1), labels)
    assert fitted.accuracy(labels) == 1.0
    # on standardised features its weights are combinations of the 16 directions of seed 0
    deviation = features.std(dim=0)
    weight = (fitted.head.weight * (deviation + 1e-2 * deviation.mean())).T
    directions = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(directions @ torch.linalg.lstsq(directions, weight).solution, weight)


def test_as_many_features_as_are_kept_are_not_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = sample(18, 18)
    plain = LeaveOneOut.fit(features, labels, 3)
    monkeypatch.setattr(leave_one_out, "_WIDEST", 18)
    assert torch.equal(LeaveOneOut.fit(features, labels, 3).head.weight, plain.head.weight)


def test_a_class_without_examples_has_no_score() -> None:
    features, labels = sample(18, 5)
    fitted = LeaveOneOut.fit(features, labels, 4)
    assert fitted.head.weight.shape == (4, 5)
    torch.testing.assert_close(fitted.scores[:, 3], torch.zeros(18))


@pytest.mark.parametrize("width", [3, 10])
def test_constant_features_give_the_prior(width: int) -> None:
    labels = torch.tensor([0, 0, 0, 1])
    fitted = LeaveOneOut.fit(torch.ones(4, width), labels, 2)
    torch.testing.assert_close(fitted.head(torch.ones(1, width)), torch.tensor([[0.75, 0.25]]))
    # each by the other three: two of class 0 and one of class 1, or three of class 0
    torch.testing.assert_close(fitted.scores, torch.tensor([[2 / 3, 1 / 3]] * 3 + [[1.0, 0.0]]))
    assert fitted.share == leave_one_out._SHARES[0]  # of penalties that do as well, the least


def test_rows_of_unequal_processes_come_together_in_order() -> None:
    mine, theirs = torch.arange(6.0).reshape(3, 2), torch.arange(6.0, 10.0).reshape(2, 2)

    def gather(tensor: Tensor) -> Tensor:
        other = torch.tensor([2]) if tensor.ndim == 1 else torch.cat([theirs, torch.zeros(1, 2)])
        return torch.cat([tensor, other])

    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"), gather=gather)
    runtime = Runtime(accelerator=accelerator, offline=True, reporter=Silent())  # type: ignore[arg-type]
    assert torch.equal(runtime.gather_rows(mine), torch.arange(10.0).reshape(5, 2))
