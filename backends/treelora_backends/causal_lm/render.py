"""From examples to token ids, the same way in training, scoring and prediction.

==========  ===============================================  ==========================
style       what the model sees                              what it learns to write
==========  ===============================================  ==========================
``plain``   the prompt as it is                              the answer, end of text
``labels``  the sentence, then the label names               the label, end of text
``chat``    the tokenizer's chat template, or role: content  the answer, end of turn
``text``    (nothing)                                        the whole text, end of text
==========  ===============================================  ==========================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treelora_cli.data.text import TextExample, Turn, message_fields

Ids = np.ndarray[Any, np.dtype[np.int32]]

_HEAD_SHARE = 4
"""A prompt that is too long loses its middle; one part in so many of what stays is its beginning."""


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt: What is read, (P,).
        answer: What is learned, (A,).
        cut: ``prompt`` or ``answer`` when that part was too long, else empty.
    """

    prompt: Ids
    answer: Ids
    cut: str = ""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Renders and tokenises.

    Args:
        tokenizer: A Hugging Face tokenizer; it is never changed.
        max_length: Most tokens of prompt and answer together.
        end_ids: Token ids that end an answer, the usual one first; may be empty.
        context: Most tokens the model takes; ``max_length`` when ``None``.
    """

    def __init__(self, tokenizer: Any, max_length: int, end_ids: Sequence[int], context: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.context = context or max_length
        self.end_ids = tuple(end_ids)
        self.pad_id = self.end_ids[0] if self.end_ids else 0  # masked, so any token will do

    @property
    def has_template(self) -> bool:
        """True when the tokenizer knows how to render a chat."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- text -----------------------------------------------------------------------------------------

    def prompt_text(self, example: TextExample, style: str, labels: Sequence[str]) -> str:
        """Return what the model reads."""
        if style == "labels":
            return f"{example.prompt}\nOptions: {', '.join(labels)}\nAnswer:"
        if style == "chat":
            return self._chat_text(example.turns or (Turn("user", example.prompt),))
        return example.prompt

    def _chat_text(self, turns: Sequence[Turn]) -> str:
        if self.has_template:
            text = self.tokenizer.apply_chat_template(message_fields(turns), tokenize=False, add_generation_prompt=True)
            return str(text)
        lines = [f"{turn.role.capitalize()}: {turn.content}" for turn in turns]
        return "\n".join([*lines, "Assistant:"])

    # -- ids ------------------------------------------------------------------------------------------

    def encode(self, example: TextExample, style: str, labels: Sequence[str]) -> Encoded:
        """Tokenise a whole example, cut to ``max_length``; the answer is kept before the prompt."""
        if style == "text":
            return self._encode_text(example.answer)
        prompt_text = self.prompt_text(example, style, labels)
        prompt = self.prompt_ids(prompt_text, style)
        answer = self.answer_ids(prompt_text, prompt, example.answer.strip(), style)
        if self.end_ids and answer[-1] not in self.end_ids:
            answer = [*answer, self.end_ids[0]]
        least_prompt = min(len(prompt), self.max_length // _HEAD_SHARE)
        if len(answer) > self.max_length - least_prompt:
            answer = answer[: self.max_length - least_prompt]
            return Encoded(_array(cut_middle(prompt, least_prompt)), _array(answer), "answer")
        room = self.max_length - len(answer)
        cut = "prompt" if len(prompt) > room else ""
        return Encoded(_array(cut_middle(prompt, room)), _array(answer), cut)

    def _encode_text(self, text: str) -> Encoded:
        ids = [*self.tokenizer(text)["input_ids"], *self.end_ids[:1]]
        cut = "answer" if len(ids) > self.max_length else ""
        return Encoded(_array(ids[:1]), _array(ids[1 : self.max_length]), cut)

    def prompt_ids(self, text: str, style: str) -> list[int]:
        """Tokenise what the model reads; a rendered template already holds its special tokens."""
        special = not (style == "chat" and self.has_template)
        ids = list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
        while special and len(ids) > 1 and ids[-1] in self.end_ids:
            ids.pop()  # some tokenizers close every text
        return ids or [self._start_id()]

    def answer_ids(self, prompt_text: str, prompt: Sequence[int], answer: str, style: str) -> list[int]:
        """Tokenise an answer as it continues the prompt, so that it reads as the model would write it."""
        templated = style == "chat" and self.has_template
        glue = "" if templated or not prompt_text or prompt_text[-1].isspace() else " "
        joint = list(self.tokenizer(prompt_text + glue + answer, add_special_tokens=not templated)["input_ids"])
        while len(joint) > len(prompt) + 1 and joint[-1] in self.end_ids:
            joint.pop()
        if joint[: len(prompt)] == list(prompt) and len(joint) > len(prompt):
            return joint[len(prompt) :]
        return list(self.tokenizer(glue + answer, add_special_tokens=False)["input_ids"])

    def content_ids(self, content: str) -> Ids:
        """Tokenise an input without any rendering, for telling its task."""
        ids = self.tokenizer(content)["input_ids"] or [self._start_id()]
        return _array(cut_middle(ids, self.max_length))

    def _start_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.pad_id)

    def decode(self, ids: Sequence[int]) -> str:
        """Return generated ids as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def show(self, example: TextExample, style: str, labels: Sequence[str]) -> str:
        """Return an example as the model sees it, with the learned part marked."""
        encoded = self.encode(example, style, labels)
        prompt = self.tokenizer.decode(encoded.prompt.tolist())
        return f"{prompt}[[{self.tokenizer.decode(encoded.answer.tolist())}]]"


def cut_middle(ids: Sequence[int], room: int) -> list[int]:
    """Return at most ``room`` ids: the beginning and, mostly, the end."""
    if len(ids) <= room:
        return list(ids)
    head = room // _HEAD_SHARE
    return [*ids[:head], *ids[len(ids) - (room - head) :]]


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)
