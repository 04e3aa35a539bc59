"""Sums that wait: in files that vanish with the process, or in memory."""

from __future__ import annotations

import tempfile
from typing import NoReturn

import pytest
import torch
from treelora_backends.spill import Aside


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
