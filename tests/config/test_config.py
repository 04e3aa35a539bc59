"""Strict settings files, line numbers in messages, and one order of precedence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treelora_cli.config import (
    DEFAULTS,
    AdapterConfig,
    BaseConfig,
    Config,
    HeadConfig,
    StreamTask,
    TrainConfig,
    TreeConfig,
    from_flags,
    load_config,
    overlay,
    parse_config,
    resolve,
    to_dict,
    to_yaml,
)
from treelora_cli.errors import ConfigError
from treelora_cli.learning.recipes import shipped_recipes, stream_tasks

# -- strictness -------------------------------------------------------------------------------------------

REFUSED = {
    "unknown key with the nearest": (
        "backend: vit\nadapter:\n  rnak: 8\n",
        r"^f\.yaml:3: unknown key 'rnak' \(did you mean 'rank'\?\)\.$",
    ),
    "unknown key of another section": ("lr: 1\n", r"^f\.yaml:1: unknown key 'lr' here; it belongs under 'train'\.$"),
    "unknown key near nothing": ("zzzzzz: 1\n", r"^f\.yaml:1: unknown key 'zzzzzz'\. Known here: backend, method, "),
    "a prefix before a misspelt key": (
        "adapter: {lora_rnak: 8}",
        r"unknown key 'lora_rnak' \(did you mean 'rank'\?\)\.$",
    ),
    "twice": ("seed: 1\nseed: 2\n", r"^f\.yaml:2: 'seed' is given twice\.$"),
    "no number": ("seed: many\n", r"^f\.yaml:1: 'seed' needs int, got 'many'\.$"),
    "fraction for a whole number": ("seed: 1.5\n", r"^f\.yaml:1: 'seed' needs int, got 1\.5\.$"),
    "truth for a number": ("\nseed: true\n", r"^f\.yaml:2: 'seed' needs int, got True\.$"),
    "number for a truth": ("train: {grad_checkpointing: 1}", r"'grad_checkpointing' needs bool, got 1\.$"),
    "below the range": ("adapter:\n  rank: 0", r"^f\.yaml:2: 'rank' must be between 1 and 1024; got 0\.$"),
    "above the range": ("adapter: {dropout: 1.5}", r"'dropout' must be between 0 and 0\.95; got 1\.5\.$"),
    "below the only bound": ("train: {reg: -0.1}", r"'reg' must be at least 0; got -0\.1\.$"),
    "not a number": ("train: {lr: .nan}", r"^f\.yaml:1: 'lr' is not a number\.$"),
    "no such choice": (
        "inference: route",
        r"one of routed, latest, merged; got 'route' \(did you mean 'routed'\?\)\.$",
    ),
    "scalar for a section": ("train: 3", r"^f\.yaml:1: expected a mapping of settings\.$"),
    "list for a section": ("train:\n- 3", r"^f\.yaml:2: expected a mapping of settings\.$"),
    "scalar for a list": ("stream: {tasks: x}", r"^f\.yaml:1: 'tasks' needs a list\.$"),
    "scalar for a mapping": ("base: {model_args: 3}", r"^f\.yaml:1: 'model_args' needs a mapping\.$"),
    "section left empty": ("seed: 1\ntrain:\n", r"^f\.yaml:2: 'train' needs a value\.$"),
    "malformed": ("seed: 1\ntrain: [\n", r"^f\.yaml:\d+: "),
    "python object": ("seed: !!python/object/apply:os.system [ls]", r"^f\.yaml:1: "),
    "alias without an anchor": ("seed: *x", r"^f\.yaml:1: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_strict_reader_names_file_line_and_key(name: str) -> None:
    text, line = REFUSED[name]
    with pytest.raises(ConfigError, match=line):
        parse_config(text, "f.yaml")


def test_values_are_read_without_loss() -> None:
    config = parse_config(
        "seed: 3\nbase:\n  model: 123\n  model_args: {img_size: 32, act: gelu, sizes: [1, 2]}\n"
        "train: {lr: 1e-3, reg: 1, precision: }\n",
        "f.yaml",
    )
    assert config.seed == 3
    assert config.base.model == "123"
    assert config.base.model_args == {"img_size": 32, "act": "gelu", "sizes": [1, 2]}
    assert config.train.lr == 0.001
    assert config.train.reg == 1.0 and isinstance(config.train.reg, float)
    assert config.train.precision is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_file_gives_nothing(text: str) -> None:
    assert parse_config(text, "f.yaml") == Config()


def test_stream_tasks_are_read() -> None:
    text = "stream:\n  tasks:\n    - {name: a, path: x}\n    - {name: b, classes: [u, v], epochs: 0}\n"
    tasks = parse_config(text, "f.yaml").stream.tasks
    assert tasks == (StreamTask(name="a", path="x"), StreamTask(name="b", classes=("u", "v"), epochs=0))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml not found\."):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(ConfigError, match=r"latin\.yaml cannot be read: "):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: "):
        load_config(tmp_path)


@settings(max_examples=400)
@given(
    st.text(max_size=80)
    | st.text(alphabet="seedtrainlr:{}[]&*!|>-? \n\t0'\"#%@`,", max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["seed", "train", "lr", "base", "stream", "tasks", "model_args"]), inner)
        ),
        max_leaves=8,
    ).map(yaml.safe_dump)
)
@example("seed: 1_0")
@example("a: &a [*a]")
@example("base: &a {model_args: *a}")
@example("&a : *a")
@example("? [a]\n: 1")
@example("seed: 2024-13-45")
@example("base: {model_args: {x: 2024-13-45}}")
@example("seed: !!int x")
@example("seed: \x00")
@example("[" * 1000)
@example("seed: 1\n---\nseed: 2\n")
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    try:
        parsed = parse_config(text, "f.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        assert parse_config(to_yaml(parsed, "x"), "g.yaml").train == parsed.train
        return
    assert message.startswith("f.yaml")
    assert "\n" not in message


# -- precedence -------------------------------------------------------------------------------------------


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            found |= _leaves(value, f"{prefix}{spec.name}.")
        else:
            found[prefix + spec.name] = value
    return found


def test_flag_over_file_over_backend_over_default() -> None:
    flags = Config(train=TrainConfig(epochs=1))
    written = Config(train=TrainConfig(epochs=2, lr=0.2))
    backend = Config(train=TrainConfig(epochs=3, lr=0.3, batch_size=33))
    train = resolve(flags, written, backend).train
    assert (train.epochs, train.lr, train.batch_size) == (1, 0.2, 33)
    assert train.reg == DEFAULTS.train.reg


def test_zero_and_false_are_given_values() -> None:
    flags = Config(budget=0, train=TrainConfig(reg=0.0, epochs=0, grad_checkpointing=False))
    written = Config(budget=3, train=TrainConfig(reg=0.5, epochs=9, grad_checkpointing=True))
    found = resolve(flags, written, Config())
    assert (found.budget, found.train.reg, found.train.epochs, found.train.grad_checkpointing) == (0, 0.0, 0, False)


def test_nothing_given_leaves_the_lower_level() -> None:
    assert overlay(Config(), DEFAULTS) == DEFAULTS
    assert resolve(Config(), Config(), Config()) == DEFAULTS


@pytest.mark.parametrize("policy", ["auto", "first", "always"])
def test_who_shares_adapters_trains_longer_unless_told(policy: str) -> None:
    branching = Config(tree=TreeConfig(branch=policy))
    backend = Config(train=TrainConfig(epochs=3, lr=5e-3, batch_size=64))
    for found in (resolve(branching, Config(), backend), resolve(Config(), branching, backend)):
        train = found.train
        assert (train.epochs, train.lr, train.batch_size, found.head.views) == (12, 1e-3, 32, 2)
        assert train.augment == "rand-m5-mstd0.5"
    told = resolve(Config(train=TrainConfig(epochs=2)), overlay(Config(head=HeadConfig(views=1)), branching), backend)
    assert (told.train.epochs, told.train.lr, told.head.views) == (2, 1e-3, 1)
    assert resolve(Config(tree=TreeConfig(branch="never")), branching, backend).train.epochs == 3


def test_mappings_are_joined_key_by_key() -> None:
    upper = BaseConfig(model_args={"img_size": 32})
    lower = BaseConfig(model="m", model_args={"img_size": 16, "depth": 2})
    joined = overlay(upper, lower)
    assert joined == BaseConfig(model="m", model_args={"img_size": 32, "depth": 2})
    assert lower.model_args == {"img_size": 16, "depth": 2}


@given(st.lists(st.tuples(st.none() | st.integers(0, 9), st.none() | st.floats(0, 1)), min_size=3, max_size=3))
def test_each_field_is_taken_from_the_first_level_that_gives_it(levels: list[tuple[int | None, float | None]]) -> None:
    configs = [Config(seed=seed, train=TrainConfig(lr=lr)) for seed, lr in levels]
    found = resolve(*configs)
    assert found.seed == next((seed for seed, _ in levels if seed is not None), DEFAULTS.seed)
    assert found.train.lr == next((lr for _, lr in levels if lr is not None), DEFAULTS.train.lr)


# -- flags, rendering, recipes ----------------------------------------------------------------------------


def test_flags_name_the_option_when_out_of_range() -> None:
    assert from_flags(seed=3, train__lr=0.1, adapter__rank=None) == Config(
        seed=3, train=TrainConfig(lr=0.1), adapter=AdapterConfig()
    )
    with pytest.raises(ConfigError, match=r"^--batch-size: 'batch_size' must be at least 1; got 0\.$"):
        from_flags(train__batch_size=0)
    with pytest.raises(
        ConfigError, match=r"^--search: 'search' is one of lcb, cold, flat, exhaustive, random; got 'lbc'"
    ):
        from_flags(tree__search="lbc")


def test_rendered_settings_read_back_the_same() -> None:
    config = dataclasses.replace(
        DEFAULTS,
        base=BaseConfig(model="a: b # c", weights="/tmp/ü 'x'.safetensors", model_args={"img_size": 32, "a": [1]}),
    )
    text = to_yaml(config, "one\ntwo")
    assert text.startswith("# one\n# two\n")
    read = parse_config(text, "f.yaml")
    given_values = {key: value for key, value in _leaves(config).items() if value not in (None, (), {})}
    assert {key: value for key, value in _leaves(read).items() if value not in (None, (), {})} == given_values
    assert to_dict(read)["base"]["model_args"] == {"img_size": 32, "a": [1]}


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_open_with_purpose_and_command(name: str) -> None:
    path = shipped_recipes()[name]
    heading = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(line.startswith("# Purpose: ") for line in heading)
    assert any(line.startswith("# Command: treelora ") for line in heading)
    config = load_config(path)
    assert config.stream.tasks or config.stream.split


def test_a_split_deals_every_class_once(tmp_path: Path) -> None:
    for index in range(11):
        (tmp_path / "train" / f"c{index:02d}").mkdir(parents=True)
    stream = parse_config("stream: {split: 3}", "f.yaml").stream
    tasks = stream_tasks(stream, tmp_path, 5, "f.yaml")
    dealt = [name for task in tasks for name in task.classes or ()]
    assert sorted(dealt) == [f"c{index:02d}" for index in range(11)]
    assert [len(task.classes or ()) for task in tasks] == [4, 4, 3]
    assert stream_tasks(stream, tmp_path, 5, "f.yaml") == tasks
    assert stream_tasks(stream, tmp_path, 6, "f.yaml") != tasks
    with pytest.raises(ConfigError, match=r"11 classes in .* do not make 6 tasks of two or more"):
        stream_tasks(dataclasses.replace(stream, split=6), tmp_path, 5, "f.yaml")
    with pytest.raises(ConfigError, match="lists no tasks under 'stream'"):
        stream_tasks(dataclasses.replace(stream, split=None), tmp_path, 5, "f.yaml")
