"""The step log of a task, and what was answered when tasks were scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import STREAM, Cli

from treelora_cli.errors import DamagedError
from treelora_cli.project import Project, repair
from treelora_cli.project.metrics import TaskAnswers, answers_document, parse_answers
from treelora_cli.project.unfinished import Step, StepLog, parse_steps


def test_every_step_is_kept_with_its_task(learned_project: Path) -> None:
    project = Project.open(learned_project)
    for index, (name, classes) in enumerate(STREAM):
        steps, record = project.steps(name), project.task_record(name)
        assert [one.step for one in steps] == list(range(1, record["steps"] + 1))
        assert record["steps"] == 2 * len(classes), "two epochs of eight images a class in batches of eight"
        last_epoch = [one.loss for one in steps[len(classes) :]]
        assert sum(last_epoch) / len(classes) == pytest.approx(record["last_loss"])
        assert steps[0].lr == 0.01 > steps[-1].lr
        assert all(one.seconds > 0 and one.examples_per_second > 0 for one in steps)
        layers = len(project.state.base["layers"])
        assert all(len(one.selected) == (layers if index else 0) for one in steps)
        assert all(0 <= task < index for one in steps for task in one.selected)
        assert all((one.pull is None) == (index == 0) for one in steps)
    assert not (learned_project / ".treelora" / "run" / "steps.jsonl").exists()


def test_answers_agree_with_the_matrix(learned_project: Path) -> None:
    project = Project.open(learned_project)
    found = project.answers()
    for (name, _), score in zip(STREAM, project.matrix().rows[-1], strict=True):
        counts = found[name].confusion
        right = sum(count for (truth, given), count in counts.items() if truth == given)
        assert right / sum(counts.values()) == pytest.approx(score)
        assert sum(found[name].routes.values()) == sum(counts.values())


def test_older_projects_have_neither(empty_project: Path) -> None:
    assert Project.open(empty_project).answers() == {}


def test_damage_costs_only_the_telling(cli: Cli, project: Path) -> None:
    folder = Project.open(project).state.tasks[0].directory
    (project / folder / "steps.jsonl").write_text("x")
    (project / "metrics" / "answers.json").write_text("x")
    done = cli("--json", "-C", project, "doctor").json
    assert done["works"]["predict"] and done["tasks_whole"] == [name for name, _ in STREAM]
    with Project.open(project).lock("test") as opened:
        opened, report = repair(opened)
    assert report.dropped == ["metrics/answers.json", f"{folder}/steps.jsonl"]
    assert opened.damage() == {} and opened.answers() == {} and opened.steps("warm") == ()


def test_a_continued_log_holds_each_step_once(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "run" / "steps.jsonl")
    log.begin(0)
    steps = [Step(number, 0.5, None, 0.1, 0.01, 800.0, (0, 1)) for number in range(1, 6)]
    log.add(steps)
    log.begin(3)
    log.add(steps[3:])
    assert parse_steps(log.read()) == tuple(steps)
    log.begin(9)
    assert log.read() == b"", "a log that lacks steps says nothing rather than something wrong"
    log.clear()
    assert log.read() == b""


def test_malformed_files_are_damage() -> None:
    with pytest.raises(DamagedError, match=r"steps\.jsonl is malformed"):
        parse_steps(b'{"step": "1"}\n')
    with pytest.raises(DamagedError, match=r"answers\.json is malformed"):
        parse_answers(b'{"tasks": {"a": {"confusion": [["x", "y", -1]], "routes": []}}}')


def test_answers_are_bounded() -> None:
    many = {("a", f"class-{index:03d}"): index for index in range(100)}
    kept = parse_answers(json.dumps(answers_document({"t": TaskAnswers(many, {"t": 3})})).encode())
    assert sorted(kept["t"].confusion.values()) == list(range(90, 100))
    assert kept["t"].routes == {"t": 3}
