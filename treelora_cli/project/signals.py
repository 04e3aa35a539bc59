"""Ctrl-C and SIGTERM around the moment that decides."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from treelora_cli.errors import Interrupted

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
