"""What the server takes at once, and how it says no."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of what is taken.

    Attributes:
        body: Bytes of a request's body.
        bodies: Bytes of all bodies that are in memory at a time.
        items: Inputs of a request.
        pixels: Pixels of an image.
        waiting: Requests that wait to be answered.
        batch: Inputs answered together.
        seconds: Within which a body has to arrive.
    """

    body: int = 16 * MIB
    bodies: int = 256 * MIB
    items: int = 64
    pixels: int = 50_000_000
    waiting: int = 256
    batch: int = 32
    seconds: float = 30.0


class Refusal(Exception):
    """A request that is not answered; its message is one line for whoever asked.

    Attributes:
        status: HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
