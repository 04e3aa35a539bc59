"""Model cards of language model exports: where the weights come from, and how each task is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from treelora_backends.causal_lm.loading import source_of
from treelora_backends.causal_lm.memory import manner_of, system_of
from treelora_cli.backend.values import TaskMemory, Turn
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import TreeLoraError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm

PLACEHOLDER = "YOUR TEXT"


def write_card(base: LoadedLm, content: str, use: str, tasks: Sequence[TaskMemory], out: Path, *, lora: bool) -> None:
    """Write the card of an export.

    Args:
        base: The loaded model.
        content: What the directory holds.
        use: How it is loaded and served.
        tasks: What it was taught.
        out: The directory.
        lora: Whether it holds adapters, not whole weights.
    """
    lines = [*_base_lines(base, content, lora=lora), use, *_prompts_section(base, tasks)]
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _base_lines(base: LoadedLm, content: str, *, lora: bool) -> list[str]:
    """Return the card's head: what the hub reads, the base, and what the directory holds."""
    source = source_of(str(base.config.base.model))
    origin = Path(source.gguf or source.name).name if source.gguf or Path(source.name).exists() else source.name
    library = "peft" if lora else "transformers"
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", f"base_model: {origin}"]
    lines += ["tags: [treelora, lora]", "---", "", f"Base: `{origin}`."]
    if source.gguf:
        lines.append("The base was a GGUF file; its weights were de-quantised.")
    return [*lines, f"This directory holds {content}, made with treelora."]


def _prompts_section(base: LoadedLm, tasks: Sequence[TaskMemory]) -> list[str]:
    """Return how each task is asked."""
    return ["", "## How each task is asked", "", *(line for task in tasks for line in _asked(base, task)), ""]


def _asked(base: LoadedLm, task: TaskMemory) -> list[str]:
    """Return a task's prompt format as a person would fill it in, and its labels."""
    manner = manner_of(task)
    if manner.style == "text":
        return [f"- **{task.name}**: free text that it goes on with; there is no prompt."]
    system = system_of(task)
    own = (Turn("system", system),) if system else ()
    turns = (*own, Turn("user", PLACEHOLDER)) if manner.style == "chat" else ()
    try:
        prompt = base.encoder.prompt_text(TextExample("card", PLACEHOLDER, "", turns), manner.style, manner.labels)
    except TreeLoraError:  # a template that wants more than one question
        return [f"- **{task.name}**: a chat, rendered by the tokenizer's template."]
    lines = [f"- **{task.name}**:", "", *(f"      {line}" for line in prompt.splitlines()), ""]
    return [*lines, f"  Answers: {', '.join(manner.labels)}.", ""] if manner.labels else lines
