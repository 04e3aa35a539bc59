"""``treelora init``: make a project around a frozen base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import parse_pairs, session_of


def init(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory to make; absent or empty.")],
    backend: Annotated[str | None, typer.Option(help="Model family: vit or causal-lm.")] = None,
    method: Annotated[str | None, typer.Option(help="Method of every task, as installed; by default treelora.")] = None,
    model: Annotated[
        str | None, typer.Option(help="timm name, hub id, local directory or GGUF file; none: the embedded ViT.")
    ] = None,
    weights: options.Weights = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Argument of the architecture, such as img_size=32.")
    ] = None,
    preprocess: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="Override mean, std, interpolation, crop_pct or crop_mode.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Type the base is held in.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="auto, all-linear, last-quarter or module names, comma-separated.")
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Adapt only the last so many blocks; 0 for all.")] = None,
    tree_depth: Annotated[int | None, typer.Option(help="Greatest depth of the tree.")] = None,
    head_width: Annotated[int | None, typer.Option(help="Random features of the shared image head.")] = None,
    reg: options.Reg = None,
    warm_start: options.WarmStart = None,
    search: options.Search = None,
    branch: options.Branch = None,
    update: options.Update = None,
    epochs: options.Epochs = None,
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = None,
    inference: options.Inference = None,
    budget: options.Budget = None,
    seed: options.Seed = None,
    settings: options.Set = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe to take settings from: a file or a shipped name.")] = None,
    device: options.Device = None,
) -> None:
    """Make a project in DIR around a frozen base model; in a terminal, without options, it asks for the model.

    Example: treelora init birds --model vit_base_patch16_224.augreg_in21k
    """
    from treelora_cli.commands.asking import asked_base, asked_branch, asks
    from treelora_cli.config import from_flags
    from treelora_cli.config.by_name import add_set
    from treelora_cli.learning.opening import make_project
    from treelora_cli.learning.recipes import find_recipe
    from treelora_cli.project.project import check_new_directory

    session = session_of(context)
    if asks(context):
        check_new_directory(directory)
        backend, base_asked = asked_base()
        model, weights = base_asked.model, None if base_asked.weights is None else Path(base_asked.weights)
        branch = asked_branch() if backend == "vit" else None
    flags = from_flags(
        backend=backend,
        method=method,
        seed=seed,
        inference=inference,
        budget=budget,
        base__model=None if model is None else plain_model(model),
        base__weights=None if weights is None else str(weights),
        base__model_args=_typed(parse_pairs(model_arg, "--model-arg")),
        base__preprocess=_typed(parse_pairs(preprocess, "--preprocess")),
        base__dtype=dtype,
        adapter__rank=rank,
        adapter__alpha=alpha,
        adapter__dropout=dropout,
        adapter__targets=targets,
        adapter__blocks=blocks,
        tree__depth=tree_depth,
        tree__search=search,
        tree__branch=branch,
        train__reg=reg,
        train__warm_start=warm_start,
        train__update=update,
        train__epochs=epochs,
        train__lr=lr,
        train__batch_size=batch_size,
        head__width=head_width,
    )
    flags = add_set(flags, settings)
    path = None if recipe is None else find_recipe(recipe)
    text = None if path is None else path.read_text(encoding="utf-8")
    project = make_project(directory, flags, text, path.name if path else "", session.runtime(device))
    base = project.state.base
    document = {"project": str(project.root), "backend": project.state.backend, "base": base}
    model_name = base["resolved"]["model"]
    session.output.result(
        document,
        f"Made {project.root}: {project.state.backend} on {model_name}, {len(base['layers'])} adapted layers.",
        f"Next: treelora -C {directory} train-task DATA",
    )


def plain_model(model: str) -> str:
    """Return a model's name or path without what others put before a hub id, a leading ``~`` written out."""
    import os

    if model.startswith("~"):
        return os.path.expanduser(model)
    for prefix in ("hf-hub:", "hf_hub:", "local-dir:", "https://huggingface.co/"):
        if model.startswith(prefix):
            return model.removeprefix(prefix).rstrip("/")
    return model


def _typed(pairs: dict[str, str]) -> dict[str, Any]:
    """Read numbers, booleans and lists as YAML does."""
    import yaml

    from treelora_cli.errors import UsageError

    typed = {}
    for key, value in pairs.items():
        try:
            typed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{key}={value}: not a number, word or list.") from error
    return typed
