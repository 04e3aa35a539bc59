"""Activations of every epoch: where they are kept, and that what is read is the same everywhere."""

from __future__ import annotations

import io
import tempfile
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from treelora_backends import kept as module
from treelora_backends.kept import Aside, Keeping, KeptRows, each_expected, planned, size_of

from treelora_cli.errors import ResourceError

CPU = torch.device("cpu")
MIB = 2**20


def full_disk() -> NoReturn:
    raise OSError(28, "No space left on device")


def rows_of(count: int) -> torch.Tensor:
    return torch.arange(6.0 * count).reshape(count, 2, 3)


@pytest.mark.parametrize(("most", "place"), [(1, "memory"), (0, "file")])
@given(order=st.permutations(range(5)), asked=st.lists(st.integers(0, 4), max_size=9))
def test_rows_come_back_from_anywhere_as_they_were_kept(most: int, place: str, order: list[int], asked: list[int]):
    kept = KeptRows(5, (2, 3), Keeping.of(CPU, most))
    assert kept.place == place
    places, rows = torch.tensor(order), rows_of(5)
    kept.write(places[:2], rows[places[:2]])
    kept.write(places[2:], rows[places[2:]].bfloat16())
    wanted = torch.tensor(asked, dtype=torch.int64)
    read = kept.read(wanted)
    assert torch.equal(read, rows[wanted].bfloat16())
    read.zero_()
    assert torch.equal(kept.read(wanted), rows[wanted].bfloat16()), "what is read is a copy"


@pytest.mark.parametrize("most", [1, 0])
def test_a_place_under_which_nothing_is_kept_is_named(most: int) -> None:
    kept = KeptRows(3, (2,), Keeping.of(CPU, most))
    kept.write(torch.tensor([0, 2]), torch.ones(2, 2))
    with pytest.raises(IndexError, match="place 1"):
        kept.read(torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("most_mib", "wanted", "place"),
    [
        (None, 16 * MIB, "memory"),
        (None, 16 * MIB + 1, "file"),
        (40, 40 * MIB, "memory"),
        (40, 40 * MIB + 1, "file"),
        (10**6, 500 * MIB, "memory"),
        (10**6, 500 * MIB + 1, "file"),  # half of what is free
        (0, 1, "file"),
    ],
)
def test_on_a_cpu_little_is_kept_in_memory(
    monkeypatch: pytest.MonkeyPatch, most_mib: int | None, wanted: int, place: str
) -> None:
    monkeypatch.setattr(module, "_free_in_computer", lambda: 1000 * MIB)
    assert Keeping.of(CPU, most_mib).place(wanted) == place


@pytest.mark.parametrize(
    ("most_mib", "wanted", "place"),
    [
        (None, 300 * MIB, "device"),
        (None, 301 * MIB, "memory"),
        (None, 501 * MIB, "file"),
        (200, 200 * MIB, "device"),
        (200, 201 * MIB, "file"),
        (400, 350 * MIB, "memory"),
        (0, 1, "file"),
    ],
)
def test_a_gpu_keeps_what_fits_half_of_its_free_memory(
    monkeypatch: pytest.MonkeyPatch, most_mib: int | None, wanted: int, place: str
) -> None:
    monkeypatch.setattr(module, "_free_on", lambda _device: 600 * MIB)
    monkeypatch.setattr(module, "_free_in_computer", lambda: 1000 * MIB)
    assert Keeping.of(torch.device("cuda"), most_mib).place(wanted) == place


@pytest.mark.parametrize(
    ("again", "free", "place"),
    [(True, 99, "nowhere"), (True, 100, "file"), (False, 99, "file"), (True, None, "file")],
)
def test_what_fits_nowhere_and_can_be_computed_again_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, again: bool, free: int | None, place: str
) -> None:
    def usage(_path: str) -> SimpleNamespace:
        if free is None:
            raise OSError("not a system that says")
        return SimpleNamespace(free=free)

    monkeypatch.setattr("shutil.disk_usage", usage)
    assert Keeping.of(CPU, 0).place(100, again=again) == place
    assert planned(25, [2], Keeping.of(CPU, 0), again=again) == {"place": place, "mib": 0.0}


def test_rows_that_are_nowhere_are_written_and_expected_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_on_disk", lambda: 0)
    kept = KeptRows(2**18, (8,), Keeping.of(CPU, 0), again=True)
    kept.write(torch.tensor([0]), torch.ones(1, 8), kept.clock())
    kept.expect(torch.tensor([0]))
    assert (kept.facts(), str(kept)) == (
        {"place": "nowhere", "mib": 4.0},
        "Activations of 4.0 MiB are not kept: each step runs the frozen blocks again.",
    )


@pytest.mark.parametrize(("computing", "place"), [(0.5, "nowhere"), (2.0, "file")])
def test_beyond_memory_the_disk_has_to_be_faster_than_computing(
    monkeypatch: pytest.MonkeyPatch, computing: float, place: str
) -> None:
    clock, flushed = [0.0], []

    def flush(number: int) -> None:
        flushed.append(number)
        clock[0] += 1.0

    monkeypatch.setattr(module, "_free_in_computer", lambda: 1)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("os.fsync", flush)
    kept = KeptRows(4, (2,), Keeping.of(CPU, 0), again=True)
    kept.write(torch.tensor([0]), torch.ones(1, 2))  # the first of a pass is not counted
    assert flushed == []
    began = kept.clock()
    clock[0] += computing
    kept.write(torch.tensor([1]), torch.ones(1, 2), began)
    assert (kept.place, kept.given_up, len(flushed)) == (place, place == "nowhere", 1)
    kept.write(torch.tensor([2]), torch.ones(1, 2), kept.clock())
    assert len(flushed) == 1, "it is decided once"
    assert kept.clock() is None
    if place == "file":
        assert torch.equal(kept.read(torch.tensor([0, 1, 2])), torch.ones(3, 2).bfloat16())


def test_what_memory_can_hold_or_cannot_be_made_again_is_not_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KeptRows(4, (2,), Keeping.of(CPU, 0), again=True).clock() is None
    monkeypatch.setattr(module, "_free_in_computer", lambda: 1)
    assert KeptRows(4, (2,), Keeping.of(CPU, 0)).clock() is None


def test_the_system_says_how_much_memory_is_free() -> None:
    assert 16 * MIB < module._free_in_computer() < 2**50


def test_what_is_said_of_kept_rows() -> None:
    kept = KeptRows(2**18, (8,), Keeping.of(CPU, 4))
    assert (kept.facts(), str(kept)) == (
        {"place": "memory", "mib": 4.0},
        "Activations of 4.0 MiB are kept in memory.",
    )
    assert size_of(2**18, (8,)) == 4 * MIB
    spilled = str(KeptRows(2**18, (8,), Keeping.of(CPU, 3)))
    assert spilled == f"Activations of 4.0 MiB are kept in {tempfile.gettempdir()}."


class Noted:
    """Notes what is expected."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def expect(self, places: torch.Tensor) -> None:
        self.seen.append(int(places))


def test_while_a_batch_is_worked_on_the_next_one_is_being_read() -> None:
    noted = Noted()
    steps = [(batch, list(noted.seen)) for batch in each_expected(noted, range(3), torch.tensor)]  # type: ignore[arg-type]
    assert steps == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(each_expected(None, range(3), torch.tensor)) == [0, 1, 2]


@pytest.mark.parametrize("when", ["made", "written"])
def test_a_full_disk_is_said_in_one_line(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.RawIOBase):
        def seek(self, offset: int, _whence: int = 0) -> int:
            return offset

        def write(self, _data: object) -> NoReturn:
            full_disk()

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full_disk() if when == "made" else Full())
    with pytest.raises(ResourceError, match=r"No space left on device.*TMPDIR"):
        KeptRows(1, (2,), Keeping.of(CPU, 0)).write(torch.tensor([0]), torch.zeros(1, 2))


@pytest.mark.parametrize("full", [False, True])
def test_what_waits_aside_comes_back(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if full:
        monkeypatch.setattr(tempfile, "TemporaryFile", full_disk)
    wanted = torch.randn(3, 5)
    waiting = Aside(wanted.clone())
    assert (waiting._array is None) is not full
    waiting.read().zero_()
    assert torch.equal(waiting.read(), wanted), "what is read is a copy"
