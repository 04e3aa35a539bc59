"""A contender that learns says how far it is."""

from __future__ import annotations

import pytest

from treelora_cli.compare.worker import LogReporter


def test_progress_says_what_how_many_and_how_long(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(LogReporter(every=0.0).track(range(4), "Training", 4)) == [0, 1, 2, 3]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"  Training: {count} of 4" for count in (1, 2, 3, 4)]
    assert lines[-1].endswith(", 0 s left")


def test_progress_is_rare(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(LogReporter().track(iter("ab"), "Reading", None)) == ["a", "b"]
    assert capsys.readouterr().err == "", "nothing before ten seconds"
