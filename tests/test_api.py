"""The Python interface: its page runs as written, and it does what the commands do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import Cli, learned_hashes, run_python

import treelora_cli
from treelora_cli import Project
from treelora_cli.config.by_name import all_settings, from_names
from treelora_cli.errors import LockedError, ProjectError, UsageError
from treelora_cli.project import Project as Stored

PAGE = Path(treelora_cli.__file__).parent / "API.md"


def test_page_runs_as_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("warm", "cold"):
        shutil.copytree(data / name, tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "birds-merged" / "model.safetensors").exists()
    assert (tmp_path / "cold-adapter" / "adapter_model.safetensors").exists()


def test_a_task_learned_in_python_is_the_commands(cli: Cli, empty_project: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(empty_project, tmp_path / "other")
    settings = {"train.precision": "fp32"}
    project = Project.open(empty_project, device="cpu")
    report = project.train_task(data / "warm", settings=settings)
    again = project.train_task(data / "cold", settings=settings)
    for name in ("warm", "cold"):
        assert cli("-C", other, "train-task", data / name, "--device", "cpu", "--precision", "fp32").code == 0
    assert learned_hashes(empty_project) == learned_hashes(other)
    assert (report.name, again.parent, project.tasks) == ("warm", "warm", ("warm", "cold"))


def test_scores_and_answers_are_the_commands(cli: Cli, learned_project: Path, data: Path) -> None:
    project = Project.open(learned_project / "tasks", device="cpu")
    assert project.root == learned_project
    told = cli("--json", "-C", learned_project, "eval", "--device", "cpu").json
    found = project.evaluate()
    assert found.standing.overall() == told["op"]
    assert {name: score.value for name, score in found.scores.items()} == {
        name: one["score"] for name, one in told["tasks"].items()
    }
    images = sorted(data.glob("*/test/*/00.png"))
    shown = cli("--json", "-C", learned_project, "predict", *images, "--device", "cpu").json["predictions"]
    answers = project.predict(images)
    assert [(one.output, one.task) for one in answers] == [(one["output"], one["task"]) for one in shown]
    assert [answer for _, answer in project.answers(iter(images))] == answers, "the order of calls changes nothing"


def test_another_writer_and_another_process(empty_project: Path, data: Path) -> None:
    first, second = Project.open(empty_project, device="cpu"), Project.open(empty_project, device="cpu")
    with Stored.open(empty_project).lock("test"), pytest.raises(LockedError, match="test"):
        second.train_task(data / "warm")
    first.train_task(data / "warm", evaluate=False)
    assert second.tasks == ()
    second.reload()
    assert second.tasks == ("warm",)


def test_errors_say_what_to_do(empty_project: Path, tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match="No treelora project here or above"):
        Project.open(tmp_path)
    project = Project.open(empty_project, device="cpu")
    with pytest.raises(UsageError, match="Nothing is learned yet"):
        project.evaluate()
    with pytest.raises(UsageError, match="Nothing is learned yet"):
        project.predict(["x.png"])
    with pytest.raises(UsageError, match=r"'train.epoch' is no setting \(did you mean 'train.epochs'\?\)"):
        project.train_task("x", settings={"train.epoch": 1})
    with pytest.raises(UsageError, match=r"^train\.epochs: 'epochs' must be between"):
        project.train_task("x", settings={"train.epochs": -1})
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        treelora_cli.nothing  # noqa: B018


def test_importing_is_light() -> None:
    code = (
        "import sys\nfrom treelora_cli import Project\n"
        "print(sorted({'torch', 'timm', 'transformers', 'peft', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code).out == "[]\n"


def test_settings_are_listed_with_meaning_default_and_range(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    listed = cli("--json", "-C", learned_project, "settings").json["settings"]
    by_name = {one["name"]: one for one in listed}
    assert by_name["train.epochs"] == {
        "name": "train.epochs",
        "meaning": "passes over the task's data",
        "default": 3,
        "allowed": "0 to 10,000",
        "here": 2,
    }
    assert by_name["tree.search"]["allowed"].startswith("lcb, ")
    assert all(one["meaning"] and one["allowed"] for one in listed)
    assert not any(name.startswith("stream") for name in by_name)
    assert json.dumps([one.name for one in all_settings()]) == json.dumps(list(by_name))
    shown = cli("-C", learned_project, "settings", "epochs").out
    assert "train.epochs" in shown and "tree.search" not in shown
    assert cli("-C", learned_project, "settings", "zzz").code == 2


def test_every_setting_can_be_given_by_name() -> None:
    for one in all_settings():
        assert from_names({one.name: one.default}) is not None
    assert from_names({"adapter.rank": 4, "seed": 3}).adapter.rank == 4
