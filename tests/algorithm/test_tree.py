"""Facts about the task tree: the splits by hand, what any tree must keep, and reading it back."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signatures import Signatures, normalised

from treelora_cli.algorithm.distances import l1_distance, mutual_pairs, nearest_neighbours
from treelora_cli.algorithm.split import RULES, halve, median_l1_cut, principal_gap_cut
from treelora_cli.algorithm.tree import Tree, build_tree


def random_signatures(tasks: int, layers: int = 4, width: int = 32, seed: int = 0) -> Signatures:
    """Unrelated tasks."""
    return normalised(np.random.default_rng(seed).standard_normal((tasks, layers, width)))


def paired_signatures(pairs: int, seed: int, layers: int = 12, width: int = 256) -> Signatures:
    """Tasks 2i and 2i + 1 are twins: scaled distance about 0.30, others about 0.57."""
    rng = np.random.default_rng(seed)
    shared = np.repeat(normalised(rng.standard_normal((pairs, layers, width))), 2, axis=0)
    own = normalised(rng.standard_normal((2 * pairs, layers, width)))
    return normalised(math.sqrt(0.73) * shared + math.sqrt(0.27) * own)


def line(*values: float) -> Signatures:
    """Tasks on a line: one layer of width 1, so a scaled distance is half the gap."""
    return np.array(values, dtype=np.float32)[:, None, None]


def groups(tree: Tree) -> set[frozenset[int]]:
    """The task sets of all nodes."""
    return {frozenset(node.members) for node in tree.nodes}


def twins_together(tree: Tree, pairs: int) -> float:
    """Share of twins whose lowest common ancestor is a leaf or holds nobody else."""
    together = 0
    for first in range(0, 2 * pairs, 2):
        node = tree.nodes[tree.lowest_common_ancestor(first, first + 1)]
        together += node.is_leaf or node.members == (first, first + 1)
    return together / pairs


def test_l1_distance_is_divided_by_two_root_width() -> None:
    first = np.array([1.0, 0.0, 0.0, 0.0])
    second = np.array([0.0, 1.0, 0.0, 0.0])
    assert l1_distance(first, second) == 2.0 / (2.0 * 2.0)
    constant = np.full(4, 0.5)
    assert l1_distance(constant, -constant) == 1.0
    assert l1_distance(first, first) == 0.0


def test_random_directions_lie_at_one_over_root_pi() -> None:
    rows = random_signatures(40, layers=1, width=512)[:, 0]
    distance = l1_distance(rows[:20], rows[20:]).mean()
    assert distance == pytest.approx(1 / math.sqrt(math.pi), abs=0.01)


@given(st.integers(0, 2**32 - 1), st.integers(1, 64))
@settings(max_examples=30, deadline=None)
def test_distance_of_unit_vectors_is_in_zero_one(seed: int, width: int) -> None:
    rows = random_signatures(8, layers=1, width=width, seed=seed)[:, 0]
    distances = l1_distance(rows[:, None], rows[None])
    assert distances.min() >= 0.0
    assert distances.max() <= 1.0 + 1e-6


def test_median_split_by_hand() -> None:
    # mean 3; distances 3, 2, 1, 6, halved; their median is (1 + 1.5) / 2
    tree = build_tree(line(0, 1, 2, 9), 1, split="median-l1")
    root, left, right = tree.nodes
    assert root.threshold == pytest.approx(1.25)
    assert (left.members, right.members) == ((1, 2), (0, 3))
    assert root.spread == pytest.approx(4.5)  # the bound of a pair: 3 + 1.5; 0 and 9 lie 4.5 apart
    assert left.spread == pytest.approx(0.5)
    assert right.spread == pytest.approx(4.5)


def test_median_split_of_two_tasks_is_always_a_tie_and_goes_by_index() -> None:
    cut = median_l1_cut(np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32))
    assert cut is not None
    assert (cut.left.tolist(), cut.right.tolist()) == ([0], [1])
    assert median_l1_cut(np.ones((2, 2), dtype=np.float32)) is None
    # mean 0; distances 0, 1, 1, 1, 1 halved: the median ties with the largest
    most = median_l1_cut(np.array([[0], [1], [-1], [1], [-1]], dtype=np.float32))
    assert most is not None
    assert most.left.tolist() == [0]


def test_principal_gap_split_by_hand() -> None:
    # mean 4.5; positions -4.5, -3.5, 3.5, 4.5; the widest gap is centred on 0
    tree = build_tree(line(8, 0, 9, 1), 1)
    root, left, right = tree.nodes
    assert root.threshold == pytest.approx(0.0)
    assert (left.members, right.members) == ((1, 3), (0, 2))
    assert root.spread == pytest.approx(4.5)
    assert left.spread == pytest.approx(0.5)


def test_principal_gap_keeps_a_quarter_on_each_side() -> None:
    # the widest gap, before 90, would leave one of eight alone; the next widest is 3 to 6
    layer = np.array([[0], [1], [2], [3], [6], [7], [8], [90]], dtype=np.float32)
    cut = principal_gap_cut(layer, np.arange(8))
    assert cut is not None
    assert cut.left.tolist() == [0, 1, 2, 3]


def test_principal_gap_does_not_part_a_label() -> None:
    layer = np.array([[0], [4], [5], [6]], dtype=np.float32)
    cut = principal_gap_cut(layer, np.array([0, 0, 2, 3]))
    assert cut is not None
    assert {tuple(cut.left), tuple(cut.right)} == {(0, 1), (2, 3)}


def test_halve_is_even_and_in_index_order_for_equal_rows() -> None:
    cut = halve(np.ones((5, 3), dtype=np.float32))
    assert (cut.left.tolist(), cut.right.tolist()) == ([0, 1, 2], [3, 4])


def test_a_node_splits_on_the_layer_of_its_depth() -> None:
    # layer 0 tells {0, 1} from {2, 3}, layer 1 tells 0 from 1 and 2 from 3
    values = np.array([[[0], [0]], [[0], [5]], [[9], [0]], [[9], [5]]], dtype=np.float32)
    tree = build_tree(values, 2)
    assert [node.layer for node in tree.nodes if not node.is_leaf] == [0, 1, 1]
    expected = [(0, 1, 2, 3), (0, 1), (2, 3), (0,), (1,), (2,), (3,)]
    assert groups(tree) == {frozenset(group) for group in expected}


def test_a_layer_on_which_tasks_are_equal_is_passed_over() -> None:
    values = np.array([[[1], [0]], [[1], [5]]], dtype=np.float32)
    tree = build_tree(values, 2)
    assert tree.nodes[0].layer == 1
    assert tree.height == 1


@pytest.mark.parametrize("split", RULES)
def test_no_task_and_one_task(split: Any) -> None:
    empty = build_tree(np.zeros((0, 3, 8), dtype=np.float32), 5, split=split)
    assert (empty.task_count, empty.nodes, empty.height) == (0, (), 0)
    single = build_tree(random_signatures(1), 5, split=split)
    assert single.nodes[0].members == (0,)
    assert single.path_to(0) == (0,)


@pytest.mark.parametrize("split", RULES)
def test_identical_signatures_stay_in_one_leaf(split: Any) -> None:
    same = np.repeat(random_signatures(1, layers=64, width=8), 300, axis=0)
    tree = build_tree(same, 64, split=split)
    assert len(tree.nodes) == 1
    assert tree.nodes[0].spread == pytest.approx(0.0, abs=1e-7)


@given(
    tasks=st.integers(0, 24),
    layers=st.integers(1, 6),
    depth=st.integers(0, 8),
    copies=st.integers(1, 3),
    split=st.sampled_from(list(RULES)),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_tree_partitions_its_tasks_and_reads_back(
    tasks: int, layers: int, depth: int, copies: int, split: Any, seed: int
) -> None:
    values = np.repeat(random_signatures(tasks, layers, 8, seed), copies, axis=0)
    tree = build_tree(values, depth, split=split)
    assert sorted(t for leaf in tree.leaves() for t in leaf.members) == list(range(tasks * copies))
    assert tree.height <= min(depth, layers)
    for node in tree.nodes:
        parts = [tree.nodes[child].members for child in node.children]
        assert not parts or sorted(parts[0] + parts[1]) == list(node.members)
    for first in range(0, tasks * copies, copies):
        assert len({tree.path_to(first + i) for i in range(copies)}) == 1
    stored = json.loads(json.dumps(tree.to_dict()))
    assert Tree.from_state(stored, tree.to_arrays()) == tree


@given(st.integers(0, 1000), st.integers(2, 30))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_tasks_does_not_change_the_groups(seed: int, tasks: int) -> None:
    values = random_signatures(tasks, seed=seed)
    order = np.random.default_rng(seed).permutation(tasks)
    renamed = {frozenset(int(order[t]) for t in g) for g in groups(build_tree(values[order], 4))}
    assert renamed == groups(build_tree(values, 4))


@pytest.mark.parametrize("pairs", [6, 32])
@pytest.mark.parametrize("depth", [5, 12])
def test_twins_share_a_leaf_or_a_parent(pairs: int, depth: int) -> None:
    for seed in range(3):
        assert twins_together(build_tree(paired_signatures(pairs, seed), depth), pairs) == 1.0


def test_the_published_split_parts_most_twins() -> None:
    shares = [twins_together(build_tree(paired_signatures(32, seed), 12, split="median-l1"), 32) for seed in range(3)]
    assert max(shares) < 0.5


def test_an_unrelated_task_does_not_sit_between_twins() -> None:
    values = np.concatenate([paired_signatures(1, 0), random_signatures(1, 12, 256, seed=9)])
    tree = build_tree(values, 12)
    assert tree.tree_distance(0, 1) == 2
    assert tree.nodes[tree.lowest_common_ancestor(0, 1)].members == (0, 1)
    assert tree.lowest_common_ancestor(0, 2) == 0
    assert tree.tree_distance(0, 2) == 3
    assert tree.tree_distance(0, 0) == 0


def test_inserting_one_by_one_keeps_twins_together() -> None:
    values = paired_signatures(20, seed=1)
    tree = build_tree(values[:3], 12)
    for row in values[3:]:
        tree = tree.insert(row)
    assert twins_together(tree, 20) == 1.0
    assert np.array_equal(tree.signatures, values)
    exact = []
    for node in tree.nodes:
        rows = values[list(node.members), node.layer]
        exact.append(float(np.sort(l1_distance(rows, rows.mean(axis=0, dtype=np.float64)))[-2:].sum()))
    assert [node.spread for node in tree.nodes] == pytest.approx(exact, abs=1e-6)
    stored = json.loads(json.dumps(tree.to_dict()))
    assert Tree.from_state(stored, tree.to_arrays()) == tree


def test_insertion_touches_only_the_newcomers_neighbourhood() -> None:
    tree = build_tree(paired_signatures(64, seed=2), 12)
    newcomer = paired_signatures(1, seed=77)[0]
    grown = tree.insert(newcomer)
    assert tree.task_count == 128  # the first tree is unchanged
    kept = groups(tree) & groups(grown)
    assert len(kept) > 0.8 * len(tree.nodes)


def test_a_rebuild_is_due_after_growing_by_half() -> None:
    values = random_signatures(16)
    tree = build_tree(values[:10], 4)
    for row in values[10:15]:
        tree = tree.insert(row)
    assert not tree.rebuild_due
    assert tree.insert(values[15]).rebuild_due
    assert not build_tree(values, 4).rebuild_due


def test_a_tree_of_less_than_eight_tasks_is_built_anew() -> None:
    values = random_signatures(9)
    assert build_tree(values[:7], 4).insert(values[7]).tasks_at_build == 8
    assert build_tree(values[:8], 4).insert(values[8]).tasks_at_build == 8


def test_nearest_neighbours_agree_with_all_comparisons() -> None:
    values = random_signatures(9)
    distance = l1_distance(values[:, None], values[None]).mean(axis=-1)
    np.fill_diagonal(distance, np.inf)
    neighbour, nearest = nearest_neighbours(values)
    assert neighbour.tolist() == distance.argmin(axis=1).tolist()
    assert nearest == pytest.approx(distance.min(axis=1))


def test_mutual_pairs_label_twins() -> None:
    assert mutual_pairs(paired_signatures(3, 0)).tolist() == [0, 0, 2, 2, 4, 4]


def test_nearest_leaves_are_the_closest_pair() -> None:
    tree = build_tree(line(0, 5, 9, 9.5), 1)
    assert tree.nearest_leaves() == (2, 3, 0.25)


def test_nearest_leaves_prefer_siblings_to_a_slightly_closer_pair() -> None:
    # layer 0 puts 1 and 2 near the mean of 5, 0 and 3 far; gaps: 0-1 is 4.5 + 0, 1-2 is 1 + 3.6
    values = np.array([[0, 0], [4.5, 0], [5.5, 3.6], [10, 50]], dtype=np.float32)[:, :, None]
    tree = build_tree(values, 2, split="median-l1")
    assert (tree.tree_distance(0, 1), tree.tree_distance(1, 2)) == (4, 2)
    assert l1_distance(values[0], values[1]).mean() == pytest.approx(1.125)
    assert tree.nearest_leaves()[:2] == (1, 2)
    assert tree.nearest_leaves()[2] == pytest.approx(1.15)
    values[2, 1] = 4.5  # 1-2 is now 5.5, too far to be preferred
    assert build_tree(values, 2, split="median-l1").nearest_leaves()[:2] == (0, 1)


def test_a_leaf_and_its_siblings_child_are_no_siblings() -> None:
    # leaves 0 | 1 under one node, 2 beside a node of 3 | 4: three edges from 2 to 3
    layers = [[0, 0, 90, 90, 90], [0, 10, 0, 3, 3], [0, 0, -6.8, 0, 20]]
    tree = build_tree(np.array(layers, dtype=np.float32).T[:, :, None], 3, split="median-l1")
    assert (tree.tree_distance(0, 1), tree.tree_distance(2, 3)) == (2, 3)
    # gaps sum to 10 and to 9.8, halved and averaged over 3 layers: within five percent, so siblings first
    assert tree.nearest_leaves() == (0, 1, pytest.approx(10 / 6))


def test_nearest_leaves_of_groups_lie_at_their_means() -> None:
    tree = build_tree(line(0, 2, 8, 20), 1)
    # tasks 0 and 1 share an adapter at 1; 8 is 7 away from it, 12 from 20
    assert tree.nearest_leaves([7, 7, 3, 4]) == (7, 3, 3.5)


def test_nearest_leaves_need_two_groups() -> None:
    with pytest.raises(ValueError, match="need two groups, got 1"):
        build_tree(line(0, 1), 1).nearest_leaves([5, 5])
    with pytest.raises(ValueError, match="1 labels for 2 tasks"):
        build_tree(line(0, 1), 1).nearest_leaves([5])


def test_bad_input_is_named() -> None:
    broken = random_signatures(3)
    broken[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match="task 1, layer 2 is not finite"):
        build_tree(broken, 2)
    with pytest.raises(ValueError, match=r"^signatures: expected shape \(T, D, m\), got \(3, 4\)$"):
        build_tree(np.zeros((3, 4), dtype=np.float32), 2)
    with pytest.raises(ValueError, match="unknown rule 'best'"):
        build_tree(random_signatures(3), 2, split="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tree_depth: expected an integer of 0 or more"):
        build_tree(random_signatures(3), -1)
    tree = build_tree(random_signatures(3), 2)
    with pytest.raises(ValueError, match="task 3 is not in the tree"):
        tree.path_to(3)
    with pytest.raises(ValueError, match=r"^signature: shape \(1, 1\), expected \(4, 32\)$"):
        tree.insert(np.zeros((1, 1), dtype=np.float32))


def _set(path: list[Any], value: Any) -> Any:
    """An edit of a nested structure."""

    def edit(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set(["version"], 2), "version 2, expected 1"),
        (_set(["extra"], 1), "unknown key extra"),
        (_set(["tree_depth"], "5"), "tree_depth: expected an integer"),
        (_set(["tree_depth"], 0), "depth 1 exceeds 0"),
        (_set(["split"], ["median-l1"]), "unknown rule"),
        (_set(["nodes"], {}), "expected a list, got dict"),
        (_set(["nodes"], []), "no nodes, but 4 tasks"),
        (_set(["nodes", 1], 7), "tree node 1: expected an object"),
        (_set(["nodes", 1, "colour"], 7), "tree node 1: unknown key colour"),
        (_set(["nodes", 1, "index"], 2), "tree node 1: index is 2"),
        (_set(["nodes", 1, "members"], [True]), "members: expected an integer"),
        (_set(["nodes", 1, "members"], []), "expected distinct tasks"),
        (_set(["nodes", 1, "members"], [0, 1, 2]), "members differ from its children's|two leaves"),
        (_set(["nodes", 2, "members"], [3]), "members differ from its children's"),
        (_set(["nodes", 0, "children"], [1]), "expected none or two, got 1"),
        (_set(["nodes", 0, "children"], [1, 9]), "child 9 does not exist"),
        (_set(["nodes", 0, "children"], [0, 1]), "child 0 makes a cycle"),
        (_set(["nodes", 0, "children"], [1, 1]), "tree node 1: parents 0 and 0"),
        (_set(["nodes", 1, "layer"], 8), "layer 8, but 1 layers"),
        (_set(["nodes", 1, "depth"], 0), "depth is not its parent's plus one"),
        (_set(["nodes", 1, "spread"], -0.5), "-0.5 is negative"),
        (_set(["nodes", 1, "spread"], float("nan")), "expected a finite number"),
        (_set(["nodes", 1, "spread"], 0.125), "node 1 differs from its spread"),
        (_set(["nodes", 0, "threshold"], None), "a threshold belongs to a node with children"),
    ],
)
def test_malformed_state_is_refused(edit: Any, message: str) -> None:
    tree = build_tree(line(0, 1, 8, 9), 1)
    data = copy.deepcopy(tree.to_dict())
    edit(data)
    with pytest.raises(ValueError, match=message):
        Tree.from_state(data, tree.to_arrays())


def test_a_task_in_two_leaves_or_none_is_refused() -> None:
    tree = build_tree(line(0, 1, 8, 9), 1)
    data: Any = copy.deepcopy(tree.to_dict())
    data["nodes"][2]["members"] = [1, 2, 3]
    with pytest.raises(ValueError, match="task 1 is in two leaves, 1 and 2"):
        Tree.from_state(data, tree.to_arrays())
    data["nodes"][2]["members"] = [3]
    data["nodes"][0]["members"] = [0, 1, 3]
    with pytest.raises(ValueError, match="task 2 is in no leaf"):
        Tree.from_state(data, tree.to_arrays())


def test_arrays_that_do_not_fit_are_refused() -> None:
    tree = build_tree(line(0, 1, 8, 9), 1)
    with pytest.raises(ValueError, match="tree arrays: missing spreads"):
        Tree.from_state(tree.to_dict(), {"signatures": tree.signatures})
    with pytest.raises(ValueError, match=r"^spreads: expected float64 \(3, 1\), got float64 \(1, 1\)$"):
        Tree.from_state(tree.to_dict(), tree.to_arrays() | {"spreads": np.zeros((1, 1))})
    with pytest.raises(ValueError, match="signatures: expected floats, got int64"):
        Tree.from_state(tree.to_dict(), tree.to_arrays() | {"signatures": np.zeros((4, 1, 1), int)})
    with pytest.raises(ValueError, match="tree: expected an object, got list"):
        Tree.from_state([], tree.to_arrays())
