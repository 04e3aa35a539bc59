"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N, mps or auto (the best there is).")]
Inference = Annotated[str | None, typer.Option(help="routed, latest or merged.")]
Threshold = Annotated[
    str | None,
    typer.Option(
        metavar="P|auto[:PERCENT]",
        help="Say 'unknown' below this probability, or where 95 of 100 own held-out examples are more familiar (auto).",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Local .safetensors for a model given by name.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the task's data.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")]
BatchSize = Annotated[int | None, typer.Option(help="Examples per step, over all processes.")]
Reg = Annotated[float | None, typer.Option(help="Lambda of eq. 3: pull towards the similar task; 0 for none.")]
WarmStart = Annotated[str | None, typer.Option(help="Where a new adapter starts: nearest, better, latest or none.")]
Search = Annotated[str | None, typer.Option(help="How similar tasks are found: lcb, cold, flat, exhaustive or random.")]
Branch = Annotated[str | None, typer.Option(help="Which tasks share an adapter: auto, first, always or never.")]
Update = Annotated[str | None, typer.Option(help="Eq. 3 as a subgradient term or a proximal step: penalty or prox.")]
Precision = Annotated[str | None, typer.Option(help="auto (measured), fp32 or bf16.")]
Track = Annotated[
    str | None, typer.Option(help="Send each step's figures and the scores to tensorboard, wandb or mlflow.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]
Budget = Annotated[int | None, typer.Option(help="Most adapters kept; beyond, the nearest are merged. 0: no limit.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of treelora.yaml, such as train.lr=0.01."),
]
Val = Annotated[Path | None, typer.Option(help="Held-out data, when it lies elsewhere.")]
Mapping = Annotated[
    list[str] | None,
    typer.Option(
        "--map", metavar="SRC=DST", help="Read column SRC as DST; SRC is a number where no line names columns."
    ),
]
ScoreEnds = Annotated[
    bool,
    typer.Option(
        "--score-ends",
        help="Score a task when it is learned, and all in the end alone: the same OP and forgetting in less time.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Most held-out examples per class or task.")]
MaxForgetting = Annotated[
    float | None, typer.Option(help="Commit only if forgetting, in points, is not above this; else exit with 7.")
]
FailUnder = Annotated[float | None, typer.Option(help="Commit only if OP, in percent, is not below this.")]
TaskUnder = Annotated[float | None, typer.Option(help="Commit only if no task's score, in percent, is below this.")]
