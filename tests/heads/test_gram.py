"""Half-size symmetric matrices hold, add and solve what whole ones do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from treelora_cli.heads.gram import FullGram, Gram, HalfGram, NotPositiveError, solve_exactly, symmetric

CPU = torch.device("cpu")
KINDS = ["half", "full"]


def empty(kind: str, width: int) -> Gram:
    return Gram.zeros(width, CPU) if kind == "half" else FullGram(width, torch.zeros(width, width))


def drawn(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count * 100 + width))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 12), count=st.integers(1, 9))
def test_sums_of_products_equal_those_of_whole_matrices(kind: str, width: int, count: int) -> None:
    gram, first, second = empty(kind, width), drawn(count, width), drawn(3, width)
    gram.add_(first)
    gram.add_(second, -0.5)
    wanted = first.T @ first - 0.5 * second.T @ second
    torch.testing.assert_close(gram.dense(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gram.diagonal(), wanted.diagonal(), atol=1e-5, rtol=1e-5)
    gram.add_diagonal_(2.0)
    wanted.diagonal().add_(2.0)
    torch.testing.assert_close(gram.dense(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 12))
def test_half_of_a_matrix_holds_all_of_it(width: int) -> None:
    matrix = symmetric(drawn(width, width))
    gram = Gram.from_dense(matrix)
    half = gram.half()
    assert isinstance(gram, HalfGram) and half.shape == (width * (width + 1) // 2,)
    assert torch.equal(half.sort().values, matrix[torch.ones_like(matrix).triu() > 0].sort().values)
    assert torch.equal(gram.dense(), matrix)
    assert torch.equal(FullGram(width, matrix).half(), half)
    assert torch.equal(Gram.restored(half, width, CPU).dense(), matrix)
    with pytest.raises(ValueError, match="do not make a symmetric matrix of width"):
        Gram.restored(half, width + 1, CPU)


def test_a_matrix_of_an_older_project_is_read() -> None:
    rows = torch.tensor([0.0, 1.0, 2.0, 11.0, 12.0, 22.0])
    wanted = [[0.0, 1.0, 2.0], [1.0, 11.0, 12.0], [2.0, 12.0, 22.0]]
    assert Gram.read({"a.gram": rows}, "a", 3, CPU).dense().tolist() == wanted
    half = Gram.from_dense(torch.tensor(wanted)).half()
    assert Gram.read({"a.half_gram": half}, "a", 3, CPU).dense().tolist() == wanted
    with pytest.raises(KeyError, match="half_gram"):
        Gram.read({}, "a", 3, CPU)
    with pytest.raises((ValueError, RuntimeError)):
        Gram.read({"a.gram": rows}, "a", 4, CPU)


def test_half_of_a_matrix_is_in_lapacks_format() -> None:
    """Rectangular full packed, lower, not transposed, order 3: by columns 00 10 20, then 22 11 21 (LAPACK's strttf)."""
    matrix = torch.tensor([[0.0, 10.0, 20.0], [10.0, 11.0, 21.0], [20.0, 21.0, 22.0]])
    assert Gram.from_dense(matrix).half().tolist() == [0.0, 10.0, 20.0, 22.0, 11.0, 21.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 6, 7])
def test_solving(kind: str, width: int) -> None:
    gram, right = empty(kind, width), drawn(width, 3)
    gram.add_(drawn(20, width))
    matrix = gram.dense()
    wanted = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(solve_exactly(matrix, right), wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gram.solve_(right), wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(gram.dense(), matrix) == (kind == "full")  # half of a matrix is solved in its place


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_not_positive_is_refused(kind: str) -> None:
    gram = empty(kind, 3)
    gram.add_(drawn(1, 3), -1.0)
    with pytest.raises(NotPositiveError, match=r"^leading minor 1$"):
        gram.solve_(torch.ones(3, 1))
