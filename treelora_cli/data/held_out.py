"""Which examples of a task are held out for scoring: chosen by content, and found again by content.

Where a task brings no held-out part, the examples with the lowest draws are held out, and a draw depends on the example
alone: other names or another order move none in or out. Once a task is learned, the hashes of its held-out examples are
kept, and from then on only those examples are scored, whatever comes to lie beside them.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from treelora_cli.backend.values import Change, Recorded

T = TypeVar("T")

_DIGITS = Recorded.DIGITS


def content_hash(*parts: str | bytes) -> str:
    """Return the hash of an example's parts (its label and what it shows), hex, short."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:_DIGITS]


def same_examples(count: int, total: int, kind: str) -> str:
    """Return what to tell of held-out examples that are among those learned."""
    return f"{count} of {total} held-out {kind} are training {kind}, too: what they score says little."


def set_aside(members: Sequence[T], share: float, key: str, hash_of: Callable[[T], str]) -> tuple[list[T], list[T]]:
    """Divide examples into (kept, set aside) by their own contents, each part in the order given.

    Of two or more examples each part gets at least one. Equal examples are drawn alike.

    Args:
        members: Examples in any order.
        share: Between 0 and 1.
        key: What else the draw depends on, such as a seed.
        hash_of: The content of an example.
    """
    draws = [content_hash(key, hash_of(one)) for one in members]
    aside = set(sorted(range(len(draws)), key=draws.__getitem__)[: _count(len(members), share)])
    kept = [one for place, one in enumerate(members) if place not in aside]
    return kept, [members[place] for place in sorted(aside)]


def _count(total: int, share: float) -> int:
    return min(total - 1, max(1, round(share * total))) if total else 0


def set_aside_by_position(members: Sequence[T], share: float, key: str) -> tuple[list[T], list[T]]:
    """Divide examples as projects did that did not keep hashes: shuffled by ``key``, in the order they were found."""
    order = list(members)
    random.Random(key).shuffle(order)
    count = _count(len(order), share)
    return order[count:], order[:count]


OTHER_DATA = Change("its data is not what it was learned from (the SHA-256 over all examples differs)", False)
"""Said of tasks learned before the held-out examples' own hashes were kept."""


def find_recorded(
    test: Sequence[T],
    train: Sequence[T],
    recorded: Sequence[str],
    hash_of: Callable[[T], str],
    drawn: Sequence[T] | None = None,
) -> tuple[list[T], Change | None]:
    """Return the examples that were held out when a task was learned, wherever they are now, and what changed.

    Args:
        test: The task's held-out part as it is now; may be empty.
        train: All other examples; looked at only for what ``test`` lacks.
        recorded: Content hashes of the examples, one each.
        hash_of: The content of an example.
        drawn: Which of ``test`` the task's limit takes now; ``None`` where it has none. Those that it leaves out were
            not recorded, so of them only a draw that has changed tells new ones.
    """
    left = Counter(recorded)
    contents: dict[int, str] = {}  # by identity: a draw holds the same objects, and hashing one reads its file

    def content_of(one: T) -> str:
        if id(one) not in contents:
            contents[id(one)] = hash_of(one)
        return contents[id(one)]

    def taken(members: Sequence[T]) -> list[T]:
        found = []
        for one in members:
            if left[content := content_of(one)] > 0:
                left[content] -= 1
                found.append(one)
        return found

    found = taken(test)
    new = len(test) - len(found) if drawn is None else _new_of_draw(Counter(map(content_of, drawn)), recorded)
    if left.total():
        found += taken(train)
    return found, _change(left.total(), new, len(recorded))


def _new_of_draw(drawn: Counter[str], recorded: Sequence[str]) -> int | None:
    """Return how many examples of a draw are new; ``None`` where it passes over recorded ones for some that are."""
    if drawn and Counter(recorded) - drawn:
        return None
    return (drawn - Counter(recorded)).total()


def _change(missing: int, new: int | None, total: int) -> Change | None:
    """Say what differs; ``new``: how many are new, ``None`` for some."""
    if missing:
        more = f", {new} are new" if new else ""
        text = f"{missing} of {total} held-out examples are gone or different since it was learned{more}"
        return Change(text, scorable=False)
    if new != 0:
        count = "some" if new is None else new
        return Change(f"{count} held-out examples are new since it was learned and are not scored", scorable=True)
    return None
