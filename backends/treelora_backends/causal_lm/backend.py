"""The ``causal-lm`` backend: any causal language model of transformers, by hub id, directory or GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from treelora_backends.causal_lm.contenders import make_contender
from treelora_backends.causal_lm.export import check_export, load_line, write_adapter, write_merged
from treelora_backends.causal_lm.gguf_export import GgufExport
from treelora_backends.causal_lm.loaded import LoadedLm
from treelora_backends.causal_lm.loading import (
    choose_layers,
    files_of,
    gguf_read_once,
    is_language_model,
    load_model,
    load_tokenizer,
    resolve,
)
from treelora_backends.causal_lm.memory import clashes
from treelora_backends.causal_lm.network.layers import blocks_of
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.predictor import LmPredictor
from treelora_backends.causal_lm.render import Encoder, placed
from treelora_backends.causal_lm.routed import RoutedExport
from treelora_backends.causal_lm.router import FeatureReader
from treelora_backends.causal_lm.session import LmSession
from treelora_backends.causal_lm.task import LmTask, read_lm_task
from treelora_backends.kept import Keeping, planned
from treelora_cli.backend import adapters
from treelora_cli.backend.fingerprint import hash_parameters, identity
from treelora_cli.backend.runtime import keep_kernels
from treelora_cli.config import LAST_QUARTER, AdapterConfig, BaseConfig, Config, HeadConfig, TrainConfig, TreeConfig
from treelora_cli.errors import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from treelora_cli.backend.contract import ContenderModel, FurtherExport, TaskData
    from treelora_cli.backend.runtime import Runtime
    from treelora_cli.backend.values import DataRequest, ExportCheck, ExportOptions, Memory

_KERNELS = 32
"""Texts are of ever other lengths: more kernels took no time off and megabytes each (recipes/RESULTS_APPENDIX.md)."""
_UNKNOWN_CONTEXT = 2048
_RATE, _RATE_WIDTH = 5e-3, 576
"""Learning rate, and the width of the model for which it measured best (recipes/RESULTS.md); wider ones take less."""
_SAMPLE = "The answer is 42: Größe, 今天, naïve?\n<end>"


class CausalLmBackend:
    """Registered as ``causal-lm``."""

    name = "causal-lm"
    honours = ("train.accumulate", "train.label_smoothing", "train.class_weights", "train.compile")
    contender_heads = ("answer", "routed")
    gpu_dtype = "bfloat16"
    divides_base = True

    def defaults(self) -> Config:
        """Return the paper's rank, scale and depth, and what measured best for the rest."""
        return Config(
            inference="routed",
            adapter=AdapterConfig(rank=8, alpha=32.0, dropout=0.0, targets=LAST_QUARTER),
            tree=TreeConfig(depth=64, probe_batches=8),
            train=TrainConfig(epochs=2, lr=_RATE, batch_size=4, reg=0.0, warm_start="better", clip=1.0),
            head=HeadConfig(width=512),
        )

    def defaults_on(self, facts: Mapping[str, Any]) -> Config:
        """Return the defaults with a rate that falls with the model's width, as measured for LoRA on Llama models.

        Source: J. Schulman and Thinking Machines Lab, "LoRA Without Regret", 2025: the best rate is proportional to
        width ** -0.775. The rate at the width of SmolLM2-135M is this project's measurement, see ``_RATE``.
        """
        defaults = self.defaults()
        share = min(1.0, (_RATE_WIDTH / int(facts["width"])) ** 0.775)
        return replace(defaults, train=replace(defaults.train, lr=float(f"{_RATE * share:.2g}")))

    def recognises(self, model: str) -> bool:
        """Tell a language model by its GGUF file or ``config.json``, without loading anything."""
        return is_language_model(model)

    def resolve_base(self, base: BaseConfig, *, offline: bool) -> BaseConfig:
        """Check the user's choice of model."""
        return resolve(base, offline=offline)

    def load(self, config: Config, runtime: Runtime) -> CausalLmBase:
        """Load the model and its tokenizer, and attach an adapter slot."""
        keep_kernels(_KERNELS)
        if runtime.shards is not None and config.base.dtype == "nf4":
            raise UsageError("--dtype nf4 does not go with FSDP. Leave one out.")
        with nullcontext() if runtime.shards is None else runtime.shards.in_turn():
            with gguf_read_once():
                model = load_model(config.base, _loaded_to(runtime), offline=runtime.offline)
                tokenizer = load_tokenizer(config.base, offline=runtime.offline)
            _check_vocabulary(model, tokenizer, str(config.base.model))
            measure = partial(hash_parameters, model)
            fingerprint = identity(files_of(str(config.base.model)), _loaded_as(config.base), measure)
            network, layers = _with_slot(model, config, runtime)
        return _around(network, layers, tokenizer, fingerprint, config, runtime)

    @staticmethod
    def around(model: nn.Module, tokenizer: Any, fingerprint: str, config: Config, runtime: Runtime) -> CausalLmBase:
        """Attach an adapter slot to a model that is in memory."""
        network, layers = _with_slot(model, config, runtime)
        return _around(network, layers, tokenizer, fingerprint, config, runtime)


def _loaded_to(runtime: Runtime) -> torch.device:
    """Return where weights are put first: what is to be divided need not fit one GPU."""
    return runtime.device if runtime.shards is None else torch.device("cpu")


def _with_slot(model: nn.Module, config: Config, runtime: Runtime) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the model with an adapter slot, on its device, and the names of the adapted layers."""
    layers = choose_layers(model, str(config.base.model), config.adapter)
    adapter = config.adapter
    assert adapter.rank is not None and adapter.alpha is not None and adapter.dropout is not None
    rank, alpha, dropout = adapter.rank, adapter.alpha, adapter.dropout
    network: nn.Module = adapters.attach(model, layers, rank=rank, alpha=alpha, dropout=dropout, task_type="CAUSAL_LM")
    if runtime.shards is not None:
        runtime.shards.divide(list(blocks_of(model)), runtime.device)
        runtime.shards.place_rest(network, runtime.device)
        held = f"{runtime.shards.own_bytes / 2**20:.2f} of {runtime.shards.all_bytes / 2**20:.2f} MiB"
        runtime.reporter.detail(f"The base's blocks are divided between processes: {held} are held in each.")
        return network, layers
    return network if config.base.dtype == "nf4" else network.to(runtime.device), layers


def _around(
    network: nn.Module, layers: tuple[str, ...], tokenizer: Any, fingerprint: str, config: Config, runtime: Runtime
) -> CausalLmBase:
    """Return what can be done with a model that holds a slot."""
    model = cast("Any", network).get_base_model()
    network.eval()
    _check_adapters_act(network, model, layers)
    lm = LmNetwork(model, layers, runtime.autocast)
    encoder = _encoder(model, lm, tokenizer, config)
    return CausalLmBase(
        network=network,
        layers=layers,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        config=config,
        runtime=runtime,
        lm=lm,
        context=_context_of(model),
        encoder=encoder,
        known_answers={},
        features=FeatureReader(network, lm, encoder, runtime),
    )


@dataclass(frozen=True, eq=False)
class CausalLmBase(LoadedLm):
    """A loaded language model, and what can be done with it; meets ``Base``."""

    export_examples: ClassVar[int] = 64
    """Examples of each task that an export is scored on: each answer is written token by token."""

    def read_task(self, request: DataRequest) -> LmTask:
        """Read, validate and tokenise a task's data."""
        return read_lm_task(request, self.encoder, self.runtime.reporter)

    def session(self, task: TaskData, memory: Memory, config: Config) -> LmSession:
        """Open a task for learning."""
        if self.runtime.shards is not None and config.train.compile not in (None, "none"):
            raise UsageError(f"train.compile {config.train.compile} does not go with FSDP. Leave one out.")
        for line in clashes(memory, cast("LmTask", task)):
            self.runtime.reporter.note(line)
        return LmSession(self, cast("LmTask", task), memory, config)

    def kept_plan(self, task: TaskData, config: Config) -> dict[str, Any]:
        """Return place and size of the activations that learning the task would keep; nothing where none are."""
        if not self.lm.cut:
            return {}
        tokens = sum(len(one) for one in self.runtime.share(cast("LmTask", task).train))
        width = int(self.lm.model.config.get_text_config().hidden_size)
        return planned(tokens, [width], Keeping.of(self.lm.device, config.train.keep_mib), again=True)

    def predictor(self, memory: Memory, inference: str) -> LmPredictor:
        """Return a predictor over everything in ``memory``."""
        return LmPredictor(self, memory, inference)

    def contender(self, head: str, config: Config) -> ContenderModel:
        """Return the plain network under a kind of head."""
        return make_contender(self, head, config)

    def export_merged(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write a directory that ``AutoModelForCausalLM.from_pretrained`` loads."""
        self._refuse_divided()
        write_merged(self, memory, out, options)

    def export_adapter(self, memory: Memory, task: str, out: Path) -> None:
        """Write a directory that ``PeftModel.from_pretrained`` loads."""
        self._refuse_divided()
        write_adapter(self, memory, task, out)

    def further_export(self, kind: str) -> FurtherExport:
        """Return the export of this name.

        Raises:
            UsageError: Language models have none such, or this base does not allow it.
        """
        self._refuse_divided()
        if kind == "gguf":
            return GgufExport(self)
        if kind != "routed":
            raise UsageError(f"--format {kind} is for image models.")
        return RoutedExport(self)

    def _refuse_divided(self) -> None:
        """Raise ``UsageError`` where processes hold the base together: an export is written by one that has it all."""
        if self.runtime.shards is not None:
            raise UsageError("An export does not go with FSDP. Run it in one process: treelora export OUT --device cpu")

    def load_line(self, out: Path, task: str | None) -> str:
        """Return the line that loads an export."""
        return load_line(self, out, task)

    def check_export(
        self, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, TaskData]]
    ) -> ExportCheck:
        """Reload ``out`` with stock transformers or PEFT and compare."""
        return check_export(self, memory, out, task, [(name, cast("LmTask", data)) for name, data in held_out])


def _loaded_as(base: BaseConfig) -> dict[str, object]:
    """Return all that decides what a model's files are loaded as."""
    libraries = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {"backend": "causal-lm", "dtype": base.dtype or "float32", "model_args": base.model_args, **libraries}


def _encoder(model: Any, lm: LmNetwork, tokenizer: Any, config: Config) -> Encoder:
    assert config.train.max_length is not None
    context = _context_of(model)
    longest = min(config.train.max_length, context)
    ends, embedded = _end_ids(model, tokenizer), int(lm.model.get_input_embeddings().weight.shape[0])
    return Encoder(tokenizer, longest, ends, context, embedded, str(config.train.learn))


def _context_of(model: Any) -> int:
    """Return the most tokens the model takes."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _UNKNOWN_CONTEXT


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer, the tokenizer's own first."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return [int(one) for one in dict.fromkeys([tokenizer.eos_token_id, *listed]) if one is not None]


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that writes tokens the model does not embed.

    Special tokens that no template uses are common beyond the embedding, and harmless until data holds one: that is
    refused where it is read.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    try:
        with placed(name):
            written = tokenizer(_SAMPLE)["input_ids"]
    except DataError:  # it knows other signs alone, such as those of proteins; what data holds is read anyway
        written = []
    beyond = {index: text for text, index in tokenizer.get_vocab().items() if index >= rows}
    special = {index for index, one in getattr(tokenizer, "added_tokens_decoder", {}).items() if one.special}
    template = str(getattr(tokenizer, "chat_template", None) or "")
    used = [i for i, text in beyond.items() if i in written or i not in special or text in template]
    if used:
        largest = max(used)
        raise ModelError(
            f"{name}: its tokenizer writes token {largest} ('{beyond[largest]}'), the model embeds {rows}."
            " They do not fit: resize the model's embedding, or take the tokenizer that came with it."
        )


def _check_adapters_act(network: nn.Module, model: Any, layers: tuple[str, ...]) -> None:
    """Raise ``ModelError`` when some adapted layer is never called in the forward pass."""
    called: set[str] = set()
    hooks = [
        network.get_submodule(f"base_model.model.{layer}").register_forward_hook(
            lambda _m, _i, _o, layer=layer: called.add(layer)
        )
        for layer in layers
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    idle = [layer for layer in layers if layer not in called]
    if idle:
        raise ModelError(f"Layer '{idle[0]}' is never called by this model; choose others with --targets.")
