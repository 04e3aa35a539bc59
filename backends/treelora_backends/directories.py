"""Directories and files that are given for a model and are none: what to give instead."""

from __future__ import annotations

from pathlib import Path

from treelora_cli.errors import ModelError

_LEVELS_BELOW = ("*/config.json", "*/*/config.json")
"""Where a model lies in a folder of models, and in the hub's cache (``snapshots/REVISION``)."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz", ".h5", ".msgpack")


def without_config(folder: Path) -> ModelError:
    """Return the error for a directory without ``config.json``; a model further down is named."""
    below = sorted(path.parent for pattern in _LEVELS_BELOW for path in folder.glob(pattern))
    if len(below) == 1:
        return ModelError(f"{folder} holds no config.json, {below[0]} does. Give that.")
    if below:
        names = ", ".join(str(path.relative_to(folder)) for path in below[:6])
        return ModelError(f"{folder} holds no config.json, but several models ({names}). Give one of them.")
    return ModelError(f"{folder} holds no config.json: no model that timm or transformers saved.")


def no_safetensors(what: str) -> ModelError:
    """Return the error for weights that would have to be unpickled."""
    return ModelError(f"{what}: only .safetensors weights are read, nothing is ever unpickled. Convert it first.")


def refuse_without_weights(folder: Path) -> None:
    """Raise ``ModelError`` when a directory holds no safetensors; pickles are not read in their place."""
    names = [path.name for path in sorted(folder.iterdir()) if path.is_file()]
    if any(name.endswith(".safetensors") for name in names):
        return
    pickled = next((name for name in names if name.endswith(_PICKLES)), None)
    if pickled is not None:
        raise no_safetensors(f"{folder} holds {pickled}")
    raise ModelError(f"{folder} holds no weights: no .safetensors file beside its config.json.")


def refuse_file(path: Path) -> None:
    """Raise ``ModelError`` for a file given as a model of images."""
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights alone: give the architecture, too: --model NAME --weights {path}")
    if path.suffix in _PICKLES:
        raise no_safetensors(str(path))
    raise ModelError(f"{path} is a file and no model. Give a directory with config.json, or a name and --weights FILE.")
