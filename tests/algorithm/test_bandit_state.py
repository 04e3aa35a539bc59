"""The search after it was stored and read back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from signatures import line_tree, noisy_queries, random_signatures, run

from treelora_cli.algorithm.bandit import TreeBandit
from treelora_cli.algorithm.tree import Tree, build_tree


@pytest.mark.parametrize("search", ["lcb", "cold", "flat", "exhaustive", "random"])
@pytest.mark.parametrize("tree_depth", [2, 5])
def test_a_round_trip_changes_nothing_that_follows(search: Any, tree_depth: int) -> None:
    tree = build_tree(random_signatures(21), tree_depth)
    queries = noisy_queries(tree.signatures[7], 80, 1.0, seed=5)
    through = TreeBandit(tree, search=search, smoothness=0.5, seed=11)
    run(through, queries[:40])
    meta = json.loads(json.dumps(through.state_meta()))
    arrays = {name: array.copy() for name, array in through.state_arrays().items()}
    loaded_tree = Tree.from_state(json.loads(json.dumps(tree.to_dict())), tree.to_arrays())
    resumed = TreeBandit.from_state(loaded_tree, arrays, meta)
    assert all(np.array_equal(array, arrays[name]) for name, array in resumed.state_arrays().items())
    assert run(resumed, queries[40:]) == run(through, queries[40:])
    assert resumed.state_meta() == through.state_meta()
    for name, array in through.state_arrays().items():
        assert np.array_equal(array, resumed.state_arrays()[name]), name
    # the arrays handed over are not the ones worked on
    assert arrays["counts"].sum() < through.state_arrays()["counts"].sum()


def test_a_search_read_back_has_its_choices_and_its_own_nodes() -> None:
    bandit = TreeBandit(line_tree(), width="literal", search="cold", smoothness=0.5)
    arrays = bandit.state_arrays()
    assert arrays["tasks"].tolist() == [-1, -1, -1, 2, 3, 0, 1]
    arrays["tasks"] = np.array([-1, -1, -1, 3, 2, 1, 0])  # as another version may have halved the leaves
    again = TreeBandit.from_state(bandit.tree, arrays, bandit.state_meta())
    assert (again.state_meta(), again.sigma().tolist()) == (bandit.state_meta(), [1.0])
    assert again.arms.tasks.tolist() == [-1, -1, -1, 3, 2, 1, 0]


def test_the_next_task_after_a_round_trip_selects_the_same() -> None:
    values = random_signatures(12)
    tree = build_tree(values[:11], 3)
    loaded = Tree.from_state(json.loads(json.dumps(tree.to_dict())), tree.to_arrays())
    queries = noisy_queries(values[4], 30, 1.0, seed=8)
    first, second = (TreeBandit(t.insert(values[11])) for t in (tree, loaded))
    assert run(first, queries) == run(second, queries)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", np.zeros((1, 7)), "bandit counts: expected int64"),
        ("counts", np.full((1, 7), -1), "^bandit counts: a negative number of pulls$"),
        ("sums", None, "bandit sums: missing"),
        ("witness", np.full((1, 7), 7), "^bandit witness: a node out of range$"),
        ("tasks", np.array([-1, -1, -1, 0, 1, 2, 2]), "^bandit tasks: expected every task of the tree on one arm$"),
        (
            "children",
            np.zeros((7, 2), dtype=np.int64),
            "^bandit children: not a binary tree with parents before children$",
        ),
    ],
)
def test_malformed_arrays_are_refused(name: str, value: Any, message: str) -> None:
    bandit = TreeBandit(line_tree())
    arrays = bandit.state_arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(ValueError, match=message):
        TreeBandit.from_state(bandit.tree, arrays, bandit.state_meta())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 9, expected 1"),
        ({"more": 1}, "^bandit: unknown key more$"),
        ({"width": "wide"}, "bandit width: unknown 'wide', expected one of observed, literal"),
        ({"search": []}, "bandit search: unknown"),
        ({"smoothness": "x"}, "bandit smoothness: expected 0 or more"),
        ({"smoothness": float("inf")}, "bandit smoothness: expected 0 or more, got inf"),
        ({"step_count": -1}, "bandit step_count: expected an integer of 0 or more"),
        ({"rng": {"bit_generator": "none"}}, "bandit rng: not a generator's state"),
    ],
)
def test_malformed_meta_is_refused(change: dict[str, Any], message: str) -> None:
    bandit = TreeBandit(line_tree())
    with pytest.raises(ValueError, match=message):
        TreeBandit.from_state(bandit.tree, bandit.state_arrays(), bandit.state_meta() | change)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^bandit: the tree holds no tasks to search$"):
        TreeBandit(build_tree(np.zeros((0, 2, 4), dtype=np.float32), 2))
    bandit = TreeBandit(build_tree(random_signatures(3), 2))
    with pytest.raises(ValueError, match=r"query: shape \(2, 16\), expected \(3, 16\)"):
        bandit.step(np.zeros((2, 16)))
    query = random_signatures(1)[0]
    query[2, 0] = np.inf
    with pytest.raises(ValueError, match="query: layer 2 is not finite"):
        bandit.step(query)
    assert bandit.step_count == 0
    with pytest.raises(ValueError, match=r"^bandit: expected an object, got list$"):
        TreeBandit.from_state(bandit.tree, bandit.state_arrays(), [])
