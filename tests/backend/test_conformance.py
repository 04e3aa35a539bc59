"""What ``treelora doctor --backend`` finds before anything is trained: one fault at a time in the example backend."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from conftest import MODEL, MODEL_ARGS, Cli, check_error, make_images
from tiny_lm import save_model

from treelora_cli.backend.values import Learned

FOLDER = Path(__file__).parents[1] / "examples" / "toy_backend"
sys.path.insert(0, str(FOLDER))
import toy_backend  # noqa: E402

CENTRES = {"red": (3.0, 0.0), "blue": (-3.0, 0.0), "green": (0.0, 3.0), "grey": (0.0, -3.0), "pink": (3.0, 3.0)}


def write_table(path: Path, *labels: str) -> Path:
    draw = random.Random(1)
    lines = ["x,y,label,split"]
    for label in labels:
        for index in range(12):
            x, y = (centre + draw.gauss(0, 0.3) for centre in CENTRES[label])
            lines.append(f"{x:.4f},{y:.4f},{label},{'test' if index % 3 == 0 else 'train'}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the example's entry point known, as installing its package does."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["treelora.backends"].items()]
    folder = tmp_path / "site" / "toy_backend-1.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("\n".join(["[treelora.backends]", *lines, ""]))
    monkeypatch.syspath_prepend(folder.parent)


pytestmark = pytest.mark.usefixtures("_installed")


def doctor(cli: Cli, *more: object) -> Any:
    return cli("doctor", "--backend", "toy-mlp", "--device", "cpu", *more)


def test_the_example_meets_every_check(cli: Cli, tmp_path: Path) -> None:
    table = write_table(tmp_path / "colours.csv", "red", "blue", "green")
    done = doctor(cli, "--data", table, "--json")
    assert done.code == 0, done.out
    assert done.json["met"]
    assert [one["check"] for one in done.json["checks"] if one["problem"]] == []
    assert len(done.json["checks"]) == 36
    shown = doctor(cli)
    assert shown.code == 0
    assert "ok   resolve_base accepts its own output" in shown.out
    assert shown.out.endswith("Learning, answers and exports were not checked: pass --data DATA.\n")


def test_the_example_learns_two_tasks_and_answers_without_being_told_which(cli: Cli, tmp_path: Path) -> None:
    root = tmp_path / "p"
    tables = [write_table(tmp_path / "warm.csv", "red", "pink"), write_table(tmp_path / "cold.csv", "blue", "green")]
    done = cli("init", root, "--backend", "toy-mlp", "--set", "backend_settings.hidden=8", "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert done.json["base"]["facts"] == {"inputs": 2, "hidden": 8}
    for table in tables:
        learned = cli(
            "-C", root, "train-task", table, "--device", "cpu", "--precision", "fp32", "--epochs", "20", "--json"
        )
        assert learned.code == 0, learned.err
    assert learned.json["nearest"] == "warm"
    assert learned.json["warm_start_from"] == "warm"
    scores = cli("-C", root, "eval", "--json", "--device", "cpu").json
    assert {name: one["examples"] for name, one in scores["tasks"].items()} == {"warm": 8, "cold": 8}
    assert scores["op"] == 1.0
    answers = cli("-C", root, "predict", "3,0", "0,3", "--json", "--device", "cpu").json["predictions"]
    assert [(one["output"], one["task"]) for one in answers] == [("red", "warm"), ("green", "cold")]
    tree = cli("-C", root, "inspect-tree")
    assert tree.code == 0
    assert "warm" in tree.out and "cold" in tree.out
    check_error(cli("-C", root, "eval", "--inference", "merged", "--device", "cpu"), 2, r"--inference merged: toy-mlp")
    check_error(cli("-C", root, "export", tmp_path / "out", "--device", "cpu"), 2, r"toy-mlp has no merged export\.")
    refused = cli("-C", root, "train-task", tables[0], "--name", "x", "--set", "backend_settings.hidden=9")
    check_error(refused, 2, r"'backend_settings\.hidden' is 8 since this project was made")
    assert "Every file is whole." in cli("-C", root, "doctor").out


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.half() for name, one in tensors.items()}


def other_finish(change: Callable[[Learned], Any]) -> Callable[[Any], Any]:
    own = toy_backend.ToySession.finish
    return lambda self: change(own(self))


def forgetful(request: Any, inputs: int) -> Any:
    return _read(dataclasses.replace(request, classes=None, train_limit=None, metric=None), inputs)


_read = toy_backend.read_toy_task
_load = toy_backend.ToyBackend.load
_batches = toy_backend.ToySession.batches


def random_weights(self: Any, config: Any, runtime: Any) -> Any:
    base = _load(self, config, runtime)
    base.fingerprint = f"{random.getrandbits(256):064x}"
    return base


def trains_the_base(self: Any, config: Any, runtime: Any) -> Any:
    base = _load(self, config, runtime)
    base.network.get_submodule("base_model.model.first").weight.requires_grad_()
    return base


def shuffled(self: Any, epoch: int) -> Iterator[Any]:
    batches = list(_batches(self, epoch))
    random.shuffle(batches)
    yield from [(rows + random.random(), truth) for rows, truth in batches]


def always(value: object) -> property:
    return property(lambda self: value)


FAULTS: list[tuple[str, str, Any, str, str]] = [
    ("ToyBackend", "name", "toy", "", r"calls itself 'toy'"),
    (
        "ToyBackend",
        "load",
        lambda self, config: None,
        "",
        r"Backend has every member: it lacks load\(config, runtime\)",
    ),
    ("ToyBackend", "defaults", lambda self: {}, "", r"defaults\(\) are settings.*: it returns dict, not Config"),
    (
        "ToyBackend",
        "resolve_base",
        lambda self, base, *, offline: dataclasses.replace(base, model=f"{base.model}+"),
        "",
        r"resolve_base accepts its own output: it makes .*None\+\+",
    ),
    ("ToyBackend", "load", random_weights, "", r"the same when the model is loaded again: it changed"),
    ("ToyBackend", "load", trains_the_base, "", r"the base is frozen: 'base_model\.model\.first\.weight' asks for a"),
    ("ToyBase", "predictor", None, "", r"its Base lacks predictor\(memory, inference\)"),
    ("ToyBase", "facts", property(lambda self: {"a": {1}}), "", r"facts are JSON: TypeError"),
    ("ToySession", "finish", None, "data", r"TaskSession has every member: it lacks finish\(\)"),
    ("ToySession", "batches", shuffled, "data", r"the first batch of an epoch is another one"),
    ("ToySession", "steps_per_epoch", always(5), "data", r"an epoch has 3 batches, steps_per_epoch is 5"),
    (
        "ToySession",
        "loss",
        lambda self, batch: self.head(self.base.network(batch[0])),
        "data",
        r"the loss is no scalar",
    ),
    (
        "ToySession",
        "finish",
        other_finish(lambda learned: dataclasses.replace(learned, shared=lambda: half(learned.shared()))),
        "data",
        r"shared\(\): 'means' is float16; a project stores int64, float64, float32, bfloat16",
    ),
    (
        "ToySession",
        "finish",
        other_finish(lambda learned: dataclasses.replace(learned, tensors={"weight": 3})),
        "data",
        r"tensors: 'weight' is int, not a tensor",
    ),
    ("ToySession", "finish", other_finish(vars), "data", r"finish\(\) returns dict, not Learned"),
    ("ToyPredictor", "evaluate", lambda self, task: 0.5, "data", r"evaluate\(\) returns float, not Score"),
    ("ToyTask", "digest", always("abc"), "data", r"digest is 'abc', not a SHA-256"),
    ("ToyTask", "train_size", always(0), "data", r"train_size is 0"),
    ("", "read_toy_task", forgetful, "data", r"--classes is honoured or refused: a class that is not there is ignored"),
]


@pytest.mark.parametrize(("owner", "member", "value", "needs", "line"), FAULTS)
def test_a_fault_is_found_before_anything_is_trained(
    cli: Cli, tmp_path: Path, monkeypatch: Any, owner: str, member: str, value: Any, needs: str, line: str
) -> None:
    monkeypatch.setattr(getattr(toy_backend, owner) if owner else toy_backend, member, value)
    table = write_table(tmp_path / "colours.csv", "red", "blue", "green")
    done = doctor(cli, *(["--data", table] if needs else []))
    check_error(done, 2 if member == "name" else 7, line)


@pytest.mark.parametrize("merged", ["solved", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_image_backend_meets_the_contract(cli: Cli, weights: Path, tmp_path: Path, merged: str) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue", "green"], train=6, test=3)
    more = [f"base.model={MODEL}", f"base.weights={weights}", "head.width=64", f"head.merged={merged}"]
    more += ["adapter.blocks=0", "adapter.targets=qkv"]
    more += [f"base.model_args.{key}={value}" for key, value in MODEL_ARGS.items()]
    settings = [part for one in more for part in ("--set", one)]
    done = cli("doctor", "--backend", "vit", "--data", folder, "--device", "cpu", *settings)
    assert [line for line in done.out.splitlines() if line.startswith("NOT ")] == []
    assert done.code == 0, done.err


def test_the_language_backend_meets_the_contract(cli: Cli, tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama", "llama")
    rows = [{"sentence": f"{word} {n}", "label": label} for word, label in (("up", "a"), ("no", "b")) for n in range(6)]
    (tmp_path / "d").mkdir()
    for part in ("train.json", "test.json"):
        (tmp_path / "d" / part).write_text(json.dumps(rows))
    settings = ["--set", f"base.model={model}", "--set", "head.width=16", "--set", "train.max_length=64"]
    done = cli("doctor", "--backend", "causal-lm", "--data", tmp_path / "d", "--device", "cpu", *settings)
    assert [line for line in done.out.splitlines() if line.startswith("NOT ")] == []
    assert done.code == 0, done.err


def test_options_that_are_ignored_in_silence_are_each_named(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_backend, "read_toy_task", forgetful)
    monkeypatch.setattr(
        toy_backend.ToyBase, "predictor", lambda self, memory, _: toy_backend.ToyPredictor(self, memory)
    )
    done = doctor(cli, "--data", write_table(tmp_path / "colours.csv", "red", "blue", "green"))
    unmet = [line for line in done.out.splitlines() if line.startswith("NOT ")]
    assert unmet == [
        "NOT  --classes is honoured or refused: a class that is not there is ignored in silence",
        "NOT  --metric is honoured or refused: a score that is not known is ignored in silence",
        "NOT  --train-limit is honoured or refused: 2 were asked for, 24 examples of 3 classes came",
        "NOT  an inference that is not known is refused: --inference is ignored in silence",
    ]
    check_error(done, 7, r"Backend 'toy-mlp' does not meet the contract in 4 of 36 checks\. First: --classes is")


def test_a_base_without_a_member_makes_no_project(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_backend.ToyBase, "session", None)
    line = r"Backend 'toy-mlp': its Base lacks session\(task, memory, config\)\. Check all of it with: treelora doctor"
    check_error(cli("init", tmp_path / "p", "--backend", "toy-mlp", "--device", "cpu"), 1, line)
    assert not (tmp_path / "p").exists()


def test_a_session_without_finish_is_found_before_it_trains(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:
    root, table = tmp_path / "p", write_table(tmp_path / "warm.csv", "red", "pink")
    assert cli("init", root, "--backend", "toy-mlp", "--device", "cpu").code == 0
    monkeypatch.setattr(toy_backend.ToySession, "finish", None)
    line = r"Backend 'toy-mlp': its TaskSession lacks finish\(\)\. Check all of it with: treelora doctor --backend"
    check_error(cli("-C", root, "train-task", table, "--device", "cpu"), 1, line)


@pytest.mark.parametrize(
    ("options", "ignored"), [(["--classes", "red"], "--classes"), (["--train-limit", "2"], "--train-limit")]
)
def test_an_option_that_the_backend_ignored_ends_the_task(
    cli: Cli, tmp_path: Path, monkeypatch: Any, options: list[str], ignored: str
) -> None:
    root, table = tmp_path / "p", write_table(tmp_path / "warm.csv", "red", "pink")
    assert cli("init", root, "--backend", "toy-mlp", "--device", "cpu").code == 0
    monkeypatch.setattr(toy_backend, "read_toy_task", forgetful)
    line = rf"The backend ignored {ignored}; nothing was learned\. Leave the option out\."
    check_error(cli("-C", root, "train-task", table, "--device", "cpu", *options), 1, line)


def test_options_of_the_examination_need_a_backend(cli: Cli, tmp_path: Path) -> None:
    check_error(cli("doctor", "--data", tmp_path), 2, r"--data, --set and --device of doctor go with --backend NAME\.")
