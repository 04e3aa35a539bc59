"""``treelora compare``: fresh processes, result files, resuming, refusals, and the table's arithmetic."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error, make_images, run_python, two_task_recipe
from tiny_lm import save_model

from treelora_cli.compare.results import Failure, Outcome, finish_runs, run_process
from treelora_cli.compare.rows import Figure, flat_row, summarise
from treelora_cli.compare.runs import Run, ignored_by_contenders, parse_variant, plan_runs
from treelora_cli.compare.worker import MemoryWatch, contender_config
from treelora_cli.config import Config, from_flags, load_config
from treelora_cli.config.by_name import from_names
from treelora_cli.errors import Interrupted, ProjectError, UsageError
from treelora_cli.methods.catalogue import load_method
from treelora_cli.score_matrix import ScoreMatrix
from treelora_cli.views.comparison import size


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    make_images(root / "data" / "warm", ("red", "yellow"))
    make_images(root / "data" / "cold", ("blue", "green", "cyan"))
    text = two_task_recipe(weights, root / "data", adapter="{rank: 2, alpha: 4}")
    (root / "small.yaml").write_text(text)
    return root / "small.yaml"


# -- as a user types it ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], int, str]:
    """Four runs in processes of their own, one of which cannot learn; output directory, document, exit code, notes."""
    from conftest import run_process as shell

    out = tmp_path_factory.mktemp("compared") / "o"
    methods = "treelora:reg=0,seqlora,seqlora:lr=1e30,ncm"
    done = shell("compare", recipe, "--methods", methods, "--out", out, "--device", "cpu", "--json")
    return out, done.json, done.code, done.err


def test_every_method_has_a_row_and_a_failing_one_stops_no_other(
    compared: tuple[Path, dict[str, Any], int, str],
) -> None:
    out, document, code, err = compared
    assert code == 7
    assert "Error: No result from seqlora:lr=1e30 (seed 0): Training diverged" in err
    assert [row["method"] for row in document["methods"]] == ["treelora:reg=0", "seqlora", "ncm"]
    (failed,) = document["failures"]
    assert (failed["label"], failed["seed"], failed["exit_code"]) == ("seqlora:lr=1e30", 0, 1)
    assert "diverged" in failed["message"]
    names = {path.name for path in out.iterdir() if path.suffix == ".json"}
    assert names == {"treelora-reg-0-seed0.json", "seqlora-seed0.json", "ncm-seed0.json"}
    project = out / "treelora-reg-0-seed0"
    assert (project / "tasks" / "002-cold" / "adapter_model.safetensors").is_file()
    assert json.loads((project / "tasks" / "002-cold" / "task.json").read_text())["settings"]["train"]["reg"] == 0


def test_rows_hold_what_the_runs_measured(compared: tuple[Path, dict[str, Any], int, str]) -> None:
    out, document, _, _ = compared
    ours, seqlora, ncm = document["methods"]
    assert document["baseline"] == "treelora:reg=0"
    for row in (ours, seqlora, ncm):
        run = next(one for one in document["runs"] if one["method"] == row["method"])
        assert row["op"] == pytest.approx(sum(run["matrix"]["rows"][-1]) / 2)
        assert row["train_seconds"] == run["train_seconds"] > 0
        assert row["train_cpu_seconds"] == run["train_cpu_seconds"] > 0
        assert row["peak_bytes"] == run["peak_bytes"] > 0
        assert row["train_seconds_ratio"] == pytest.approx(row["train_seconds"] / ours["train_seconds"])
        assert row["op_spread"] is None and row["cuda_peak_bytes"] is None
        stored = json.loads((out / f"{row['method'].replace(':', '-').replace('=', '-')}-seed0.json").read_text())
        assert stored["matrix"] == run["matrix"]
    # rank 2 on qkv and proj: of both blocks for a contender, of the last one for treelora
    block = 2 * (32 + 96) + 2 * (32 + 32)
    assert seqlora["trained_parameters"] == 2 * block + 3 * 33
    assert ours["trained_parameters"] == block + 3 * 33
    assert ncm["trained_parameters"] == 0
    assert ncm["kept_bytes_per_task"] == 4 * 5 * 32 / 2
    runs = {one["method"]: one for one in document["runs"]}
    assert runs["seqlora"]["steps"] == runs["treelora:reg=0"]["steps"] == 2 + 2 * 3
    assert runs["seqlora"]["head"] == "linear"
    project = out / "treelora-reg-0-seed0"
    files = json.loads((project / "state.json").read_text())["files"].values()
    assert runs["treelora:reg=0"]["kept_bytes"] == sum(one["size"] for one in files)
    seconds = runs["treelora:reg=0"]["seconds"]
    wanted = sum(value for phase, value in seconds.items() if phase not in ("read", "evaluate"))
    assert runs["treelora:reg=0"]["train_seconds"] == pytest.approx(wanted)


def test_scores_of_the_ends_alone_give_the_same_figures(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    third = tmp_path / "three.yaml"
    tasks = f"  tasks:\n    - {{name: again, path: {recipe.parent / 'data' / 'warm'}, classes: [red]}}\n"
    third.write_text(recipe.read_text().replace("  tasks:\n", tasks))
    assert len(load_config(third).stream.tasks) == 3
    documents = [
        cli(
            "compare",
            third,
            "--methods",
            "treelora,seqlora",
            "--out",
            tmp_path / out,
            "--device",
            "cpu",
            "--json",
            *more,
        )
        for out, more in (("all", ()), ("ends", ("--score-ends",)))
    ]
    for whole, ends in zip(*(done.json["runs"] for done in documents), strict=True):
        known, left = whole["matrix"]["rows"], ends["matrix"]["rows"]
        assert left == [known[0], [None, known[1][1]], known[2]]
        assert None not in known[1]
    for whole, ends in zip(*(done.json["methods"] for done in documents), strict=True):
        assert (ends["op"], ends["forgetting"]) == (whole["op"], whole["forgetting"])
        assert ends["forgetting"] is not None
    other = cli("compare", third, "--methods", "seqlora", "--out", tmp_path / "ends", "--device", "cpu")
    check_error(other, 3, "was measured with other settings")


def test_scores_of_the_ends_alone_are_too_few_for_a_gate(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    gated = tmp_path / "gated.yaml"
    gated.write_text(f"{recipe.read_text()}\ngate: {{fail_under: 1}}\n")
    for command in (("compare", gated, "--out", tmp_path / "o"), ("run", gated, tmp_path / "p")):
        check_error(cli(*command, "--score-ends"), 2, "--score-ends leaves the gate too little to check")
    assert not (tmp_path / "o").exists() and not (tmp_path / "p").exists()


def test_run_scores_the_ends_alone(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    done = cli("run", recipe, tmp_path / "p", "--score-ends", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    first, last = done.json["rows"]
    assert None not in (*first, *last)  # of two tasks the first is scored when it is learned
    assert done.json["op"] == pytest.approx(sum(last) / 2)


def test_what_is_done_is_not_run_again(
    cli: Cli, recipe: Path, compared: tuple[Path, dict[str, Any], int, str], tmp_path: Path, monkeypatch: Any
) -> None:
    def never(run: Run) -> None:
        raise AssertionError(run.name)

    monkeypatch.setattr("treelora_cli.compare.results.run_process", never)
    out, document, _, _ = compared
    table = tmp_path / "tables" / "t.csv"
    options = ["--out", out, "--device", "cpu", "--csv", table, "--baseline", "ncm", "--target-op", "0"]
    again = cli("compare", recipe, "--methods", "seqlora,ncm", *options)
    assert again.code == 0, again.err
    assert "Methods side by side; baseline ncm" in again.out and "(x1.00)" in again.out and "time to OP 0" in again.out
    assert "seqlora, seed 0: OP" in again.err and "(done before)" in again.err
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["seqlora", "ncm"]
    assert float(rows[0]["op"]) == pytest.approx(document["methods"][1]["op"])
    assert rows[0]["seconds_to_target"] == rows[0]["train_seconds"]
    refused = cli("compare", recipe, "--methods", "seqlora", "--out", out, "--device", "cpu", "--epochs", "3")
    check_error(refused, 3, re.escape("was measured with other settings (train.epochs: None, now 3)"))


@pytest.mark.slow
def test_a_language_model_is_compared_too(cli: Cli, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama", "llama")
    rows = [{"sentence": f"{word} {n}", "label": label} for word, label in (("up", "a"), ("no", "b")) for n in range(4)]
    for part in ("train.json", "test.json"):
        for task, reverse in (("one", False), ("two", True)):
            (tmp_path / "data" / task).mkdir(parents=True, exist_ok=True)
            (tmp_path / "data" / task / part).write_text(json.dumps(rows[::-1] if reverse else rows))
            (tmp_path / "data" / task / "labels.json").write_text('["a", "b"]')
    recipe = tmp_path / "words.yaml"
    recipe.write_text(
        f"backend: causal-lm\nbase: {{model: {model}}}\ntrain: {{epochs: 1, precision: fp32}}\n"
        f"stream: {{data: {tmp_path / 'data'}, tasks: [{{name: one, path: one}}, {{name: two, path: two}}],"
        " watch: [{name: general, path: one/test.json}]}\n"
    )
    options = ["--out", tmp_path / "o", "--device", "cpu"]
    done = cli("compare", recipe, "--methods", "hidelora,joint", *options, "--json")
    assert done.code == 0, done.err
    routed, joint = done.json["runs"]
    assert routed["head"] == "routed" and joint["head"] == "answer"
    assert [len(row) for row in routed["matrix"]["rows"]] == [1, 2]
    assert joint["matrix"]["rows"][0] == [None] and joint["steps"] == routed["steps"] == 4
    assert done.json["methods"][1]["forgetting"] is None and done.json["methods"][1]["op"] is not None
    assert list(routed["watch"]["general"]["scores"]) == ["one", "two"]
    assert list(joint["watch"]["general"]["scores"]) == ["two"]
    assert routed["watch"]["general"]["untouched"] == joint["watch"]["general"]["untouched"]
    assert "Watch sets" in cli("compare", recipe, "--methods", "hidelora,joint", *options).out
    for method in ("slca", "l2p", "dualprompt"):
        refused = cli("compare", recipe, "--methods", f"treelora,{method}", *options)
        check_error(refused, 2, f"'{method}' does not work with the causal-lm backend")


def test_weights_given_to_the_command_reach_every_process(
    cli: Cli, recipe: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text("".join(line for line in recipe.open() if "weights:" not in line))
    started: list[Run] = []

    def note(run: Run) -> Failure:
        started.append(Run.from_json(json.loads(json.dumps(run.to_json()))))
        return Failure(run.variant.label, run.seed, "not run", 1)

    monkeypatch.setattr("treelora_cli.compare.results.run_process", note)
    monkeypatch.chdir(weights.parent)
    options = ["--methods", "treelora,ncm", "--weights", weights.name, "--out", tmp_path / "o", "--device", "cpu"]
    assert cli("compare", bare, *options).code == 7
    assert [run.flags.base.weights for run in started] == [str(weights)] * 2


@pytest.mark.parametrize(
    ("options", "code", "line"),
    [
        (["--methods", "seqlor"], 2, "Unknown method 'seqlor' (did you mean 'seqlora'?). Known: treelora, dualprompt"),
        (["--methods", "seqlora,seqlora"], 2, "--methods names 'seqlora' twice."),
        (["--methods", ","], 2, "--methods names nothing."),
        (["--methods", "treelora:regg=1"], 2, "unknown setting 'regg' (did you mean 'reg'?)"),
        (["--methods", "treelora:width=64"], 2, "'width' fits tree.width and head.width."),
        (["--methods", "treelora:reg"], 2, "expected treelora:KEY=VALUE."),
        (["--methods", "treelora:reg=0,epochs=2"], 2, "'epochs=2' is no method. Colons divide a row's settings"),
        (["--methods", "treelora:epochs=many"], 2, "'train.epochs' needs int, got 'many'"),
        (["--methods", "treelora:search=rand"], 2, "'search' is one of lcb, cold, flat, exhaustive, random"),
        (["--methods", "seqlora:search=random"], 2, "'tree.search' means nothing to seqlora."),
        (["--seeds", "0,x"], 2, "--seeds 0,x: expected whole numbers with commas"),
        (["--seeds", "1,1"], 2, "--seeds needs one or more different numbers."),
        (["--baseline", "seqlor"], 2, "is not among --methods (did you mean 'seqlora'?)"),
        (["--data", "nowhere"], 4, "nowhere not found."),
        (["--weights", "no.safetensors"], 5, "no.safetensors not found. Pass --weights FILE.safetensors."),
        (["--model", "vit_tiny_patch16_244"], 5, "Unknown timm model 'vit_tiny_patch16_244'. Did you mean"),
    ],
)
def test_bad_input_starts_nothing(
    cli: Cli, recipe: Path, tmp_path: Path, options: list[str], code: int, line: str
) -> None:
    check_error(cli("compare", recipe, "--out", tmp_path / "o", *options), code, re.escape(line))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("methods", "setting", "told"),
    [
        ("treelora,seqlora,ncm", "balanced", True),
        ("treelora", "balanced", False),
        ("treelora,seqlora", "none", False),
    ],
)
def test_weights_of_solved_heads_that_contenders_do_not_have_are_said(
    recipe: Path, tmp_path: Path, methods: str, setting: str, told: bool
) -> None:
    flags = from_names({"head.class_weights": setting})
    shared = {"data": None, "limit": None, "device": "cpu", "offline": True, "out": tmp_path}
    runs = plan_runs(methods.split(","), [0], recipe=recipe, flags=flags, **shared)
    line = "head.class_weights balanced is for treelora's solved heads alone; without it: seqlora, ncm."
    assert ignored_by_contenders(runs) == ([line] if told else [])


# -- the parts -------------------------------------------------------------------------------------


def run_of(recipe: Path, out: Path, method: str = "seqlora", flags: Config | None = None) -> Run:
    shared = {"recipe": recipe, "data": None, "limit": None, "device": "cpu", "offline": True, "out": out}
    return plan_runs([method], [3], flags=flags or Config(), **shared)[0]


def test_a_job_file_holds_the_whole_run(recipe: Path, tmp_path: Path) -> None:
    flags = from_flags(train__epochs=0, base__model="m", base__model_args={"depth": 2}, inference="merged")
    run = run_of(recipe, tmp_path, "treelora:reg=0:warm_start=none", flags)
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
    assert (run.flags.train.reg, run.flags.train.warm_start, run.flags.seed) == (0.0, "none", 3)
    assert run.name == "treelora-reg-0-warm_start-none-seed3"


def test_settings_are_the_rows_then_the_papers_then_the_recipes(recipe: Path, tmp_path: Path) -> None:
    given = from_flags(train__lr=0.01, head__width=64)
    settings = {
        text: contender_config(run_of(recipe, tmp_path, text), given, load_method(text.partition(":")[0]).heads[0])
        for text in ("ranpac", "ranpac:width=99", "slca", "slca:lr=0.5", "seqlora:blocks=3")
    }
    assert settings["ranpac"].head.width == 10_000
    assert settings["ranpac:width=99"].head.width == 99
    assert settings["slca"].train.lr == pytest.approx(0.001)
    assert settings["seqlora:blocks=3"].train.lr == pytest.approx(0.002)
    assert contender_config(run_of(recipe, tmp_path), given, "answer").train.lr == 0.01
    assert settings["slca:lr=0.5"].train.lr == 0.5
    assert settings["ranpac"].adapter.blocks == 0 and settings["seqlora:blocks=3"].adapter.blocks == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 99}'])
def test_a_damaged_result_is_named(recipe: Path, tmp_path: Path, content: str) -> None:
    run = run_of(recipe, tmp_path)
    run.result.write_text(content)
    with pytest.raises(ProjectError, match=r"seqlora-seed3\.json .*[Dd]elete it"):
        finish_runs([run], lambda _: None, lambda *_: None)


def run_instead_of_python(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script be what every process of a comparison runs."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))


@pytest.mark.parametrize(
    ("code", "line"), [("print('Error: no cat'); raise SystemExit(4)", "no cat"), ("1 / 0", "Zero")]
)
def test_a_process_that_fails_is_told_by_its_last_line(
    recipe: Path, tmp_path: Path, monkeypatch: Any, code: str, line: str
) -> None:
    run_instead_of_python(f'exec python3 -c "{code}"', tmp_path, monkeypatch)
    outcome = run_process(run_of(recipe, tmp_path / "o"))
    assert not isinstance(outcome, Outcome)
    assert line in outcome.message and outcome.exit_code == (4 if "cat" in line else 1)


@pytest.mark.parametrize(
    ("signal", "line"), [("KILL", r"ended by SIGKILL \(out of memory\?\)"), ("SEGV", "ended by SIGSEGV")]
)
def test_a_process_that_is_killed_is_told_by_its_signal(
    recipe: Path, tmp_path: Path, monkeypatch: Any, signal: str, line: str
) -> None:
    run_instead_of_python(f"kill -{signal} $$", tmp_path, monkeypatch)
    outcome = run_process(run_of(recipe, tmp_path / "o"))
    assert not isinstance(outcome, Outcome)
    assert re.match(line, outcome.message) and outcome.exit_code == 1


def test_a_process_whose_files_are_removed_under_it_is_told_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_instead_of_python(f"rm {tmp_path}/o/*.log {tmp_path}/o/*.job\nexit 1", tmp_path, monkeypatch)
    outcome = run_process(run_of(recipe, tmp_path / "o"))
    assert isinstance(outcome, Failure) and outcome.exit_code == 1
    assert ".log was removed while it ran. Leave " in outcome.message


def test_an_interrupted_process_stops_the_whole_comparison(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run_instead_of_python("exit 130", tmp_path, monkeypatch)
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        run_process(run_of(recipe, tmp_path / "o"))


def outcome(label: str, seed: int, rows: tuple[Any, ...], seconds: float, peak: int = 100, data: str = "d") -> Outcome:
    matrix = ScoreMatrix(("a", "b"), rows)
    return Outcome(
        label, seed, matrix, seconds, seconds / 2, peak, None, 50, 7, {"base_sha256": "b", "data_sha256": data}
    )


def test_results_on_other_data_are_not_put_side_by_side(recipe: Path, tmp_path: Path, monkeypatch: Any) -> None:
    measured = {"ncm": "new"}
    rows = ((0.8,), (0.6, 0.4))
    monkeypatch.setattr(
        "treelora_cli.compare.results.run_process",
        lambda run: outcome(run.variant.label, run.seed, rows, 1.0, data=measured.get(run.variant.label, "old")),
    )
    runs = [run_of(recipe, tmp_path, method) for method in ("seqlora", "joint")]
    assert len(finish_runs(runs, lambda _: None, lambda *_: None)[0]) == 2
    with pytest.raises(ProjectError, match=r"The data changed between seqlora and ncm \(seed 3\)"):
        finish_runs([*runs, run_of(recipe, tmp_path, "ncm")], lambda _: None, lambda *_: None)


def test_rows_are_means_spreads_and_ratios() -> None:
    outcomes = [
        outcome("x", 0, ((0.8,), (0.6, 0.4)), 10.0),
        outcome("x", 1, ((0.6,), (0.6, 0.8)), 30.0),
        outcome("y", 0, ((None,), (0.5, 0.7)), 60.0, peak=50),
    ]
    x, y = summarise(["x", "z", "y"], outcomes, "x", 0.55)
    assert (x.label, y.label, x.seeds) == ("x", "y", (0, 1))
    assert x.op == Figure(pytest.approx(0.6), pytest.approx(0.1 * 2**0.5))
    assert x.forgetting == Figure(pytest.approx(0.05), pytest.approx(0.1 / 2**0.5))
    assert x.bwt == Figure(pytest.approx(-0.1), pytest.approx(0.2 / 2**0.5))
    assert x.seconds_to_target is None  # the first seed ended at 0.5
    assert y.seconds_to_target == Figure(60.0, None)
    assert y.forgetting is None and y.bwt is None
    assert y.ratios == {"train_seconds": 3.0, "train_cpu_seconds": 3.0, "peak_bytes": 0.5, "kept_bytes_per_task": 1.0}
    flat = flat_row(y)
    assert (flat["kept_bytes_per_task"], flat["forgetting"], flat["train_seconds_ratio"]) == (25.0, None, 3.0)


def test_a_variant_needs_a_known_method() -> None:
    with pytest.raises(UsageError, match="Unknown method 'treelra'"):
        parse_variant("treelra:reg=0")


def test_sizes_are_readable() -> None:
    assert [size(value) for value in (12, 2048, 151 * 2**20, 1.5 * 2**30)] == ["12 B", "2.0 KiB", "151 MiB", "1.50 GiB"]


def test_memory_is_the_peak_above_the_base() -> None:
    from conftest import plain_runtime

    watch = MemoryWatch(plain_runtime())
    watch.start()
    held = bytearray(b"x") * (64 * 2**20)
    del held
    peaks = watch.peaks()
    assert 60 * 2**20 < (peaks["peak_bytes"] or 0) < 140 * 2**20
    assert peaks["cuda_peak_bytes"] is None


def test_the_comparison_itself_imports_no_model_library() -> None:
    shown = run_python(
        "import sys, treelora_cli.compare.runs, treelora_cli.views.comparison, treelora_cli.commands.compare\n"
        "print(sorted({'torch', 'timm', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert shown.out.strip() == "[]", shown.err
