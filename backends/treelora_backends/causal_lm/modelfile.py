"""A Modelfile for Ollama beside every language model export: how it is asked, and where answers stop.

Ollama's templates are Go's. A chat template is expressed there when it writes every turn in one way, whatever stands
around it; that is found out by rendering chats and putting them together again. Otherwise prompts go in as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_backends.causal_lm.loading import source_of
from treelora_backends.causal_lm.memory import manner_of, system_of
from treelora_cli.backend.values import TaskMemory, Turn
from treelora_cli.errors import DataError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_backends.causal_lm.template import ChatTemplate

FILE = "Modelfile"
_SYSTEM, _USER, _ANSWER = "Treelora7system", "Treelora7user", "Treelora7answer"
_TRIAL = (
    *(Turn("system", "Be kind."), Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "Who?")),
    *(Turn("assistant", "Me."), Turn("user", "Why?")),
)
_PLAIN = "{{ .Prompt }}"
_FORBIDDEN = ("{{", "}}", '"""')
"""What no literal part of a template in a Modelfile may hold."""


@dataclass(frozen=True)
class Wrapped:
    """How a template writes turns: each role's content between two texts.

    Attributes:
        unsaid: What stands first where there is no system prompt.
        system: What stands before and after a system prompt; ``None`` where the template takes none.
        user, assistant: The same of a turn.
        asks: What is added for a turn that is to be written.
    """

    unsaid: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    asks: str

    def rendered(self, turns: Sequence[Turn]) -> str:
        """Return a chat that asks for the next turn, as the Go template writes it."""
        system = "\n".join(turn.content for turn in turns if turn.role == "system")
        text = f"{self.system[0]}{system}{self.system[1]}" if system and self.system else self.unsaid
        around = {"user": self.user, "assistant": self.assistant}
        for turn in turns:
            if turn.role in around:
                before, after = around[turn.role]
                text += f"{before}{turn.content}{after}"
        return text + self.asks

    @property
    def go(self) -> str:
        """The Go template; a last turn of the assistant is left open, to be continued."""
        user = f"{self.user[0]}{{{{ .Content }}}}{self.user[1]}{{{{ if $last }}}}{self.asks}{{{{ end }}}}"
        answer = f"{self.assistant[0]}{{{{ .Content }}}}{{{{ if not $last }}}}{self.assistant[1]}{{{{ end }}}}"
        system = self.unsaid
        if self.system is not None:
            said = f"{self.system[0]}{{{{ .System }}}}{self.system[1]}"
            system = f"{{{{ if .System }}}}{said}{{{{ else }}}}{self.unsaid}{{{{ end }}}}"
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        turns = f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        return f"{system}{{{{ range $i, $_ := .Messages }}}}{last}{turns}{{{{ end }}}}"


def wrapped(template: ChatTemplate, begin: str) -> Wrapped | None:
    """Return how a chat template writes turns; ``None`` where Go cannot say it.

    Args:
        template: The tokenizer's.
        begin: The token that begins every text, which Ollama adds by itself; empty for none.
    """
    try:
        found = _taken_apart(template, begin)
        trial = _TRIAL if found.system else _TRIAL[1:]
        whole = template.asked(trial).removeprefix(begin)
        alone = template.asked(trial[-1:]).removeprefix(begin)
    except (DataError, ValueError):
        return None
    parts = (found.unsaid, *(found.system or ()), *found.user, *found.assistant, found.asks)
    if any(odd in part for part in parts for odd in _FORBIDDEN):
        return None
    return found if (found.rendered(trial), found.rendered(trial[-1:])) == (whole, alone) else None


def _taken_apart(template: ChatTemplate, begin: str) -> Wrapped:
    """Find the texts around each role's content.

    Raises:
        ValueError: A content is not written as it is, or a later turn changes an earlier one.
        DataError: The template refuses a chat.
    """
    system, user, answer = Turn("system", _SYSTEM), Turn("user", _USER), Turn("assistant", _ANSWER)
    one, asked = template.finished([user]), template.asked([user])
    two, three = template.finished([user, answer]), template.finished([user, answer, user])
    if not (two.startswith(one) and three.startswith(two) and asked.startswith(one)):
        raise ValueError("turns depend on later ones")
    around_answer, around_user = _around(two[len(one) :], _ANSWER), _around(three[len(two) :], _USER)
    tail = _USER.join(around_user)
    said = template.finished([system, user]) if template.takes_system else tail
    if not (one.endswith(tail) and said.endswith(tail)):
        raise ValueError("the first turn is another")
    opening = said[: len(said) - len(tail)].removeprefix(begin)
    unsaid = one[: len(one) - len(tail)].removeprefix(begin)
    around_system = _around(opening, _SYSTEM) if template.takes_system else None
    return Wrapped(unsaid, around_system, around_user, around_answer, asked[len(one) :])


def begins_by_itself(tokenizer: Any) -> str:
    """Return the token that is put before every text, as Ollama then does, too; empty for none."""
    begin = tokenizer.bos_token_id
    ids = [] if begin is None else list(tokenizer("a")["input_ids"])
    return str(tokenizer.bos_token) if begin is not None and ids[:1] == [begin] else ""


def _around(text: str, content: str) -> tuple[str, str]:
    before, found, after = text.partition(content)
    if not found:
        raise ValueError(f"{content} is not written")
    return before, after


def write_modelfile(base: LoadedLm, tasks: Sequence[TaskMemory], out: Path, *, adapter: bool, model: str = ".") -> None:
    """Write the Modelfile of an export.

    Args:
        base: The loaded model.
        tasks: What the export was taught.
        out: Its directory.
        adapter: It is an adapter, which stands on the base.
        model: The file or directory of a whole model, relative to ``out``.
    """
    source = source_of(str(base.config.base.model))
    lines = ["# ollama create NAME -f Modelfile"]
    if adapter:
        origin = str(Path(source.name) / source.gguf) if source.gguf else source.name
        lines += [f"FROM {origin}", "ADAPTER ."]
    else:
        lines.append(f"FROM {model}")
    text, remark = _template(base, tasks)
    lines += [*([f"# {remark}"] if remark else []), f'TEMPLATE """{text}"""']
    systems = {system_of(task) for task in tasks}
    if len(systems) == 1 and (system := systems.pop()) and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    stops = [str(base.tokenizer.decode([one])) for one in base.encoder.stop_ids]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop.strip() and '"' not in stop]
    most = max((manner_of(task).most_new for task in tasks), default=1)
    lines += ["PARAMETER temperature 0", f"PARAMETER num_ctx {base.context}", f"PARAMETER num_predict {most}"]
    (out / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _template(base: LoadedLm, tasks: Sequence[TaskMemory]) -> tuple[str, str]:
    """Return the template, and what it does not say."""
    manners = [manner_of(task) for task in tasks]
    chats = [one.style == "chat" for one in manners]
    if any(chats):
        begin = begins_by_itself(base.tokenizer)
        found = wrapped(base.encoder.template, begin) if base.encoder.has_template else None
        if found is None:
            return _PLAIN, "The chat template cannot be said in Go's terms: prompts go in as they are."
        return found.go, "" if all(chats) else "Tasks that are no chats were taught on the bare prompt: ask those raw."
    first = manners[0]
    if len(tasks) == 1 and first.style == "labels" and not any(odd in "".join(first.labels) for odd in _FORBIDDEN):
        return f"{_PLAIN}\nOptions: {', '.join(first.labels)}\nAnswer:", ""
    return _PLAIN, ""
