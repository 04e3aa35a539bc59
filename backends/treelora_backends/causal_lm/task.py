"""A language task: its examples read, rendered and tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from treelora_backends.causal_lm.render import Encoded, Encoder, placed
from treelora_backends.causal_lm.template import THOUGHT_ENDS
from treelora_cli.backend.runtime import Reporter
from treelora_cli.backend.values import Change, DataRequest
from treelora_cli.data.examples import TextExample, calls_text, learned_answers
from treelora_cli.data.text import TextListing, hash_of_text, list_texts
from treelora_cli.errors import SKIP_BAD, DataError, UsageError, skipped

if TYPE_CHECKING:
    from torch import Tensor

_AFTER_END = 3
"""Learned tokens at the end of an answer among which its end is looked for."""
_LOOKED_AT = 50
"""Chats that are searched for what the template leaves out."""
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
        tokens: The first example token by token, and whether each is learned.
        digest: SHA-256 over the examples as read, hex.
        generated: Held-out examples, calls of tools as the template writes them.
    """

    listing: TextListing
    train: list[Encoded]
    source: str
    notes: tuple[str, ...]
    sample: str
    tokens: tuple[tuple[str, bool], ...]
    digest: str
    generated: list[TextExample]

    @property
    def labels(self) -> tuple[str, ...]:
        """The closed set of answers; empty for open ones."""
        return self.listing.labels

    @property
    def numbered(self) -> bool:
        """False: each task keeps its own set of answers, so numbers of two tasks never mix."""
        return False

    @property
    def metric(self) -> str:
        """Name of the score."""
        return self.listing.metric

    @property
    def closed(self) -> bool:
        """True when an answer is chosen among several labels, right or wrong."""
        return len(self.labels) > 1 and self.metric == "accuracy"

    @property
    def style(self) -> str:
        """How examples become model input, one of ``data.text.STYLES``."""
        return self.listing.style

    @property
    def test(self) -> list[TextExample]:
        """Held-out examples, with answers as they are generated."""
        return self.generated

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


def read_lm_task(request: DataRequest, encoder: Encoder, reporter: Reporter) -> LmTask:
    """Read, validate and tokenise a task's examples.

    Raises:
        DataError: The data is missing, malformed or of another kind, or tokenizer or template refuse it.
    """
    listing = list_texts(request, encoder.learn)
    reading = _Reading(encoder, listing.style, listing.labels, request.skip_bad)
    wanted = [] if request.test_only else listing.train
    pairs = [pair for one in reporter.track(wanted, "Tokenising", len(wanted)) for pair in reading.learned(one)]
    test = listing.test
    if not request.test_only or request.skip_bad:
        test = [one for one in test if reading.accepts(one)]
    generated = [replace(one, answer=encoder.body(one)) if _is_rewritten(one) else one for one in test]
    if wanted and not pairs:
        raise DataError(f"No example is left: {reading.bad[0]}")
    train = [encoded for _, encoded in pairs]
    used = replace(listing, train=[one for one, _ in pairs] if wanted else listing.train, test=test)
    notes = (
        *listing.notes,
        *reading.notes(),
        *_cut_notes(train, encoder),
        *_template_notes(used, len(wanted), encoder),
        *_end_notes(train, encoder),
        *_sign_notes([one for one, _ in pairs], train, encoder),
    )
    first = pairs[0][0] if pairs else None
    sample = "" if first is None else _shortened(encoder.show(first, listing.style, listing.labels))
    tokens = () if first is None else tuple(encoder.tokens(first, listing.style, listing.labels))
    return LmTask(used, train, _source(request), notes, sample, tokens, listing.digest, generated)


def answer_classes(tasks: Sequence[LmTask], weights: str | None) -> Tensor:
    """Return the place of each training example's answer among its task's labels, (n,), the tasks one after the other.

    Where nothing is weighed, all are 0.

    Raises:
        UsageError: Classes are to be weighed, and a task's answers are free.
    """
    import torch

    found: list[int] = []
    for task in tasks:
        if weights in (None, "none"):
            found += [0] * len(task.train)
            continue
        if not task.labels or task.metric != "accuracy":
            raise UsageError(
                f"train.class_weights {weights}: the answers are free text, so there are no classes to weigh. Leave it"
                " out for this task: --set train.class_weights=none"
            )
        offset = max(found, default=-1) + 1
        found += [offset + task.labels.index(one.answer.strip()) for one in task.listing.train]
    return torch.tensor(found, dtype=torch.int64)


@dataclass
class _Reading:
    """Tokenises examples one by one, and counts those that cannot be."""

    encoder: Encoder
    style: str
    labels: tuple[str, ...]
    skip_bad: bool
    bad: list[str] = field(default_factory=list)

    def learned(self, one: TextExample) -> list[tuple[TextExample, Encoded]]:
        """Return what is learned of a record: itself, or a chat's turns; nothing for a bad one that is skipped."""
        try:
            with placed(one.where):
                parts = self.encoder.template.divided(one, self.encoder.learn) if self.style == "chat" else [one]
            return [(part, self.encoder.encode(part, self.style, self.labels)) for part in parts]
        except DataError as error:
            self._pass_over(error)
            return []

    def accepts(self, one: TextExample) -> bool:
        """True when an example can be tokenised; a bad one is skipped or refused."""
        try:
            self.encoder.encode(one, self.style, self.labels)
        except DataError as error:
            self._pass_over(error)
            return False
        return True

    def _pass_over(self, error: DataError) -> None:
        """Count a bad example; raises where none is skipped."""
        if not self.skip_bad:
            raise DataError(f"{str(error).removesuffix('.')}.{SKIP_BAD}") from error
        self.bad.append(str(error))

    def notes(self) -> list[str]:
        """Return a line on what was skipped."""
        return [skipped(self.bad, "examples")] if self.bad else []


def _cut_notes(train: Sequence[Encoded], encoder: Encoder) -> list[str]:
    notes = []
    parts = {"prompt": "prompt cut", "answer": "answer cut", "turns": "oldest messages left out"}
    for part, done in parts.items():
        count = sum(one.cut == part for one in train)
        if count:
            cut = f"{count} of {len(train)} training examples: {done} to fit {encoder.max_length} tokens"
            notes.append(f"{cut} (--max-length, or the model's context).")
    return notes


def _end_notes(train: Sequence[Encoded], encoder: Encoder) -> list[str]:
    """Return a line where answers are learned without a token at which generation stops."""
    whole = [one for one in train if one.cut != "answer" and one.places]
    stops = set(encoder.stop_ids)
    # a template may write a line break after its end
    endless = sum(not stops & {int(one.answer[place]) for place in one.places[-_AFTER_END:]} for one in whole)
    if not endless:
        return []
    reason = "the template writes none that is learned" if encoder.end_ids else "the tokenizer names no end token"
    return [f"{endless} of {len(train)} training answers have no end ({reason}): what is generated runs to its limit."]


def _sign_notes(examples: Sequence[TextExample], train: Sequence[Encoded], encoder: Encoder) -> list[str]:
    """Say where texts that are learned hold an end before their own, or what the tokenizer does not know."""
    notes = []
    learned = [learned_answers(one, encoder.learn) for one in examples]
    ends = [str(encoder.tokenizer.convert_ids_to_tokens(one)) for one in encoder.stop_ids]
    for end in ends:
        count = sum(any(end in said.rstrip().removesuffix(end) for said in answers) for answers in learned)
        if count:
            notes.append(f"{count} training examples hold '{end}' inside an answer: what is generated stops there.")
    unknown = encoder.tokenizer.unk_token_id
    if unknown is not None and unknown not in encoder.stop_ids:
        count = sum(unknown in one.answer[one.places] for one in train)
        if count:
            sign = encoder.tokenizer.unk_token
            notes.append(
                f"{count} training examples hold what the tokenizer does not know: '{sign}' is learned for it."
            )
    return notes


def _template_notes(listing: TextListing, records: int, encoder: Encoder) -> list[str]:
    """Say what of a chat is learned otherwise than its data and template would have one think."""
    if not encoder.stop_ids:
        return ["The model names no token that ends an answer: what it writes is cut at the longest answer's length."]
    if listing.style != "chat" or not encoder.has_template:
        return []
    form, notes = encoder.template.form, []
    if form.only_asked:
        opened = form.only_asked.replace("\n", "\\n")
        notes.append(
            f"The chat template opens '{opened}' where a turn is to be written; finished turns lack it: left out."
        )
    if not form.end:
        notes.append(f"The chat template ends no turn; '{encoder.tokenizer.eos_token}' is learned as the end.")
    if not encoder.template.takes_system and any(one.system for one in listing.train or listing.test):
        notes.append("The chat template takes no system prompt: it opens the user's first message instead.")
    examples = (listing.train or listing.test)[:_LOOKED_AT]
    silent = sorted(set().union(*(encoder.template.left_out(one) for one in examples)))
    if silent:
        notes.append(f"The chat template leaves out what stands in {', '.join(silent)}: the model does not read it.")
    if any(map(encoder.template.drops_thoughts, examples)):
        notes.append("The chat template leaves out the thoughts before an answer: they are not learned.")
    if not encoder.template.writes_calls and any(calls_text(turn) for one in examples for turn in one.messages):
        notes.append("The chat template writes no calls of tools: they stand in the messages as JSON instead.")
    if not encoder.template.keeps_indentation and any(map(_is_indented, examples)):
        notes.append(
            "The chat template strips white space around messages: indentation before an answer is not learned."
        )
    if records and len(listing.train) > records:
        notes.append(f"{records} chats are learned as {len(listing.train)} examples, one for each answer.")
    return notes


def _is_indented(example: TextExample) -> bool:
    return any(turn.role == "assistant" and turn.content[:1].isspace() for turn in example.messages)


def _is_rewritten(example: TextExample) -> bool:
    """Return whether a template may write an answer otherwise than it stands: without its thoughts, or with calls."""
    return example.last is not None and bool(example.last.more or THOUGHT_ENDS in example.last.content)


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _source(request: DataRequest) -> str:
    record = {**request.to_json(), "path": str(request.known_as or request.path)}
    place = [record[key] for key in ("path", "val", "classes", "data_format", "columns")]
    return hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
