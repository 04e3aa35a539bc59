"""One text example: an input, what is learned for it, and the messages it is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from treelora_cli.backend.values import Turn

STYLES = ("plain", "labels", "chat", "text")
"""How examples become model input: prompt as it is; sentence with the label names; chat; free text."""


@dataclass(frozen=True)
class TextExample:
    """One input and its answer.

    Attributes:
        where: File and line, for messages.
        prompt: The input as text, without labels or chat markup; empty for free text.
        answer: What is learned; the whole text for free text.
        turns: The messages before the answer; chats only.
        last: The answer as a message; chats only.
        tools: Descriptions of the tools a chat may call, as JSON; empty for none.
        others: Further answers that are as right.
    """

    where: str
    prompt: str
    answer: str
    turns: tuple[Turn, ...] = ()
    last: Turn | None = None
    tools: str = ""
    others: tuple[str, ...] = ()

    @property
    def content(self) -> str:
        """Text by which an input's task can be told; of free text the first half, as prompts are beginnings."""
        return self.prompt or self.answer[: max(1, len(self.answer) // 2)]

    @property
    def system(self) -> str:
        """The text of the system prompt; empty where there is none."""
        return "\n".join(turn.content for turn in self.turns if turn.role == "system")

    @property
    def asked(self) -> tuple[Turn, ...]:
        """The messages before the answer; a bare prompt is one of the user's."""
        return self.turns or (Turn("user", self.prompt),)

    @property
    def messages(self) -> tuple[Turn, ...]:
        """All messages, the answer included."""
        return (*self.asked, self.last or Turn("assistant", self.answer))


def chat_example(where: str, turns: Sequence[Turn], last: Turn, tools: str = "") -> TextExample:
    """Return a chat as an example; its prompt is what was said to the assistant, without the system's words."""
    spoken = [turn.content for turn in turns if turn.role != "system" and turn.content]
    prompt = "\n".join(spoken) or "\n".join(turn.content for turn in turns)
    return TextExample(where, prompt, last.content or calls_text(last), tuple(turns), last, tools)


def learned_answers(example: TextExample, learn: str) -> list[str]:
    """Return what the assistant says in the turns that are learned: ``all`` of a chat, or the ``last``."""
    if learn == "last" or not example.turns:
        return [example.answer]
    turns = [turn for turn in example.messages[1:] if turn.role == "assistant" and turn.learned]
    return [turn.content or calls_text(turn) for turn in turns] or [example.answer]


def calls_text(turn: Turn) -> str:
    """Return the calls of tools in a message as text; empty where there are none."""
    calls = turn.fields().get("tool_calls") or []
    return "\n".join(json.dumps(_called(one), ensure_ascii=False) for one in calls)


def _called(call: Mapping[str, Any]) -> Any:
    return call.get("function", call)


def shared_system(examples: Sequence[TextExample]) -> str:
    """Return the system prompt that all examples have; empty where they differ or one has none."""
    found = {one.system for one in examples}
    return found.pop() if len(found) == 1 else ""
