"""Distances and cuts worked out by hand, at the edges where a comparison, a type or a sign decides."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from treelora_cli.algorithm import distances, split
from treelora_cli.algorithm.distances import distances_to_all, l1_distance, nearest_neighbours, spread_by_layer
from treelora_cli.algorithm.nodes import grow, number
from treelora_cli.algorithm.split import Cut, halve, median_l1_cut, principal_gap_cut


def rows(values: ArrayLike) -> NDArray[np.float32]:
    """One layer of tasks: `(n, m)`, or `(n,)` for tasks on a line."""
    found = np.array(values, dtype=np.float32)
    return found[:, None] if found.ndim == 1 else found


def sides(cut: Cut | None) -> tuple[list[int], list[int]]:
    """The two sides of a cut that there is."""
    assert cut is not None
    return cut.left.tolist(), cut.right.tolist()


# -- distances ---------------------------------------------------------------------------------------------------------


def test_distances_are_summed_in_double_precision() -> None:
    long = rows([[2.0**24, 1.0]])  # in single precision the sum of the two is the first
    assert l1_distance(long, np.zeros_like(long)).tolist() == pytest.approx([(2.0**24 + 1) / (2 * 2**0.5)], rel=1e-12)


def test_the_mean_from_which_a_spread_is_measured_is_taken_in_double_precision() -> None:
    # mean 5592406; in single precision the ones are lost on the way to it. Distances are half the gaps
    assert spread_by_layer(rows([2.0**24, 1, 1])[:, None]).tolist() == [5592405.0 + 2796202.5]


def test_a_query_is_rounded_as_signatures_are() -> None:
    assert distances_to_all(rows([0.1])[:, None], np.array([[[0.1]]])).tolist() == [[[0.0]]]


def test_distances_block_by_block_are_those_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    wanted = l1_distance(values[None], values[:2, None])
    for entries in (1, 12, 100):  # one task a block, two, all
        monkeypatch.setattr(distances, "_BLOCK_ENTRIES", entries)
        np.testing.assert_allclose(distances_to_all(values, values[:2]), wanted, rtol=1e-6)


def test_a_nearest_task_is_looked_for_among_the_nearest_by_l2() -> None:
    # eleven tasks, so not all can be compared; 100 is beside 101, and ten lie half as far again from zero
    neighbour, distance = nearest_neighbours(rows([100, 101, *range(150, 159)])[:, None])
    assert (neighbour[0], distance[0]) == (1, 0.5)


def test_up_to_nine_tasks_the_nearest_is_exact_and_another() -> None:
    for seed in range(30):
        values = np.random.default_rng(seed).normal(size=(9, 1, 2)).astype(np.float32)
        apart = l1_distance(values[:, None], values[None]).mean(axis=2)
        np.fill_diagonal(apart, np.inf)
        assert nearest_neighbours(values)[0].tolist() == apart.argmin(axis=1).tolist()


# -- the published cut -------------------------------------------------------------------------------------------------


def test_a_distance_at_the_edge_of_a_tie_is_a_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_TIE", 0.25)  # of the largest, which is 4 in both
    # distances 4, 2 and 1, the median 1: what is 2 ties with it and goes left
    assert sides(median_l1_cut(rows([-8, 8, -4, 4, -2, 2, -2, 2, -2, 2])))[1] == [0, 1]
    # distances 4, 3 and 0, the median 4 and nothing above: what is 3 ties with it and goes right
    assert sides(median_l1_cut(rows([-8, 8, -8, 8, -6, 6, 0])))[0] == [6]


# -- the cut at the widest gap -----------------------------------------------------------------------------------------


def test_a_gap_at_the_edge_of_a_tie_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # gaps 1, 1, 1, 4, 0.5, 0.5, 8 over 16: only the last leaves a side with less than a quarter
    line = rows([0, 1, 2, 3, 7, 7.5, 8, 16])
    assert sides(principal_gap_cut(line, np.arange(8)))[1] == [4, 5, 6, 7]
    monkeypatch.setattr(split, "_TIE", 0.25)  # a gap of 4 is a tie now, as all the smaller ones are
    assert sides(principal_gap_cut(line, np.arange(8)))[1] == [7]


def test_positions_are_around_the_mean_of_the_tasks_not_of_the_groups() -> None:
    cut = principal_gap_cut(rows([0, 0, 0, 8]), np.array([0, 0, 0, 3]))
    assert sides(cut) == ([0, 1, 2], [3])
    assert cut is not None
    assert cut.threshold == 2.0  # between -2 and 6


def test_a_group_weighs_as_much_as_it_has_tasks() -> None:
    # two single tasks at 3 and -3 on one axis, two groups of nine at 2 and -2 on the other: 18 against 72
    values = rows([[3, 0], [-3, 0], *[[0, -2]] * 9, *[[0, 2]] * 9])
    labels = np.array([0, 1, *[2] * 9, *[3] * 9])
    assert sides(principal_gap_cut(values, labels))[0] == list(range(2, 11))


def test_a_position_is_a_length_along_the_direction() -> None:
    cut = principal_gap_cut(rows([[0, 0, 0], [3, 4, 0], [30, 40, 0]]), np.arange(3))
    assert sides(cut) == ([0, 1], [2])
    assert cut is not None
    assert cut.threshold == pytest.approx((-40 / 3 + 95 / 3) / 2)  # 0, 5 and 50 around their mean of 55 / 3


@pytest.mark.parametrize("count", [3, 30])  # fewer rows than columns, and more
def test_the_largest_entry_of_the_direction_is_positive(count: int) -> None:
    for seed in range(8):
        direction = np.random.default_rng(seed).normal(size=6)
        direction *= np.sign(direction[np.abs(direction).argmax()])
        values = rows(np.arange(count)[:, None] * direction)
        assert 0 in sides(principal_gap_cut(values, np.arange(count)))[0]
        assert sides(halve(values))[0] == list(range((count + 1) // 2))


# -- halving -----------------------------------------------------------------------------------------------------------


def test_halving_leaves_equals_in_their_order() -> None:
    alike = halve(rows([7.0] * 3))
    assert (sides(alike), alike.threshold) == (([0, 1], [2]), 0.0)
    ones = np.random.default_rng(0).integers(0, 2, 201)
    kept = np.argsort(ones, kind="stable")[:101]  # the zeros and the first ones, or the first zeros
    assert sides(halve(rows(ones)))[0] == sorted(kept.tolist())


def test_halving_does_not_see_what_all_have_in_common() -> None:
    apart, beside = halve(rows([[0, 0], [0, 7], [0, 1], [0, 3]])), halve(rows([[90, 0], [90, 7], [90, 1], [90, 3]]))
    assert sides(apart) == sides(beside) == ([0, 2], [1, 3])
    assert beside.threshold == pytest.approx(apart.threshold)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_halving_goes_along_the_positive_direction_at_any_scale(scale: float) -> None:
    assert sides(halve(rows([scale, -scale]))) == ([1], [0])
    assert sides(halve(rows([3 * scale, 0, 2 * scale, scale]))) == ([1, 3], [0, 2])


# -- growing -----------------------------------------------------------------------------------------------------------


def test_a_node_is_cut_on_the_layer_of_its_depth_and_a_leaf_stands_on_its_own() -> None:
    # the first layer could cut 0 from 1, too; the second puts 0 beside 2 and 1 beside 3
    values = np.zeros((4, 4, 1), dtype=np.float32)
    values[:, 0, 0], values[:, 1, 0] = [0, 1, 8, 9], [0, 8, 0, 8]
    nodes, _ = number(grow(values, np.arange(4), 0, 2, "median-l1"), values)
    assert [(node.depth, node.layer) for node in nodes] == [(0, 0), (1, 1), (1, 1), (2, 2), (2, 2), (2, 2), (2, 2)]
