"""What ``init`` asks in a terminal where nothing but the directory was given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from treelora_cli.errors import Interrupted

if TYPE_CHECKING:
    from treelora_cli.config import BaseConfig

Ask = Callable[[str], str]
_FAMILIES = {"images": "vit", "texts": "causal-lm"}
_UNANSWERED = "Nothing was made: the questions were left unanswered."


def asks(context: typer.Context) -> bool:
    """True when somebody sits at a terminal, wants no JSON, and gave nothing but the directory."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or context.obj.output.as_json:
        return False
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"] == [
        "directory"
    ]


def asked_base(ask: Ask = input) -> tuple[str, BaseConfig]:
    """Ask for the kind of data and the base model; Enter takes what stands in brackets.

    Args:
        ask: Shows a question and returns the line typed.

    Returns:
        Name of the backend, and the base.

    Raises:
        Interrupted: The input ends.
    """
    from treelora_cli.config import BaseConfig

    try:
        kind = _one_of(ask, "What is to be learned, images or texts?", tuple(_FAMILIES))
        if kind == "texts":
            model = _needed(ask, "Language model (directory, GGUF file or hub id): ")
            return _FAMILIES[kind], BaseConfig(model=model)
        model = ask("Base model (timm name, directory or hub id) [the small one that comes along]: ").strip()
        if not model or "/" in model or Path(model).exists():
            return _FAMILIES[kind], BaseConfig(model=model or None)
        weights = ask("Its weights (a .safetensors file) [timm fetches them]: ").strip()
        return _FAMILIES[kind], BaseConfig(model=model, weights=weights or None)
    except EOFError as error:
        raise Interrupted(_UNANSWERED) from error


def asked_branch(ask: Ask = input) -> str | None:
    """Ask whether datasets of different kinds will come; returns a value of ``tree.branch``, ``None`` for the default.

    Raises:
        Interrupted: The input ends.
    """
    question = "Will the datasets be of different kinds, such as photos, drawings, signs? Each then gets an adapter"
    try:
        return "auto" if _one_of(ask, f"{question}, which takes longer:", ("no", "yes")) == "yes" else None
    except EOFError as error:
        raise Interrupted(_UNANSWERED) from error


def _one_of(ask: Ask, question: str, choices: Sequence[str]) -> str:
    """Ask until the answer begins one of the choices; Enter is the first."""
    while True:
        answer = ask(f"{question} [{choices[0]}]: ").strip().lower()
        found = [one for one in choices if one.startswith(answer)]
        if found:
            return found[0]


def _needed(ask: Ask, question: str) -> str:
    while True:
        answer = ask(question).strip()
        if answer:
            return answer
