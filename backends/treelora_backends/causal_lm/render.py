"""From examples to token ids, the same way in training, scoring and prediction.

==========  ===============================================  ==============================
style       what the model sees                              what it learns to write
==========  ===============================================  ==============================
``plain``   the prompt as it is                              the answer, end of text
``labels``  the sentence, then the label names               the label, end of text
``chat``    the tokenizer's chat template, or role: content  each answer, the template's end
``text``    (nothing)                                        the whole text, end of text
==========  ===============================================  ==============================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from treelora_backends.causal_lm.template import ChatTemplate, shortened
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import DataError, TreeLoraError

Ids = np.ndarray[Any, np.dtype[np.int32]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_BLANK_LINES = re.compile(r"^(\s*\n)+")
_HEAD_SHARE = 4
"""A prompt that is too long loses its middle; one part in so many of what stays is its beginning."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt: What is read before anything is learned, (P,).
        answer: What is learned; in a chat of several turns with what is read in between, (A,).
        cut: ``prompt``, ``answer`` or ``turns`` when that was too long, else empty.
        learned: True where a token of ``answer`` is learned, (A,); ``None`` for everywhere.
    """

    prompt: Ids
    answer: Ids
    cut: str = ""
    learned: Mask | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def places(self) -> list[int]:
        """Places in ``answer`` of the tokens that are learned."""
        return list(range(len(self.answer))) if self.learned is None else np.flatnonzero(self.learned).tolist()

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        if self.learned is None:
            return len(self.answer)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.learned.astype(np.int8), [0]])))
        return int((edges[1::2] - edges[::2]).max(initial=0))


class Encoder:
    """Renders and tokenises.

    Args:
        tokenizer: A Hugging Face tokenizer; it is never changed.
        max_length: Most tokens of prompt and answer together.
        end_ids: Token ids that end an answer, the usual one first; may be empty.
        context: Most tokens the model takes; ``max_length`` when ``None``.
        vocabulary: Tokens that the model embeds; ``None`` for all of the tokenizer's.
        learn: Which turns of the assistant in a chat are learned: ``all`` or the ``last``.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        end_ids: Sequence[int],
        context: int | None = None,
        vocabulary: int | None = None,
        learn: str = "all",
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.context = context or max_length
        self.end_ids = tuple(end_ids)
        self.vocabulary = vocabulary
        self.learn = learn
        self.template = ChatTemplate(tokenizer)
        self.pad_id = self.end_ids[0] if self.end_ids else 0  # masked, so any token will do

    @property
    def has_template(self) -> bool:
        """True when the tokenizer knows how to render a chat."""
        return self.template.exists

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids at which an answer ends: where the template's turns do, and the model's own."""
        own: list[int] = []
        if self.has_template:
            try:
                own = [int(self.tokenizer.convert_tokens_to_ids(end)) for end in [self.template.form.end] if end]
            except DataError:  # a template that renders no chat; nothing learned has its ends
                own = []
        return tuple(dict.fromkeys([*own, *self.end_ids]))

    # -- text -----------------------------------------------------------------------------------------

    def prompt_text(self, example: TextExample, style: str, labels: Sequence[str]) -> str:
        """Return what the model reads."""
        if style == "labels":
            return f"{example.prompt}\nOptions: {', '.join(labels)}\nAnswer:"
        if style == "chat":
            return self.template.asked(example.asked, example.tools)
        return example.prompt

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    # -- ids ------------------------------------------------------------------------------------------

    def encode(self, example: TextExample, style: str, labels: Sequence[str]) -> Encoded:
        """Tokenise a whole example, cut to ``max_length``; the answer is kept before the prompt.

        Raises:
            DataError: Tokenizer or template refuse it, or the model does not know a token; names file and line.
        """
        with placed(example.where):
            if style == "text":
                encoded = self._encode_text(example.answer)
            elif style == "chat":
                encoded = self._encode_chat(example)
            else:
                encoded = self._encode_pair(example, style, labels)
            self._check(encoded.prompt, encoded.answer)
        return encoded

    def _check(self, *parts: Ids) -> None:
        """Refuse tokens that the model does not embed."""
        largest = max((int(part.max(initial=0)) for part in parts), default=0)
        if self.vocabulary is not None and largest >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(f"holds '{token}', token {largest}; the model embeds {self.vocabulary}.")

    def _encode_pair(self, example: TextExample, style: str, labels: Sequence[str]) -> Encoded:
        prompt_text = self.prompt_text(example, style, labels)
        prompt = self.prompt_ids(prompt_text, style)
        closed = style == "labels" or example.answer.strip() in labels
        wanted = example.answer.strip() if closed else example.answer
        return self._fitted(prompt, self.answer_ids(prompt_text, prompt, wanted, style, ends=True), None)

    def _encode_chat(self, example: TextExample) -> Encoded:
        """Tokenise a chat; one that is too long loses its oldest turns first."""
        ids, learned = self._chat_ids(example)
        cut = ""
        for start in range(1, len(example.turns)):
            shorter = shortened(example, start)
            if len(ids) <= self.max_length or shorter is None:
                break
            cut, (ids, learned) = "turns", self._chat_ids(shorter)
        first = int(np.argmax(learned))
        inner = None if learned[first:].all() else learned[first:]
        fitted = self._fitted(ids[:first], ids[first:], inner)
        return fitted if fitted.cut or not cut else Encoded(fitted.prompt, fitted.answer, cut, fitted.learned)

    def _chat_ids(self, example: TextExample) -> tuple[list[int], Mask]:
        """Return a whole chat as ids, and which of them are learned, (T,)."""
        pieces = self.template.pieces(example, self.learn)
        if pieces is None:  # the last turn alone; ``ChatTemplate.divided`` makes examples of the others
            pieces = self.template.pieces(example, "last") or []
        ids: list[int] = []
        learned: list[bool] = []
        text = ""
        for piece in pieces:
            new = self._continued(text, ids, piece.text, "chat") if text else self.prompt_ids(piece.text, "chat")
            if piece.ends:
                new = [*new, *self.end_ids[:1]]
            text += piece.text
            ids += new
            learned += [piece.learned] * len(new)
        return ids, np.asarray(learned, dtype=np.bool_)

    def _fitted(self, prompt: Sequence[int], answer: Sequence[int], learned: Mask | None) -> Encoded:
        """Cut prompt and answer to ``max_length``."""
        least_prompt = min(len(prompt), self.max_length // _HEAD_SHARE)
        if len(answer) > self.max_length - least_prompt:
            kept = self.max_length - least_prompt
            inner = None if learned is None else learned[:kept]
            return Encoded(_array(cut_middle(prompt, least_prompt)), _array(answer[:kept]), "answer", inner)
        room = self.max_length - len(answer)
        cut = "prompt" if len(prompt) > room else ""
        return Encoded(_array(cut_middle(prompt, room)), _array(answer), cut, learned)

    def _encode_text(self, text: str) -> Encoded:
        ids = self._tokens(text, special=True)
        if not ids or ids[-1] not in self.end_ids:  # some tokenizers close every text
            ids = [*ids, *self.end_ids[:1]]
        cut = "answer" if len(ids) > self.max_length else ""
        return Encoded(_array(ids[:1]), _array(ids[1 : self.max_length]), cut)

    def _adds_special(self, style: str) -> bool:
        """True unless a template wrote the text, which already holds its special tokens."""
        return not (style == "chat" and self.has_template)

    def prompt_ids(self, text: str, style: str) -> list[int]:
        """Tokenise what the model reads."""
        special = self._adds_special(style)
        ids = self._tokens(text, special=special)
        while special and len(ids) > 1 and ids[-1] in self.end_ids:
            ids.pop()  # some tokenizers close every text
        return ids or [self.start_id]

    def fitted_prompt(
        self, example: TextExample, style: str, labels: Sequence[str], room: int
    ) -> tuple[str, list[int]]:
        """Return what the model reads and its ids, at most ``room``: first a chat's oldest turns go, then the middle.

        Raises:
            DataError: Tokenizer or template refuse it; names file and line.
        """
        with placed(example.where):
            for start in range(len(example.turns) + 1):
                shown = example if start == 0 else shortened(example, start)
                if shown is None:
                    break
                text = self.prompt_text(shown, style, labels)
                ids = self.prompt_ids(text, style)
                if len(ids) <= room or style != "chat":
                    break
            self._check(_array(ids))
        return text, cut_middle(ids, room)

    def answer_ids(
        self, prompt_text: str, prompt: Sequence[int], answer: str, style: str, *, ends: bool = False
    ) -> list[int]:
        """Tokenise an answer as it continues the prompt, so that it reads as the model would write it.

        Args:
            prompt_text: What the model reads.
            prompt: Its ids.
            answer: The answer, as its data has it.
            style: One of ``STYLES``.
            ends: Add the token that ends an answer.
        """
        if style == "chat":
            glue = self.template.form.opening
        else:
            glue = "" if not prompt_text or prompt_text[-1].isspace() or answer[:1].isspace() else " "
        ids = self._continued(prompt_text, prompt, glue + answer, style)
        return [*ids, *self.end_ids[:1]] if ends and (not ids or ids[-1] not in self.end_ids) else ids

    def _continued(self, before: str, ids: Sequence[int], text: str, style: str) -> list[int]:
        """Return the tokens of ``text`` where it follows ``before``, whose tokens are ``ids``."""
        special = self._adds_special(style)
        joint = self._tokens(before + text, special=special)
        while special and len(joint) > len(ids) + 1 and joint[-1] in self.end_ids:
            joint.pop()
        if joint[: len(ids)] == list(ids) and len(joint) > len(ids):
            return joint[len(ids) :]
        return self._tokens(text, special=False)

    def content_ids(self, content: str) -> Ids:
        """Tokenise an input without any rendering, for telling its task."""
        ids = self.tokenizer(content)["input_ids"] or [self.start_id]
        return _array(cut_middle(ids, self.max_length))

    @property
    def start_id(self) -> int:
        """Token id that stands for an empty text."""
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.pad_id)

    def decode(self, ids: Sequence[int], style: str = "plain") -> str:
        """Return generated ids as text, without what the template writes before every answer."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        opening = self._shown_opening if style == "chat" else ""
        if opening and text.lstrip().startswith(opening):
            text = text.lstrip()[len(opening) :]
        if style == "chat":
            return text.strip()
        text = _BLANK_LINES.sub("", text).rstrip()
        return text[1:] if text[:1] == " " and not text[1:2].isspace() else text  # the space between prompt and answer

    @cached_property
    def _shown_opening(self) -> str:
        """What decoding leaves of the text that the template writes before every answer."""
        ids = self._tokens(self.template.form.opening, special=False)
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def body(self, example: TextExample) -> str:
        """Return a chat's answer as it is compared with what is generated."""
        _, piece = self.template.written(example.messages, example.tools)
        return self.decode(self._tokens(piece.text, special=False), "chat")

    def tokens(self, example: TextExample, style: str, labels: Sequence[str]) -> list[tuple[str, bool]]:
        """Return an example token by token, and which of them are learned."""
        encoded = self.encode(example, style, labels)
        chosen = set(encoded.places)
        read = [(str(self.tokenizer.decode([one])), False) for one in encoded.prompt.tolist()]
        return read + [
            (str(self.tokenizer.decode([one])), i in chosen) for i, one in enumerate(encoded.answer.tolist())
        ]

    def show(self, example: TextExample, style: str, labels: Sequence[str]) -> str:
        """Return an example as the model sees it, with the learned parts marked."""
        encoded = self.encode(example, style, labels)
        ids = encoded.answer.tolist()
        marks = [True] * len(ids) if encoded.learned is None else encoded.learned.tolist()
        shown, start = str(self.tokenizer.decode(encoded.prompt.tolist())), 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or marks[end] != marks[start]:
                part = self.tokenizer.decode(ids[start:end])
                shown += f"[[{part}]]" if marks[start] else str(part)
                start = end
        return shown


@contextmanager
def placed(where: str) -> Iterator[None]:
    """Name the file and line of whatever a tokenizer or template raises on data.

    Raises:
        DataError: It raised.
    """
    try:
        yield
    except TreeLoraError as error:
        raise DataError(f"{where}: {error}") from error
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # tokenizers' panics are no Exception
        reason = (str(error).strip().splitlines() or [""])[0][:160]
        raise DataError(f"{where}: the tokenizer refuses this text ({type(error).__name__}: {reason}).") from error


def cut_middle(ids: Sequence[int], room: int) -> list[int]:
    """Return at most ``room`` ids: the beginning and, mostly, the end."""
    if len(ids) <= room:
        return list(ids)
    head = room // _HEAD_SHARE
    return [*ids[:head], *ids[len(ids) - (room - head) :]]


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)
