"""Rolling back and bringing back: bit for bit, refused when it cannot be exact, crash-safe like a commit."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FAULT_STEP, Cli, check_error, learned_hashes, make_images, tree_hash
from faults import commit_of, die, everything, hooked

from treelora_cli.errors import DamagedError, ProjectError, ResourceError, UsageError
from treelora_cli.project import Project, trash
from treelora_cli.project.state import parse_state


def visible(root: Path) -> dict[str, str]:
    """Hashes of every file but the project's own bookkeeping."""
    return {name: one for name, one in tree_hash(root).items() if not name.startswith(".treelora/")}


def grown(root: Path, *names: str, merge: bool = False) -> list[dict[str, str]]:
    """Learn further tasks; returns what the project looked like before each and after the last."""
    seen = [visible(root)]
    for name in names:
        project = Project.open(root)
        project.commit(commit_of(project, name, merge=merge))
        seen.append(visible(root))
    return seen


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\7")


# -- the command ------------------------------------------------------------------------------------------


def test_the_newest_task_goes_and_comes_back_bit_for_bit(cli: Cli, project: Path, tmp_path: Path) -> None:
    before = visible(project)
    more = make_images(tmp_path / "more", ["pink", "brown"])
    assert cli("-C", project, "train-task", more, "--device", "cpu").code == 0
    learned = visible(project)
    done = cli("-C", project, "rollback", "more", "--json")
    assert done.code == 0, done.err
    assert done.json == {"undone": ["more"], "tasks": ["warm", "cold", "grey"]}
    assert visible(project) == before
    assert cli("-C", project, "eval", "--device", "cpu").code == 0
    again = cli("-C", project, "rollback", "--undo", "--json")
    assert again.json == {"brought_back": ["more"], "tasks": ["warm", "cold", "grey", "more"]}
    assert visible(project) == learned
    assert cli("-C", project, "rollback", "more").code == 0, "again reversible"
    assert visible(project) == before


def test_what_was_rolled_back_learns_anew_to_the_same_hashes(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    learn = ["-C", project, "train-task", more, "--device", "cpu", "--precision", "fp32"]
    assert cli(*learn).code == 0
    first = learned_hashes(project)
    assert cli("-C", project, "rollback", "more").code == 0
    assert cli(*learn).code == 0
    assert learned_hashes(project) == first


def test_later_tasks_are_named_and_need_a_yes(cli: Cli, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree_hash(project)
    line = r"Rolling back 'cold' also undoes what was learned after it: grey\. Pass --yes\."
    check_error(cli("-C", project, "rollback", "cold"), 2, line)
    assert tree_hash(project) == before
    asked = []

    def answer(question: str, **_keywords: object) -> bool:
        asked.append(question)
        return True

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", answer)
    assert cli("-C", project, "rollback", "cold").code == 0
    assert asked == ["This also undoes what was learned after 'cold': grey. Go on?"]
    assert [task.name for task in Project.open(project).state.tasks] == ["warm"]
    check_error(cli("-C", project, "rollback", "--undo", "red"), 2, r"The trash holds no task 'red'\.")
    assert cli("-C", project, "rollback", "--undo", "grey").code == 0
    assert {name: one for name, one in tree_hash(project).items() if "trash" not in name} == before


def test_an_answer_of_no_changes_nothing(cli: Cli, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    before = tree_hash(project)
    terminal = io.StringIO("n\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    assert cli("-C", project, "rollback", "cold").code == 130
    assert tree_hash(project) == before


def test_every_task_can_go(cli: Cli, project: Path) -> None:
    assert cli("-C", project, "rollback", "warm", "--yes").code == 0
    assert sorted(visible(project)) == ["state.json", "treelora.yaml"]
    assert json.loads((project / "state.json").read_text())["generation"] == 0
    assert cli("-C", project, "status").code == 0
    check_error(cli("-C", project, "rollback"), 2, r"rollback needs TASK\. No task can be rolled back\.")
    assert cli("-C", project, "rollback", "--undo").code == 0
    assert cli("-C", project, "eval", "--device", "cpu").code == 0


def test_what_cannot_be_rolled_back_is_said(cli: Cli, project: Path) -> None:
    grown(project, "a", "b")
    status = cli("-C", project, "status", "--json").json
    assert status["rollback"] == ["grey", "a", "b"]
    assert status["history_bytes"] > 0
    before = tree_hash(project)
    line = r"The state before 'cold' is not kept any more\. Rollback reaches back to before 'grey' \('history' in"
    check_error(cli("-C", project, "rollback", "cold", "--yes"), 3, line)
    check_error(cli("-C", project, "rollback", "hot"), 2, r"No task 'hot' in this project\. Known: warm, cold, grey")
    check_error(cli("-C", project, "rollback"), 2, r"rollback needs TASK\. Can be rolled back: grey, a, b\.")
    check_error(cli("-C", project, "rollback", "--undo"), 2, r"Nothing was rolled back\.")
    assert tree_hash(project) == before


def test_the_setting_says_how_many_tasks_are_kept(project: Path) -> None:
    settings = project / "treelora.yaml"
    settings.write_text(settings.read_text().replace("\nhistory: 3", "\nhistory: 1"))
    grown(project, "a", "b")
    opened = Project.open(project)
    assert opened.history.reach(opened.state) == ["b"]
    assert len(list((project / ".treelora" / "history").iterdir())) == 2, "the state before, and a copy of this one"


# -- states -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_every_earlier_state_comes_back_exactly(project: Path, merge: bool) -> None:
    seen = grown(project, "a", "b", "c", merge=merge)
    inside = tree_hash(project)
    for index, name in ((2, "c"), (1, "b"), (0, "a")):
        Project.open(project).rollback(name)
        assert visible(project) == seen[index]
        everything(Project.open(project))
    for index in (1, 2, 3):
        Project.open(project).undo_rollback(None)
        assert visible(project) == seen[index]
    assert tree_hash(project) == inside, "objects and history too"
    Project.open(project).rollback("a")
    assert visible(project) == seen[0]
    Project.open(project).undo_rollback("b")
    assert tree_hash(project) == inside
    Project.open(project).rollback("b")
    assert visible(project) == seen[1]


def test_a_rollback_survives_commits_and_their_rollback(project: Path) -> None:
    seen = grown(project, "a", "b")
    Project.open(project).rollback("a")
    other = grown(project, "x", "y", "z")
    with pytest.raises(ProjectError, match=r"'a', 'b' can be brought back only to the state that was rolled back to"):
        Project.open(project).undo_rollback("a")
    assert visible(project) == other[-1]
    Project.open(project).rollback("y")
    Project.open(project).rollback("x")
    assert visible(project) == seen[0]
    Project.open(project).undo_rollback("a")
    assert visible(project) == seen[2]
    Project.open(project).rollback("a")
    for name, index in (("x", 1), ("y", 3)):
        Project.open(project).undo_rollback(name)
        assert visible(project) == other[index]


def test_a_line_that_was_left_is_not_taken_for_history(project: Path) -> None:
    grown(project, "a", "b")
    Project.open(project).rollback("a")
    grown(project, "a")
    opened = Project.open(project)
    states = [json.loads(data) for data in opened.history.earlier(opened.state)]
    assert [len(one["tasks"]) for one in states] == [2, 3]
    assert states[-1]["generation"] == 3
    assert all(set(everything(Project(project, parse_state(data)))) for data in opened.history.earlier(opened.state))


def test_a_reader_of_the_undone_state_keeps_its_files(project: Path) -> None:
    reader = Project.open(project)
    before = everything(reader)
    Project.open(project).rollback("cold")
    assert everything(reader) == before


def test_a_damaged_earlier_state_is_refused_before_anything_changes(project: Path) -> None:
    grown(project, "a")
    objects = [path for path in (project / ".treelora" / "objects").iterdir() if path.stat().st_size > 1000]
    for path in objects:
        flip(path)
    before = tree_hash(project)
    with pytest.raises(DamagedError, match=r"\.safetensors of that state is damaged; nothing was changed"):
        Project.open(project).rollback("a")
    assert tree_hash(project) == before


def test_a_damaged_newest_task_can_be_rolled_back(project: Path) -> None:
    seen = grown(project, "a")
    flip(project / "tasks/004-a/adapter_model.safetensors")
    (project / "tasks/004-a/head.safetensors").unlink()
    Project.open(project).rollback("a")
    assert visible(project) == seen[0]
    with pytest.raises(DamagedError, match=r"004-a/.* of that state is damaged; nothing was changed"):
        Project.open(project).undo_rollback(None)
    assert visible(project) == seen[0]


def test_a_damaged_entry_of_the_trash_hinders_nothing_else(cli: Cli, project: Path) -> None:
    Project.open(project).rollback("grey")
    (entry,) = (project / ".treelora" / "trash").iterdir()
    objects = tree_hash(project / ".treelora" / "objects")
    entry.write_text("{}")
    grown(project, "a")
    assert set(objects) <= set(tree_hash(project / ".treelora" / "objects")), "nothing it might need is deleted"
    check_error(cli("-C", project, "rollback", "--undo"), 2, r"Nothing was rolled back\.")


def test_the_trash_keeps_its_contents_until_it_is_emptied(project: Path) -> None:
    Project.open(project).rollback("cold")
    grown(project, *(f"task-{number}" for number in range(6)))
    opened = Project.open(project)
    ((entry, size),) = trash(opened)
    assert entry.tasks == ("cold", "grey")
    used = sum(path.stat().st_size for path in (project / ".treelora").rglob("*") if path.is_file())
    kept = everything(opened)
    assert opened.empty_trash() == 1
    left = sum(path.stat().st_size for path in (project / ".treelora").rglob("*") if path.is_file())
    assert used - left == size > 10_000
    assert everything(Project.open(project)) == kept
    with pytest.raises(UsageError, match=r"Nothing was rolled back\."):
        Project.open(project).undo_rollback(None)


def test_a_project_written_meanwhile_is_not_overwritten(project: Path) -> None:
    stale = Project.open(project)
    grown(project, "a")
    before = tree_hash(project)
    for action in (lambda: stale.rollback("grey"), lambda: stale.commit(commit_of(stale)), stale.empty_trash):
        with pytest.raises(ProjectError, match=r"was changed by another process\. Run the command again\."):
            action()
    assert tree_hash(project) == before


def test_a_file_system_without_hard_links_serves_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    seen = grown(project, "a", "b")
    Project.open(project).rollback("a")
    assert visible(project) == seen[0]
    Project.open(project).undo_rollback(None)
    assert visible(project) == seen[2]
    everything(Project.open(project))


# -- faults -----------------------------------------------------------------------------------------------

Action = Callable[[Project], Project]
ACTIONS: dict[str, Action] = {
    "rollback": lambda project: project.rollback("b"),
    "undo": lambda project: project.undo_rollback(None),
}


@pytest.fixture
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


def prepared(root: Path, action: str) -> Path:
    grown(root, "a", "b", "c", merge=True)
    if action == "undo":
        Project.open(root).rollback("b")
    return root


@pytest.mark.usefixtures("_no_flush")
@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("death", FAULT_STEP),
        pytest.param("death", 1, marks=pytest.mark.slow),
        pytest.param("error", FAULT_STEP, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fault_at_every_operation_leaves_the_one_or_the_other_state(
    project: Path, tmp_path: Path, action: str, fault: str, step: int
) -> None:
    source = prepared(project, action)
    counted = Path(shutil.copytree(source, tmp_path / "counted"))
    events: list[str] = []
    old = Project.open(counted)
    with hooked(events.append):
        new = ACTIONS[action](old)
    old_files, new_files = everything(Project.open(source)), everything(new)
    assert len(events) > 15
    seen = set()
    for victim in range(0, len(events), step):
        root = Path(shutil.copytree(source, tmp_path / "q"))
        opened, done = Project.open(root), iter(range(10_000))
        if fault == "death":
            child = os.fork()
            if child == 0:
                with hooked(lambda _name, done=done, victim=victim: die() if next(done) == victim else None):
                    ACTIONS[action](opened)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        else:

            def fail(_name: str, victim: int = victim, done: object = done) -> None:
                if next(done) >= victim:  # type: ignore[call-overload]
                    raise OSError(errno.ENOSPC, "No space left on device")

            with hooked(fail):
                try:
                    ACTIONS[action](opened)
                except (ResourceError, ProjectError):
                    assert Project.open(root).state == opened.state
        found = Project.open(root)
        assert found.state in (old.state, new.state)
        happened = found.state == new.state
        seen.add(happened)
        assert everything(found) == (new_files if happened else old_files)
        if not happened:
            found = ACTIONS[action](found)
        assert everything(found) == new_files, "what did not happen can be done again"
        found = found.undo_rollback(None) if action == "rollback" else found.rollback("b")
        assert everything(found) == old_files, "and undone"
        assert not list(root.rglob(".treelora-new-*"))
        shutil.rmtree(root)
    assert seen == {False, True}
    print(f"{action}, {fault}: {len(range(0, len(events), step))} of {len(events)} operations")
