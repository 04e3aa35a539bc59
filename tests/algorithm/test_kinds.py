"""Facts about kinds of data: the signature by hand, and whom a new task joins."""

from __future__ import annotations

import numpy as np
import pytest

from treelora_cli.algorithm.kinds import BranchChoice, Kind, TokenMoments, choose_branch, explain, kind_distance


def moments(means: list[list[float]], deviation: float = 1.0) -> TokenMoments:
    """One block; class ``k`` has four tokens with this mean and deviation in every channel."""
    mean = np.array(means)[:, None, :]
    return TokenMoments(4 * mean, 4 * (mean**2 + deviation**2), np.full(len(means), 4.0))


def at(angle: float, branch: str | None, halves: float = 0.1) -> Kind:
    """A kind on the unit circle."""
    return Kind(np.array([[np.cos(angle), np.sin(angle)]], dtype=np.float32), halves, branch)


def test_signature_by_hand() -> None:
    # one class: mean (3, 4), deviation (1, 1), each of norm 1
    assert moments([[3.0, 4.0]]).signature() == pytest.approx(np.array([[0.6, 0.8], [0.5**0.5] * 2]))
    # two classes of means 2 apart in the first channel: mean (1, 4); variance 1 + 1 and 1
    two = moments([[0.0, 4.0], [2.0, 4.0]]).signature()
    assert two[0] == pytest.approx(np.array([1, 4]) / 17**0.5)
    assert two[1] == pytest.approx(np.array([2**0.5, 1]) / 3**0.5)


def test_classes_count_alike_and_a_class_without_tokens_is_no_division_by_zero() -> None:
    few, many = moments([[1.0, 0.0], [0.0, 1.0]]), moments([[1.0, 0.0], [0.0, 1.0]])
    many.sums[1] *= 100
    many.squares[1] *= 100
    many.counts[1] *= 100
    assert many.signature() == pytest.approx(few.signature())
    none = TokenMoments(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), np.zeros(1))
    assert none.signature().tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_halves_of_equal_classes_do_not_differ_and_one_class_has_none() -> None:
    assert moments([[1.0, 2.0]] * 4).half_distance(0) == 0.0
    assert moments([[1.0, 2.0]]).half_distance(0) == 0.0
    two = moments([[1.0, 0.0], [0.0, 1.0]])
    # every halving is the one class against the other: rows 2 / (2 sqrt 2) and 0 apart
    assert two.half_distance(0) == pytest.approx(0.5 * 2 / (2 * 2**0.5))
    assert two.half_distance(0) == pytest.approx(kind_distance(two.signature([0]), two.signature([1])))


def test_the_first_task_opens() -> None:
    assert choose_branch(at(0, None), [], "auto", 0) == BranchChoice(False, None, None, None, None, "new")


def test_a_task_joins_the_nearest_within_its_own_spread_and_opens_beyond() -> None:
    earlier = [at(0.0, "a"), at(1.0, "b"), at(1.1, "b", halves=0.3)]
    near = choose_branch(at(0.1, None), earlier, "auto", 0)
    # the chord to (1, 0): (0.005 + 0.0998) / (2 sqrt 2); limit 0.8 x 0.1
    assert (near.joins, near.branch, near.nearest, near.reason) == (True, "a", 0, "kind")
    assert near.distance == pytest.approx((1 - np.cos(0.1) + np.sin(0.1)) / 8**0.5, abs=1e-6)
    assert near.limit == pytest.approx(0.08)
    far = choose_branch(at(0.45, None), earlier, "auto", 0)
    assert (far.joins, far.nearest, far.reason) == (False, 0, "new")
    # halves of the newcomer that differ more widen the limit; so do the branch's, on average 0.2
    assert choose_branch(at(0.45, None, halves=0.5), earlier, "auto", 0).joins
    assert choose_branch(at(1.3, None), earlier, "auto", 0).limit == pytest.approx(0.16)


def test_who_lies_nearest_to_frozen_features_joins_them() -> None:
    choice = choose_branch(at(0.02, None), [at(0.0, None), at(1.0, "b")], "auto", 0)
    assert (choice.joins, choice.branch, choice.nearest) == (True, None, 0)


def test_policies_and_the_bound() -> None:
    earlier = [at(0.0, "a"), at(1.0, "b"), at(2.0, None)]
    assert choose_branch(at(1.0, None), earlier, "first", 0).branch == "a"
    always = choose_branch(at(1.0, None), earlier, "always", 0)
    assert (always.joins, always.reason) == (False, "always")
    bound = choose_branch(at(1.9, None, halves=0.0), earlier, "always", 2)
    assert (bound.joins, bound.branch, bound.reason) == (True, "b", "bound")  # frozen features are no branch
    assert choose_branch(at(2.6, None), earlier, "auto", 3).reason == "new"


def test_the_ablation_joins_at_random_but_opens_as_ever() -> None:
    earlier = [at(0.01 * index, f"b{index}") for index in range(8)]
    drawn = {choose_branch(at(0.0, None), earlier, "auto", 0, np.random.default_rng(s)).branch for s in range(40)}
    assert drawn == {f"b{index}" for index in range(8)}
    assert not choose_branch(at(3.0, None), earlier, "auto", 0, np.random.default_rng(0)).joins


def test_sentences() -> None:
    first = BranchChoice(False, None, None, None, None, "new")
    assert explain(first, "t", [], (0.1, 0.07), opened=True) == (
        "'t' opened a branch: it is the first task; with its adapter images kept out of the training are"
        " +0.100 nats likelier, 0.070 or more pays."
    )
    assert explain(first, "t", [], None, opened=False).endswith(
        "it is the first task; too few images could be kept out to say that an adapter pays."
    )
    joins = BranchChoice(True, "a", 0, 0.02, 0.08, "kind")
    assert explain(joins, "t", ["a"], None, opened=True) == (
        "'t' joined branch 'a': kind 0.020 from 'a', limit 0.080: the same."
    )
    frozen = BranchChoice(True, None, 0, 0.02, 0.08, "kind")
    assert explain(frozen, "t", ["a"], None, opened=False).startswith("'t' joined the frozen features: kind")
