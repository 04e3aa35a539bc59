"""Exports of language models: what stock transformers and PEFT load, reloaded and compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.causal_lm.answers import Answerer
from treelora_backends.causal_lm.batches import Batch, pad
from treelora_backends.causal_lm.card import write_card
from treelora_backends.causal_lm.loading import load_model, source_of
from treelora_backends.causal_lm.memory import common_manner, manner_of, merged_adapter
from treelora_backends.causal_lm.modelfile import write_modelfile
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.task import LmTask
from treelora_backends.own_code import refuse_own_code
from treelora_cli.backend import adapters
from treelora_cli.backend.values import ExportCheck, TaskMemory, rounded_scores
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.backend.values import ExportOptions, Memory

_EXACT = 1e-3
"""Allowed logit difference between networks in float32; logits are of the order of 10."""
_OF_ROUNDING = 4.0
"""Allowed difference where another type takes part, as a multiple of what that type does to the base alone."""
_CHECKED_PROMPTS = 8
_TEXT = "The quick brown fox jumps over the lazy dog. Question: what is the answer?"


def write_merged(base: LoadedLm, memory: Memory, out: Path, options: ExportOptions) -> None:
    """Add the tasks' mean update to the unquantised base in float32, cast and save, tokenizer included.

    Raises:
        UsageError: ``options.max_shard`` is no size.
    """
    model: Any = load_model(base.config.base, torch.device("cpu"), offline=base.runtime.offline, dtype="float32")
    _add_update(model, merged_adapter(memory))
    model.to(getattr(torch, options.dtype))
    model.config.dtype = getattr(torch, options.dtype)
    model.generation_config.eos_token_id = list(base.encoder.stop_ids) or None
    if model.generation_config.max_new_tokens is None:
        model.generation_config.max_new_tokens = max(manner_of(task).most_new for task in memory.tasks)
    model.generation_config.min_new_tokens = common_manner(memory).least_new or None
    try:
        model.save_pretrained(out, max_shard_size=options.max_shard)
    except ValueError as error:
        raise UsageError(f"--max-shard {options.max_shard}: {error}") from error
    base.tokenizer.save_pretrained(out)
    write_card(base, merged_contents(memory), _SERVE, memory.tasks, out, lora=False)
    write_modelfile(base, memory.tasks, out, adapter=False)
    if source_of(str(base.config.base.model)).gguf:
        base.runtime.reporter.note("The base is a GGUF file; the exported weights are de-quantised.")


def merged_contents(memory: Memory) -> str:
    """Say what a merged model holds."""
    names = ", ".join(task.name for task in memory.tasks)
    if len(memory.tasks) == 1:
        return f"the base with the adapter of task {names} merged into its weights"
    return f"the base and, at their mean, the updates learned for {names}"


def _add_update(model: nn.Module, weights: AdapterWeights) -> None:
    with torch.no_grad():
        for index, layer in enumerate(weights.layers):
            module = model.get_submodule(layer)
            update = weights.update(index)
            turned = type(module).__name__ == "Conv1D"  # GPT-2 keeps its weights as (in, out)
            cast("Tensor", module.weight).add_(update.T if turned else update)


def write_adapter(base: LoadedLm, memory: Memory, task: str, out: Path) -> None:
    """Write one task's adapter: lora_A and lora_B only."""
    known = _task(memory, task)
    config = adapters.peft_config(base.network, base.config.base.model)
    config["target_modules"] = _short_targets(base)
    adapters.save_adapter(known.adapter(), config, out)
    write_card(base, f"the adapter of task {task}", _SERVE_ADAPTER, [known], out, lora=True)
    write_modelfile(base, [known], out, adapter=True)


_SERVE = """
`AutoModelForCausalLM.from_pretrained("PATH")`; `vllm serve PATH`; `ollama create NAME -f Modelfile`. As a GGUF file, in
llama.cpp: `python convert_hf_to_gguf.py PATH --outfile model.gguf --outtype f16`.
"""
_SERVE_ADAPTER = """
`PeftModel.from_pretrained(base, "PATH")`; `vllm serve BASE --enable-lora --lora-modules NAME=PATH`;
`ollama create NAME -f Modelfile`.
"""


def _task(memory: Memory, name: str) -> TaskMemory:
    return next(task for task in memory.tasks if task.name == name)


def _short_targets(base: LoadedLm) -> list[str]:
    """Return module names as people write them when they select exactly the adapted layers, else full ones."""
    short = {layer.rsplit(".", 1)[-1] for layer in base.layers}
    prefix = "base_model.model."
    every = [name.removeprefix(prefix) for name, _ in base.network.named_modules() if name.startswith(prefix)]
    selected = {name for name in every if name.rsplit(".", 1)[-1] in short}
    return sorted(short) if selected == set(base.layers) else sorted(base.layers)


def load_line(base: LoadedLm, out: Path, task: str | None) -> str:
    """Return the line of Python that loads an export."""
    if task is None:
        return f'AutoModelForCausalLM.from_pretrained("{out}")'
    source = source_of(str(base.config.base.model))
    gguf = f', gguf_file="{source.gguf}", quantization_config=GgufConfig(dequantize=True)' if source.gguf else ""
    return f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{source.name}"{gguf}), "{out}")'


# -- check ----------------------------------------------------------------------------------------


def check_export(
    base: LoadedLm, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, LmTask]]
) -> ExportCheck:
    """Reload an export with stock code and compare logits and scores with the model in memory."""
    weights = merged_adapter(memory) if task is None else _task(memory, task).adapter()
    return compare_networks(base, memory, weights, _reloaded(base, out, task), _written_type(base, out, task), held_out)


def compare_networks(
    base: LoadedLm,
    memory: Memory,
    weights: AdapterWeights,
    stock: nn.Module,
    written: str,
    held_out: Sequence[tuple[str, LmTask]],
) -> ExportCheck:
    """Compare a reloaded network with the base under an adapter.

    Args:
        base: The loaded model; its slot is overwritten.
        memory: Everything learned.
        weights: The adapter that the export holds.
        stock: The reloaded network.
        written: Type in which it was written.
        held_out: Examples by task.
    """
    base.network.eval()
    batch = _prompts(base, memory, held_out)
    rounding = _rounding(base, batch, written)
    adapters.write_slot(base.network, weights)
    reloaded = LmNetwork(stock.to(base.runtime.device))
    difference = _difference(_last_logits(base.lm, batch), _last_logits(reloaded, batch))
    answerers = [Answerer(lm, base.encoder, base.runtime) for lm in (base.lm, reloaded)]
    scores, counts = {}, []
    for name, data in held_out:
        known = _task(memory, name)
        counts.append(len(data.test))
        sums = [one.score_sum(data.test, manner_of(known), known.metric) for one in answerers]
        scores[name] = (sums[0][0] / max(1.0, sums[0][1]), sums[1][0] / max(1.0, sums[1][1]))
    if rounding is None:
        return ExportCheck(difference, _EXACT, scores)
    return ExportCheck(difference, max(_EXACT, _OF_ROUNDING * rounding), scores, rounded_scores(counts))


def _written_type(base: LoadedLm, out: Path, task: str | None) -> str:
    """Return the type that the export's network is held in."""
    if task is not None:
        return base.config.base.dtype or "float32"
    return str(json.loads((out / "config.json").read_text(encoding="utf-8")).get("dtype", "float32"))


def _rounding(base: LoadedLm, batch: Batch, written: str) -> float | None:
    """Return how far the base's own logits move in the types at hand, without any adapter; ``None``: all is float32."""
    own = base.config.base.dtype or "float32"
    if own == written == "float32":
        return None
    stock: Any = load_model(base.config.base, base.runtime.device, offline=base.runtime.offline, dtype="float32")
    stock = stock.to(base.runtime.device)
    exact, moved = _last_logits(LmNetwork(stock), batch), 0.0
    if own != "float32":
        adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
        moved += _difference(_last_logits(base.lm, batch), exact)
    if written in ("float16", "bfloat16"):
        moved += _difference(_last_logits(LmNetwork(stock.to(getattr(torch, written))), batch), exact)
    return moved


def _last_logits(lm: LmNetwork, batch: Batch) -> Tensor:
    """Return the logits after each prompt, (B, V) float32."""
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    with torch.no_grad():
        return lm.logits_at(batch, rows, batch.lengths - 1).float()


def _difference(ones: Tensor, others: Tensor) -> float:
    return float((ones - others).abs().max())


def _reloaded(base: LoadedLm, out: Path, task: str | None) -> nn.Module:
    if task is None:
        from transformers import AutoModelForCausalLM

        refuse_own_code(str(out), offline=True)
        stock: Any = AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", local_files_only=True, trust_remote_code=False
        )
        return cast("nn.Module", stock.eval())
    from peft import PeftModel

    stock = load_model(base.config.base, base.runtime.device, offline=base.runtime.offline)
    return PeftModel.from_pretrained(cast("Any", stock), str(out)).eval().get_base_model()


def _prompts(base: LoadedLm, memory: Memory, held_out: Sequence[tuple[str, LmTask]]) -> Batch:
    rows = []
    for name, data in held_out:
        manner = manner_of(_task(memory, name))
        rows += [base.encoder.encode(one, manner.style, manner.labels).prompt for one in data.test[:_CHECKED_PROMPTS]]
    rows = rows[:_CHECKED_PROMPTS] or [base.encoder.content_ids(_TEXT)]
    return pad(rows, base.encoder.pad_id).to(base.lm.device)
