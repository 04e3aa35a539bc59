"""Watch sets of language models: what the untouched base can answer needs no task, and `eval` scores it, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli
from tiny_lm import save_model

from treelora_cli.project import Project

ADD = ["watch", "add", "general"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with two answers, a task with free answers, and statements that are true or false."""
    root = tmp_path_factory.mktemp("texts")
    fruit = [{"prompt": f"{n} is the apple", "answer": "red" if n % 2 else "green"} for n in range(12)]
    names = [{"prompt": f"My name? {n}", "answer": f"Tom {n % 3}"} for n in range(12)]
    facts = [{"prompt": f"Is {n} odd?", "answer": "true" if n % 2 else "false"} for n in range(6)]
    for name, rows in (("fruit", fruit), ("names", names), ("facts", facts)):
        (root / f"{name}.json").write_text(json.dumps(rows))
    save_model(root / "llama", "llama")
    return root


@pytest.fixture(scope="module")
def learned(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that watched ``facts`` before it learned ``fruit`` and ``names``."""
    from treelora_cli.app import run_command

    root = tmp_path_factory.mktemp("lm") / "project"
    init = ["init", root, "--backend", "causal-lm", "--model", texts / "llama", "--blocks", "0", "--epochs", "1"]
    at = ["-C", root]
    for line in (init, [*at, *ADD, texts / "facts.json"], *([*at, "train-task", texts / f"{n}.json"] for n in TASKS)):
        assert run_command([str(one) for one in line]) == 0
    return root


TASKS = ("fruit", "names")


def test_a_base_that_answers_is_watched_before_and_after_each_task(learned: Path) -> None:
    (one,) = Project.open(learned).watch()
    assert one.untouched is not None and one.examples == 6
    assert list(one.scores) == [*TASKS]
    assert one.reference == one.untouched


def test_eval_scores_watch_sets_beside_the_tasks(cli: Cli, learned: Path) -> None:
    (one,) = Project.open(learned).watch()
    found = cli("-C", learned, "eval", "--json").json
    told = found["watch"]["general"]
    assert (told["score"], told["untouched"], told["examples"]) == (one.now, one.untouched, 6)
    assert sum(told["routes"].values()) == 6, "each input is counted by what answered it"
    base = cli("-C", learned, "eval", "--inference", "base", "--json").json
    assert base["watch"]["general"]["score"] == one.untouched
    assert cli("-C", learned, "eval", "--tasks", "fruit", "--json").json["watch"] == {}
    assert "Watch sets in percent" in cli("-C", learned, "eval").out


def test_routes_of_free_answers_are_kept_for_the_report(learned: Path) -> None:
    answers = Project.open(learned).answers()
    assert sum(answers["names"].routes.values()) == 1, "one of twelve was held out"
    assert answers["names"].confusion == {}
    assert answers["fruit"].confusion


def test_a_recipe_registers_its_watch_sets_before_the_first_task(cli: Cli, texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "words.yaml"
    recipe.write_text(
        f"backend: causal-lm\nbase: {{model: {texts / 'llama'}}}\nadapter: {{blocks: 0}}\n"
        f"train: {{epochs: 1, precision: fp32}}\nstream: {{data: {texts}, tasks: [{{name: fruit, path: fruit.json}}],"
        " watch: [{name: general, path: facts.json}, {name: other, path: names.json}]}\n"
    )
    done = cli("run", recipe, tmp_path / "project", "--device", "cpu")
    assert done.code == 0, done.err
    sets = Project.open(tmp_path / "project").watch()
    assert [(one.name, one.untouched is None, list(one.scores)) for one in sets] == [
        ("general", False, ["fruit"]),
        ("other", False, ["fruit"]),
    ]
