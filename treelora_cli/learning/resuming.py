"""What an interrupted task continues from: parameters, optimizer and method, and that nothing else has changed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from treelora_cli.config import DEFAULTS, Config, TrainConfig, TreeConfig, overlay, to_dict
from treelora_cli.errors import DamagedError, ProjectError, UsageError

if TYPE_CHECKING:
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.learning.trainer import Trainer
    from treelora_cli.methods.base import Method
    from treelora_cli.project.unfinished import Checkpoint

S = TypeVar("S")

_FLAGS = {"data_format": "format", "columns": "map"}
"""Flags whose names differ from those of ``DataRequest``."""
WITH_FLAG = frozenset(
    ["epochs", "lr", "batch_size", "max_length", "learn", "reg", "warm_start", "search", "update", "budget"]
) | {"precision", "grad_checkpointing"}
"""Settings of training that ``train-task`` has a flag for; the others are given by ``--set``."""
_STATE = "bandit"
"""Names the method's state in a checkpoint; the first methods kept their search there and nothing else."""


def save_step(
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    config: Config,
    request: DataRequest,
    step: int,
    tensors: dict[str, torch.Tensor],
    method: Method,
) -> None:
    """Replace the checkpoint.

    Args:
        checkpoint: The project's.
        identity: What must be the same when the task is continued.
        config: The settings it was begun with, which ``--resume`` takes.
        request: Where the task's data lies.
        step: Steps taken.
        tensors: The trainer's.
        method: Its state is saved too.
    """
    arrays, facts = method.state()
    own = {f"{_STATE}.{key}": torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}
    chosen = to_dict(config)
    begun = {
        **identity,
        "settings": {"train": chosen["train"], "tree": chosen["tree"], "budget": chosen["budget"]},
        "request": request.to_json(),
        "step": step,
        _STATE: facts,
    }
    checkpoint.save(begun, {**tensors, **own})


def begun_with(facts: Mapping[str, Any], flags: Config) -> Config:
    """Return flags under which an interrupted task goes on as it was begun.

    Args:
        facts: The checkpoint's; older ones keep the settings of training only.
        flags: What is given now; settings that training does not depend on may differ.

    Raises:
        ProjectError: A flag differs from what the task was begun with; both values are named.
        DamagedError: The settings are not what this program writes.
    """
    saved = facts.get("settings", {"train": facts.get("train")})
    try:
        train = _known(TrainConfig(), {**saved["train"], "precision": facts["precision"]})
        tree = _known(TreeConfig(), saved.get("tree", {}))
        kept = Config(train=train, tree=tree, budget=saved.get("budget"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(".treelora/run/checkpoint.json is malformed. Train the task anew.") from error
    for section, free in (("train", ("keep_mib",)), ("tree", ())):
        given, then = getattr(flags, section), getattr(kept, section)
        for spec in dataclasses.fields(given):
            new, old = getattr(given, spec.name), getattr(then, spec.name)
            if new is not None and new != old and spec.name not in free and (spec.name, new) != ("precision", "auto"):
                raise ProjectError(_differs(f"{section}.{spec.name}", new, old))
    if flags.budget is not None and flags.budget != kept.budget:
        raise ProjectError(_differs("budget", flags.budget, kept.budget))
    measured = dataclasses.replace(kept.train, precision=saved["train"].get("precision") or "auto")
    kept = dataclasses.replace(kept, train=measured)
    return overlay(dataclasses.replace(flags, train=TrainConfig(keep_mib=flags.train.keep_mib)), kept)


def _known(empty: S, values: Mapping[str, Any]) -> S:
    """Return ``empty`` with those of the values whose names it has; lists are tuples in settings."""
    names = {spec.name for spec in dataclasses.fields(empty)}  # type: ignore[arg-type]
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in names}
    return dataclasses.replace(empty, **found)  # type: ignore[type-var]


def _differs(setting: str, new: object, old: object) -> str:
    """Say which flag, or ``--set`` of a setting that has none, is not what the task was begun with."""
    name = setting.rpartition(".")[2]
    flag, equals = (f"--{name.replace('_', '-')}", " ") if name in WITH_FLAG else (f"--set {setting}", "=")
    begun = f"without {flag}" if old is None else f"with {flag}{equals}{old}, not {new}"
    return f"The interrupted task was begun {begun}. Leave {flag} out, or train it anew: train-task DATA --abandon."


def check_request(request: DataRequest, given: Mapping[str, Any]) -> None:
    """Raise ``UsageError`` when something given about the data differs from what the interrupted task was begun with.

    Args:
        request: The interrupted task's.
        given: Fields of ``DataRequest`` as the user gives them now; empty ones are not given.
    """
    for key, value in given.items():
        old = getattr(request, key)
        if value not in (None, False, (), {}) and value != old:
            flag = f"--{_FLAGS.get(key, key).replace('_', '-')}"
            begun = f"with {flag} {old}, not {value}" if old not in (None, False, (), {}) else f"without {flag}"
            raise UsageError(f"The interrupted task was begun {begun}. Leave it out.")


def restore(checkpoint: Checkpoint, identity: Mapping[str, Any], trainer: Trainer, method: Method) -> None:
    """Put trainer and method where the interrupted task stopped.

    Raises:
        ProjectError: There is none, or it is another task, or was trained with other settings.
        DamagedError: What was saved does not fit.
    """
    facts = checkpoint.facts()
    if facts is None:
        raise ProjectError("No interrupted task to resume. Run: treelora train-task DATA")
    defaults = to_dict(DEFAULTS)["train"]
    for key, value in json.loads(json.dumps(identity)).items():
        found = facts.get(key)
        if key == "train" and isinstance(found, dict):  # begun before a setting was there: without it
            found = {**{name: defaults[name] for name in value}, **found}
        if found != value:
            raise ProjectError(
                f"The interrupted task cannot be resumed: its {key} has changed."
                " Train it anew: train-task DATA --abandon."
            )
    saved = checkpoint.tensors(facts)
    prefix = f"{_STATE}."
    arrays = {key[len(prefix) :]: value.numpy() for key, value in saved.items() if key.startswith(prefix)}
    try:
        method.load_state(arrays, facts[_STATE])
        trainer.load(int(facts["step"]), saved)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DamagedError(
            f"{facts['file']} does not fit this task. Train it anew: train-task DATA --abandon."
        ) from error
