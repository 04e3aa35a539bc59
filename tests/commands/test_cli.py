"""Every command as a user types it, in one process."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STREAM, Cli, learned_hashes, make_images, picture, run_python, tree_hash
from safetensors.torch import load_file

from treelora_cli.views.console import Output

COMMANDS = (
    "init",
    "train-task",
    "eval",
    "inspect-tree",
    "export",
    "predict",
    "serve",
    "status",
    "report",
    "settings",
    "rollback",
    "data",
    "doctor",
    "run",
    "compare",
    "demo",
)
NAMES = [name for name, _ in STREAM]
_HEAVY = """
import sys
from treelora_cli.app import hoist_globals, run_command
code = run_command(hoist_globals(sys.argv[1:]))
assert code == 0, code
print("HEAVY", sorted({"torch", "timm", "transformers", "peft", "accelerate"} & set(sys.modules)))
"""


# -- globals and help -------------------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    from treelora_cli import __version__

    assert cli("--version").out == f"treelora {__version__}\n"


def test_help_lists_every_command(cli: Cli) -> None:
    from treelora_cli.app import app

    shown = cli("--help")
    assert shown.code == 0
    listed = {line.split()[0] for line in shown.out.splitlines() if line.startswith("  ") and line.split()}
    assert set(COMMANDS) <= listed
    assert set(COMMANDS) == {command.name for command in app.registered_commands}, "a new command belongs in the list"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_the_global_options(cli: Cli, command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0
    assert f" {command} [OPTIONS]" in shown.out
    assert "--json" in shown.out
    assert f"Example: treelora {command}" in shown.out.replace("-C birds ", "")


@pytest.mark.parametrize("arguments", [["--help"], ["train-task", "--help"], ["status"], ["inspect-tree", "--bandit"]])
def test_light_commands_import_no_heavy_library(learned_project: Path, arguments: list[str]) -> None:
    done = run_python(_HEAVY, "-C", str(learned_project), *arguments)
    assert done.out.splitlines()[-1] == "HEAVY []", done.err


def test_global_options_stand_before_or_after_the_command(cli: Cli, learned_project: Path) -> None:
    before = cli("--json", "-C", learned_project, "status")
    after = cli("status", "--json", f"--project={learned_project}")
    assert before.code == after.code == 0
    assert before.json == after.json


def test_a_double_dash_ends_the_options(cli: Cli, learned_project: Path) -> None:
    done = cli("-C", learned_project, "predict", "--", "--json")
    assert done.code == 4
    assert "--json not found" in done.err


def test_the_project_is_found_from_a_directory_below(
    cli: Cli, learned_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(learned_project / "tasks")
    assert cli("status", "--json").json["project"] == str(learned_project)


def test_quiet_leaves_the_result_only(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"], test=0)
    done = cli("-q", "-C", project, "train-task", more, "--device", "cpu")
    assert done.code == 0
    assert done.err == ""
    assert "Task 'more' is committed" in done.out


def test_debug_shows_the_traceback(cli: Cli, tmp_path: Path) -> None:
    assert "Traceback" in cli("--debug", "-C", tmp_path, "status").err
    assert "Traceback" not in cli("-C", tmp_path, "status").err


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["nonsense"],
        ["eval", "--limit", "many"],
        ["train-task", "absent"],
        ["export", "x", "--format", "zip"],
    ],
)
def test_json_is_one_document_also_on_failure(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    done = cli(*arguments, "--json", "-C", tmp_path)
    assert done.code in (2, 3)
    assert done.json["exit_code"] == done.code
    assert done.json["error"] in done.err.replace("\n", " ")
    assert done.err.startswith("Error: ")


# -- init and train-task ----------------------------------------------------------------------------------


def test_init_makes_a_project_that_says_what_is_next(cli: Cli, tmp_path: Path, init_options: list[str]) -> None:
    done = cli("init", tmp_path / "p", *init_options, "--json")
    assert done.code == 0
    assert done.json["backend"] == "vit"
    assert done.json["base"]["layers"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert done.json["base"]["facts"]["input_size"] == [16, 16]
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"treelora.yaml", "state.json"}
    settings = (tmp_path / "p" / "treelora.yaml").read_text()
    assert "  rank: 4  # LoRA rank r" in settings.splitlines()
    shown = cli("-C", tmp_path / "p", "status")
    assert "Next: treelora train-task DATA" in shown.out


def test_train_task_reports_and_records(cli: Cli, empty_project: Path, data: Path) -> None:
    first = cli("-C", empty_project, "train-task", data / "warm", "--json", "--device", "cpu").json
    second = cli("-C", empty_project, "train-task", data / "cold", "--json", "--name", "c2", "--epochs", "1").json
    assert first["task"] == "warm"
    assert first["steps"] == 4
    assert first["warm_start_from"] is None
    assert (second["task"], second["nearest"], second["warm_start_from"]) == ("c2", "warm", "warm")
    assert second["steps"] == 3
    assert list(second["scores"]) == ["warm", "c2"]
    assert second["scores"]["c2"]["examples"] == 24
    assert second["op"] == pytest.approx(sum(one["score"] for one in second["scores"].values()) / 2)
    record = json.loads((empty_project / "tasks" / "002-c2" / "task.json").read_text())
    assert record["data"]["path"] == str(data / "cold")
    assert record["train_examples"] == 24
    assert record["settings"]["train"]["epochs"] == 1


def test_train_task_shows_before_and_after(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "More Pictures", ["pink", "brown"])
    shown = cli("-C", project, "train-task", more, "--device", "cpu").out
    assert "Task 'more-pictures' is committed: 4 steps, started from" in shown
    for name in (*NAMES, "more-pictures"):
        assert f"│ {name}" in shown
    assert "OP " in shown and "forgetting " in shown and "BWT " in shown


def test_dry_run_learns_nothing(cli: Cli, project: Path, data: Path) -> None:
    before = tree_hash(project)
    done = cli("-C", project, "train-task", data / "cold", "--name", "again", "--dry-run", "--json", "--device", "cpu")
    assert done.code == 0
    assert done.json["train_examples"] == 24
    assert done.json["steps"] == 6
    assert done.json["labels"] == ["blue", "cyan", "green"]
    assert done.json["adapter_parameters"] == 2 * 4 * (32 + 96)
    assert (done.json["kept_activations_place"], done.json["kept_activations_mib"]) == ("memory", 0.0)
    assert tree_hash(project) == before


def test_what_is_learned_does_not_depend_on_where_activations_are_kept(
    cli: Cli, project: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = []
    for limit, place, said in (
        (1, "memory", "kept in memory."),
        (0, "file", f"kept in {tempfile.gettempdir()}."),
        (0, "nowhere", "not kept: each step runs the frozen blocks again."),
    ):
        if place == "nowhere":
            monkeypatch.setattr("treelora_backends.kept._free_on_disk", lambda: 0)
            plan = cli("-C", project, "train-task", data / "cold", "--name", "again", "--keep-mib", 0, "--dry-run",
                       "--json", "--device", "cpu")  # fmt: skip
            assert plan.json["kept_activations_place"] == "nowhere"
        shutil.copytree(project, tmp_path / place)
        done = cli("-v", "-C", tmp_path / place, "train-task", data / "cold", "--name", "again", "--keep-mib", limit,
                   "--no-eval", "--device", "cpu")  # fmt: skip
        assert done.code == 0, done.err
        assert done.err.count(f"are {said}") == 1
        (folder,) = (tmp_path / place / "tasks").glob("*-again")
        assert json.loads((folder / "task.json").read_text())["facts"]["kept"] == {"place": place, "mib": 0.0}
        adapters.append(load_file(folder / "adapter_model.safetensors"))
    kept, in_file, computed_again = adapters
    for name, tensor in kept.items():
        assert torch.equal(in_file[name], tensor)
        torch.testing.assert_close(computed_again[name], tensor, rtol=0, atol=1e-4)


def test_no_eval_leaves_scores_open(cli: Cli, empty_project: Path, data: Path) -> None:
    done = cli("-C", empty_project, "train-task", data / "warm", "--no-eval", "--json", "--device", "cpu")
    assert done.json["scores"] == {}
    assert done.json["op"] is None
    status = cli("-C", empty_project, "status", "--json").json
    assert status["tasks"][0]["now"] is None


def test_same_class_in_a_later_task_is_one_label(cli: Cli, project: Path, tmp_path: Path) -> None:
    again = make_images(tmp_path / "again", ["red", "pink"], seed=50)
    assert cli("-C", project, "train-task", again, "--device", "cpu").code == 0
    for inference in ("routed", "latest", "merged"):
        done = cli("-C", project, "eval", "--inference", inference, "--json", "--device", "cpu").json
        assert list(done["tasks"]) == [*NAMES, "again"]
    out = tmp_path / "out"
    assert cli("-C", project, "export", out, "--device", "cpu").code == 0
    labels = json.loads((out / "config.json").read_text())["label_names"]
    assert sorted(labels) == ["black", "blue", "cyan", "green", "pink", "red", "white", "yellow"]


def test_classes_choose_part_of_a_folder(cli: Cli, empty_project: Path, data: Path) -> None:
    done = cli("-C", empty_project, "train-task", data / "cold", "--classes", "blue, cyan", "--json", "--device", "cpu")
    assert done.json["scores"]["cold"]["examples"] == 16
    assert json.loads((empty_project / "tasks/001-cold/labels.json").read_text()) == ["blue", "cyan"]


def test_limits_cap_examples_per_class(cli: Cli, empty_project: Path, data: Path) -> None:
    options = ["--train-limit", "3", "--test-limit", "2", "--json", "--device", "cpu"]
    done = cli("-C", empty_project, "train-task", data / "cold", *options)
    assert done.json["scores"]["cold"]["examples"] == 6
    record = json.loads((empty_project / "tasks/001-cold/task.json").read_text())
    assert record["train_examples"] == 9


@pytest.mark.parametrize(
    "options",
    [
        ["--search", "flat"],
        ["--search", "exhaustive"],
        ["--search", "random"],
        ["--warm-start", "none"],
        ["--warm-start", "latest"],
        ["--update", "prox"],
        ["--reg", "0"],
        ["--epochs", "0"],
        ["--precision", "bf16"],
    ],
)
def test_every_training_option_commits(cli: Cli, project: Path, tmp_path: Path, options: list[str]) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    done = cli("-C", project, "train-task", more, *options, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    expected = {"none": None, "latest": "grey"}.get(options[1], done.json["nearest"])
    assert done.json["warm_start_from"] == expected
    assert json.loads((project / "state.json").read_text())["generation"] == 4


def test_budget_merges_the_nearest_and_still_answers(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    done = cli("-C", project, "train-task", more, "--budget", "2", "--json", "--device", "cpu")
    assert done.code == 0
    assert "now share one adapter" in done.err
    state = json.loads((project / "state.json").read_text())
    homes = {task["adapter"] for task in state["tasks"]}
    assert len(homes) == 2
    kept = {str(path.parent.relative_to(project)) for path in project.rglob("adapter_model.safetensors")}
    assert kept == homes
    scores = cli("-C", project, "eval", "--json", "--device", "cpu").json
    assert scores["op"] == pytest.approx(done.json["op"])
    shared = [task["name"] for task in state["tasks"] if task["adapter"] != task["directory"]]
    assert f"{shared[0]} uses tasks/" in cli("-C", project, "inspect-tree").out
    for name in (*NAMES, "more"):
        out = tmp_path / f"out-{name}"
        assert cli("-C", project, "export", out, "--format", "adapter", "--task", name, "--device", "cpu").code == 0


# -- eval, predict, status --------------------------------------------------------------------------------


def test_eval_repeats_what_training_recorded(cli: Cli, learned_project: Path) -> None:
    matrix = json.loads((learned_project / "metrics/matrix.json").read_text())
    done = cli("-C", learned_project, "eval", "--json", "--device", "cpu")
    assert done.code == 0
    assert [one["score"] for one in done.json["tasks"].values()] == pytest.approx(matrix["rows"][-1])
    assert done.json["op"] == pytest.approx(matrix["op"])
    assert done.json["forgetting"] == pytest.approx(matrix["forgetting"])
    assert done.json["bwt"] == pytest.approx(matrix["bwt"])


def test_eval_prints_scores_and_formulas(cli: Cli, learned_project: Path) -> None:
    shown = cli("-C", learned_project, "eval", "--device", "cpu").out
    assert "Inference: routed" in shown
    assert "forgetting = mean of a[j][j] - a[N][j]" in shown
    matrix = json.loads((learned_project / "metrics/matrix.json").read_text())
    for name, score in zip(matrix["tasks"], matrix["rows"][-1], strict=True):
        line = next(line for line in shown.splitlines() if line.startswith(f"│ {name}"))
        assert f"{100 * score:.1f}" in line


@pytest.mark.parametrize("inference", ["routed", "latest", "merged"])
def test_eval_of_some_tasks_with_a_limit(cli: Cli, learned_project: Path, inference: str) -> None:
    options = ["--tasks", "warm,grey", "--limit", "2", "--inference", inference, "--json", "--device", "cpu"]
    done = cli("-C", learned_project, "eval", *options).json
    assert done["inference"] == inference
    assert {name: one["examples"] for name, one in done["tasks"].items()} == {"warm": 4, "grey": 4}
    assert all((one["routed"] is not None) == (inference == "routed") for one in done["tasks"].values())


def test_an_untouched_image_model_cannot_be_scored(cli: Cli, learned_project: Path) -> None:
    done = cli("-C", learned_project, "eval", "--inference", "base", "--device", "cpu")
    assert done.code == 2
    assert "--inference base is for language models" in done.err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--fail-under", "100"], r"OP \d+\.\d\d is below --fail-under 100\."),
        (["--max-forgetting", "-100"], r"Forgetting -?\d+\.\d\d is above --max-forgetting -100\."),
    ],
)
def test_thresholds_end_with_7(cli: Cli, learned_project: Path, options: list[str], line: str) -> None:
    done = cli("-C", learned_project, "eval", *options, "--device", "cpu")
    assert done.code == 7
    assert re.search(line, done.err)
    assert "│ warm" in done.out
    as_json = cli("-C", learned_project, "eval", *options, "--json", "--device", "cpu")
    assert as_json.code == 7
    assert as_json.json["op"] is not None


def test_thresholds_that_hold_end_with_0(cli: Cli, learned_project: Path) -> None:
    options = ["--fail-under", "0", "--max-forgetting", "100", "--device", "cpu"]
    assert cli("-C", learned_project, "eval", *options).code == 0


def test_eval_writes_nothing(cli: Cli, project: Path) -> None:
    before = tree_hash(project)
    assert cli("-C", project, "eval", "--device", "cpu").code == 0
    assert tree_hash(project) == before


def test_predict_names_label_task_and_confidence(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    for name in ("red", "blue"):
        picture(name, 5000, size=40).save(tmp_path / f"{name}.jpg")
    done = cli("-C", learned_project, "predict", tmp_path / "red.jpg", tmp_path / "blue.jpg", "--json").json
    classes = dict(STREAM)
    for answer in done["predictions"]:
        assert answer["output"] in {label for names in classes.values() for label in names}
        assert answer["task"] in classes
        assert 0 < answer["confidence"] <= 1
    shown = cli("-C", learned_project, "predict", tmp_path / "red.jpg", "--inference", "latest").out
    assert done["predictions"][0]["input"] in shown


def test_status_tells_what_is_here(cli: Cli, learned_project: Path) -> None:
    document = cli("-C", learned_project, "status", "--json").json
    assert [task["name"] for task in document["tasks"]] == NAMES
    assert [task["labels"] for task in document["tasks"]] == [2, 3, 2]
    assert document["interrupted"] is None
    adapters = sum(path.stat().st_size for path in learned_project.rglob("adapter_model.safetensors"))
    assert document["adapter_bytes"] == adapters
    assert "Next: treelora train-task DATA" in cli("-C", learned_project, "status").out


# -- same seed, same result -------------------------------------------------------------------------------


def test_same_seed_same_hashes(cli: Cli, empty_project: Path, tmp_path: Path, data: Path) -> None:
    twin = Path(shutil.copytree(empty_project, tmp_path / "twin"))
    for root in (empty_project, twin):
        for name in ("warm", "cold"):
            cli("-C", root, "train-task", data / name, "--device", "cpu", "--precision", "fp32")
    assert learned_hashes(empty_project) == learned_hashes(twin)


def test_what_takes_long_shows_how_far_it_is(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, int | None]] = []

    def track(_self: Output, items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        shown.append((description, total))
        yield from items

    monkeypatch.setattr(Output, "track", track)
    assert cli("-C", project, "eval").code == 0
    assert shown.count(("Answering", 1)) == len(NAMES)
    assert cli("-C", project, "export", tmp_path / "out").code == 0
    assert ("Checking the export", 1) in shown
