"""Activations and sums that wait: in memory, or in files that vanish with the process."""

from __future__ import annotations

import tempfile
from typing import NoReturn

import pytest
import torch
from treelora_backends import kept
from treelora_backends.kept import Aside, room


def full_disk() -> NoReturn:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("full", [False, True])
def test_what_waits_aside_comes_back(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if full:
        monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)
    wanted = torch.randn(3, 5)
    waiting = Aside(wanted.clone())
    assert (waiting._array is None) is not full
    waiting.read().zero_()
    assert torch.equal(waiting.read(), wanted), "what is read is a copy"


def test_large_activations_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", 10)
    large = room((2, 3))
    large[1] = torch.tensor([1.0, 2.0, 3.0])
    assert large.dtype == torch.bfloat16 and large[1].tolist() == [1.0, 2.0, 3.0]
