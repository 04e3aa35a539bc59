"""A language task: its examples read, rendered and tokenised."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from treelora_backends.causal_lm.render import Encoded, Encoder
from treelora_cli.backend.contract import Change, DataRequest
from treelora_cli.backend.runtime import Reporter
from treelora_cli.data.text import TextExample, TextListing, hash_of_text, list_texts

_SHOWN = 600
"""Characters of the sample that are shown."""


@dataclass(frozen=True)
class LmTask:
    """Meets ``TaskData``.

    Attributes:
        listing: The examples as text.
        train: The training examples as token ids, in the same order; empty when only the rest was asked for.
        source: Hash of where the data lies, by which a learned task knows its own held-out examples.
        notes: Lines for the user.
        sample: The first example as the model sees it; what is learned stands in double brackets.
    """

    listing: TextListing
    train: list[Encoded]
    source: str
    notes: tuple[str, ...]
    sample: str

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of answers; empty for open ones."""
        return self.listing.labels

    @property
    def metric(self) -> str:
        """Name of the score."""
        return self.listing.metric

    @property
    def closed(self) -> bool:
        """True when an answer is one of the labels, right or wrong."""
        return len(self.labels) > 1 and self.metric == "accuracy"

    @property
    def style(self) -> str:
        """How examples become model input, one of ``data.text.STYLES``."""
        return self.listing.style

    @property
    def test(self) -> list[TextExample]:
        """Held-out examples."""
        return self.listing.test

    @property
    def train_size(self) -> int:
        """Training examples."""
        return len(self.train)

    @property
    def test_size(self) -> int:
        """Held-out examples."""
        return len(self.listing.test)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Content hash of each held-out example."""
        return tuple(hash_of_text(one) for one in self.listing.test)

    @property
    def change(self) -> Change | None:
        """What differs from the recorded held-out examples, if anything."""
        return self.listing.change

    @property
    def digest(self) -> str:
        """SHA-256 over the examples, hex."""
        return self.listing.digest


def read_lm_task(request: DataRequest, encoder: Encoder, reporter: Reporter) -> LmTask:
    """Read, validate and tokenise a task's examples.

    Raises:
        DataError: The data is missing, malformed or of another kind.
    """
    listing = list_texts(request)
    wanted = [] if request.test_only else listing.train
    train = [
        encoder.encode(one, listing.style, listing.labels) for one in reporter.track(wanted, "Tokenising", len(wanted))
    ]
    notes = [*listing.notes]
    for part in ("prompt", "answer"):
        count = sum(one.cut == part for one in train)
        if count:
            cut = f"{count} of {len(train)} training examples: {part} cut to fit {encoder.max_length} tokens"
            notes.append(f"{cut} (--max-length, or the model's context).")
    sample = _shortened(encoder.show(wanted[0], listing.style, listing.labels)) if wanted else ""
    return LmTask(listing, train, _source(request), tuple(notes), sample)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _source(request: DataRequest) -> str:
    record = request.to_json()
    place = [record[key] for key in ("path", "val", "classes", "data_format", "columns")]
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
