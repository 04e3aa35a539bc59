"""An interrupted task: continued exactly, or refused when what it depends on has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Cli, check_error, learned_hashes, make_images, tree_hash
from interrupting import OPTIONS, stop_after

from treelora_cli.learning.resuming import WITH_FLAG


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return make_images(tmp_path / "more", ["pink", "brown"])


@pytest.fixture
def interrupted(cli: Cli, project: Path, more: Path) -> Path:
    """A project whose fourth task was stopped after its third step of eight."""
    stop_after(cli, project, more, 3)
    return project


def test_resuming_twice_ends_as_if_never_interrupted(cli: Cli, project: Path, more: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    done = cli("-C", whole, "train-task", more, *OPTIONS, "--json").json
    before = learned_hashes(project)
    stop_after(cli, project, more, 3)
    stop_after(cli, project, more, 6, "--resume")
    assert learned_hashes(project) == before
    resumed = cli("-C", project, "train-task", "--resume", *OPTIONS, "--json")
    assert resumed.code == 0, resumed.err
    assert learned_hashes(project) == learned_hashes(whole)
    assert resumed.json["scores"] == done["scores"]
    assert resumed.json["steps"] == 8


def test_the_last_commit_still_works_meanwhile(cli: Cli, interrupted: Path, learned_project: Path) -> None:
    here, there = (cli("-C", root, "eval", "--json", "--device", "cpu").json for root in (interrupted, learned_project))
    assert here == there
    assert learned_hashes(interrupted) == learned_hashes(learned_project)


def test_settings_that_are_said_to_have_a_flag_have_one(cli: Cli) -> None:
    shown = cli("train-task", "--help").out
    assert [name for name in sorted(WITH_FLAG) if f"--{name.replace('_', '-')} " not in shown] == []


def test_name_and_data_may_be_repeated(cli: Cli, interrupted: Path, more: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(more)
    other = cli("-C", interrupted, "train-task", tmp_path, "--resume", "--device", "cpu")
    check_error(other, 2, rf"The interrupted task's data is {more}, not {tmp_path}\.")
    more = tmp_path / "link"
    assert cli("-C", interrupted, "train-task", more, "--name", "More", "--resume", *OPTIONS).code == 0


def test_data_that_moved_meanwhile_is_found_where_it_is_said_to_be(
    cli: Cli, interrupted: Path, project: Path, more: Path, tmp_path: Path
) -> None:
    """Its contents are compared as ever; the old place counts as long as it holds the data."""
    moved = more.rename(tmp_path / "moved")
    root = ("-C", interrupted, "train-task", "--resume")
    check_error(cli(*root), 4, r"/more not found\..* If it has moved, say where it is now: treelora train-")
    other = make_images(tmp_path / "other", ["pink", "brown"], seed=50)
    check_error(cli(*root, other, *OPTIONS), 3, r"cannot be resumed: its data has changed")
    assert cli(*root, moved, *OPTIONS).code == 0
    assert cli("-C", interrupted, "eval", "--device", "cpu").code == 0


def test_going_on_and_giving_up_are_not_the_same(cli: Cli, interrupted: Path) -> None:
    done = cli("-C", interrupted, "train-task", "--resume", "--abandon")
    check_error(done, 2, r"--resume goes on with the interrupted task, --abandon gives it up\. Leave one of them out\.")


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--name", "other"], 2, r"The interrupted task is 'more', not 'other'\."),
        (["elsewhere"], 2, r"The interrupted task's data is .*more, not elsewhere\."),
        (
            ["--lr", "0.5"],
            3,
            r"The interrupted task was begun with --lr 0\.01, not 0\.5\. Leave --lr out",
        ),
        (["--epochs", "9"], 3, r"The interrupted task was begun with --epochs 4, not 9\. Leave --epochs out"),
        (["--precision", "bf16"], 3, r"The interrupted task was begun with --precision fp32, not bf16\."),
        (["--search", "random"], 3, r"The interrupted task was begun with --search \w+, not random\."),
        (
            ["--set", "train.weight_decay=0.3"],
            3,
            r"was begun with --set train\.weight_decay=[\d.]+, not 0\.3\. Leave --set train\.weight_decay out",
        ),
        (["--budget", "2"], 3, r"The interrupted task was begun with(out)? --budget"),
        (["--classes", "pink,brown"], 2, r"The interrupted task was begun without --classes"),
        (["--train-limit", "3"], 2, r"The interrupted task was begun without --train-limit\. Leave it out"),
    ],
)
def test_other_settings_are_refused(cli: Cli, interrupted: Path, arguments: list[str], code: int, line: str) -> None:
    before = tree_hash(interrupted)
    check_error(cli("-C", interrupted, "train-task", "--resume", *OPTIONS, *arguments), code, line)
    assert tree_hash(interrupted) == before


def test_other_data_is_refused(cli: Cli, interrupted: Path, more: Path) -> None:
    make_images(more, ["pink"], train=1, test=0, seed=99)
    before = tree_hash(interrupted)
    line = r"The interrupted task cannot be resumed: its data has changed\. Train it anew: train-task DATA --abandon\."
    check_error(cli("-C", interrupted, "train-task", "--resume", *OPTIONS), 3, line)
    shutil.rmtree(more)
    check_error(cli("-C", interrupted, "train-task", "--resume", *OPTIONS), 4, r"more not found\.")
    assert tree_hash(interrupted) == before


def test_a_damaged_checkpoint_is_refused(cli: Cli, interrupted: Path, more: Path) -> None:
    run = interrupted / ".treelora" / "run"
    tensors = next(run.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-3] ^= 1
    tensors.write_bytes(bytes(data))
    check_error(cli("-C", interrupted, "train-task", "--resume", *OPTIONS), 3, r"step-00000003\.safetensors: hash mism")
    (run / "checkpoint.json").write_text("{")
    check_error(cli("-C", interrupted, "train-task", "--resume", *OPTIONS), 3, r"checkpoint\.json is damaged\.")
    assert cli("-C", interrupted, "train-task", more, *OPTIONS).code == 0, "training anew needs no checkpoint"


def test_the_printed_command_is_enough(cli: Cli, project: Path, more: Path, tmp_path: Path) -> None:
    """``train-task --resume`` takes every setting from the checkpoint, given by flag or chosen by measurement."""
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    own = ["--lr", "0.02", "--search", "random", "--warm-start", "none", "--classes", "pink,brown"]
    assert cli("-C", whole, "train-task", more, *own, *OPTIONS).code == 0
    stop_after(cli, project, more, 3, *own)
    done = cli("-C", project, "train-task", "--resume", "--device", "cpu")
    assert done.code == 0, done.err
    assert learned_hashes(project) == learned_hashes(whole)


def test_another_task_does_not_drop_the_interrupted_one(cli: Cli, interrupted: Path, data: Path) -> None:
    other = ["-C", interrupted, "train-task", data / "warm", "--name", "between", "--device", "cpu"]
    before = tree_hash(interrupted)
    line = r"Task 'more' was interrupted after step 3 and would be lost\. Continue it: treelora"
    check_error(cli(*other), 3, line)
    assert tree_hash(interrupted) == before
    assert cli(*other, "--dry-run").code == 0
    assert cli(*other, "--abandon").code == 0
    check_error(cli("-C", interrupted, "train-task", "--resume"), 3, r"No interrupted task to resume\.")


def test_an_interrupted_task_is_given_up_alone(cli: Cli, interrupted: Path) -> None:
    done = cli("-C", interrupted, "train-task", "--abandon")
    assert (done.code, done.out) == (0, "Given up: 'more'.\n")
    check_error(cli("-C", interrupted, "train-task", "--resume"), 3, r"No interrupted task to resume\.")
    check_error(cli("-C", interrupted, "train-task", "--abandon"), 2, r"No task was interrupted; there is nothing")
    assert cli("-C", interrupted, "doctor").code == 0


def test_what_was_interrupted_at_another_state_is_in_nobodys_way(cli: Cli, interrupted: Path, data: Path) -> None:
    assert cli("-C", interrupted, "rollback", "grey").code == 0
    done = cli("-C", interrupted, "train-task", data / "grey", "--name", "again", "--device", "cpu")
    assert done.code == 0, done.err


def test_a_rollback_keeps_the_checkpoint_for_the_state_it_belongs_to(
    cli: Cli, project: Path, more: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    assert cli("-C", whole, "train-task", more, *OPTIONS).code == 0
    stop_after(cli, project, more, 3)
    assert cli("-C", project, "rollback", "grey").code == 0
    line = r"The interrupted task cannot be resumed: its state has changed\. Train it anew: train-task DATA --abandon\."
    check_error(cli("-C", project, "train-task", "--resume", *OPTIONS), 3, line)
    assert cli("-C", project, "rollback", "--undo").code == 0
    assert cli("-C", project, "train-task", "--resume", *OPTIONS).code == 0
    assert learned_hashes(project) == learned_hashes(whole)


def test_the_same_task_does_not_drop_what_was_interrupted(cli: Cli, interrupted: Path, more: Path) -> None:
    before = tree_hash(interrupted)
    line = r"Task 'more' was interrupted after step 3 and would be lost\. Continue it: treelora train-task --resume\."
    for given in ([more], [more, "--epochs", "1"], [more, "--name", "other"]):
        check_error(cli("-C", interrupted, "train-task", *given, "--device", "cpu"), 3, line)
    assert tree_hash(interrupted) == before
    assert cli("-C", interrupted, "train-task", "--resume", "--device", "cpu").code == 0


def test_training_anew_ignores_the_checkpoint(cli: Cli, interrupted: Path, more: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(interrupted, tmp_path / "whole"))
    shutil.rmtree(whole / ".treelora" / "run")
    for root in (interrupted, whole):
        assert cli("-C", root, "train-task", more, *OPTIONS, "--lr", "0.02", "--abandon").code == 0
    assert learned_hashes(interrupted) == learned_hashes(whole)


def test_a_diverged_task_commits_nothing_and_names_the_learning_rate(cli: Cli, project: Path, more: Path) -> None:
    before = tree_hash(project)
    done = cli("-C", project, "train-task", more, *OPTIONS, "--lr", "1e37")
    check_error(done, 1, r"Training diverged: .* not finite.*; nothing was committed\. Retry with a smaller --lr")
    assert {name: digest for name, digest in tree_hash(project).items() if "/run/" not in name} == before
