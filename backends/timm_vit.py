"""The ``vit`` backend: any timm vision transformer, by name, file, directory or hub id."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from treelora_backends.vit_contenders import make_contender
from treelora_backends.vit_export import check_export, write_adapter, write_merged
from treelora_backends.vit_images import ImageTask, Preprocessing, make_preprocessing, read_image_task
from treelora_backends.vit_predictor import VitPredictor
from treelora_backends.vit_session import VitSession
from treelora_backends.vit_trunk import Trunk

from treelora_cli import adapters
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig
from treelora_cli.errors import ModelError, UsageError
from treelora_cli.fingerprint import hash_parameters

if TYPE_CHECKING:
    from treelora_cli.backend import ContenderModel, DataRequest, ExportCheck, ExportOptions, Memory, TaskData
    from treelora_cli.runtime import Runtime

EMBEDDED = Path(__file__).parent / "embedded" / "vit_tiny_cifar"
"""The model used when none is named."""


class VitBackend:
    """Registered as ``vit``."""

    name = "vit"
    contender_heads = ("linear", "aligned", "routed", "ridge", "mean", "l2p", "dualprompt")

    def defaults(self) -> Config:
        """Return what measured best for image streams (see recipes/RESULTS.md)."""
        return Config(
            adapter=AdapterConfig(rank=8, alpha=16.0, dropout=0.0),
            train=TrainConfig(epochs=3, lr=5e-3, batch_size=64),
        )

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        """Check the user's choice of model; an existing path is always local."""
        if base.dtype not in (None, "float32"):
            raise UsageError("The vit backend holds its base in float32; leave --dtype out.")
        model, weights = base.model, base.weights
        if weights is not None:
            weights = str(_existing_weights(Path(weights)))
        if model is None:
            model = "embedded"
        if model != "embedded" and Path(model).is_dir():
            if not (Path(model) / "config.json").is_file():
                raise ModelError(f"{model} holds no config.json: not a model directory saved by timm.")
            model = str(Path(model).absolute())
        elif model != "embedded":
            _check_name(model, weights, offline)
        return dataclasses.replace(base, model=model, weights=weights)

    def load(self, config: Config, runtime: Runtime) -> VitBase:
        """Load the base and attach an adapter slot."""
        vit = _create(config.base, offline=runtime.offline)
        layers = _choose_layers(vit, config)
        fingerprint = hash_parameters(vit)
        preprocessing = make_preprocessing(vit, config.base.preprocess)
        adapter = config.adapter
        assert adapter.rank is not None and adapter.alpha is not None and adapter.dropout is not None
        network = adapters.attach(vit, layers, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout).to(
            runtime.device
        )
        network.eval()
        trunk = Trunk(vit, int(layers[0].split(".")[1]), config.head.blocks)
        _check_adapters_act(network, trunk, layers, preprocessing, runtime)
        return VitBase(network, layers, fingerprint, trunk, preprocessing, config, runtime)


class VitBase:
    """A loaded timm transformer with one LoRA slot; meets ``Base``."""

    def __init__(
        self,
        network: nn.Module,
        layers: tuple[str, ...],
        fingerprint: str,
        trunk: Trunk,
        preprocessing: Preprocessing,
        config: Config,
        runtime: Runtime,
    ) -> None:
        self.network = network
        self.layers = layers
        self.fingerprint = fingerprint
        self.trunk = trunk
        self.preprocessing = preprocessing
        self.config = config
        self.runtime = runtime
        assert config.adapter.alpha is not None and config.adapter.rank is not None
        self.scale: float = config.adapter.alpha / config.adapter.rank

    def fresh_vit(self, classes: int) -> nn.Module:
        """Return the frozen model anew, without adapters, with a linear classifier for ``classes``."""
        vit = _create(self.config.base, offline=self.runtime.offline)
        cast("Any", vit).reset_classifier(classes)
        return vit.to(self.runtime.device)

    @property
    def facts(self) -> dict[str, Any]:
        """Architecture, size and preprocessing."""
        vit = cast("Any", self.trunk.vit)
        return {
            "architecture": vit.pretrained_cfg.get("architecture") or type(vit).__name__,
            "blocks": len(self.trunk.blocks),
            "width": self.trunk.width,
            "parameters": sum(p.numel() for n, p in self.network.named_parameters() if "lora_" not in n),
            "input_size": list(self.preprocessing.size),
            "mean": list(self.preprocessing.mean),
            "std": list(self.preprocessing.std),
        }

    def read_task(self, request: DataRequest) -> ImageTask:
        """Find and decode a task's images."""
        return read_image_task(request, self.preprocessing, self.runtime.reporter)

    def session(self, task: TaskData, memory: Memory, config: Config) -> VitSession:
        """Open a task for learning."""
        return VitSession(self, cast("ImageTask", task), memory, config)

    def predictor(self, memory: Memory, inference: str) -> VitPredictor:
        """Return a predictor over everything in ``memory``.

        Raises:
            UsageError: The untouched model is asked for, which knows none of the classes.
        """
        if inference == "base":
            raise UsageError("--inference base is for language models: an untouched image model knows no class.")
        return VitPredictor(self, memory, inference)

    def contender(self, head: str, config: Config) -> ContenderModel:
        """Return the plain network under a kind of head."""
        return make_contender(self, head, config)

    def export_merged(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write a directory that ``timm.create_model('local-dir:OUT', pretrained=True)`` loads."""
        write_merged(self, memory, out, options)

    def export_adapter(self, memory: Memory, task: str, out: Path) -> None:
        """Write a directory that ``PeftModel.from_pretrained`` loads, classifier included."""
        write_adapter(self, memory, task, out)

    def load_line(self, out: Path, task: str | None) -> str:
        """Return the line of Python that loads an export."""
        if task is None:
            return f"timm.create_model('local-dir:{out}', pretrained=True)"
        return f"PeftModel.from_pretrained(base, '{out}')  # base: the timm model with as many classes as labels.json"

    def check_export(
        self, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, TaskData]]
    ) -> ExportCheck:
        """Reload ``out`` with stock timm or PEFT and compare."""
        images = [(name, cast("ImageTask", data)) for name, data in held_out]
        return check_export(self, memory, out, task, images)


def recorded_model_args(base: BaseConfig) -> dict[str, Any]:
    """Return the architecture arguments that a local model directory brings along."""
    folder = EMBEDDED if base.model == "embedded" else Path(str(base.model))
    if not folder.is_dir():
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return dict(config.get("model_args") or {})


def _existing_weights(path: Path) -> Path:
    if not path.is_file():
        raise ModelError(f"{path} not found. Pass --weights FILE.safetensors.")
    if path.suffix != ".safetensors":
        raise ModelError(f"{path}: only .safetensors weights are read, nothing is ever unpickled. Convert it first.")
    return path.absolute()


def _check_name(model: str, weights: str | None, offline: bool) -> None:
    """Refuse a name that neither timm nor, when online, the hub can know."""
    import timm

    if "/" in model:
        if Path(model).suffix or model.startswith((".", "/")) or model.count("/") > 1:
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

    found = [try_to_load_from_cache(hub_id, name) for name in ("model.safetensors", "config.json")]
    return any(isinstance(path, str) for path in found)


def _create(base: BaseConfig, *, offline: bool) -> nn.Module:
    """Build the model without classifier and fill it with its weights.

    Raises:
        ModelError: Unknown architecture arguments, or weights that are absent or do not fit.
    """
    import timm

    name = str(base.model)
    if name == "embedded":
        name = f"local-dir:{EMBEDDED}"
    elif Path(name).is_dir():
        name = f"local-dir:{name}"
    elif "/" in name:
        name = f"hf-hub:{name}"
    from_source = base.weights is None
    try:
        vit = timm.create_model(name, pretrained=from_source, num_classes=0, **base.model_args)
    except (TypeError, AssertionError, KeyError) as error:
        raise ModelError(f"{base.model}: --model-arg does not fit this architecture ({error}).") from error
    except RuntimeError as error:
        raise ModelError(_misfit(str(base.model), error)) from error
    except Exception as error:  # the hub client raises many kinds when a download fails
        reason = "is not cached and --offline is set" if offline else f"cannot be fetched ({type(error).__name__})"
        raise ModelError(f"{base.model} {reason}. Pass --model PATH or --weights FILE.") from error
    if base.weights is not None:
        _load_weights(vit, Path(base.weights))
    if not all(bool(p.isfinite().all()) for p in vit.parameters()):
        source = base.model if base.weights is None else Path(base.weights).name
        raise ModelError(f"{source} holds weights that are not finite.")
    if not isinstance(getattr(vit, "blocks", None), nn.Sequential | nn.ModuleList):
        raise ModelError(f"{base.model} is not a vision transformer: it has no list of blocks.")
    if not hasattr(vit, "patch_embed") or not hasattr(vit, "norm"):
        raise ModelError(f"{base.model} is not a plain vision transformer that can be split at a block.")
    return vit


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


def _choose_layers(vit: Any, config: Config) -> tuple[str, ...]:
    """Return the modules to adapt, in network order, in the chosen blocks."""
    count = len(vit.blocks)
    wanted = -(-count // 6) if config.adapter.blocks is None else config.adapter.blocks or count
    if wanted > count:
        raise UsageError(f"--blocks {wanted}: {config.base.model} has {count} blocks.")
    chosen = []
    for index in range(count - wanted, count):
        chosen += [f"blocks.{index}.{name}" for name in _block_targets(vit.blocks[index], str(config.adapter.targets))]
    if not chosen:
        raise UsageError(f"--targets {config.adapter.targets}: no such linear layer in {config.base.model}.")
    return tuple(chosen)


def _block_targets(block: nn.Module, targets: str) -> list[str]:
    linear = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        return linear
    if targets != "auto":
        wanted = [target.strip() for target in targets.split(",")]
        return [name for name in linear if any(name == w or name.endswith(f".{w}") for w in wanted)]
    attention = [name for name in linear if name.split(".")[-1] in ("qkv", "q_proj", "k_proj", "v_proj", "proj")]
    reads_weight_only = getattr(getattr(block, "attn", None), "q_bias", None) is not None
    # such attention multiplies by qkv.weight itself and would pass an adapter by
    return [name for name in attention if not (reads_weight_only and name.endswith("qkv"))]


def _check_adapters_act(
    network: nn.Module, trunk: Trunk, layers: tuple[str, ...], preprocessing: Preprocessing, runtime: Runtime
) -> None:
    """Raise ``ModelError`` when some adapted layer is never called in the forward pass."""
    called: set[str] = set()
    hooks = [
        network.get_submodule(f"base_model.model.{layer}").register_forward_hook(
            lambda _m, _i, _o, layer=layer: called.add(layer)
        )
        for layer in layers
    ]
    image = torch.zeros(1, 3, *preprocessing.size, device=runtime.device)
    try:
        with torch.no_grad():
            trunk.after(trunk.before(image))
    finally:
        for hook in hooks:
            hook.remove()
    idle = [layer for layer in layers if layer not in called]
    if idle:
        raise ModelError(f"Layer '{idle[0]}' is never called by this model; choose others with --targets.")
