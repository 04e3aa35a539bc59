"""What a finished search tells of its earlier steps."""

import numpy as np
import pytest

from treelora_cli.algorithm.bandit import TreeBandit
from treelora_cli.algorithm.replay import replay
from treelora_cli.algorithm.tree import build_tree

TASKS, LAYERS, WIDTH, STEPS = 7, 3, 16, 40


def searched(seed=0, begun=True, **options):
    """Search for task 2 of seven; return the search, what it selected (S, D) and its pulls after each step (S, T)."""
    rng = np.random.default_rng(seed)

    def unit(values):
        return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)

    signatures = unit(rng.standard_normal((TASKS, LAYERS, WIDTH)))
    queries = unit(signatures[2] + 0.5 * unit(rng.standard_normal((STEPS + 4, LAYERS, WIDTH))))
    bandit = TreeBandit(build_tree(signatures, LAYERS), **options)
    if begun:
        bandit.begin_with(queries[STEPS:])
    selected, pulls = [], []
    for query in queries[:STEPS]:
        selected.append(bandit.step(query))
        pulls.append(bandit.pulls().sum(axis=0))
    return bandit, np.array(selected), np.array(pulls)


@pytest.mark.parametrize(
    ("begun", "options"),
    [(True, {}), (False, {"search": "cold"}), (True, {"search": "flat"}), (True, {"width": "literal"})],
)
def test_pulls_of_every_step_and_the_last_bounds_are_those_of_the_search(begun, options):
    bandit, selected, pulls = searched(begun=begun, **options)
    found = replay(bandit.state_arrays(), selected, range(TASKS), literal=options.get("width") == "literal")
    bounds = bandit._own_bounds()[:, bandit.arms.arm_of]
    for arm in found:
        assert arm.pulls.tolist() == pulls[:, arm.task].tolist()
        known = bandit.pulls()[:, arm.task] > 0
        if known.any():
            assert arm.bounds[-1] == pytest.approx(bounds[known, arm.task].mean(), abs=1e-12)
            assert arm.mean == pytest.approx(np.nanmean(bandit.mean_distances()[:, arm.task]), abs=1e-12)


def test_an_arm_has_no_bound_before_its_first_pull():
    bandit, selected, pulls = searched(begun=False, search="cold")
    for arm in replay(bandit.state_arrays(), selected, range(TASKS), literal=False):
        assert np.isnan(arm.bounds).tolist() == (pulls[:, arm.task] == 0).tolist()


def test_steps_of_another_search_are_refused():
    bandit, selected, _ = searched(begun=False, search="cold")
    with pytest.raises(ValueError, match="expected"):
        replay(bandit.state_arrays(), selected[:, :1], [0], literal=False)
    with pytest.raises(ValueError, match="more often than the search counted"):
        replay(bandit.state_arrays(), np.full((400, LAYERS), 5), [5], literal=False)
