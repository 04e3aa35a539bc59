"""OP, forgetting and BWT on matrices small enough to do by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.score_matrix import ScoreMatrix

THREE = ScoreMatrix(("a", "b", "c"), ((0.9,), (0.8, 0.7), (0.5, 0.75, 0.6)))


def test_figures_by_hand() -> None:
    assert THREE.overall() == pytest.approx((0.5 + 0.75 + 0.6) / 3)
    assert THREE.forgetting() == pytest.approx((0.4 - 0.05 + 0.0) / 3)
    assert THREE.backward_transfer() == pytest.approx((-0.4 + 0.05) / 2)


def test_one_task_forgets_nothing_and_has_no_backward_transfer() -> None:
    one = ScoreMatrix().with_row("a", [0.4])
    assert (one.overall(), one.forgetting(), one.backward_transfer()) == (0.4, 0.0, None)


def test_no_task_has_no_figures() -> None:
    empty = ScoreMatrix()
    assert (empty.overall(), empty.forgetting(), empty.backward_transfer()) == (None, None, None)
    assert empty.standing().tasks == ()


def test_standing_by_the_last_row() -> None:
    standing = THREE.standing()
    assert standing.learned == (0.9, 0.7, 0.6)
    assert standing.before == (0.8, 0.7, None)
    assert standing.now == (0.5, 0.75, 0.6)


def test_standing_of_some_tasks_by_fresh_scores() -> None:
    standing = THREE.standing({"c": 0.1, "a": 1.0}, ["a", "c"])
    assert standing.tasks == ("a", "c")
    assert standing.now == (1.0, 0.1)
    assert standing.overall() == pytest.approx(0.55)
    assert standing.forgetting() == pytest.approx((-0.1 + 0.5) / 2)
    assert standing.backward_transfer() == pytest.approx(0.1)


def test_missing_scores_are_left_out_of_a_standing_but_void_the_matrix_figures() -> None:
    matrix = ScoreMatrix(("a", "b", "c"), ((0.9,), (None, None), (None, 0.5, 0.7)))
    standing = matrix.standing()
    assert standing.now == (None, 0.5, 0.7)
    assert standing.overall() == pytest.approx(0.6)
    assert standing.forgetting() == pytest.approx(0.0)
    assert standing.backward_transfer() is None
    assert (matrix.overall(), matrix.forgetting(), matrix.backward_transfer()) == (None, None, None)


def test_a_row_needs_a_score_for_every_task() -> None:
    with pytest.raises(ValueError, match="a row for task 3 needs 4 scores"):
        THREE.with_row("d", [0.1])


@given(
    st.integers(0, 5).flatmap(
        lambda n: st.tuples(*[st.tuples(*[st.none() | st.floats(0, 1)] * (i + 1)) for i in range(n)])
    )
)
def test_round_trip(rows: tuple[tuple[float | None, ...], ...]) -> None:
    matrix = ScoreMatrix(tuple(f"t{index}" for index in range(len(rows))), rows)
    assert ScoreMatrix.from_json(matrix.to_json()) == matrix


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"tasks": ["a"], "rows": []},
        {"tasks": ["a"], "rows": [[0.1, 0.2]]},
        {"tasks": ["a"], "rows": [[1.5]]},
        {"tasks": ["a"], "rows": [["x"]]},
        {"tasks": [1], "rows": [[0.5]]},
        {"tasks": None, "rows": None},
        {"tasks": ["a"], "rows": [3]},
        {"tasks": ["a"], "rows": [[float("nan")]]},
    ],
)
def test_a_malformed_matrix_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="malformed score matrix"):
        ScoreMatrix.from_json(record)
