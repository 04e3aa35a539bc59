"""A task that fails its gate: nobody sees it, it waits, and is accepted bit for bit or dropped without a trace."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import FAULT_STEP, Cli, Result, check_error, learned_hashes, tree_hash, two_task_recipe
from faults import commit_of, die, everything, hooked

from treelora_cli.config import GateConfig
from treelora_cli.errors import DamagedError
from treelora_cli.learning.gate import WatchScore, refusal
from treelora_cli.project import Project, damage_of_the_past, repair
from treelora_cli.project.unfinished import PENDING
from treelora_cli.score_matrix import ScoreMatrix

MATRIX = ScoreMatrix(("a", "b"), ((0.9,), (0.7, 0.8)))


# -- the rule ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        (GateConfig(), None),
        (GateConfig(max_forgetting=10, fail_under=75, task_under=70), None),
        (GateConfig(max_forgetting=9.9), "forgetting 10.00 is above max_forgetting 9.9"),
        (GateConfig(fail_under=75.1), "OP 75.00 is below fail_under 75.1"),
        (GateConfig(task_under=70.5), "task 'a' scores 70.00, below task_under 70.5"),
    ],
)
def test_rule_by_hand(gate: GateConfig, line: str | None) -> None:
    assert refusal(gate, MATRIX, {}) == line


def test_watch_sets_count_too() -> None:
    watched = {"acceptance": WatchScore(0.5, 0.6), "new": WatchScore(0.9, None)}
    gate = GateConfig(max_forgetting=9.9)
    calm = ScoreMatrix(("a",), ((0.9,),))
    assert refusal(gate, calm, watched) == "watch set 'acceptance' lost 10.00, above max_forgetting 9.9"
    assert refusal(GateConfig(task_under=60), calm, watched) == (
        "watch set 'acceptance' scores 50.00, below task_under 60"
    )
    assert refusal(GateConfig(max_forgetting=10.1, task_under=50), calm, watched) is None


def test_a_gate_is_not_passed_by_what_is_not_known() -> None:
    nothing = ScoreMatrix(("a",), ((None,),))
    assert refusal(GateConfig(fail_under=1), nothing, {}) == "OP unknown is below fail_under 1"
    assert refusal(GateConfig(max_forgetting=100), nothing, {}) == "forgetting unknown is above max_forgetting 100"
    assert refusal(GateConfig(task_under=1), nothing, {}) == "task 'a' scores unknown, below task_under 1"


# -- the command ------------------------------------------------------------------------------------------


def learned(cli: Cli, root: Path, data: Path, *options: object) -> Result:
    return cli("-C", root, "train-task", data / "warm", "--device", "cpu", "--precision", "fp32", *options)


def scores_shown(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("│ warm")]


def test_refused_then_accepted_is_the_same_as_committed(
    cli: Cli, empty_project: Path, data: Path, tmp_path: Path
) -> None:
    free = shutil.copytree(empty_project, tmp_path / "free")
    before = {name: value for name, value in tree_hash(empty_project).items() if not name.startswith(".treelora")}
    direct = learned(cli, free, data).out
    done = learned(cli, empty_project, data, "--fail-under", "100", "--max-forgetting", "0")
    check_error(done, 7, r"Task 'warm' is learned but not committed: OP [\d.]+ is below fail_under 100\. Accept it")
    after = {name: value for name, value in tree_hash(empty_project).items() if not name.startswith(".treelora")}
    assert after == before, "nobody sees a state that failed"
    status = cli("--json", "-C", empty_project, "status").json
    assert status["tasks"] == []
    assert status["waiting"]["task"] == "warm"
    assert "OP" in status["waiting"]["reason"]
    shown = cli("-C", empty_project, "status").out
    assert "Learned but not committed: 'warm'" in shown and "Next: treelora train-task --accept, or --drop" in shown
    accepted = cli("-C", empty_project, "train-task", "--accept").out
    assert accepted.startswith("Task 'warm' is committed.\n")
    assert scores_shown(accepted) == scores_shown(direct) != []
    assert learned_hashes(empty_project) == learned_hashes(free)
    assert Project.open(empty_project).damage() == {}
    assert cli("--json", "-C", empty_project, "status").json["waiting"] is None
    assert not list((empty_project / ".treelora" / "objects").iterdir())


def test_dropped_leaves_nothing(cli: Cli, empty_project: Path, data: Path) -> None:
    assert learned(cli, empty_project, data, "--task-under", "100").code == 7
    check_error(
        learned(cli, empty_project, data, "--name", "other"), 7, "Task 'warm' is learned and waits, for task 'w"
    )
    assert cli("-C", empty_project, "train-task", "--drop").out == "Dropped: warm.\n"
    objects = empty_project / ".treelora" / "objects"
    assert not list(objects.iterdir())
    assert not (empty_project / PENDING).exists()
    assert learned(cli, empty_project, data, "--task-under", "0").code == 0


def test_settings_gate_like_flags_and_a_flag_wins(cli: Cli, empty_project: Path, data: Path) -> None:
    file = empty_project / "treelora.yaml"
    file.write_text(file.read_text() + "\ngate:\n  fail_under: 100\n")
    assert learned(cli, empty_project, data).code == 7
    assert cli("-C", empty_project, "train-task", "--drop").code == 0
    assert learned(cli, empty_project, data, "--fail-under", "0").code == 0


@pytest.mark.parametrize("option", ["--max-forgetting", "--fail-under", "--task-under"])
@pytest.mark.parametrize("value", ["101", "-1", "nan"])
def test_a_gate_outside_0_to_100(cli: Cli, empty_project: Path, data: Path, option: str, value: str) -> None:
    check_error(learned(cli, empty_project, data, option, value), 2, option)


def test_what_contradicts_is_refused(cli: Cli, empty_project: Path, data: Path) -> None:
    check_error(learned(cli, empty_project, data, "--no-eval", "--fail-under", "1"), 2, "--no-eval leaves the gate")
    check_error(learned(cli, empty_project, data, "--accept"), 2, "stands alone")
    check_error(cli("-C", empty_project, "train-task", "--accept", "--drop"), 2, "stands alone")
    check_error(cli("-C", empty_project, "train-task", "--accept"), 2, "No task waits to be accepted")
    check_error(cli("-C", empty_project, "train-task", "--drop"), 2, "No task waits to be dropped")


def test_a_stream_stops_there_and_goes_on(cli: Cli, weights: Path, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "two.yaml"
    recipe.write_text(two_task_recipe(weights, data, adapter="{rank: 4, alpha: 8, targets: qkv, blocks: 0}"))
    root = tmp_path / "p"
    again = ["run", recipe, root, "--resume", "--device", "cpu"]
    assert cli("run", recipe, root, "--device", "cpu", "--task-under", "100").code == 7
    assert cli("-C", root, *again).code == 7, "nothing is decided yet"
    accepted = cli("--json", "-C", root, "train-task", "--accept").json
    assert (accepted["task"], accepted["accepted"]) == ("warm", True)
    assert cli(*again).code == 7, "the gate that a stream began with is its project's setting"
    assert cli("-C", root, "train-task", "--drop").code == 0
    assert cli(*again, "--task-under", "0").code == 0
    assert [task.name for task in Project.open(root).state.tasks] == ["warm", "cold"]


# -- the waiting place ------------------------------------------------------------------------------------


def test_it_belongs_to_the_state_it_grew_from(cli: Cli, project: Path) -> None:
    with Project.open(project).lock("test") as opened:
        opened.propose(commit_of(opened, "late"), "a reason")
        opened.commit(commit_of(opened, "first"))
    assert not (project / PENDING).exists(), "another commit voids it"
    check_error(cli("-C", project, "train-task", "--accept"), 2, "No task waits")
    assert Project.open(project).damage() == {}


def test_damage_is_said_and_never_accepted(cli: Cli, project: Path) -> None:
    before = everything(Project.open(project))
    with Project.open(project).lock("test") as opened:
        opened.propose(commit_of(opened, "late"), "a reason")
    victim = max((project / ".treelora" / "objects").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(b"x")
    assert "of a task that waits" in "".join(damage_of_the_past(Project.open(project)).values())
    check_error(cli("-C", project, "train-task", "--accept"), 3, "damaged; nothing was changed")
    (project / PENDING).write_text("{}")
    assert damage_of_the_past(Project.open(project))[PENDING] == "damaged"
    check_error(cli("-C", project, "train-task", "--accept"), 3, "pending.json is damaged. Drop it with")
    with Project.open(project).lock("test") as opened:
        opened, report = repair(opened)
    assert report.dropped == [PENDING]
    assert everything(Project.open(project)) == before
    (project / PENDING).write_text("{}")
    assert cli("-C", project, "train-task", "--drop").out == "Dropped: a task that could not be read.\n"


@pytest.mark.parametrize("action", ["propose", "accept"])
def test_a_death_at_every_operation(
    project: Path, tmp_path: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    if action == "accept":
        Project.open(project).propose(commit_of(Project.open(project), "late"), "a reason")
    old = everything(Project.open(project))

    def act(opened: Project) -> None:
        if action == "propose":
            opened.propose(commit_of(opened, "late"), "a reason")
        else:
            opened.accept()

    counted, events = Path(shutil.copytree(project, tmp_path / "counted")), list[str]()
    with hooked(events.append):
        act(Project.open(counted))
    new = everything(Project.open(counted))
    assert (new == old) == (action == "propose")
    for victim in range(0, len(events), FAULT_STEP):
        root = Path(shutil.copytree(project, tmp_path / "q"))
        opened, done = Project.open(root), iter(range(10_000))
        child = os.fork()
        if child == 0:
            with hooked(lambda _name, done=done, victim=victim: die() if next(done) == victim else None):
                act(opened)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        left = Project.open(root)
        assert everything(left) in (old, new)
        waiting = left.pending.of(left.state)
        if waiting is not None:
            everything(left.accept())
        elif everything(left) == old:
            left.commit(commit_of(left, "after"))
        assert Project.open(root).damage() == {}
        shutil.rmtree(root)


def test_a_crafted_file_is_damage(project: Path) -> None:
    (project / PENDING).parent.mkdir(parents=True, exist_ok=True)
    (project / PENDING).write_text('{"task": 1}')
    with pytest.raises(DamagedError, match="Drop it with"):
        Project.open(project).pending.read()
