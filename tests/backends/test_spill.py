"""Activations and sums that wait: in memory, or in files that vanish with the process."""

from __future__ import annotations

import io
import tempfile
from typing import NoReturn

import pytest
import torch
from treelora_backends.spill import Aside, KeptRows

from treelora_cli.errors import ResourceError


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


def test_rows_come_back_as_they_were_kept_in_any_order() -> None:
    kept = KeptRows((2, 3))
    rows = torch.arange(24.0).reshape(4, 2, 3)
    kept.write(2, rows[2:])
    kept.write(0, rows[:1])
    kept.write(1, rows[1:2].bfloat16())
    assert torch.equal(kept.read(1, 3), rows[1:].bfloat16())
    assert torch.equal(kept.read_each(torch.tensor([3, 0, 3])), rows[[3, 0, 3]].bfloat16())
    kept.read(0, 1).zero_()
    assert torch.equal(kept.read(0, 1), rows[:1].bfloat16()), "what is read is a copy"
    with pytest.raises(IndexError, match="place 4"):
        kept.read(4, 1)


def test_rows_are_kept_each_under_its_place() -> None:
    kept = KeptRows((2, 3))
    rows = torch.arange(18.0).reshape(3, 2, 3)
    kept.write_each(torch.tensor([2, 0, 1]), rows)
    assert torch.equal(kept.read(0, 3), rows[[1, 2, 0]].bfloat16())


@pytest.mark.parametrize("when", ["made", "written"])
def test_a_full_disk_is_said_in_one_line(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.RawIOBase):
        def seek(self, offset: int, _whence: int = 0) -> int:
            return offset

        def write(self, _data: object) -> NoReturn:
            full_disk()

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full_disk() if when == "made" else Full())
    with pytest.raises(ResourceError, match=r"No space left on device.*TMPDIR"):
        KeptRows((2,)).write(0, torch.zeros(1, 2))
