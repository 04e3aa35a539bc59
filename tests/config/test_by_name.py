"""Settings by name, and settings that a backend or a method declares for itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error
from treelora_backends.vit.backend import VitBackend

from treelora_cli.config import BaseConfig, Config, TrainConfig, from_flags, load_config
from treelora_cli.config.by_name import add_set, from_names, given_settings, known_settings, parse_set
from treelora_cli.config.fields import check_own, fixed_own, own_settings, setting
from treelora_cli.errors import ConfigError, UsageError
from treelora_cli.methods import treelora


@dataclass(frozen=True)
class Own:
    hidden: int = setting(16, "neurons", low=1, high=64, fixed=True)
    slope: float | None = setting(None, "of the rectifier")
    kind: str = setting("relu", "of nonlinearity", choices=("relu", "tanh"))


def test_a_setting_is_named_in_full_or_by_its_last_part() -> None:
    train = TrainConfig(lr=0.01, epochs=2, grad_checkpointing=True)
    assert parse_set(["train.lr=1e-2", "epochs=2", "grad_checkpointing=true"]) == Config(train=train)
    assert parse_set(["seed=3", "inference=latest"]) == Config(seed=3, inference="latest")
    assert parse_set(None) == Config()


def test_a_mapping_is_given_key_by_key() -> None:
    given = parse_set(["base.model_args.img_size=32", "base.model_args.act=gelu", "backend_settings.hidden=4"])
    base = BaseConfig(model_args={"img_size": 32, "act": "gelu"})
    assert given == Config(base=base, backend_settings={"hidden": 4})


@pytest.mark.parametrize(
    ("pair", "line"),
    [
        ("lr", r"^--set lr: expected KEY=VALUE\.$"),
        ("=3", r"^--set =3: expected KEY=VALUE\.$"),
        ("train.lrr=1", r"^--set train\.lrr=1: unknown setting 'train\.lrr' \(did you mean 'train\.lr'\?\)\. What a "),
        ("blocks=2", r"'blocks' fits adapter\.blocks and head\.blocks\. Write one of them\."),
        ("train.lr=fast", r"--set train\.lr=fast: 'train\.lr' needs float, got 'fast'\."),
        ("epochs=-1", r"^--set epochs=-1: 'epochs' must be between 0 and 10000; got -1\."),
        ("train.epochs=[", r"--set train\.epochs=\[: not a number, word or list\."),
        ("stream.data=x", r"unknown setting 'stream\.data'"),
        (
            "backend_settings=3",
            r"^--set backend_settings=3: 'backend_settings' has entries\. Write each as backend_set",
        ),
        ("base.model_args={a: 1}", r"'base\.model_args' has entries\. Write each as base\.model_args\.NAME=VALUE\.$"),
    ],
)
def test_a_pair_that_cannot_be_used_is_refused(pair: str, line: str) -> None:
    with pytest.raises(UsageError, match=line):
        parse_set([pair])


def test_a_value_out_of_range_is_named_as_it_was_given() -> None:
    with pytest.raises(UsageError, match=r"^train\.lr: 'lr' must be at least 0; got -1\.$"):
        from_names({"train.lr": -1})
    with pytest.raises(UsageError, match=r"^--lr: 'lr' must be at least 0; got -1\.$"):
        from_flags(train__lr=-1)


def test_one_setting_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--set lr=2: 'train\.lr' is given twice\."):
        parse_set(["train.lr=1", "lr=2"])
    with pytest.raises(UsageError, match=r"^--set train\.lr: the setting's own option gives it, too\."):
        add_set(from_flags(train__lr=0.1), ["lr=2"])
    assert add_set(from_flags(train__lr=0.1, seed=2), ["epochs=1"]) == Config(
        seed=2, train=TrainConfig(lr=0.1, epochs=1)
    )


def test_every_setting_but_the_streams_has_a_name() -> None:
    known = known_settings()
    assert known["train.lr"] is float and known["seed"] is int and known["base.model_args"] is dict
    assert not [name for name in known if name.startswith("stream")]
    config = Config(seed=0, base=BaseConfig(model_args={"depth": 2}))
    assert given_settings(config) == {"seed": 0, "base.model_args.depth": 2}


def test_declared_settings_have_defaults_types_and_ranges() -> None:
    assert own_settings(Own, {}, "backend_settings") == Own(16, None, "relu")
    assert own_settings(Own, {"hidden": 3, "slope": 1}, "backend_settings") == Own(3, 1.0, "relu")
    for values, line in (
        ({"hiden": 3}, r"^backend_settings: unknown key 'hiden' \(did you mean 'hidden'\?\)\.$"),
        ({"width": 3}, r"^backend_settings: unknown key 'width'\. Known here: hidden, slope, kind\.$"),
        ({"hidden": 65}, r"'hidden' must be between 1 and 64; got 65\."),
        ({"hidden": "many"}, r"'hidden' needs int, got 'many'\."),
        ({"kind": "tan"}, r"'kind' is one of relu, tanh; got 'tan' \(did you mean 'tanh'\?\)\."),
    ):
        with pytest.raises(ConfigError, match=line):
            own_settings(Own, values, "backend_settings")


def test_fixed_settings_of_its_own_are_known_by_full_name() -> None:
    assert fixed_own(Own, {"hidden": 3, "kind": "tanh"}, "backend_settings") == {"backend_settings.hidden": 3}
    assert fixed_own(None, {}, "backend_settings") == {}
    assert check_own(Own, {"slope": 2.0}, "backend_settings", "toy") == {"hidden": 16, "slope": 2.0, "kind": "relu"}
    with pytest.raises(ConfigError, match=r"^backend_settings: toy has no settings of its own; got 'a'\.$"):
        check_own(None, {"a": 1}, "backend_settings", "toy")


def test_init_and_train_task_take_any_setting(cli: Cli, tmp_path: Path, init_options: list[str], data: Path) -> None:
    more = ["--set", "tree.probe_batches=2", "--set", "train.weight_decay=0.25", "--set", "width=literal"]
    refused = cli("init", tmp_path / "p", *init_options, *more)
    check_error(refused, 2, r"--set width=literal: 'width' fits tree\.width and head\.width\.")
    more[-1] = "tree.width=literal"
    assert cli("init", tmp_path / "p", *init_options, *more).code == 0
    written = load_config(tmp_path / "p" / "treelora.yaml")
    assert (written.tree.probe_batches, written.train.weight_decay, written.tree.width) == (2, 0.25, "literal")
    options = ["--device", "cpu", "--epochs", "0", "--no-eval"]
    assert cli("-C", tmp_path / "p", "train-task", data / "warm", *options, "--set", "train.weight_decay=0.5").code == 0
    settings = json.loads((tmp_path / "p/tasks/001-warm/task.json").read_text())["settings"]
    assert settings["train"]["weight_decay"] == 0.5
    assert settings["train"]["epochs"] == 0


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            "adapter.rank=2",
            r"'adapter\.rank' is 4 since this project was made, and cannot become 2\. Make a new",
        ),
        ("seed=9", r"'seed' is 0 since this project was made, and cannot become 9\."),
        ("backend=causal-lm", r"'backend' is vit since this project was made, and cannot become causal-lm\."),
        ("base.model=other", r"The base model is chosen when a project is made\."),
        ("backend_settings.hidden=3", r"backend_settings: vit has no settings of its own; got 'hidden'\."),
        ("lr=0.1", r"'lr' fits|--set train\.lr: the setting's own option gives it, too\."),
    ],
)
def test_what_a_project_is_made_with_is_not_changed_by_a_task(
    cli: Cli, empty_project: Path, data: Path, given: str, line: str
) -> None:
    done = cli("-C", empty_project, "train-task", data / "warm", "--lr", "0.2", "--set", given, "--device", "cpu")
    check_error(done, 2, line)


def test_a_methods_own_settings_are_checked_against_what_it_declares(
    cli: Cli, init_options: list[str], data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    root = tmp_path / "own"
    own = ["--set", "method_settings.hidden=5"]
    refused = cli("init", root, *init_options, *own)
    check_error(refused, 2, r"method_settings: treelora has no settings of its own; got 'hidden'\.")
    monkeypatch.setattr(treelora, "TREELORA", replace(treelora.TREELORA, own_settings=Own))
    assert cli("init", root, *init_options, *own).code == 0
    assert json.loads((root / "state.json").read_text())["fixed"]["method_settings.hidden"] == 5
    train = ["-C", root, "train-task", data / "warm", "--device", "cpu", "--epochs", "0", "--no-eval", "--set"]
    check_error(cli(*train, "method_settings.kind=3"), 2, r"method_settings: 'kind' is one of relu, tanh; got '3'")
    line = r"'method_settings\.hidden' is 5 since this project was made, and cannot become 6\."
    check_error(cli(*train, "method_settings.hidden=6"), 2, line)


def test_a_backends_own_settings_are_kept_with_the_project_and_the_fixed_ones_hold(
    cli: Cli, empty_project: Path, init_options: list[str], data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(VitBackend, "own_settings", Own, raising=False)
    root = tmp_path / "own"
    assert cli("init", root, *init_options, "--set", "backend_settings.hidden=5").code == 0
    assert json.loads((root / "state.json").read_text())["fixed"]["backend_settings.hidden"] == 5
    assert load_config(root / "treelora.yaml").backend_settings == {"hidden": 5}
    train = ["-C", root, "train-task", data / "warm", "--device", "cpu", "--epochs", "0", "--no-eval", "--set"]
    line = r"'backend_settings\.hidden' is 5 since this project was made, and cannot become 6\."
    check_error(cli(*train, "backend_settings.hidden=6"), 2, line)
    check_error(cli(*train, "backend_settings.kind=3"), 2, r"backend_settings: 'kind' is one of relu, tanh; got '3'")
    text = (root / "treelora.yaml").read_text()
    (root / "treelora.yaml").write_text(text.replace("{hidden: 5}", "{hidden: 6}"))
    check_error(cli(*train, "backend_settings.kind=tanh"), 2, r"'hidden' is 6 but this project was made with 5\.")
    (root / "treelora.yaml").write_text(text)
    assert cli(*train, "backend_settings.kind=tanh").code == 0
    settings = json.loads((root / "tasks/001-warm/task.json").read_text())["settings"]
    assert settings["backend_settings"] == {"hidden": 5, "kind": "tanh"}
    shutil.rmtree(root)
