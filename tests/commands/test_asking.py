"""``init`` asks in a terminal where nothing but the directory was given, and nowhere else."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Cli, check_error

from treelora_cli.app import hoist_globals, run_command
from treelora_cli.commands import asking
from treelora_cli.commands.asking import asked_base, asked_branch
from treelora_cli.config import BaseConfig
from treelora_cli.errors import Interrupted


def typed(*lines: str) -> tuple[Callable[[str], str], list[str]]:
    """Answers line by line, then the end of the input; the questions that were asked."""
    left, questions = list(lines), []

    def ask(question: str) -> str:
        questions.append(question)
        if not left:
            raise EOFError
        return left.pop(0)

    return ask, questions


@pytest.mark.parametrize(
    ("lines", "backend", "base", "count"),
    [
        (["", ""], "vit", BaseConfig(), 2),
        (["i", "vit_small_patch16_224", ""], "vit", BaseConfig(model="vit_small_patch16_224"), 3),
        (["images", "vit_x", "w.safetensors"], "vit", BaseConfig(model="vit_x", weights="w.safetensors"), 3),
        (["", "timm/vit_x"], "vit", BaseConfig(model="timm/vit_x"), 2),
        (["pictures", "TEXTS", "", "model.gguf"], "causal-lm", BaseConfig(model="model.gguf"), 4),
    ],
)
def test_answers_become_backend_and_base(lines: list[str], backend: str, base: BaseConfig, count: int) -> None:
    ask, questions = typed(*lines)
    assert asked_base(ask) == (backend, base)
    assert len(questions) == count


@pytest.mark.parametrize(("line", "branch"), [("", None), ("n", None), ("Yes", "auto"), ("y", "auto")])
def test_datasets_of_different_kinds_get_branches(line: str, branch: str | None) -> None:
    assert asked_branch(typed(line)[0]) == branch


def test_an_input_that_ends_leaves_nothing() -> None:
    for question, ask in ((asked_base, typed("texts")[0]), (asked_branch, typed()[0])):
        with pytest.raises(Interrupted, match=r"^Nothing was made: the questions were left unanswered\.$"):
            question(ask)


@contextmanager
def terminal(keys: str = "") -> Iterator[int]:
    """Standard input and output on a pseudo-terminal on which ``keys`` were pressed."""
    master, slave = os.openpty()
    os.write(master, keys.encode())
    with (
        io.TextIOWrapper(os.fdopen(os.dup(slave), "rb")) as stdin,
        os.fdopen(slave, "w") as stdout,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "stdout", stdout)
        yield master
    os.close(master)


def test_enter_thrice_in_a_terminal_makes_a_project_on_the_embedded_model(tmp_path: Path) -> None:
    with terminal("\n\n\n") as master:
        assert run_command(["init", str(tmp_path / "p")]) == 0
        seen = os.read(master, 65536).decode()
    assert "What is to be learned, images or texts? [images]: " in seen
    assert "Base model (timm name, directory or hub id) [the small one that comes along]: " in seen
    text = (tmp_path / "p" / "treelora.yaml").read_text()
    assert "backend: vit" in text and "model: embedded" in text


def test_ctrl_c_at_a_question_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(_question: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("treelora_cli.commands.asking.asked_base", lambda: asked_base(pressed))
    with terminal():
        assert run_command(["init", str(tmp_path / "p")]) == 130
    assert not (tmp_path / "p").exists()


def test_a_directory_in_use_is_refused_before_any_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    asked: list[str] = []
    monkeypatch.setattr("treelora_cli.commands.asking.asked_base", lambda: asked.append("asked"))
    with terminal():
        assert run_command(["init", str(tmp_path)]) == 2
    assert asked == []


@pytest.mark.parametrize("options", [[], ["--json"], ["--model", "nosuch"]])
def test_nobody_is_asked_when_piped_or_told(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(asking, "asked_base", lambda: pytest.fail("asked"))
    monkeypatch.setattr("treelora_cli.learning.opening.make_project", _refuse)
    if not options:
        check_error(cli("init", tmp_path / "p"), 5, r"Not made\.")
        return
    with terminal():
        assert run_command(hoist_globals(["init", str(tmp_path / "p"), *options])) == 5


def _refuse(*_arguments: object) -> None:
    from treelora_cli.errors import ModelError

    raise ModelError("Not made.")
