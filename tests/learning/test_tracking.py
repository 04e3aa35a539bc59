"""Experiment trackers: the figures of steps.jsonl and the scores, when asked, and never a lost task."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error

QUICK = ["--device", "cpu", "--precision", "fp32"]


class Fake:
    """Stands for one of accelerate's trackers and remembers its calls."""

    made: dict[str, Any]

    def __init__(self, name: str, /, *arguments: Any, **keywords: Any) -> None:
        self.calls: list[tuple[dict[str, float], int]] = []
        self.closed = 0
        type(self).made = {"name": name, "arguments": arguments, "keywords": keywords, "tracker": self}

    def start(self) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((values, step))

    def finish(self) -> None:
        self.closed += 1


class Full(Fake):
    """Has no space left at the third step."""

    def log(self, values: dict[str, float], step: int) -> None:
        super().log(values, step)
        if step == 3:
            raise OSError(28, "No space left on device")


def fake(monkeypatch: pytest.MonkeyPatch, kind: type[Fake], *names: str) -> None:
    from accelerate import tracking

    for name in names:
        monkeypatch.setattr(tracking, name, kind)
    original = importlib.util.find_spec
    known = ("wandb", "mlflow", "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in known else original(name))
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "WANDB_MODE"):
        monkeypatch.setenv(variable, "anything")  # so that what is set meanwhile goes when the test ends
        monkeypatch.delenv(variable)


def test_tensorboard_gets_what_steps_jsonl_has_and_the_scores(cli: Cli, empty_project: Path, data: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("warm", "cold"):
        done = cli("-C", empty_project, "--json", "train-task", data / name, *QUICK, "--track", "tensorboard")
        assert done.code == 0, done.err
    events = EventAccumulator(str(empty_project / ".treelora/tracking/tensorboard/cold"))
    events.Reload()
    steps = [json.loads(line) for line in (empty_project / "tasks/002-cold/steps.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("train/lr", "lr"), ("train/pull", "pull")):
        wanted = [(one["step"], one[key]) for one in steps if one[key] is not None]
        found = [(one.step, one.value) for one in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-5, abs=1e-9)
    matrix = json.loads((empty_project / "metrics/matrix.json").read_text())
    last = matrix["rows"][-1]
    for name, score in zip(("warm", "cold"), last, strict=True):
        assert events.Scalars(f"score/{name}")[0].value == pytest.approx(100 * score, rel=1e-5)
    assert events.Scalars("op")[0].value == pytest.approx(50 * sum(last), rel=1e-5)
    assert len(events.Scalars("forgetting")) == 1
    assert cli("-C", empty_project, "doctor").code == 0


def test_nothing_is_tracked_unless_asked(cli: Cli, learned_project: Path) -> None:
    assert not (learned_project / ".treelora/tracking").exists()
    shown = cli("-C", learned_project, "--json", "settings", "track").json
    assert "none" in json.dumps(shown)


def test_the_setting_does_what_the_flag_does(
    cli: Cli, empty_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, Fake, "TensorBoardTracker")
    settings = empty_project / "treelora.yaml"
    settings.write_text(settings.read_text().replace("track: none", "track: tensorboard"))
    assert cli("-C", empty_project, "train-task", data / "warm", *QUICK, "--no-eval").code == 0
    made = Fake.made
    assert (made["name"], made["tracker"].closed) == ("warm", 1)
    assert [step for _, step in made["tracker"].calls[:-1]] == [1, 2, 3, 4], "and at last the row of scores"
    Fake.made = {}
    assert cli("-C", empty_project, "train-task", data / "cold", *QUICK, "--no-eval", "--track", "none").code == 0
    assert Fake.made == {}


@pytest.mark.parametrize(("name", "kind"), [("wandb", "WandBTracker"), ("mlflow", "MLflowTracker")])
def test_services_stay_local_unless_told_otherwise(
    cli: Cli, empty_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    fake(monkeypatch, Fake, kind)
    assert cli("-C", empty_project, "train-task", data / "warm", *QUICK, "--track", name).code == 0
    folder = empty_project / ".treelora/tracking"
    assert Fake.made["name"] == "p"
    if name == "wandb":
        assert Fake.made["keywords"] == {"name": "warm", "dir": str(folder), "mode": "offline"}
    else:
        assert Fake.made["keywords"] == {"run_name": "warm"}
        assert os.environ["MLFLOW_TRACKING_URI"] == (folder / "mlruns").as_uri()
        assert os.environ["MLFLOW_ALLOW_FILE_STORE"] == "true"
    values, step = Fake.made["tracker"].calls[-1]
    assert step == 4 and set(values) == {"score/warm", "op", "forgetting"}


def test_a_tracker_that_fails_costs_its_figures_not_the_task(
    cli: Cli, empty_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, Full, "TensorBoardTracker")
    done = cli("-C", empty_project, "train-task", data / "warm", *QUICK, "--track", "tensorboard")
    assert done.code == 0, done.err
    assert done.err.count("The tracker is given up ([Errno 28] No space left on device)") == 1
    assert len(Full.made["tracker"].calls) == 3
    assert len((empty_project / "tasks/001-warm/steps.jsonl").read_text().splitlines()) == 4


def test_a_missing_package_is_named_before_anything_is_learned(
    cli: Cli, empty_project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else original(name))
    done = cli("-C", empty_project, "train-task", data / "warm", *QUICK, "--track", "wandb")
    check_error(done, 2, r"--track wandb needs the wandb package\. Run: pip install wandb")
    assert not (empty_project / "tasks").exists()


def test_an_unknown_tracker_is_refused(cli: Cli, empty_project: Path, data: Path) -> None:
    done = cli("-C", empty_project, "train-task", data / "warm", *QUICK, "--track", "comet")
    check_error(done, 2, r"--track.*comet.*none, tensorboard, wandb, mlflow|--track.*none, tensorboard, wandb, mlflow")
