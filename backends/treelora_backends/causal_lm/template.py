"""Chats as a model's template writes them: what is asked, and what is learned of every turn of the assistant.

A template writes a turn twice: its beginning, when the turn is to be written, and the whole, when it is finished. The
two are compared once with an answer that is known. What the finished turn has is learned, its end included; what
only the beginning has, such as an opened ``<think>``, is left out of prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from treelora_cli.backend.values import Turn
from treelora_cli.data.examples import TextExample, calls_text
from treelora_cli.errors import DataError

_ANSWER = "Treelora7answer"
_SYSTEM = "Treelora7system"
_USER = "Hello"
_QUESTION = "Treelora7question"
_CALL = "Treelora7call"
_THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"
_THOUGHTS = ("reasoning_content", "thinking")
"""What messages call thoughts that stand beside their content."""
_CLOCK = re.compile(r"\bstrftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class Piece:
    """A part of a rendered chat.

    Attributes:
        text: As the template writes it.
        learned: True for what the assistant writes.
        ends: True when the tokenizer's own end has to follow, which the template does not write.
    """

    text: str
    learned: bool = False
    ends: bool = False


@dataclass(frozen=True)
class TurnForm:
    """How the template writes a turn of the assistant.

    Attributes:
        only_asked: What it adds for a turn to be written that a finished one does not have.
        opening: What stands in a finished turn before the content.
        closing: What it writes after the content, as far as it is learned.
        rest: What follows the closing.
        end: The token that ends a turn; empty where the template writes none.
    """

    only_asked: str
    opening: str
    closing: str
    rest: str
    end: str


class ChatTemplate:
    """Renders chats with a tokenizer's template, or as ``Role: content`` without one."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self._frozen = _without_clock(template) if isinstance(template, str) else None

    @property
    def exists(self) -> bool:
        """True when the tokenizer knows how to render a chat."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    # -- what the template does -----------------------------------------------------------------------

    @cached_property
    def form(self) -> TurnForm:
        """Return how a turn of the assistant is written."""
        if not self.exists:
            return TurnForm("", " ", "", "", "")
        question = [Turn("user", _USER)]
        asked = self._applied(question, "", asks=True)
        finished = self._applied([*question, Turn("assistant", _ANSWER)], "", asks=False)
        if _ANSWER not in finished:
            raise DataError("The model's chat template leaves out what the assistant says.")
        place = finished.rindex(_ANSWER)
        common = _in_common(asked, finished[:place])
        closing, rest, end = self._until_special(finished[place + len(_ANSWER) :])
        if common < _in_common(asked, self._applied(question, "", asks=False)):  # see ``_is_rewritten``
            return TurnForm("", finished[_place_behind(asked, finished[:place]) : place], closing, rest, end)
        return TurnForm(asked[common:], finished[common:place], closing, rest, end)

    @cached_property
    def takes_system(self) -> bool:
        """True when a system prompt is written, and not refused or dropped."""
        if not self.exists:
            return True
        try:
            return _SYSTEM in self._applied([Turn("system", _SYSTEM), Turn("user", _USER)], "", asks=True)
        except DataError:
            return False

    def _until_special(self, text: str) -> tuple[str, str, str]:
        """Divide what follows an answer behind its first special token; blanks alone are no closing."""
        places = [(text.index(one), -len(one), one) for one in self._special_tokens if one in text]
        if not places:
            return ("", text, "") if text.isspace() else (text, "", "")
        place, _, token = min(places)
        return text[: place + len(token)], text[place + len(token) :], token

    @cached_property
    def _special_tokens(self) -> list[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        known = [*map(str, self.tokenizer.all_special_tokens), *(str(one) for one in added)]
        return [one for one in dict.fromkeys(known) if one.strip()]

    @cached_property
    def takes_parts(self) -> bool:
        """True when a message's text is written only as a list of parts, as models that see pictures have it."""
        asked = [{"role": "user", "content": content} for content in (_QUESTION, text_part(_QUESTION))]
        return self.exists and [self._writes(_QUESTION, [one]) for one in asked] == [False, True]

    @cached_property
    def writes_calls(self) -> bool:
        """True when calls of tools in a message are written, and not refused or dropped."""
        function = {"name": _CALL, "arguments": {}}
        calls = [{"id": "treelora7", "type": "function", "function": function}]
        content = text_part("") if self.takes_parts else ""
        turns = [{"role": "user", "content": text_part(_USER) if self.takes_parts else _USER}]
        return self.exists and self._writes(
            _CALL, [*turns, {"role": "assistant", "content": content, "tool_calls": calls}]
        )

    @cached_property
    def keeps_indentation(self) -> bool:
        """True when white space before an answer is written."""
        answer = f"    {_ANSWER}"
        return not self.exists or answer in self._applied(
            [Turn("user", _USER), Turn("assistant", answer)], "", asks=False
        )

    def _writes(self, text: str, messages: Sequence[dict[str, Any]]) -> bool:
        try:
            return text in self._rendered(messages, "", asks=False)
        except DataError:
            return False

    def _applied(self, turns: Sequence[Turn], tools: str, *, asks: bool) -> str:
        fields = [turn.fields() for turn in turns]
        if self.takes_parts:
            fields = [{**one, "content": text_part(one["content"])} for one in fields]
        return self._rendered(fields, tools, asks=asks)

    def _rendered(self, fields: Sequence[dict[str, Any]], tools: str, *, asks: bool) -> str:
        more = {"tools": json.loads(tools)} if tools else {}
        if self._frozen is not None:
            more["chat_template"] = self._frozen
        try:
            text = self.tokenizer.apply_chat_template(list(fields), tokenize=False, add_generation_prompt=asks, **more)
        except Exception as error:  # a template is a program, and may raise anything
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(f"the model's chat template refuses these messages ({reason[0][:160]})") from error
        return str(text)

    # -- chats ----------------------------------------------------------------------------------------

    def adapted(self, turns: Sequence[Turn]) -> list[Turn]:
        """Return turns as the template takes them.

        A system prompt that it does not take opens the user's first message; calls of tools that it does not write
        become their message's content.
        """
        turns = [self._spoken(turn) for turn in turns]
        if self.takes_system or not any(turn.role == "system" for turn in turns):
            return list(turns)
        system = "\n".join(turn.content for turn in turns if turn.role == "system")
        others = [turn for turn in turns if turn.role != "system"]
        first = next((index for index, turn in enumerate(others) if turn.role == "user"), None)
        if first is None:
            return [Turn("user", system), *others]
        others[first] = replace(others[first], content=f"{system}\n\n{others[first].content}")
        return others

    def asked(self, turns: Sequence[Turn], tools: str = "") -> str:
        """Return what the model reads before it writes the next turn."""
        turns = self.adapted(turns)
        if not self.exists:
            return "\n".join([*_lines(turns, tools), "Assistant:"])
        text = self._applied(turns, tools, asks=True)
        extra = self.form.only_asked
        return text[: len(text) - len(extra)] if extra and text.endswith(extra) else text

    def left_out(self, example: TextExample) -> set[str]:
        """Return what of a chat the template does not write: roles of messages, and ``tools``."""
        if not self.exists:
            return set()
        asked, piece = self.written(example.messages, example.tools)
        written = asked + piece.text
        turns = [turn for turn in self.adapted(example.messages)[:-1] if THOUGHT_ENDS not in turn.content]
        silent = {turn.role for turn in turns if turn.content.strip() not in written}
        silently, said = self.written(example.messages, "")
        deaf = bool(example.tools) and written == silently + said.text
        return silent | ({"tools"} if deaf else set())

    def drops_thoughts(self, example: TextExample) -> bool:
        """Return whether the template writes an answer without the thoughts that stand before it."""
        last = example.messages[-1]
        fields = last.fields()
        thoughts = [fields.get(name) for name in _THOUGHTS]
        before, mark, _ = last.content.partition(THOUGHT_ENDS)
        thoughts.append(before.rpartition(_THOUGHT_BEGINS)[2] if mark else "")
        said = [one.strip() for one in thoughts if isinstance(one, str) and one.strip()]
        return bool(said) and not any(one in self.written(example.messages, example.tools)[1].text for one in said)

    def finished(self, turns: Sequence[Turn], tools: str = "") -> str:
        """Return a chat that asks for nothing more."""
        turns = self.adapted(turns)
        return self._applied(turns, tools, asks=False) if self.exists else "\n".join(_lines(turns, tools))

    def written(self, turns: Sequence[Turn], tools: str = "") -> tuple[str, Piece]:
        """Return what the model reads and what it learns to write of a chat's last turn, its end included."""
        asked, finished = self.asked(turns[:-1], tools), self.finished(turns, tools)
        common = _in_common(asked, finished)
        if self._is_rewritten(turns, tools, asked, common):
            text = finished[_place_behind(asked, finished) :]
            if not text.strip():
                raise DataError("the model's chat template writes a finished chat in another way than one to answer")
        else:
            asked, text = asked[:common], finished[common:]
        form = self.form
        if form.rest and text.endswith(form.rest):
            text = text[: len(text) - len(form.rest)]
        return asked, Piece(text, learned=True, ends=not form.end or not text.endswith(form.end))

    def _is_rewritten(self, turns: Sequence[Turn], tools: str, asked: str, common: int) -> bool:
        """Return whether a finished turn changes what stands before it: a system prompt may open the last message.

        Then the model answers what is asked, and not what the finished chat shows.
        """
        if common == len(asked) or not self.exists:
            return False
        return common < _in_common(asked, self.finished(turns[:-1], tools))

    def _spoken(self, turn: Turn) -> Turn:
        """Return a turn; calls of tools that the template leaves out become its content."""
        calls = calls_text(turn)
        if not calls or not self.exists or self.writes_calls:
            return turn
        more = {key: value for key, value in turn.fields().items() if key not in ("role", "content", "tool_calls")}
        written = json.dumps(more, ensure_ascii=False) if more else ""
        return replace(turn, content=f"{turn.content}\n{calls}".strip(), more=written)

    def pieces(self, example: TextExample, learn: str) -> list[Piece] | None:
        """Return a chat in parts, what is read and what is learned in turns.

        Args:
            example: The chat.
            learn: ``all`` turns of the assistant, or the ``last``.

        Returns:
            ``None`` where earlier turns are not written as they were learned: each turn is an example of its own then.
        """
        turns = [*example.messages]
        ends = _learned_turns(turns, learn)
        if not self.exists and len(ends) > 1:
            return None
        found: list[Piece] = []
        before = ""
        for end in ends:
            asked, piece = self.written(turns[: end + 1], example.tools)
            if not asked.startswith(before) or (found and found[-1].ends):
                return None
            found += [Piece(asked[len(before) :]), piece]
            before = asked + piece.text
        return found

    def divided(self, example: TextExample, learn: str) -> list[TextExample]:
        """Return a chat as one example, or as one for each learned turn where it cannot be learned at once."""
        turns = example.messages
        if self.pieces(example, learn) is not None:
            return [example]
        return [
            replace(example, turns=turns[:end], last=turns[end], answer=turns[end].content or calls_text(turns[end]))
            for end in _learned_turns(turns, learn)
        ]


def shortened(example: TextExample, start: int) -> TextExample | None:
    """Return a chat without its oldest turns, system prompts kept: from the ``start``-th later message of the user on.

    Returns:
        ``None`` where only the last exchange is left.
    """
    users = [index for index, turn in enumerate(example.turns) if turn.role == "user"]
    if start >= len(users):
        return None
    kept = [turn for turn in example.turns[: users[start]] if turn.role == "system"]
    return replace(example, turns=(*kept, *example.turns[users[start] :]))


def text_part(content: str) -> list[dict[str, str]]:
    """Return a message's text as a list of its one part."""
    return [{"type": "text", "text": content}]


def _without_clock(template: str) -> str:
    """Return a template with the time of now written in: else what is asked and what is written may differ by it."""
    now = datetime.now()
    return _CLOCK.sub(lambda found: repr(now.strftime(found[2])), template)


def _in_common(one: str, other: str) -> int:
    """Return the characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _place_behind(asked: str, finished: str) -> int:
    """Return the place in a finished chat behind the longest ending of what is asked that stands in it."""
    least, most = 0, len(asked)
    while least < most:
        size = (least + most + 1) // 2
        least, most = (size, most) if asked[len(asked) - size :] in finished else (least, size - 1)
    return finished.rindex(asked[len(asked) - least :]) + least


def _learned_turns(turns: Sequence[Turn], learn: str) -> list[int]:
    own = [index for index, turn in enumerate(turns) if turn.role == "assistant" and index]
    wanted = [index for index in own if turns[index].learned]
    return own[-1:] if learn == "last" else wanted or own[-1:]


def _lines(turns: Sequence[Turn], tools: str) -> list[str]:
    described = [f"Tools: {tools}"] if tools else []
    texts = [(turn.role, "\n".join(part for part in (turn.content, calls_text(turn)) if part)) for turn in turns]
    return [*described, *(f"{role.capitalize()}: {text}" for role, text in texts)]
