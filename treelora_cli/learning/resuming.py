"""What an interrupted task continues from: parameters, optimizer and method, and that nothing else has changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from treelora_cli.errors import DamagedError, ProjectError

if TYPE_CHECKING:
    from treelora_cli.backend.contract import DataRequest
    from treelora_cli.learning.trainer import Trainer
    from treelora_cli.methods.base import Method
    from treelora_cli.project.checkpoint import Checkpoint

_STATE = "bandit"
"""Names the method's state in a checkpoint; the first methods kept their search there and nothing else."""


def save_step(
    checkpoint: Checkpoint,
    identity: Mapping[str, Any],
    request: DataRequest,
    step: int,
    tensors: dict[str, torch.Tensor],
    method: Method,
) -> None:
    """Replace the checkpoint.

    Args:
        checkpoint: The project's.
        identity: What must be the same when the task is continued.
        request: Where the task's data lies.
        step: Steps taken.
        tensors: The trainer's.
        method: Its state is saved too.
    """
    arrays, facts = method.state()
    own = {f"{_STATE}.{key}": torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}
    checkpoint.save({**identity, "request": request.to_json(), "step": step, _STATE: facts}, {**tensors, **own})


def restore(checkpoint: Checkpoint, identity: Mapping[str, Any], trainer: Trainer, method: Method) -> None:
    """Put trainer and method where the interrupted task stopped.

    Raises:
        ProjectError: There is none, or it is another task, or was trained with other settings.
        DamagedError: What was saved does not fit.
    """
    facts = checkpoint.facts()
    if facts is None:
        raise ProjectError("No interrupted task to resume. Run: treelora train-task DATA")
    for key, value in json.loads(json.dumps(identity)).items():
        if facts.get(key) != value:
            raise ProjectError(
                f"The interrupted task cannot be resumed: its {key} has changed. Train it anew, without --resume."
            )
    saved = checkpoint.tensors(facts)
    prefix = f"{_STATE}."
    arrays = {key[len(prefix) :]: value.numpy() for key, value in saved.items() if key.startswith(prefix)}
    try:
        method.load_state(arrays, facts[_STATE])
        trainer.load(int(facts["step"]), saved)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise DamagedError(f"{facts['file']} does not fit this task. Train it anew, without --resume.") from error
