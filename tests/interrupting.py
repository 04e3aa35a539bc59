"""Interrupt a task at a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli, Result, check_error

from treelora_cli.learning.trainer import Trainer

OPTIONS = ["--epochs", "4", "--precision", "fp32", "--device", "cpu"]


def stop_after(cli: Cli, project: Path, data: Path, step: int, *options: str, of: int = 8) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_any_process", lambda self, _flag: self.step == step)
        done = cli("-C", project, "train-task", data, *options, *OPTIONS)
    line = (
        rf"Interrupted after step {step} of {of}; nothing was committed\. Continue with: treelora train-task --resume"
    )
    check_error(done, 130, line)
    return done
