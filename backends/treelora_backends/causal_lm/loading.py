"""Find and load a causal language model: hub id, local directory or GGUF file."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from treelora_backends.causal_lm.network.layers import blocks_of
from treelora_backends.directories import without_config
from treelora_backends.own_code import refuse_kernels, refuse_own_code, refuse_pointers
from treelora_cli.backend.fingerprint import all_finite, whole_numbers
from treelora_cli.config import LAST_QUARTER, AdapterConfig, BaseConfig
from treelora_cli.errors import ModelError, UsageError
from treelora_cli.locations import lasting

_USUAL_TARGETS = (("q_proj", "v_proj"), ("qkv_proj",), ("query_key_value",), ("c_attn",), ("Wqkv",), ("qkv",))
"""Names of attention inputs, tried in order where PEFT does not know a family."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: Directory or hub id for ``from_pretrained``.
        gguf: Name of a GGUF file in it.
    """

    name: str
    gguf: str | None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def resolve(base: BaseConfig, *, offline: bool) -> BaseConfig:
    """Check the choice of model; an existing path is always local.

    Raises:
        UsageError: No model, or options of another backend.
        ModelError: Not found, not a model, or not available offline.
    """
    if base.model is None:
        raise UsageError("The causal-lm backend needs a model. Pass --model ID, DIRECTORY or FILE.gguf.")
    if base.weights is not None or base.preprocess:
        raise UsageError("--weights and --preprocess are for images; a language model is named by --model alone.")
    path = Path(base.model)
    if path.exists():
        return dataclasses.replace(base, model=str(_local(path)))
    looks_local = path.suffix in (".gguf", ".safetensors") or base.model.startswith((".", "/", "~"))
    if looks_local or base.model.count("/") > 1:
        raise ModelError(f"{base.model} not found. Pass --model ID, DIRECTORY or FILE.gguf.")
    if offline and _cached_config(base.model) is None:
        raise ModelError(f"{base.model} is not cached and --offline is set. Pass --model PATH.")
    return base


def _local(path: Path) -> Path:
    if path.is_dir():
        _refuse_adapter(path)
        if (path / "config.json").is_file():
            return lasting(path)
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise without_config(path)
        if len(files) > 1:
            raise ModelError(f"{path} holds several GGUF files; name one of them.")
        path = files[0]
    if path.suffix != ".gguf":
        raise ModelError(f"{path}: not a model. Pass a directory with config.json, or a .gguf file.")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path.name} needs the gguf package. Run: pip install 'treelora[gguf]'")
    return lasting(path)


def _refuse_adapter(folder: Path) -> None:
    """Raise ``ModelError`` for a directory of an adapter: transformers would load the base that it names instead."""
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    try:
        base = json.loads(config.read_text(encoding="utf-8-sig")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        base = None
    named = f" ({base})" if isinstance(base, str) and base else ""
    raise ModelError(f"{folder} holds an adapter. Give its base model{named}, or merge both first.")


def is_language_model(model: str) -> bool:
    """Return whether a path or cached hub id is a causal language model, by its GGUF file or ``config.json``."""
    path = Path(model)
    if path.suffix == ".gguf":
        return path.is_file()
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            return any(path.glob("*.gguf")) or (path / "adapter_config.json").is_file()
    elif model.count("/") == 1 and not path.exists():
        cached = _cached_config(model)
        if cached is None:
            return False
        config = cached
    else:
        return False
    try:
        written = json.loads(config.read_text(encoding="utf-8-sig"))
        declared = [str(name) for name in written.get("architectures") or ()]
        family = written.get("model_type")
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return False
    if not declared and isinstance(family, str):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return any("CausalLM" in name or name.endswith("LMHeadModel") for name in declared)


def _cached_config(hub_id: str) -> Path | None:
    """Return the cached configuration of a repository; ``None`` for one that is not here, or no id of one."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def source_of(model: str) -> Source:
    """Split a resolved model name."""
    path = Path(model)
    return Source(str(path.parent), path.name) if path.suffix == ".gguf" else Source(model, None)


def files_of(model: str) -> list[Path]:
    """Return the local files that decide a resolved model's weights; none for one that is not here."""
    source = source_of(model)
    if source.gguf:
        return [Path(model)]
    folder = Path(source.name)
    if not folder.is_dir():
        cached = _cached_config(model)
        if cached is None:
            return []
        folder = cached.parent
    return sorted(one for one in folder.iterdir() if one.suffix in (".safetensors", ".json"))


# -- loading --------------------------------------------------------------------------------------


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Parse a GGUF file once; transformers does so for configuration, tokenizer and weights, seconds each time.

    The table of its tensors' names is made once, too, where transformers makes it for each module.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    legacy: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    open_file, load = gguf.GGUFReader, legacy.load_gguf_checkpoint
    opened, parsed = functools.cache(open_file), functools.cache(load)

    def reader(path: Any, mode: str = "r") -> Any:
        return opened(os.path.realpath(path)) if mode == "r" else open_file(path, mode)

    def checkpoint(path: Any, return_tensors: bool = False, **options: Any) -> Any:
        if return_tensors:
            return load(path, return_tensors=True, **options)
        return copy.deepcopy(parsed(os.path.realpath(path)))  # whoever asked may change it

    with ExitStack() as stack:
        stack.enter_context(_in_place(gguf, "GGUFReader", reader))
        stack.enter_context(_in_place(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)))
        stack.enter_context(_in_place(legacy, "load_gguf_checkpoint", checkpoint))
        yield


@contextmanager
def _in_place(module: Any, name: str, stand: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, stand)
    try:
        yield
    finally:
        setattr(module, name, original)


def load_tokenizer(base: BaseConfig, *, offline: bool) -> Any:
    """Load the model's tokenizer.

    Raises:
        ModelError: There is none, it cannot be read, or it would run its own code.
    """
    from transformers import AutoTokenizer

    source = source_of(str(base.model))
    refuse_own_code(source.name, offline=offline)
    refuse_pointers(source.name)
    try:
        return AutoTokenizer.from_pretrained(
            source.name, local_files_only=offline, trust_remote_code=False, **source.options
        )
    except Exception as error:  # the libraries raise many kinds for a missing or malformed file
        raise ModelError(f"{base.model}: no tokenizer can be loaded ({_line(error)}).") from error


def load_model(base: BaseConfig, device: torch.device, *, offline: bool, dtype: str | None = None) -> nn.Module:
    """Load the model, dense unless it is quantised, in evaluation mode.

    Args:
        base: The resolved choice.
        device: Weights go straight there where it is a GPU, unless they are unpacked from a GGUF file.
        offline: Never ask the network.
        dtype: Instead of the base's own; never quantised then.

    Raises:
        ModelError: It cannot be loaded, is not a causal language model, lacks weights, or would run its own code.
    """
    from transformers import AutoModelForCausalLM

    source = source_of(str(base.model))
    refuse_own_code(source.name, offline=offline)
    refuse_pointers(source.name)
    refuse_kernels(base.model_args)
    options: dict[str, Any] = {**source.options, "local_files_only": offline, **base.model_args}
    config = _checked_config(base, options)
    options |= _held_as(dtype or base.dtype or "float32", device, gguf=source.gguf is not None)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name, output_loading_info=True, trust_remote_code=False, **options
        )
        model, report = loaded
    except Exception as error:  # the libraries raise many kinds for a missing, malformed or foreign file
        raise ModelError(f"{base.model}: cannot be loaded as a {config.model_type} model ({_line(error)}).") from error
    _check_types(model, source)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{base.model} lacks {len(missing)} weights, such as '{missing[0]}'.")
    if source.gguf:
        drop_quantizer(model)
    if not all_finite(model):
        raise ModelError(f"{base.model} holds weights that are not finite.")
    return cast("nn.Module", model.eval())


def _held_as(dtype: str, device: torch.device, *, gguf: bool) -> dict[str, Any]:
    """Return what tells transformers the weights' type, and to put them on a GPU at once where that can be."""
    options: dict[str, Any] = _four_bits(device) if dtype == "nf4" else {"dtype": getattr(torch, dtype)}
    if gguf:
        return options | dequantized()
    if device.type == "cuda" and dtype != "nf4":
        options["device_map"] = {"": torch.device("cuda", torch.cuda.current_device())}
    return options


def _check_types(model: nn.Module, source: Source) -> None:
    """Raise ``ModelError`` when a file holds whole numbers for weights that the model has as fractions."""
    if not Path(source.name).is_dir() or getattr(model, "is_quantized", False):
        return
    own = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    for path in sorted(Path(source.name).glob("*.safetensors")):
        wrong = next((name for name in whole_numbers(path) if name in own), None)
        if wrong is not None:
            raise ModelError(f"{path}: '{wrong}' holds whole numbers, and the model has fractions there.")


def _checked_config(base: BaseConfig, options: dict[str, Any]) -> Any:
    """Read the configuration and refuse what is not a causal language model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    source = source_of(str(base.model))
    try:
        config = AutoConfig.from_pretrained(source.name, trust_remote_code=False, **options)
    except Exception as error:  # as above
        if Path(source.name).exists():
            raise ModelError(f"{base.model} is not a language model of transformers ({_line(error)}).") from error
        reason = (
            "is not cached and --offline is set"
            if options["local_files_only"]
            else f"cannot be fetched ({_line(error)})"
        )
        raise ModelError(f"{base.model} {reason}. Pass --model PATH.") from error
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = {known} if isinstance(known, str) else set(known or ())
    declared = set(config.architectures or ())
    if not names or (declared and not declared & names):
        kind = ", ".join(sorted(declared)) or config.model_type
        raise ModelError(f"{base.model} is not a causal language model but {kind}.")
    return config


def dequantized() -> dict[str, Any]:
    """Ask for dense weights; transformers before 5.20 gives nothing else."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def drop_quantizer(model: Any) -> None:
    """Forget that dense weights were once packed, so that the model saves and loads as any other."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _four_bits(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("--dtype nf4 needs CUDA and bitsandbytes (pip install 'treelora[4bit]'). Use bfloat16 here.")
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": settings, "device_map": {"": device}}


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# -- where adapters go ----------------------------------------------------------------------------


def choose_layers(model: nn.Module, name: str, adapter: AdapterConfig) -> tuple[str, ...]:
    """Return the modules to adapt, in network order, in the last ``adapter.blocks`` blocks.

    Unless told, these are the last quarter with ``targets: last-quarter``, the default, and else the last half. Blocks
    before them run once per task and keep no gradients: eight blocks of SmolLM2's 30 with all their linear layers
    learn free answers better, in less time, than queries and values of all 30 (recipes/RESULTS.md).

    Raises:
        ModelError: The model has no list of blocks.
        UsageError: No such module, or too many blocks asked for.
    """
    try:
        blocks = blocks_of(model)
    except (LookupError, AttributeError) as error:
        raise ModelError(f"{name}: its transformer blocks cannot be found.") from error
    usual = (len(blocks) + 3) // 4 if adapter.targets == LAST_QUARTER else (len(blocks) + 1) // 2
    wanted = usual if adapter.blocks is None else adapter.blocks or len(blocks)
    if wanted > len(blocks):
        raise UsageError(f"--blocks {wanted}: {name} has {len(blocks)} blocks.")
    prefix = next(path for path, module in model.named_modules() if module is blocks)
    linear = [
        (f"{prefix}.{index}.{inner}", inner)
        for index in range(len(blocks) - wanted, len(blocks))
        for inner in _linear_names(blocks[index])
    ]
    chosen = _matching(linear, str(adapter.targets), cast("Any", model).config.model_type)
    if not chosen:
        raise UsageError(f"--targets {adapter.targets}: no such linear layer in {name}.")
    return tuple(chosen)


def _linear_names(block: nn.Module) -> Iterator[str]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name


def _matching(linear: list[tuple[str, str]], targets: str, family: str) -> list[str]:
    if targets in ("all-linear", LAST_QUARTER):
        return [full for full, _ in linear]
    if targets != "auto":
        names = [target.strip() for target in targets.split(",")]
        return [
            full for full, inner in linear if any(inner == n or inner.endswith(f".{n}") or full == n for n in names)
        ]
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(family)
    if isinstance(known, str):
        return [full for full, _ in linear if re.fullmatch(known, full)]
    for usual in ([tuple(known)] if known else []) + list(_USUAL_TARGETS):
        found = [full for full, inner in linear if inner.split(".")[-1] in usual]
        if found:
            return found
    return []
