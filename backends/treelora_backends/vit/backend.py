"""The ``vit`` backend: any timm vision transformer, by name, file, directory or hub id."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from treelora_backends.directories import without_config
from treelora_backends.kept import Keeping, planned
from treelora_backends.vit.augment import Augment
from treelora_backends.vit.export import check_export, write_adapter, write_merged
from treelora_backends.vit.images import (
    LIKE_THEMSELVES,
    ImageTask,
    Preprocessing,
    images_at_once,
    make_preprocessing,
    read_image_task,
)
from treelora_backends.vit.loaded import LoadedVit
from treelora_backends.vit.loading import check_model_name, choose_layers, create_vit, existing_weights, files_of
from treelora_backends.vit.onnx_export import OnnxExport
from treelora_backends.vit.predictor import VitPredictor
from treelora_backends.vit.routed import RoutedExport
from treelora_backends.vit.session import VitSession
from treelora_backends.vit.trunk import Trunk
from treelora_cli.backend.fingerprint import hash_parameters, identity
from treelora_cli.backend.linear_slots import attach_linear
from treelora_cli.backend.runtime import keep_kernels
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig
from treelora_cli.errors import ModelError, UsageError
from treelora_cli.locations import lasting

if TYPE_CHECKING:
    from treelora_cli.backend.contract import ContenderModel, FurtherExport, TaskData
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import DataRequest, ExportCheck, ExportOptions, Memory


_KERNELS = 128
"""A task of images runs through up to so many shapes, always the same (recipes/RESULTS_APPENDIX.md)."""
_LARGER_ON_CUDA = 4
"""Steps that wait for launches take as long for four times the images; with the rate four times as high the scores are
those of small batches (recipes/RESULTS.md)."""


class VitBackend:
    """Registered as ``vit``."""

    name = "vit"
    honours = (
        "train.accumulate",
        "train.label_smoothing",
        "train.class_weights",
        "train.augment",
        "train.compile",
        "head.class_weights",
    )
    contender_heads = ("linear", "aligned", "routed", "ridge", "mean", "l2p", "dualprompt")

    def defaults(self) -> Config:
        """Return what measured best for image streams (see recipes/RESULTS.md)."""
        return Config(
            adapter=AdapterConfig(rank=8, alpha=16.0, dropout=0.0),
            train=TrainConfig(epochs=3, lr=5e-3, batch_size=64),
        )

    def defaults_on(self, facts: Mapping[str, Any]) -> Config:
        """Return the defaults; on CUDA with larger batches at a rate as many times higher, see ``_LARGER_ON_CUDA``."""
        defaults = self.defaults()
        if facts.get("device") != "cuda":
            return defaults
        size, rate = cast("int", defaults.train.batch_size), cast("float", defaults.train.lr)
        larger = dataclasses.replace(defaults.train, batch_size=_LARGER_ON_CUDA * size, lr=_LARGER_ON_CUDA * rate)
        return dataclasses.replace(defaults, train=larger)

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        """Check the user's choice of model; an existing path is always local."""
        if base.dtype not in (None, "float32"):
            raise UsageError("The vit backend holds its base in float32; leave --dtype out.")
        model, weights = base.model, base.weights
        if weights is not None:
            weights = str(existing_weights(Path(weights)))
        if model is None:
            model = "embedded"
        if not model.strip():
            raise UsageError("--model is empty. Leave it out for the model that comes along.")
        if model != "embedded" and Path(model).is_dir():
            if not (Path(model) / "config.json").is_file():
                raise without_config(Path(model))
            model = str(lasting(Path(model)))
        elif model != "embedded":
            check_model_name(model, weights, offline)
        return dataclasses.replace(base, model=model, weights=weights)

    def load(self, config: Config, runtime: Runtime) -> VitBase:
        """Load the base and attach an adapter slot."""
        keep_kernels(_KERNELS)
        vit = create_vit(config.base, offline=runtime.offline)
        fingerprint = identity(files_of(config.base), _loaded_as(config.base), lambda: hash_parameters(vit))
        return self.around(vit, fingerprint, config, runtime)

    @staticmethod
    def around(vit: nn.Module, fingerprint: str, config: Config, runtime: Runtime) -> VitBase:
        """Attach an adapter slot to a model that is in memory."""
        layers = choose_layers(vit, config)
        preprocessing = make_preprocessing(vit, config.base.preprocess)
        if config.train.augment:
            Augment(config.train.augment, preprocessing.size, preprocessing.mean)  # refused before anything is read
        adapter = config.adapter
        assert adapter.rank is not None and adapter.alpha is not None and adapter.dropout is not None
        network = attach_linear(vit, layers, rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout)
        network = network.to(runtime.device)
        network.eval()
        trunk = Trunk(vit, int(layers[0].split(".")[1]), config.head.blocks)
        _check_adapters_act(network, trunk, layers, preprocessing, runtime)
        return VitBase(network, layers, fingerprint, trunk, preprocessing, config, runtime)


def _loaded_as(base: BaseConfig) -> dict[str, object]:
    """Return all that decides what a model's files are loaded as."""
    libraries = {name: metadata.version(name) for name in ("torch", "timm")}
    return {"backend": "vit", "model": base.model, "model_args": base.model_args, **libraries}


@dataclasses.dataclass(frozen=True, eq=False)
class VitBase(LoadedVit):
    """A loaded transformer, and what can be done with it; meets ``Base``."""

    def read_task(self, request: DataRequest) -> ImageTask:
        """Find and decode a task's images."""
        overlaps = self.runtime.device.type != "cpu"  # there decoding has every processor, and so has computing
        return read_image_task(request, self.preprocessing, self.runtime.reporter, ahead=overlaps)

    def session(self, task: TaskData, memory: Memory, config: Config) -> VitSession:
        """Open a task for learning."""
        return VitSession(self, cast("ImageTask", task), memory, config)

    def kept_plan(self, task: TaskData, config: Config) -> dict[str, Any]:
        """Return place and size of the activations that learning the task would keep; every image must be readable."""
        for pictures in (cast("ImageTask", task).train, cast("ImageTask", task).test):
            deque(pictures.pixels.split(images_at_once(self.runtime.device)), maxlen=0)
        assert config.head.views is not None
        with torch.no_grad():
            image = torch.zeros(1, 3, *self.preprocessing.size, device=self.runtime.device)
            shape = self.trunk.before(image).tokens.shape[1:]
        own = len(self.runtime.share(list(range(task.train_size))))
        keeping = Keeping.of(self.runtime.device, config.train.keep_mib)
        return planned(own * config.head.views, shape, keeping, again=config.head.views <= LIKE_THEMSELVES)

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
        from treelora_backends.vit.contenders.heads import make_contender

        return make_contender(self, head, config)

    def export_merged(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write a directory that ``timm.create_model('local-dir:OUT', pretrained=True)`` loads."""
        write_merged(self, memory, out, options)

    def export_adapter(self, memory: Memory, task: str, out: Path) -> None:
        """Write a directory that ``PeftModel.from_pretrained`` loads, classifier included."""
        write_adapter(self, memory, task, out)

    def further_export(self, kind: str) -> FurtherExport:
        """Return the export of this name.

        Raises:
            UsageError: Images have none such, or a package is missing.
        """
        if kind == "onnx":
            return OnnxExport(self)
        if kind != "routed":
            raise UsageError(f"--format {kind} is not for images.")
        return RoutedExport(self)

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
