"""Facts about kinds of data: the signature by hand, and whom a new task joins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.algorithm import kinds
from treelora_cli.algorithm.kinds import (
    SAME_KIND,
    BranchChoice,
    Kind,
    KindSignature,
    TokenMoments,
    choose_branch,
    explain,
    kind_distance,
)


def moments(means: list[list[float]], deviation: float = 1.0) -> TokenMoments:
    """One block; class ``k`` has four tokens with this mean and deviation in every channel."""
    mean = np.array(means)[:, None, :]
    return TokenMoments(4 * mean, 4 * (mean**2 + deviation**2), np.full(len(means), 4.0))


def signature(mean: float, variance: float = 1.0, classes: int = 5) -> KindSignature:
    """A kind of one row and one channel."""
    return KindSignature(np.array([[mean]], np.float32), np.array([[variance]], np.float32), classes)


def at(mean: float, branch: str | None) -> Kind:
    return Kind(signature(mean), branch)


def test_signature_by_hand() -> None:
    # one class: mean (3, 4), deviation (1, 1), each of norm 1; nothing lies between classes
    one = moments([[3.0, 4.0]]).signature()
    assert one.means == pytest.approx(np.array([[0.6, 0.8], [0.5**0.5] * 2]))
    assert (one.variances.tolist(), one.classes) == ([[0.0, 0.0]] * 2, 1)
    # two classes, of norm 1 each: (0, 1) and (0.6, 0.8); variances 2 x 0.3^2 and 2 x 0.1^2
    two = moments([[0.0, 4.0], [3.0, 4.0]]).signature()
    assert two.means[0] == pytest.approx([0.3, 0.9])
    assert two.variances[0] == pytest.approx([0.18, 0.02])
    assert two.variances[1] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert two.classes == 2


def test_classes_count_alike_and_a_class_without_tokens_is_no_division_by_zero() -> None:
    few, many = moments([[1.0, 0.0], [0.0, 1.0]]), moments([[1.0, 0.0], [0.0, 1.0]])
    many.sums[1] *= 100
    many.squares[1] *= 100
    many.counts[1] *= 100
    assert many.signature().means == pytest.approx(few.signature().means)
    single = TokenMoments(np.array([[[3.0, 4.0]]]), np.array([[[9.0, 16.0]]]), np.ones(1)).signature()
    assert single.means.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]
    assert single.means.dtype == single.variances.dtype == np.float32
    none = TokenMoments(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), np.zeros(1)).signature()
    assert none.means.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_distance_by_hand() -> None:
    # pooled variance (4 x 1 + 2 x 4) / 6 = 2, of a difference of means 2 (1/5 + 1/3) = 16/15; 4^2 over it is 15
    apart = kind_distance(signature(0.0), signature(4.0, 4.0, 3))
    assert apart == pytest.approx(15 / (1 + 15 / 30))
    assert kind_distance(signature(1.0), signature(1.0, 4.0, 3)) == 0.0
    # of three classes one degree of freedom: 3^2 over 1 x (1/2 + 1)
    assert kind_distance(signature(0.0, 1.0, 2), signature(3.0, 0.0, 1)) == pytest.approx(6 / (1 + 6 / 30))
    # nothing to measure by: as far as can be, unless the means are the same
    single = KindSignature(np.array([[1.0]], np.float32), np.zeros((1, 1), np.float32), 1)
    assert kind_distance(single, signature(0.0, 0.0, 1)) == pytest.approx(30.0)
    assert kind_distance(single, single) == 0.0


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 9))
def test_distance_is_symmetric_and_bounded(seed: int, classes: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (
        TokenMoments(rng.normal(size=(k, 2, 3)), rng.uniform(1, 9, size=(k, 2, 3)), np.ones(k)).signature()
        for k in (classes, others)
    )
    assert kind_distance(one, other) == pytest.approx(kind_distance(other, one))
    assert 0.0 <= kind_distance(one, other) <= 30.0


def test_tasks_whose_classes_are_drawn_alike_lie_about_one_apart() -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=(6, 4000)) for _ in range(2)]
    first, second = (
        KindSignature(x.mean(0)[None].astype(np.float32), x.var(0, ddof=1)[None].astype(np.float32), 6) for x in drawn
    )
    assert 0.9 < kind_distance(first, second) < 1.2


def test_the_first_task_opens() -> None:
    assert choose_branch(signature(0), [], "auto", 0) == BranchChoice(False, None, None, None, "new")


def test_a_task_joins_the_nearest_of_its_kind_and_opens_beyond() -> None:
    earlier = [at(0.0, "a"), at(9.0, "b"), at(10.0, "b")]
    # variance 1, five classes each: a square over 2/5
    near = choose_branch(signature(0.8), earlier, "auto", 0)
    assert (near.joins, near.branch, near.nearest, near.reason) == (True, "a", 0, "kind")
    assert near.distance == pytest.approx(1.6 / (1 + 1.6 / 30))
    assert near.apart == tuple(kind_distance(signature(0.8), one.signature) for one in earlier)
    far = choose_branch(signature(1.0), earlier, "auto", 0)
    assert (far.joins, far.branch, far.nearest, far.reason) == (False, None, 0, "new")
    assert near.distance is not None and far.distance is not None
    assert near.distance < SAME_KIND < far.distance
    assert choose_branch(signature(9.6), earlier, "auto", 0).nearest == 2


def test_a_task_at_the_limit_is_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "SAME_KIND", kind_distance(signature(0.8), signature(0.0)))
    assert choose_branch(signature(0.8), [at(0.0, "a")], "auto", 0).joins


def test_who_lies_nearest_to_frozen_features_joins_them() -> None:
    choice = choose_branch(signature(0.1), [at(0.0, None), at(9.0, "b")], "auto", 0)
    assert (choice.joins, choice.branch, choice.nearest) == (True, None, 0)


def test_of_two_branches_of_its_kind_a_task_joins_that_whose_first_task_is_nearest() -> None:
    earlier = [at(0.0, "a"), at(2.0, "b"), at(1.2, "b"), at(0.1, None)]
    # nearest is the third, whose adapter was learned from the second's images, 1.3 away; the first is 0.7 away
    both = choose_branch(signature(0.7), [*earlier[:3], at(5.0, None)], "auto", 0)
    assert (both.joins, both.branch, both.nearest, both.reason) == (True, "a", 0, "kind")
    assert both.distance == kind_distance(signature(0.7), signature(0.0)) < SAME_KIND
    # the first is of another kind, though its branch's first task is nearer
    one = choose_branch(signature(0.95), earlier[:3], "auto", 0)
    assert (one.branch, one.nearest) == ("b", 2)
    # a later task of the better branch may be the nearest of it
    later = choose_branch(signature(0.6), [*earlier[:3], at(0.5, "a")], "auto", 0)
    assert (later.branch, later.nearest) == ("a", 3)
    # nearest to frozen features, but of a branch's kind, too: an adapter that did not pay says nothing of another's
    beside = choose_branch(signature(0.15), earlier, "auto", 0)
    assert (beside.joins, beside.branch, beside.nearest) == (True, "a", 0)


@given(st.permutations(["a", "b", "c", "d", "e"]))
def test_of_branches_as_near_a_task_joins_the_oldest(names: list[str]) -> None:
    assert choose_branch(signature(0.1), [at(0.0, name) for name in names], "auto", 0).branch == names[0]


def test_policies_and_the_bound() -> None:
    earlier = [at(0.0, "a"), at(5.0, "b"), at(9.0, None)]
    first = choose_branch(signature(5.0), earlier, "first", 0)
    assert (first.joins, first.branch, first.reason) == (True, "a", "first")
    always = choose_branch(signature(5.0), earlier, "always", 0)
    assert (always.joins, always.reason) == (False, "always")
    bound = choose_branch(signature(8.0), earlier, "always", 2)
    assert (bound.joins, bound.branch, bound.reason) == (True, "b", "bound")  # frozen features are no branch
    assert choose_branch(signature(20.0), earlier, "auto", 3).reason == "new"


def test_the_ablation_joins_at_random_but_opens_as_ever() -> None:
    earlier = [at(0.01 * index, f"b{index}") for index in range(8)]
    drawn = {choose_branch(signature(0), earlier, "auto", 0, np.random.default_rng(s)).branch for s in range(40)}
    assert drawn == {f"b{index}" for index in range(8)}
    assert not choose_branch(signature(30), earlier, "auto", 0, np.random.default_rng(0)).joins


def test_sentences() -> None:
    first = BranchChoice(False, None, None, None, "new")
    assert explain(first, "t", [], (0.1, 0.07), opened=True) == (
        "'t' opened a branch: it is the first task; with its adapter images kept out of the training are"
        " +0.100 nats likelier, 0.070 or more is asked."
    )
    assert explain(first, "t", [], None, opened=False) == (
        "'t' opened no branch: it is the first task; too few images could be kept out to say that an adapter pays."
    )
    assert explain(BranchChoice(False, None, 1, 2.5, "new"), "t", ["a", "b"], (-0.25, 0.07), opened=False) == (
        "'t' opened no branch: kind 2.50 from 'b', limit 2: another; with its adapter images kept out of the training"
        " are -0.250 nats likelier, 0.070 or more is asked."
    )
    joins = BranchChoice(True, "a", 0, 0.9, "kind")
    assert explain(joins, "t", ["a"], None, opened=True) == (
        "'t' joined branch 'a': kind 0.90 from 'a', limit 2: the same."
    )
    for reason, joined, sentence in (
        ("new", False, "'t' opened a branch: kind 2.50 from 'a', limit 2: another."),
        ("always", False, "'t' opened a branch: each task opens one (kind 2.50 from 'a', limit 2)."),
        ("first", True, "'t' joined branch 'a': all tasks use the first one's."),
        ("bound", True, "'t' joined branch 'a': no more branches may be opened, kind 2.50 from 'a', limit 2."),
    ):
        choice = BranchChoice(joined, "a" if joined else None, 0, 2.5, reason)
        assert explain(choice, "t", ["a"], None, opened=True) == sentence
    frozen = BranchChoice(True, None, 0, 0.9, "kind")
    assert explain(frozen, "t", ["a"], None, opened=False).startswith("'t' joined the frozen features: kind")
