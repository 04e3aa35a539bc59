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


@pytest.mark.filterwarnings("error")
def test_bounds_by_hand_are_means_over_the_layers_that_have_pulled():
    # pulls of tasks 0 to 3: three steps of two layers
    selected = np.array([[0, 1], [0, 0], [1, 2]])
    arrays = {
        "tasks": np.array([-1, -1, -1, 0, 1, 2, 3]),
        "counts": np.array([[3, 3, 0, 2, 1, 0, 0], [3, 2, 1, 1, 1, 1, 0]]),
        "sums": np.array([[0.0, 0, 0, 1.0, 0.25, 0, 0], [0, 0, 0, 0.3, 0.2, 0.6, 0]]),
        "squares": np.zeros(2),
        "repeats": np.zeros(2, dtype=np.int64),
    }
    zero, one, two, never = replay(arrays, selected, range(4), literal=True)
    second, third = (2 * np.log(step) ** 0.5 for step in (2, 3))
    assert zero.pulls.tolist() == [1, 3, 3]
    wanted = [0.5, (0.5 - second / 2**0.5 + 0.3 - second) / 2, (0.5 - third / 2**0.5 + 0.3 - third) / 2]
    assert (zero.bounds.tolist(), zero.mean) == (pytest.approx(wanted), pytest.approx(0.4))
    assert one.bounds.tolist() == pytest.approx([0.2, 0.2 - second, (0.25 - third + 0.2 - third) / 2])
    assert two.bounds.tolist() == pytest.approx([np.nan, np.nan, 0.6 - third], nan_ok=True)
    assert two.mean == pytest.approx(0.6)
    assert never.pulls.tolist() == [0, 0, 0]
    assert np.isnan([*never.bounds, never.mean]).all()


def test_an_arm_has_no_bound_before_its_first_pull():
    bandit, selected, pulls = searched(begun=False, search="cold")
    for arm in replay(bandit.state_arrays(), selected, range(TASKS), literal=False):
        assert np.isnan(arm.bounds).tolist() == (pulls[:, arm.task] == 0).tolist()


def test_steps_of_another_search_are_refused():
    bandit, selected, _ = searched(begun=False, search="cold")
    with pytest.raises(ValueError, match="expected"):
        replay(bandit.state_arrays(), selected[:, :1], [0], literal=False)
    for other in (selected[:0], selected.ravel()):
        with pytest.raises(ValueError, match=r"^selected: shape .*, expected \(S, 3\)$"):
            replay(bandit.state_arrays(), other, [0], literal=False)
    with pytest.raises(ValueError, match="more often than the search counted"):
        replay(bandit.state_arrays(), np.full((400, LAYERS), 5), [5], literal=False)
