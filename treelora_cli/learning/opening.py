"""Make a project, and load the base that a project stands on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from treelora_cli.backend.contract import Backend, Base
from treelora_cli.backend.registry import backend_for, check_settings, defaults_on, load_backend, require
from treelora_cli.backend.runtime import Runtime
from treelora_cli.config import BaseConfig, Config, overlay, parse_config, resolve, to_yaml
from treelora_cli.config.by_name import given_settings
from treelora_cli.config.fields import check_own, fixed_own
from treelora_cli.errors import ConfigError, ModelError, ProjectError, UsageError
from treelora_cli.locations import along
from treelora_cli.methods.catalogue import project_method
from treelora_cli.project import Project
from treelora_cli.project.project import check_new_directory

_RUNS_CODE = {"trust_remote_code", "code_revision", "auto_map", "use_kernels", "allow_all_kernels", "kernel_config"}
"""Arguments that make transformers run a repository's own code, or kernels that it fetches."""
_HEADING = "Settings of this treelora project. Flags override them; 'treelora status' shows the project."


def make_project(root: Path, flags: Config, recipe_text: str | None, source: str, runtime: Runtime) -> Project:
    """Make a project around a frozen base; nothing is written unless the base loads.

    Args:
        root: Absent or empty directory.
        flags: What the command line gave.
        recipe_text: A recipe to start from; kept verbatim when no flag changes it.
        source: Name of the recipe file, for messages.
        runtime: Device and reporter.

    Raises:
        TreeLoraError: Bad settings, a model that cannot be loaded, or a directory in use.
    """
    check_new_directory(root)
    recipe = parse_config(recipe_text, source) if recipe_text is not None else Config()
    given = overlay(flags, recipe)
    backend = load_backend(given.backend or backend_for(given.base.model))
    config = resolve(flags, recipe, backend.defaults())
    _check_method(config)
    resolved = held_in(backend, backend.resolve_base(config.base, offline=runtime.offline), runtime)
    config = dataclasses.replace(config, backend=backend.name, base=resolved)
    base = load_base(backend, config, runtime)
    settled = resolve(flags, recipe, defaults_on(backend, base.facts))
    config = dataclasses.replace(settled, backend=backend.name, base=resolved)
    record = {
        "fingerprint": base.fingerprint,
        "layers": list(base.layers),
        "facts": base.facts,
        "resolved": dataclasses.asdict(resolved),
        "given": dataclasses.asdict(recipe.base if flags == Config() else resolved),
        "kept_in": str(root.absolute()),
    }
    text = recipe_text if recipe_text is not None and flags == Config() else to_yaml(config, _HEADING)
    return Project.create(root, text, backend=backend.name, base=record, fixed=fixed_settings(config, backend))


def held_in(backend: Backend, base: BaseConfig, runtime: Runtime) -> BaseConfig:
    """Return a new project's base with the type that it is held in: the user's choice, or the backend's on a GPU."""
    dtype: str | None = getattr(backend, "gpu_dtype", None)
    if base.dtype is not None or dtype is None or runtime.device.type != "cuda":
        return base
    return dataclasses.replace(base, dtype=dtype)


def project_config(project: Project, flags: Config, device: str | None = None) -> Config:
    """Return the settings in force: flags over ``treelora.yaml`` over what the project was made with.

    Args:
        project: Whose settings.
        flags: What the command line says.
        device: Kind of device, whose defaults of batch and rate hold where neither is said; they go together.
    """
    _refuse_fixed(project, flags)
    written = project.config()
    backend = load_backend(project.state.backend)
    recorded = project.state.base
    said = overlay(flags, written).train
    open_to_device = said.batch_size is None and said.lr is None and said.accumulate is None
    facts = {**recorded["facts"], **({"device": device} if open_to_device else {})}
    defaults = defaults_on(backend, facts)
    config = resolve(flags, overlay(written, _fixed_config(project.fixed)), defaults)
    unchanged = dataclasses.asdict(written.base) == recorded["given"]
    base = BaseConfig(**recorded["resolved"]) if unchanged else config.base
    if config.method_settings:
        _check_method(config)
    return dataclasses.replace(config, backend=project.state.backend, base=_followed(project, base))


def _followed(project: Project, base: BaseConfig) -> BaseConfig:
    """Return a base whose local files moved together with the project; its weights are compared once it is loaded."""
    before = project.state.base.get("kept_in")
    if not isinstance(before, str):
        return base
    now = project.root.absolute()
    return dataclasses.replace(
        base,
        model=base.model and along(base.model, before, now),
        weights=base.weights and along(base.weights, before, now),
    )


def _check_method(config: Config) -> None:
    """Raise ``UsageError`` when no such method runs in a project, or it has no such settings of its own."""
    entry = project_method(str(config.method))
    check_own(entry.own_settings, config.method_settings, "method_settings", str(config.method))


def _refuse_fixed(project: Project, flags: Config) -> None:
    """Raise ``UsageError`` when the command line gives what a project was made with, and gives it otherwise."""
    made_with = {"backend": project.state.backend, **project.fixed}
    for name, value in given_settings(flags).items():
        if name in made_with and value != made_with[name]:
            raise UsageError(
                f"'{name}' is {made_with[name]} since this project was made, and cannot become {value}."
                " Make a new project: treelora init DIR."
            )


def open_base(project: Project, config: Config, runtime: Runtime, *, exact: bool = False) -> Base:
    """Load the project's base, and compute from now on as the project does.

    Args:
        project: Whose base.
        config: Settings in force.
        runtime: Device; its arithmetic is set.
        exact: See ``compute_as_recorded``.

    Raises:
        ModelError: It cannot be loaded.
        ProjectError: It is not the one the project was made with.
    """
    backend = load_backend(project.state.backend)
    _check_place(project, config.base)
    resolved = backend.resolve_base(config.base, offline=runtime.offline)
    base = load_base(backend, dataclasses.replace(config, base=resolved), runtime)
    check_base(project, base)
    compute_as_recorded(project, runtime, exact=exact)
    return base


def _check_place(project: Project, base: BaseConfig) -> None:
    """Raise ``ModelError`` when a local file or directory of the base is not where it was."""
    for name, value in (("model", base.model), ("weights", base.weights)):
        if value is not None and os.path.isabs(value) and not os.path.exists(value):
            raise ModelError(
                f"{value}, this project's base, not found. Put it back, or write where it lies now into"
                f" {project.root / 'treelora.yaml'} (base: {name})."
            )


def compute_as_recorded(project: Project, runtime: Runtime, *, exact: bool = False) -> None:
    """Compute as the project was taught on this kind of device: one project, one arithmetic.

    Args:
        project: Whose arithmetic.
        runtime: Its arithmetic is set.
        exact: In float32 whatever was recorded, as comparing an export with stock code needs it.
    """
    record = None if exact else recorded_arithmetic(project, runtime.device.type)
    runtime.compute_as(record or {"precision": "fp32"})


def recorded_arithmetic(project: Project, device: str, having: str = "precision") -> dict[str, Any] | None:
    """Return the record of the last task learned on this kind of device that has a figure; ``None`` where none has."""
    records = (project.task_record(task.name) for task in reversed(project.state.tasks))
    return next((record for record in records if record["device"] == device and having in record), None)


def load_base(backend: Backend, config: Config, runtime: Runtime) -> Base:
    """Load a base; neither its repository's code nor a pickle is run, also when a recipe or a project asks for it.

    Raises:
        ConfigError: A model argument would run code.
        UsageError: The base is to be divided between processes, and the backend cannot.
        ModelError: The weights would be unpickled, are missing, or do not fit.
    """
    check_own(getattr(backend, "own_settings", None), config.backend_settings, "backend_settings", backend.name)
    check_settings(backend, config)
    if runtime.shards is not None and not getattr(backend, "divides_base", False):
        raise UsageError(
            f"accelerate's configuration asks for FSDP; bases of backend '{backend.name}' are not divided between"
            " processes. Choose multi-GPU without it."
        )
    refused = sorted(_RUNS_CODE & set(config.base.model_args))
    if refused:
        raise ConfigError(f"model argument '{refused[0]}' is not allowed: code that comes with a model is never run.")
    with _nothing_unpickled(str(config.base.model)):
        base = backend.load(config, runtime)
    require(base, Base, backend.name, () if getattr(backend, "contender_heads", ()) else ("contender",))
    return base


@contextmanager
def _nothing_unpickled(model: str) -> Iterator[None]:
    """Refuse weights that a library would unpickle, which both timm and transformers do where no safetensors are.

    ``torch.load`` with ``weights_only`` is a narrower gate, and has been passed before (CVE-2025-32434).
    """
    import torch

    original, met = torch.load, False

    def refuse(*_arguments: Any, **_keywords: Any) -> None:
        nonlocal met
        met = True
        raise ModelError("pickled weights")

    torch.load = refuse
    try:
        yield
    except Exception as error:
        if met:  # the libraries wrap what they catch
            raise ModelError(
                f"{model}: only .safetensors weights are read, nothing is ever unpickled. Convert them first."
            ) from error
        raise
    finally:
        torch.load = original


def _fixed_config(fixed: dict[str, Any]) -> Config:
    """Turn ``state.fixed`` back into a configuration."""
    config = Config()
    for key, value in fixed.items():
        section, _, name = key.rpartition(".")
        if section:
            part: Any = getattr(config, section)
            part = {**part, name: value} if isinstance(part, dict) else dataclasses.replace(part, **{name: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def fixed_settings(config: Config, backend: Backend) -> dict[str, Any]:
    """Return the settings that every stored adapter and statistic depends on."""
    return {
        "method": config.method,
        "seed": config.seed,
        "adapter.rank": config.adapter.rank,
        "adapter.alpha": config.adapter.alpha,
        "adapter.targets": config.adapter.targets,
        "adapter.blocks": config.adapter.blocks,
        "tree.signature_width": config.tree.signature_width,
        "tree.branch": config.tree.branch,
        "tree.branch_adapter": config.tree.branch_adapter,
        "head.width": config.head.width,
        "head.blocks": config.head.blocks,
        "head.merged": config.head.merged,
        **fixed_own(getattr(backend, "own_settings", None), config.backend_settings, "backend_settings"),
        **fixed_own(project_method(str(config.method)).own_settings, config.method_settings, "method_settings"),
    }


def check_base(project: Project, base: Base) -> None:
    """Raise ``ProjectError`` when ``base`` is not the model the project was made with."""
    if base.fingerprint != project.state.base["fingerprint"]:
        raise ProjectError(
            f"The base model is not the one this project was made with: weights hash {base.fingerprint[:12]},"
            f" expected {project.state.base['fingerprint'][:12]}. Restore the original model."
        )
    if list(base.layers) != project.state.base["layers"]:
        raise ProjectError(
            "The base model's adapted layers differ from this project's. Restore 'targets' and 'blocks'."
        )
