"""Sums of outer products, in half the space of a matrix, and systems solved in their place.

On the CPU a symmetric matrix is kept in LAPACK's rectangular full packed format, whose routines are as fast as those
for whole matrices; it is the largest thing that a solved head needs. Other devices keep whole matrices.

Symbols: ``W`` width, ``n`` examples, ``K`` right-hand sides.

Source: Gustavson, Wasniewski, Dongarra and Langou, ACM Transactions on Mathematical Software 37(2), 2010.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class NotPositiveError(ArithmeticError):
    """A matrix is not positive definite in its own precision; it was overwritten."""


class Gram(ABC):
    """A symmetric matrix (W, W), of which only sums of ``phi^T phi`` are added and positive definite systems solved.

    Attributes:
        width: W.
        values: What is stored, linear in the matrix; its layout is the subclass's.
    """

    def __init__(self, width: int, values: Tensor) -> None:
        self.width = width
        self.values = values

    @staticmethod
    def zeros(width: int, device: torch.device) -> Gram:
        """Return the matrix of zeros."""
        if device.type == "cpu":
            return HalfGram(width, torch.zeros(width * (width + 1) // 2))
        return FullGram(width, torch.zeros(width, width, device=device))

    @staticmethod
    def restored(half: Tensor, width: int, device: torch.device) -> Gram:
        """Return the matrix that ``half`` of another holds, (W (W + 1) / 2,), whose memory is taken over.

        Raises:
            ValueError: The length does not fit the width.
        """
        if half.numel() != width * (width + 1) // 2:
            raise ValueError(f"{half.numel()} values do not make a symmetric matrix of width {width}")
        own = HalfGram(width, half.float())
        return own if device.type == "cpu" else FullGram(width, own.upper().to(device))

    @staticmethod
    def read(tensors: Mapping[str, Tensor], name: str, width: int, device: torch.device) -> Gram:
        """Return the stored matrix ``NAME.half_gram``; older projects have ``NAME.gram``, the upper triangle by rows.

        Raises:
            KeyError: Neither is there.
            ValueError: The length does not fit the width.
        """
        rows = tensors.get(f"{name}.gram")
        if rows is None:
            return Gram.restored(tensors[f"{name}.half_gram"], width, device)
        upper = torch.zeros(width, width)
        upper[torch.ones(width, width).triu() > 0] = rows.float()
        return Gram.from_dense(upper.to(device))

    @staticmethod
    def from_dense(matrix: Tensor) -> Gram:
        """Return a symmetric matrix (W, W) of which the upper triangle is read."""
        if matrix.device.type == "cpu":
            return HalfGram(matrix.shape[0], _halved(matrix))
        return FullGram(matrix.shape[0], matrix)

    def like(self, values: Tensor) -> Gram:
        """Return the matrix that is stored as ``values``."""
        return type(self)(self.width, values)

    @abstractmethod
    def add_(self, phi: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * phi^T phi`` in place: phi (n, W)."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """Return the diagonal, (W,)."""

    @abstractmethod
    def add_diagonal_(self, amount: float) -> None:
        """Add a multiple of the identity in place."""

    @abstractmethod
    def solve_(self, right: Tensor) -> Tensor:
        """Solve ``A x = right`` (W, K) for this positive definite matrix, in its place.

        Raises:
            NotPositiveError: It is not, in single precision.
        """

    @abstractmethod
    def half(self) -> Tensor:
        """Return it in rectangular full packed format, (W (W + 1) / 2,), on the CPU; without a copy where it is so."""

    @abstractmethod
    def upper(self) -> Tensor:
        """Return a matrix (W, W) with this upper triangle; what is below is not meant."""

    @abstractmethod
    def block(self, part: slice) -> Tensor:
        """Return the whole matrix of some rows and the same columns, (n, n)."""

    def dense(self) -> Tensor:
        """Return the whole matrix, (W, W)."""
        return symmetric(self.upper())


class HalfGram(Gram):
    """Rectangular full packed, on the CPU: ``values`` are (W (W + 1) / 2,)."""

    def add_(self, phi: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * phi^T phi`` in place: phi (n, W)."""
        from scipy.linalg import lapack

        columns = phi.detach().float().contiguous().numpy().T  # (W, n) by columns, as LAPACK wants it
        lapack.ssfrk(
            self.width, columns.shape[1], factor, columns, 1.0, self.values.numpy(), uplo="L", overwrite_c=True
        )

    def _places(self, row: Tensor, column: Tensor) -> Tensor:
        """Return where entries of the lower triangle (``row >= column``) are stored."""
        columns = (self.width + 1) // 2
        even = 1 - self.width % 2
        second = column >= columns
        across = torch.where(second, row - columns + 1 - even, column)
        down = torch.where(second, column - columns, row + even)
        return down + across * (self.width + even)

    @property
    def _diagonal(self) -> Tensor:
        index = torch.arange(self.width)
        return self._places(index, index)

    def diagonal(self) -> Tensor:
        """Return the diagonal, (W,)."""
        return self.values[self._diagonal]

    def add_diagonal_(self, amount: float) -> None:
        """Add a multiple of the identity in place."""
        self.values[self._diagonal] += amount

    def block(self, part: slice) -> Tensor:
        """Return the whole matrix of some rows and the same columns, (n, n)."""
        index = torch.arange(self.width)[part]
        row, column = index[:, None], index[None]
        return self.values[self._places(torch.maximum(row, column), torch.minimum(row, column))]

    def solve_(self, right: Tensor) -> Tensor:
        """Solve ``A x = right`` (W, K) in place; see ``Gram.solve_``."""
        from scipy.linalg import lapack

        factor, failed = lapack.spftrf(self.width, self.values.numpy(), uplo="L", overwrite_a=True)
        if failed:
            raise NotPositiveError(f"leading minor {failed}")
        solved, _ = lapack.spftrs(self.width, factor, np.asfortranarray(right.numpy(), dtype=np.float32), uplo="L")
        return torch.from_numpy(np.ascontiguousarray(solved))

    def half(self) -> Tensor:
        """Return what is stored."""
        return self.values

    def upper(self) -> Tensor:
        """Return a matrix (W, W) with this upper triangle."""
        from scipy.linalg import lapack

        lower, _ = lapack.stfttr(self.width, self.values.numpy(), uplo="L")
        return torch.from_numpy(lower.T)


class FullGram(Gram):
    """A whole matrix, (W, W), of which the upper triangle is meant."""

    def add_(self, phi: Tensor, factor: float = 1.0) -> None:
        """Add ``factor * phi^T phi`` in place: phi (n, W)."""
        edges = [round(index * self.width / _STRIPS) for index in range(_STRIPS + 1)]
        for start, end in itertools.pairwise(edges):
            self.values[start:end, start:].addmm_(phi[:, start:end].T, phi[:, start:], alpha=factor)

    def diagonal(self) -> Tensor:
        """Return the diagonal, (W,)."""
        return self.values.diagonal()

    def add_diagonal_(self, amount: float) -> None:
        """Add a multiple of the identity in place."""
        self.values.diagonal().add_(amount)

    def block(self, part: slice) -> Tensor:
        """Return the whole matrix of some rows and the same columns, (n, n)."""
        return symmetric(self.values[part, part])

    def solve_(self, right: Tensor) -> Tensor:
        """Solve ``A x = right`` (W, K); see ``Gram.solve_``."""
        factor, failed = torch.linalg.cholesky_ex(self.values, upper=True)
        if bool(failed):
            raise NotPositiveError(f"leading minor {int(failed)}")
        return torch.cholesky_solve(right, factor, upper=True)

    def half(self) -> Tensor:
        """Return it in rectangular full packed format, (W (W + 1) / 2,), on the CPU."""
        return _halved(self.values.cpu())

    def upper(self) -> Tensor:
        """Return what is stored."""
        return self.values


_STRIPS = 4
"""Parts in which a product is computed, so that most of its lower half is left out."""


def symmetric(matrix: Tensor) -> Tensor:
    """Return the symmetric matrix with this upper triangle, (W, W)."""
    whole: Tensor = matrix.triu() + matrix.triu(1).T
    return whole


def solve_exactly(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``A x = right`` for a symmetric matrix (W, W) in float64."""
    solved: Tensor = torch.linalg.solve(matrix.double(), right.double())
    return solved.to(right.dtype)


def _halved(matrix: Tensor) -> Tensor:
    """Return a matrix (W, W) in rectangular full packed format; its upper triangle is read."""
    from scipy.linalg import lapack

    # its rows are the columns of LAPACK, and so its upper triangle is the lower one
    half, _ = lapack.strttf(matrix.float().contiguous().numpy().T, uplo="L")
    return torch.from_numpy(half)
