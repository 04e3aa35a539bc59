"""Images that are decoded while a device works: the same pixels, in the order asked for, errors at their own file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli, check_error, child_environment, learned_hashes, make_images
from interrupting import OPTIONS
from test_vit_prompts import load
from treelora_backends.vit import backend as module
from treelora_backends.vit import decoding
from treelora_backends.vit.decoding import PixelsAhead, expect, in_threads
from treelora_backends.vit.images import read_image_task

from treelora_cli.backend.runtime import Silent
from treelora_cli.backend.values import DataRequest
from treelora_cli.errors import DataError


def numbered(place: int) -> np.ndarray:
    return np.full((3, 2, 2), place, dtype=np.uint8)


def test_images_are_decoded_once_and_no_further_ahead_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_AHEAD", 5)
    decoded: list[int] = []

    def decode(place: int) -> np.ndarray:
        decoded.append(place)
        return numbered(place)

    pixels = PixelsAhead(40, (2, 2), decode)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    expect(pixels, order)
    assert decoded == [], "nothing is decoded before anything is asked for"
    seen = []
    for rows in order.split(8):
        seen.append(pixels[rows][:, 0, 0, 0])
        assert set(decoded) <= set(order[: len(torch.cat(seen)) + 5].tolist())
    assert torch.equal(torch.cat(seen), order.byte())
    assert sorted(decoded) == list(range(40))
    assert torch.equal(torch.cat(list(pixels.split(16))), pixels[torch.arange(40)])
    assert torch.equal(pixels[3:5][:, 0, 0, 0], torch.tensor([3, 4], dtype=torch.uint8))
    assert len(decoded) == 40


def test_the_next_images_are_decoded_while_those_before_are_worked_on() -> None:
    """Every image waits until the batch before it is in the caller's hands: without threads this would never end."""
    given = threading.Semaphore(4)
    pixels = PixelsAhead(8, (2, 2), lambda place: (given.acquire(timeout=30), numbered(place))[1])
    expect(pixels, torch.arange(8))
    assert pixels[torch.arange(4)][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    given.release(4)
    until = time.monotonic() + 30
    while not all(place in pixels._begun and pixels._begun[place].done() for place in range(4, 8)):
        assert time.monotonic() < until, "nobody decodes what was not asked for yet"
        time.sleep(0.001)
    assert pixels[torch.arange(4, 8)][:, 0, 0, 0].tolist() == [4, 5, 6, 7]


def test_an_image_that_cannot_be_decoded_is_named_where_it_is_asked_for() -> None:
    def decode(place: int) -> np.ndarray:
        if place in (5, 6):
            raise DataError(f"{place}.png: no image.")
        return numbered(place)

    pixels = PixelsAhead(8, (2, 2), decode)
    assert len(pixels[torch.arange(5)]) == 5
    for _ in range(2):
        with pytest.raises(DataError, match=r"6\.png"):
            pixels[torch.tensor([7, 6, 5])]
    assert pixels[torch.tensor([7])][0, 0, 0, 0] == 7


def test_nothing_more_is_decoded_once_nobody_holds_the_images() -> None:
    """The first two images wait until the rest was given up: only what had begun is decoded, and no thread is left."""
    begun: list[int] = []
    held = threading.Event()
    before = set(threading.enumerate())

    def decode(place: int) -> np.ndarray:
        begun.append(place)
        if len(begun) > 4:
            held.wait(30)
        return numbered(place)

    pixels = PixelsAhead(200, (2, 2), decode)
    expect(pixels, torch.arange(200))
    assert len(pixels[torch.arange(4)]) == 4
    del pixels
    held.set()
    until = time.monotonic() + 30
    while set(threading.enumerate()) - before:
        assert time.monotonic() < until, "a thread goes on"
        time.sleep(0.001)
    assert len(begun) <= 4 + 2 * (os.cpu_count() or 1)


def test_work_in_threads_keeps_the_order_the_limit_and_the_first_error() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item in (30, 31):
            raise ValueError(str(item))
        return item * item

    found = in_threads(work, range(40), ahead=4)
    assert [next(found) for _ in range(10)] == [item * item for item in range(10)]
    assert max(begun) <= 13
    with pytest.raises(ValueError, match="30"):
        list(found)
    assert begun.count(0) == 1 and max(begun) <= 34
    assert list(in_threads(work, [7])) == [49] and list(in_threads(work, [])) == []


def test_a_task_read_ahead_is_the_same_task(weights: Path, data: Path) -> None:
    base, _ = load(weights)
    folder = next(one for one in sorted(data.iterdir()) if one.is_dir())
    now, later = (
        read_image_task(DataRequest(folder), base.preprocessing, Silent(), ahead=ahead) for ahead in (False, True)
    )
    assert (now.digest, now.notes, now.held_out, now.sample) == (
        later.digest,
        later.notes,
        later.held_out,
        later.sample,
    )
    assert isinstance(later.train.pixels, PixelsAhead) and tuple(later.test.pixels.shape) == tuple(
        now.test.pixels.shape
    )
    for one, other in ((now.train, later.train), (now.test, later.test)):
        assert torch.equal(one.labels, other.labels) and tuple(one.pixels.shape) == tuple(other.pixels.shape)
        rows = torch.randperm(len(one), generator=torch.Generator().manual_seed(1))
        assert torch.equal(one.pixels[rows], other.pixels[rows])


@pytest.mark.slow
def test_a_task_that_is_read_ahead_is_learned_alike_and_a_bad_image_commits_nothing(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    train = ["-C", project, "train-task", more, *OPTIONS]
    assert cli(*train).code == 0
    now = learned_hashes(project)
    assert cli("-C", project, "rollback", "more", "--yes").code == 0
    monkeypatch.setattr(module, "read_image_task", lambda *given, ahead: read_image_task(*given, ahead=not ahead))
    before = learned_hashes(project)
    assert cli(*train).code == 0
    assert learned_hashes(project) == now
    assert cli("-C", project, "rollback", "more", "--yes").code == 0
    bad = more / "train" / "pink" / "07.png"
    bad.write_bytes(bad.read_bytes()[:60])
    check_error(cli(*train), 4, r"pink/07\.png")
    check_error(cli(*train, "--dry-run"), 4, r"pink/07\.png")
    assert learned_hashes(project) == before
    assert cli(*train, "--skip-bad").code == 0


_DECODED_AHEAD = """
import sys, time
from treelora_backends.vit import backend, images
from treelora_cli import app
from treelora_cli.errors import DataError

read, decode, marker, bad = backend.read_image_task, images.Preprocessing.to_pixels, sys.argv[1], sys.argv[2]

def slowly(self, data, name):
    if not bad:
        time.sleep(0.1)
        open(marker, "w").close()
    if bad and bad in name:
        raise DataError(f"{name}: cannot be decoded.")
    return decode(self, data, name)

backend.read_image_task = lambda *given, ahead: read(*given, ahead=True)
images.Preprocessing.to_pixels = slowly
app.main(sys.argv[3:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, None])
def test_a_command_ends_at_once_while_images_are_decoded_ahead(
    project: Path, tmp_path: Path, number: signal.Signals | None
) -> None:
    """Of 400 images of a tenth of a second each most are still to be decoded; ``None``: one of them is bad."""
    more = make_images(tmp_path / "more", ["pink", "brown"], train=200, test=2)
    before, marker = learned_hashes(project), tmp_path / "begun"
    command = ["-C", str(project), "train-task", str(more), *OPTIONS]
    child = subprocess.Popen(
        [sys.executable, "-c", _DECODED_AHEAD, str(marker), "" if number else "pink/150.png", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell put the tests behind
    )
    while number is not None and not marker.exists() and child.poll() is None:
        time.sleep(0.01)
    began = time.monotonic()
    if number is not None:
        child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert child.returncode == (130 if number else 4), said
    assert "Traceback" not in said and "Unexpected" not in said
    assert ("Interrupted" in said) == (number is not None)
    assert ("pink/150.png: cannot be decoded." in said) == (number is None)
    if number is not None:
        assert time.monotonic() - began < 10, "the other images were decoded first"
    assert learned_hashes(project) == before
    assert list((project / ".treelora" / "run").iterdir()) == []
