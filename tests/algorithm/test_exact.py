"""Small cases by hand, at the edges where a sign or a comparison decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from treelora_cli.algorithm.arms import SearchArms, search_arms
from treelora_cli.algorithm.bandit import TreeBandit, _where_adequate, pull_summary
from treelora_cli.algorithm.budget import merge_to_budget
from treelora_cli.algorithm.distances import mutual_pairs
from treelora_cli.algorithm.nodes import grow, nodes_from_list
from treelora_cli.algorithm.pull import ramp, soft_threshold_
from treelora_cli.algorithm.signature import SketchSpec, sketch_layer
from treelora_cli.algorithm.split import _TIE, halve, median_l1_cut, principal_gap_cut
from treelora_cli.algorithm.tree import Tree, build_tree, extend_tree


def on_a_line(*values: float) -> np.ndarray:
    """Tasks of one layer of width 1."""
    return np.array(values, dtype=np.float32)[:, None, None]


FOUR = on_a_line(0, 1, 8, 9)


# -- the search nodes -------------------------------------------------------------------------------------


def test_search_nodes_below_the_tree_are_numbered_after_it_and_leaves_hold_one_task() -> None:
    arms = search_arms(build_tree(FOUR, 1))
    assert arms.tasks.tolist() == [-1, -1, -1, 2, 3, 0, 1]
    assert arms.children.tolist() == [[1, 2], [5, 6], [3, 4], [-1, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert arms.spreads[:, 0].tolist() == [4.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_a_leaf_of_one_task_is_an_arm_and_a_leaf_of_many_is_halved_until_it_is() -> None:
    arms = search_arms(build_tree(on_a_line(0, 1, 2, 3, 100, 101), 1))  # leaves: tasks 0 to 3, and 4 and 5
    assert arms.tasks.tolist() == [-1, -1, -1, 4, 5, -1, -1, 2, 3, 0, 1]
    inner = [[1, 2], [5, 6], [3, 4], [-1, -1], [-1, -1], [9, 10], [7, 8]]
    assert arms.children.tolist() == [*inner, *[[-1, -1]] * 4]
    assert [level.tolist() for level in arms.levels] == [[5, 6], [1, 2], [0]]
    single = search_arms(build_tree(on_a_line(0, 1, 8), 1))
    assert single.tasks.tolist() == [-1, -1, 2, 0, 1]
    assert single.children.tolist() == [[1, 2], [3, 4], [-1, -1], [-1, -1], [-1, -1]]


def test_a_step_looks_at_both_children_on_the_way_down_and_up() -> None:
    bandit = TreeBandit(build_tree(FOUR, 1))
    for step in (1, 2):
        bandit.step(np.array([[0.4]], dtype=np.float32))
        assert bandit.node_visits == 8 * step


@pytest.mark.parametrize(
    "children",
    [
        [[1, 2], [3, 4], [3, 4]],  # in order, but one node twice
        [[2, 3], [4, 5], [1, 6]],  # each once, but a child before its parent
        [[2, 3], [1, 4], [5, 6]],  # each once, but a node below itself
    ],
)
def test_search_nodes_that_are_no_tree_are_refused(children: list[list[int]]) -> None:
    tree = build_tree(FOUR, 1)
    arrays = search_arms(tree).to_arrays()
    arrays["tasks"] = np.array([-1, -1, -1, 0, 1, 2, 3])
    arrays["children"] = np.array([*children, *[[-1, -1]] * 4])
    with pytest.raises(ValueError, match="not a binary tree with parents before children"):
        SearchArms.from_arrays(arrays, tree)


# -- the search -------------------------------------------------------------------------------------------


def test_an_arm_with_exactly_a_quarter_of_the_most_pulls_counts() -> None:
    values = _where_adequate(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([[8, 2, 1], [1, 1, 1]]))
    assert values[0, :2].tolist() == [1.0, 2.0]
    assert np.isnan(values[0, 2])
    assert values[1].tolist() == [4.0, 5.0, 6.0]  # of its own layer's most


def test_nearest_takes_the_mean_of_an_arm_that_was_pulled_once_as_it_is() -> None:
    bandit = TreeBandit(build_tree(on_a_line(0, 1, 8), 1))
    layer, arms = bandit._layers[0], bandit.arms.arm_of
    layer.counts[arms], layer.sums[arms] = [4, 1, 1], [4 * 3.0, 2.0, 10.0]
    layer.counts[0] = 6
    bandit.step_count = 6
    assert bandit.mean_distances().tolist() == [[3.0, 2.0, 10.0]]
    assert bandit.nearest() == 1  # -3 below the mean of the means; task 0 is -2


def test_nearest_is_relative_to_each_layers_level() -> None:
    bandit = TreeBandit(build_tree(np.array([[[0], [0]], [[1], [1]]], dtype=np.float32), 1))
    arms = bandit.arms.arm_of
    for layer, pulls, means in zip(bandit._layers, ([1, 3], [3, 1]), ([1.0, 2.0], [10.0, 20.0]), strict=True):
        layer.counts[arms], layer.sums[arms] = pulls, np.multiply(pulls, means)
        layer.counts[0] = 4
    bandit.step_count = 4
    # around 1.5 and 15: task 0 is (-0.5 - 3 x 5) / 4, task 1 (3 x 0.5 + 5) / 4; pulls alone would say 1
    assert bandit.nearest() == 0


def test_nearest_weighs_a_layer_by_its_pulls() -> None:
    bandit = TreeBandit(build_tree(np.array([[[0], [0]], [[1], [1]]], dtype=np.float32), 1))
    arms = bandit.arms.arm_of
    for layer, pulls, means in zip(bandit._layers, (12, 1), ([1.0, 2.0], [20.0, 10.0]), strict=True):
        layer.counts[arms], layer.sums[arms] = pulls, np.multiply(pulls, means)
        layer.counts[0] = 2 * pulls
    bandit.step_count = 24
    # task 0 is (-12 x 0.5 + 5) / 13, task 1 the same with the other sign
    assert bandit.nearest() == 0


def test_a_saved_search_is_summed_up_without_its_tree() -> None:
    bandit = TreeBandit(build_tree(FOUR, 1))
    for value in (0.4, 8.4, 0.5):
        bandit.step(np.array([[value]], dtype=np.float32))
    pulls, means = pull_summary(bandit.state_arrays())
    assert np.array_equal(pulls, bandit.pulls())
    assert np.array_equal(means, bandit.mean_distances(), equal_nan=True)
    assert pulls.sum() == 3


def test_of_equal_children_the_first_is_the_witness() -> None:
    bandit = TreeBandit(build_tree(on_a_line(0, 1), 1))
    middle = np.array([[0.5]], dtype=np.float32)
    assert [bandit.step(middle)[0] for _ in range(2)] == [0, 1]
    assert bandit._layers[0].witness[0] == bandit.arms.children[0][0]


def test_a_nodes_witness_attains_the_least_bound_of_its_children() -> None:
    rng = np.random.default_rng(3)
    bandit = TreeBandit(build_tree(on_a_line(*rng.normal(size=24)), 3))
    for step in range(200):
        arm = bandit.arms.arm_of[bandit.step(rng.normal(size=(1, 1)).astype(np.float32))[0]]
        layer, own = bandit._layers[0], bandit._layers[0].own_bounds(step + 1)
        for node in bandit.arms.path_to(int(bandit.arms.tasks[arm]))[:-1]:
            bounds = [max(own[child], own[layer.witness[child]]) for child in bandit.arms.children[node]]
            assert own[layer.witness[node]] == min(bounds)


def test_an_exhaustive_search_pools_the_squares_of_its_later_pulls() -> None:
    bandit = TreeBandit(build_tree(FOUR, 1), search="exhaustive")
    for value in (2.0, 3.0):
        bandit.step(np.array([[value]], dtype=np.float32))
    # distances are half the gaps: (1, 0.5, 3, 3.5), then (1.5, 1, 2.5, 3): each arm 0.5 from its first
    assert bandit._layers[0].squares == pytest.approx(4 * 0.5**2 / 2)
    assert bandit._layers[0].repeats == 4
    bandit.step(np.array([[7.0]], dtype=np.float32))  # (3.5, 3, 0.5, 1): deviations of each arm -1, -0.5, 1.5
    assert bandit.mean_distances().tolist() == [[2.0, 1.5, 2.0, 2.5]]
    assert bandit._layers[0].squares == pytest.approx(4 * (1 + 0.25 + 2.25))
    assert (bandit._layers[0].repeats, bandit.node_visits) == (8, 3 * 7)


@pytest.mark.parametrize(("value", "place"), [(0.0, (0, 1)), (0.02, (2,))])
def test_first_pulls_choose_witnesses_as_before_the_first_step(value: float, place: tuple[int, ...]) -> None:
    # at step 1 bounds are the means: 0, 0 and 0.01 from 0; of equal bounds a node's own is the witness. At step 2 the
    # third arm, of one pull, would lie lower than the node of the other two
    bandit = TreeBandit(build_tree(on_a_line(0, 0, 0.02), 1))
    bandit.begin_with(np.array([[[value]]], dtype=np.float32))
    node = next(node for node in bandit.tree.nodes if node.members == place)
    assert bandit._layers[0].witness[0] == node.index


def test_of_equal_bounds_a_step_takes_the_first_child_and_a_nodes_own() -> None:
    # the bounds of the first step are the means
    node = next(node.index for node in build_tree(on_a_line(0, 0, 0.02), 1).nodes if node.members == (0, 1))
    for begun, seen, witness in ((0.0, 0.0, node), (0.02, 5.0, node)):
        bandit = TreeBandit(build_tree(on_a_line(0, 0, 0.02), 1))
        bandit.begin_with(np.array([[[begun]]], dtype=np.float32))
        bandit.step(np.array([[seen]], dtype=np.float32))  # the second time the third arm, which turns out far away
        assert bandit._layers[0].witness[0] == witness
    bandit = TreeBandit(build_tree(on_a_line(0, 1), 1))
    bandit.begin_with(np.array([[[0.5]]], dtype=np.float32))
    assert bandit.step(np.array([[0.5]], dtype=np.float32)) == [0]
    assert bandit._layers[0].witness[0] == bandit.arms.children[0][0]


def test_squares_of_an_arms_pulls_add_up() -> None:
    bandit = TreeBandit(build_tree(on_a_line(0), 1))
    for value in (0.0, 2.0, 4.0):
        bandit.step(np.array([[value]], dtype=np.float32))
    assert (bandit._layers[0].squares, bandit._layers[0].repeats) == (2.0, 2)  # distances 0, 1 and 2


def test_first_pulls_give_every_node_the_witness_of_the_exact_bounds() -> None:
    rng = np.random.default_rng(5)
    bandit = TreeBandit(build_tree(on_a_line(*(0.01 * rng.normal(size=24))), 3))
    layer = bandit._layers[0]
    layer.begin_with(np.abs(0.005 * rng.normal(size=(2, 24))), 50)
    own = layer.own_bounds(50)
    bound, inside = own.copy(), 0
    for level in bandit.arms.levels:
        for node in level:
            least = min(bound[child] for child in bandit.arms.children[node])
            assert own[layer.witness[node]] == least
            bound[node], inside = max(own[node], least), inside + int(own[node] > least)
    assert inside > 3  # nodes whose own bound is the greater


# -- the tree ---------------------------------------------------------------------------------------------


def test_two_tasks_are_each_others_nearest() -> None:
    assert mutual_pairs(on_a_line(0, 1)).tolist() == [0, 0]
    assert mutual_pairs(on_a_line(5)).tolist() == [0]
    assert mutual_pairs(on_a_line(0, 1, 8, 10)).tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(("depth", "layer"), [(0, 0), (2, 2), (9, 3)])
def test_a_node_stands_on_the_layer_of_its_depth_and_never_below_the_last(depth: int, layer: int) -> None:
    signatures = np.ones((1, 4, 2), dtype=np.float32)
    assert grow(signatures, np.array([0]), depth, 12, "median-l1").layer == layer


def test_halving_by_hand() -> None:
    even = halve(np.array([[0.0], [7.0], [1.0], [3.0]], dtype=np.float32))
    assert (even.left.tolist(), even.right.tolist()) == ([0, 2], [1, 3])
    # deviations -2.75, 4.25, -1.75, 0.25 times the sum of their squares over the largest; between the middle two
    assert even.threshold == pytest.approx(-0.75 * 28.75 / 4.25)
    odd = halve(np.array([[0.0], [5.0], [1.0]], dtype=np.float32))
    assert (odd.left.tolist(), odd.right.tolist()) == ([0, 2], [1])
    assert odd.threshold == pytest.approx(1.0 * 14 / 3)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_distances_tie_when_they_differ_by_less_than_a_share_of_the_largest(scale: float) -> None:
    little = _TIE / 10  # moves the mean, and so makes distances differ that would be equal
    cut = median_l1_cut(np.array([[little], [-1.0], [1.0]], dtype=np.float32) * np.float32(scale))
    assert cut is not None
    assert (cut.left.tolist(), cut.right.tolist()) == ([0], [1, 2])
    cut = median_l1_cut(np.array([[3.0], [-3.0], [1.0], [-1.0], [little]], dtype=np.float32) * np.float32(scale))
    assert cut is not None
    assert (cut.left.tolist(), cut.right.tolist()) == ([2, 3, 4], [0, 1])


def test_the_widest_gap_is_cut_in_its_middle() -> None:
    cut = principal_gap_cut(np.array([[0.0], [1.0], [10.0], [12.0]], dtype=np.float32), np.arange(4))
    assert cut is not None
    assert (cut.left.tolist(), cut.right.tolist()) == ([0, 1], [2, 3])
    assert cut.threshold == pytest.approx(-0.25)  # deviations from the mean 5.75: between -4.75 and 4.25


def test_a_stored_leaf_holds_no_task_beyond_the_last() -> None:
    records = build_tree(on_a_line(5, 5), 1).to_dict()["nodes"]
    assert [node.members for node in nodes_from_list(records, 2, 1, 1)] == [(0, 1)]
    with pytest.raises(ValueError, match="tree node 0: task 1, but 1 tasks"):
        nodes_from_list(records, 1, 1, 1)


def test_groups_that_are_merged_again_are_one_group() -> None:
    tree = build_tree(on_a_line(0, 1, 8, 9), 2)
    groups = merge_to_budget(tree, ["a", "b", "c", "d"], lambda task: str(task), 1, lambda pair, _: "+".join(pair))
    assert [(group.members, group.adapter) for group in groups] == [((0, 1, 2, 3), "0+1+2+3")]


def test_groups_are_merged_in_proportion_to_their_tasks() -> None:
    asked: list[tuple[list[str], list[float]]] = []

    def merge(pair: Sequence[str], sizes: Sequence[float]) -> str:
        asked.append((list(pair), list(sizes)))
        return "+".join(pair)

    merge_to_budget(build_tree(on_a_line(0, 1, 3, 9), 2), ["a", "b", "c", "d"], str, 1, merge)
    assert asked == [(["0", "1"], [1.0, 1.0]), (["0+1", "2"], [2.0, 1.0]), (["0+1+2", "3"], [3.0, 1.0])]
    asked.clear()
    merge_to_budget(build_tree(on_a_line(0, 5, 6, 6.5), 2), ["a", "b", "c", "c"], str, 1, merge)
    assert asked == [(["1", "2"], [1.0, 2.0]), (["0", "1+2"], [1.0, 3.0])]


def test_of_equal_tasks_the_distance_is_zero() -> None:
    assert build_tree(on_a_line(0, 5, 5), 1).nearest_leaves() == (1, 2, 0.0)


def test_trees_that_differ_in_one_thing_are_not_equal() -> None:
    tree = build_tree(FOUR, 1)
    assert tree == build_tree(FOUR, 1) and tree != 1
    for change in (
        {"signatures": FOUR + 1},
        {"nodes": tree.nodes[:2]},
        {"spreads": tree.spreads + 1},
        {"tree_depth": 2},
        {"split": "median-l1"},
        {"tasks_at_build": 3},
    ):
        assert tree != replace(tree, **change)


def test_a_small_tree_keeps_its_rule_when_a_task_comes() -> None:
    tree = build_tree(FOUR, 1, split="median-l1")
    assert tree.insert(np.array([[20.0]])) == build_tree(on_a_line(0, 1, 8, 9, 20), 1, split="median-l1")


def test_a_task_comes_beside_the_one_that_is_nearest_over_all_layers() -> None:
    # two groups of eight: ten apart on the first layer, one apart on the second, where the newcomer is the others' like
    values = [[[10.0 * (task >= 8) + 0.01 * task], [1.0 * (task < 8)]] for task in range(16)]
    tree = build_tree(np.array(values, dtype=np.float32), 1)
    assert [node.members for node in tree.leaves()] == [tuple(range(8)), tuple(range(8, 16))]
    grown = tree.insert(np.zeros((2, 1)))
    assert [node.members for node in grown.leaves()] == [(*range(8), 16), tuple(range(8, 16))]


def test_a_tree_is_extended_by_insertion_until_a_rebuild_is_due() -> None:
    values = np.random.default_rng(0).normal(size=(13, 2, 3)).astype(np.float32)
    tree = build_tree(values[:8], 2)
    for row in values[8:12]:
        inserted = tree.insert(row)
        tree = extend_tree(tree, row, 2, split="principal-gap")
        assert tree == inserted and tree.tasks_at_build == 8
    assert extend_tree(tree, values[12], 2, split="principal-gap") == build_tree(values, 2)
    assert extend_tree(tree, values[12], 1, split="principal-gap") == build_tree(values, 1)


# -- signatures and the pull ------------------------------------------------------------------------------


def test_a_sketch_may_have_one_number() -> None:
    assert SketchSpec(width=1, seed=0).width == 1
    with pytest.raises(ValueError, match="sketch width: expected 1 or more, got 0"):
        SketchSpec(width=0, seed=0)


def test_a_deviation_of_exactly_the_threshold_becomes_the_target() -> None:
    ours, theirs = [torch.tensor([1.0])], [torch.tensor([1e-8])]
    soft_threshold_(ours, theirs, 1.0)
    assert torch.equal(ours[0], theirs[0])


def test_a_proximal_step_between_other_shapes_is_refused_before_anything_changes() -> None:
    ours = [torch.ones(2), torch.ones(1)]
    with pytest.raises(ValueError, match="shape"):
        soft_threshold_(ours, [torch.zeros(2), torch.zeros(3)], 0.1)
    assert ours[0].tolist() == [1.0, 1.0]


def test_every_layer_has_a_sketch_of_its_own_that_stays_the_same() -> None:
    sketches = [
        sketch_layer(torch.arange(1.0, 13.0), SketchSpec(width=4, seed=2), layer).tolist() for layer in (0, 1, 2)
    ]
    assert sketches == [[-4.0, -1.0, 20.0, -5.0], [6.0, 11.0, -14.0, -17.0], [-12.0, 23.0, 22.0, -7.0]]


def test_a_gradient_as_long_as_the_sketch_is_kept_as_it_is() -> None:
    assert sketch_layer(torch.arange(4.0), SketchSpec(width=4), 0).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert sketch_layer(torch.zeros(0), SketchSpec(width=2), 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", [1, 4000])
def test_half_precision_gradients_are_summed_in_single_precision(width: int) -> None:
    sketch = sketch_layer(torch.ones(2000, dtype=torch.bfloat16), SketchSpec(width), 0)
    assert sketch.dtype == torch.float32
    assert torch.equal(sketch, sketch_layer(torch.ones(2000), SketchSpec(width), 0))


@pytest.mark.slow  # torch imports its compiler for tensors without data
def test_a_sketch_lies_on_the_device_of_its_gradient() -> None:
    there = torch.device("meta")
    for entries in (3, 12):
        assert sketch_layer(torch.zeros(entries, device=there), SketchSpec(width=4), 0).device == there


def test_a_ramp_of_one_step_is_over_after_it() -> None:
    assert [ramp(step, 1) for step in (0, 1, 2)] == [0.0, 1.0, 1.0]


def test_errors_of_a_stored_tree_name_the_tree() -> None:
    tree = build_tree(FOUR, 1)
    with pytest.raises(ValueError, match=r"^tree: .*more"):
        Tree.from_state({**tree.to_dict(), "more": 1}, tree.to_arrays())


def test_a_tree_holds_single_precision_and_at_least_one_layer() -> None:
    tree = build_tree(FOUR.astype(np.float64), 1)
    assert tree.signatures.dtype == np.float32
    assert build_tree(FOUR[:0], 1).tasks_at_build == 0
    with pytest.raises(ValueError, match=r"^signatures: expected shape \(T, D, m\), got \(1, 0, 3\)$"):
        build_tree(np.zeros((1, 0, 3)), 1)
    with pytest.raises(ValueError, match=r"^tasks_at_build: expected an integer of 0 or more, got -1$"):
        Tree.from_state({**tree.to_dict(), "tasks_at_build": -1}, tree.to_arrays())
