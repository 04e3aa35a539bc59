"""Find a vision transformer, build it, fill it with its weights, and choose the layers to adapt."""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from treelora_backends.directories import no_safetensors, refuse_file, refuse_without_weights
from treelora_backends.own_code import refuse_own_code, refuse_pointers
from treelora_cli.backend.fingerprint import all_finite, whole_numbers
from treelora_cli.config import BaseConfig, Config
from treelora_cli.errors import ModelError, UsageError, first_line
from treelora_cli.locations import lasting

_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".npz", ".h5", ".json", ".zip", ".gz")
"""Endings of files; ``timm/vit_base_patch16_224.augreg_in21k`` is a hub id."""
EMBEDDED = Path(__file__).parents[1] / "embedded" / "vit_tiny_cifar"
"""The model used when none is named."""


def recorded_model_args(base: BaseConfig) -> dict[str, Any]:
    """Return the architecture arguments that a local model directory brings along."""
    folder = EMBEDDED if base.model == "embedded" else Path(str(base.model))
    if not folder.is_dir():
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return dict(config.get("model_args") or {})


def existing_weights(path: Path) -> Path:
    """Return the absolute path of a weights file, or raise ``ModelError``: absent, or no safetensors."""
    if not path.is_file():
        raise ModelError(f"{path} not found. Pass --weights FILE.safetensors.")
    if path.suffix != ".safetensors":
        raise no_safetensors(str(path))
    return lasting(path)


def files_of(base: BaseConfig) -> list[Path]:
    """Return the local files that decide a resolved model's weights; none for weights that timm fetches."""
    folder = EMBEDDED if base.model == "embedded" else Path(str(base.model))
    own = sorted(one for one in folder.iterdir() if one.suffix in (".safetensors", ".json")) if folder.is_dir() else []
    return own if base.weights is None else [*own, Path(base.weights)]


def check_model_name(model: str, weights: str | None, offline: bool) -> None:
    """Refuse a name that neither timm nor, when online, the hub can know."""
    import timm

    if Path(model).is_file():
        refuse_file(Path(model))
    if "://" in model:
        raise ModelError(f"{model} is an address; give a hub id, or download it and give the directory.")
    if "/" in model:
        if Path(model).suffix in _FILES or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelError(f"{model} not found.")
        if offline and not _is_cached(model):
            raise ModelError(f"{model} is not cached and --offline is set. Pass --model PATH.")
        return
    known = timm.list_models(module=["vision_transformer", "deit", "eva", "beit", "vision_transformer_relpos"])
    if model.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(model, known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ModelError(
            f"Unknown timm model '{model}'.{hint} List them: python -c 'import timm; print(timm.list_models())'"
        )
    if weights is None and offline and not _is_cached(f"timm/{model}"):
        raise ModelError(f"{model} is not cached and --offline is set. Pass --weights FILE.safetensors.")


def _is_cached(hub_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(hub_id, name) for name in ("model.safetensors", "config.json")]
    except HFValidationError:
        return False
    return any(isinstance(path, str) for path in found)


def create_vit(base: BaseConfig, *, offline: bool) -> nn.Module:
    """Build the model without classifier and fill it with its weights.

    Raises:
        ModelError: Unknown architecture arguments, or weights that are absent or do not fit.
    """
    import timm

    name = _timm_name(base)
    try:
        vit = timm.create_model(name, pretrained=base.weights is None, num_classes=0, **base.model_args)
    except (TypeError, AssertionError, KeyError) as error:
        raise ModelError(f"{base.model}: --model-arg does not fit this architecture ({error}).") from error
    except RuntimeError as error:
        if str(error).startswith("Unknown model"):
            raise ModelError(f"{base.model} cannot be loaded by timm ({first_line(error)}).") from error
        raise ModelError(_misfit(str(base.model), error)) from error
    except Exception as error:  # the hub client raises many kinds when a download fails
        if name.startswith("local-dir:"):
            raise ModelError(f"{base.model} cannot be loaded by timm ({first_line(error)}).") from error
        reason = "is not cached and --offline is set" if offline else f"cannot be fetched ({type(error).__name__})"
        raise ModelError(f"{base.model} {reason}. Pass --model PATH or --weights FILE.") from error
    if not isinstance(getattr(vit, "blocks", None), nn.Sequential | nn.ModuleList):
        raise ModelError(f"{base.model} is not a vision transformer: it has no list of blocks.")
    if not hasattr(vit, "patch_embed") or not hasattr(vit, "norm"):
        raise ModelError(f"{base.model} is not a plain vision transformer that can be split at a block.")
    if base.weights is not None:
        _load_weights(vit, Path(base.weights))
    if not all_finite(vit):
        source = base.model if base.weights is None else Path(base.weights).name
        raise ModelError(f"{source} holds weights that are not finite.")
    return vit


def _timm_name(base: BaseConfig) -> str:
    """Return the model by the name under which timm finds its files."""
    name = str(base.model)
    if name == "embedded":
        return f"local-dir:{EMBEDDED}"
    if Path(name).is_dir():
        _refuse_foreign(Path(name))
        if base.weights is None:
            refuse_without_weights(Path(name))
        return f"local-dir:{name}"
    return f"hf-hub:{name}" if "/" in name else name


def _refuse_foreign(folder: Path) -> None:
    """Raise ``ModelError`` for a directory that timm did not save: what it is, and what it lacks."""
    refuse_own_code(str(folder), offline=True)
    refuse_pointers(str(folder))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'config.json'} is no JSON ({first_line(error)}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} is not a model's configuration but a {type(config).__name__}.")
    if isinstance(config.get("architecture"), str):
        return
    if "model_type" in config:
        kind = ", ".join(map(str, config.get("architectures") or ())) or str(config["model_type"])
        if kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError(f"{folder} is {kind} of transformers, a language model: pass --backend causal-lm")
        raise ModelError(
            f"{folder} is {kind} of transformers: neither a causal language model nor a vision transformer of timm."
        )
    raise ModelError(f"{folder / 'config.json'} names no 'architecture' of timm, and no 'model_type' of transformers.")


def _load_weights(vit: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error}).") from error
    # timm's own conversion for this architecture, which also resamples position embeddings to another image size
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        stored = convert(stored, vit)
    own = vit.state_dict()
    wrong = next((key for key in whole_numbers(path) if key in own and own[key].is_floating_point()), None)
    if wrong is not None:
        raise ModelError(f"{path}: '{wrong}' holds whole numbers, and the model has fractions there.")
    stored = {key: value for key, value in stored.items() if not key.startswith(("head.", "head_dist."))}
    for key, value in stored.items():
        if key in own and own[key].shape != value.shape:
            raise ModelError(
                f"{path.name} does not fit: '{key}' is {tuple(value.shape)}, the architecture has"
                f" {tuple(own[key].shape)}. Check --model and --model-arg."
            )
    odd = sorted(set(own).symmetric_difference(stored))
    if odd:
        side = "lacks" if odd[0] in own else "has an unexpected"
        raise ModelError(f"{path.name} does not fit: it {side} '{odd[0]}'. Check --model and --model-arg.")
    vit.load_state_dict(stored)


def _misfit(model: str, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = lines[1] if len(lines) > 1 else lines[0]
    return f"{model}: weights do not fit the architecture ({detail[:160]}). Check --model-arg."


_EVERY = "every"
"""Targets of a branch's adapter: all linear layers that an adapter acts on."""


def choose_layers(vit: Any, config: Config) -> tuple[str, ...]:
    """Return the modules to adapt, in network order: of a branch all linear layers, unless told otherwise."""
    count = len(vit.blocks)
    branches = config.tree.branch != "never"
    fewest = count if branches else -(-count // 6)
    wanted = fewest if config.adapter.blocks is None else config.adapter.blocks or count
    if wanted > count:
        raise UsageError(f"--blocks {wanted}: {config.base.model} has {count} blocks.")
    targets = str(config.adapter.targets)
    if targets == "auto" and branches:
        targets = _EVERY
    chosen = []
    for index in range(count - wanted, count):
        chosen += [f"blocks.{index}.{name}" for name in _block_targets(vit.blocks[index], targets)]
    if not chosen:
        raise UsageError(f"--targets {config.adapter.targets}: no such linear layer in {config.base.model}.")
    return tuple(chosen)


def _block_targets(block: nn.Module, targets: str) -> list[str]:
    linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        return linear
    if targets not in ("auto", _EVERY):
        wanted = [target.strip() for target in targets.split(",")]
        return [name for name in linear if any(name == w or name.endswith(f".{w}") for w in wanted)]
    reads_weight_only = getattr(getattr(block, "attn", None), "q_bias", None) is not None
    # such attention multiplies by qkv.weight itself and would pass an adapter by
    usable = [name for name in linear if not (reads_weight_only and name.endswith("qkv"))]
    if targets == _EVERY:
        return usable
    return [name for name in usable if name.split(".")[-1] in ("qkv", "q_proj", "k_proj", "v_proj", "proj")]
