"""One writer at a time, by a lock that dies with its process; and no signal in the moment that decides."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from treelora_cli.errors import Interrupted, LockedError, ProjectError
from treelora_cli.project.store import refuse_links, user_mode

_PATIENCE = 0.3
"""Seconds a writer tries for: whoever asks who holds the lock holds it for a moment."""


@contextmanager
def exclusive_lock(directory: Path, purpose: str) -> Iterator[None]:
    """Hold the writer's lock in ``directory`` (a project's ``.treelora``).

    The operating system releases the lock when the holder dies, so a lock left behind needs no mending.

    Raises:
        LockedError: Another process holds it; the message names it.
        ProjectError: The directory cannot be written, or leads elsewhere.
    """
    holder = directory / "lock.json"
    refuse_links(directory.parent, [f"{directory.name}/lock", f"{directory.name}/lock.json"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # a lock that only its maker may open would shut out the others of a shared project
        lock = FileLock(directory / "lock", timeout=_PATIENCE, mode=user_mode())
        lock.acquire()
    except Timeout as error:
        raise LockedError(f"This project is being written by {_describe(holder)}. Wait for it to end.") from error
    except OSError as error:
        raise ProjectError(f"{directory} cannot be written: {error.strerror}.") from error
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "command": purpose, "since": int(time.time())}
        holder.write_text(json.dumps(facts), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def lock_holder(directory: Path) -> str | None:
    """Return who holds the writer's lock in ``directory``, ``None`` when nobody does."""
    if not (directory / "lock").exists():
        return None
    lock = FileLock(directory / "lock", timeout=0, mode=user_mode())
    try:
        lock.acquire()
    except Timeout:
        return _describe(directory / "lock.json")
    except OSError:
        return None  # a read-only project has no writer
    lock.release()
    return None


def _describe(holder: Path) -> str:
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(facts["since"])))
        return f"'treelora {facts['command']}' (process {int(facts['pid'])} on {facts['host']}, since {since})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process"


_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class _Hold:
    """Counts the signals that came."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1


@contextmanager
def signals_held(done: str) -> Iterator[None]:
    """Hold signals back while the commit point is passed, so that what is then said is true.

    Args:
        done: What has happened when the block ends, for the message.

    Raises:
        Interrupted: A signal came and the block ended as it should.
    """
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or isinstance(signal.getsignal(signal.SIGINT), _Hold):  # no signal comes here, or a wider block says
        yield
        return
    hold = _Hold()
    before = {number: signal.signal(number, hold) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if hold.count:
        raise Interrupted(f"Interrupted, but {done}. See: treelora status")


def terminate_like_interrupt() -> None:
    """Let SIGTERM end a command as Ctrl-C does: with its clean-up, a line and the documented code."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
