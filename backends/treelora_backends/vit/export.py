"""Exports of the vit backend, and their check by reloading with stock code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from treelora_backends.vit.decoding import Pixels
from treelora_backends.vit.images import ImageTask
from treelora_backends.vit.single import SingleNetwork, latest_head
from treelora_backends.vit.trunk import fill_classifier
from treelora_cli.backend import adapters
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory, rounded_scores
from treelora_cli.errors import UsageError
from treelora_cli.heads.ridge import LinearHead

if TYPE_CHECKING:
    from treelora_backends.vit.loaded import LoadedVit

_CHUNK = 256
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest logit difference by dtype, as a share of the largest logit (at least 10)."""
_CARD = """---
library_name: timm
pipeline_tag: image-classification
base_model: {base}
tags: [image-classification, treelora]
---
# {architecture}, merged by treelora

A vision transformer: {content}, and one linear head over {classes} classes of {tasks} tasks: {names}.

Load with `timm.create_model("local-dir:PATH", pretrained=True)`; `model.pretrained_cfg["label_names"]` names the
classes in order, `timm.data.resolve_model_data_config(model)` gives the preprocessing.
"""
_SOLVED = (
    "the frozen base as it was, {count} more blocks of its kind whose MLPs are solved, not trained, from sums over the"
    " tasks' images (no task's adapter is part of it)"
)
_MEAN = "the base with the mean of the tasks' {count} adapters merged into its weights"
_ONE = "the base with its one task's adapter merged into its weights"
_ADAPTER_CARD = """---
library_name: peft
pipeline_tag: image-classification
base_model: {base}
tags: [image-classification, lora, treelora]
---
# Adapter of task {task}

A LoRA of rank {rank} on `{base}` with the linear head that goes with it, made with treelora. It answers with
{classes} classes, {scope}: {names}; `labels.json` names them in order.

Load with `PeftModel.from_pretrained(base, PATH)`, where `base` is the timm model made with `num_classes={classes}`.
"""


def write_merged(base: LoadedVit, memory: Memory, out: Path, options: ExportOptions) -> None:
    """Write the ``merged`` network so that stock timm loads it with its preprocessing and label names."""
    network = SingleNetwork(base, memory, "merged")
    vit = cast("Any", network.vit).to("cpu", getattr(torch, options.dtype))
    save_stock(base, vit, out, {**model_config(base, len(network.names)), "label_names": network.names})
    names = ", ".join(network.names)
    card = _CARD.format(
        base=Path(str(base.config.base.model)).name,
        architecture=base.facts["architecture"],
        content=merged_content(base, len(vit.blocks), len(memory.tasks)),
        tasks=len(memory.tasks),
        classes=len(network.names),
        names=names,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def save_stock(base: LoadedVit, vit: nn.Module, out: Path, config: dict[str, Any]) -> None:
    """Write a model that ``timm.create_model("local-dir:OUT")`` loads with the project's own preprocessing.

    Args:
        base: The loaded base.
        vit: On the CPU, of the base's architecture.
        out: Where to.
        config: What ``model_config`` returned, and more.
    """
    from timm.models import save_for_hf

    model = cast("Any", vit)
    # of a name that timm knows it reads these from the architecture's own record, wherever else they stand
    left_out = ("test_input_size", "test_crop_pct", "url", "hf_hub_id")
    known = {key: value for key, value in model.pretrained_cfg.items() if key not in left_out}
    model.pretrained_cfg = {**known, **config}
    arguments = model_args(base, len(model.blocks))
    save_for_hf(model, str(out), model_config=config, model_args=arguments, safe_serialization=True)


def merged_content(base: LoadedVit, blocks: int, tasks: int) -> str:
    """Say what a merged network of so many blocks is made of."""
    grown = blocks - base.facts["blocks"]
    if grown:
        return _SOLVED.format(count=grown)
    return _ONE if tasks == 1 else _MEAN.format(count=tasks)


def model_config(base: LoadedVit, classes: int) -> dict[str, Any]:
    """Return what timm records of a model with so many classes: its input size and preprocessing."""
    data = base.preprocessing.data_config
    return {
        "num_classes": classes,
        "input_size": [3, *base.preprocessing.size],
        **{key: data[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
    }


def model_args(base: LoadedVit, depth: int) -> dict[str, Any]:
    """Arguments that rebuild the architecture, the base directory's own included."""
    from treelora_backends.vit.loading import recorded_model_args

    grown = {} if depth == base.facts["blocks"] else {"depth": depth}
    found = {**recorded_model_args(base.config.base), **base.config.base.model_args, **grown}
    found.pop("num_classes", None)  # the base's own; an export has a class for each learned
    return found


def write_adapter(base: LoadedVit, memory: Memory, task: str, out: Path) -> None:
    """Write one task's adapter as a PEFT directory that carries its linear head.

    The newest task's head covers all classes, as ``latest`` predicts; an earlier task's covers its own.
    """
    index = _index_of(memory, task)
    vit, names = _classifier(base, memory, index)
    model = _peft_model(vit, base, memory.tasks[index].adapter())
    model.save_pretrained(str(out), safe_serialization=True)
    path = out / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.config.base.model
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (out / "labels.json").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
    newest = index == len(memory.tasks) - 1
    card = _ADAPTER_CARD.format(
        base=Path(str(base.config.base.model)).name,
        task=task,
        rank=base.config.adapter.rank,
        classes=len(names),
        scope="those of all tasks" if newest else "those of its own task alone",
        names=", ".join(names),
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def _index_of(memory: Memory, task: str) -> int:
    return next(index for index, one in enumerate(memory.tasks) if one.name == task)


def _classifier(base: LoadedVit, memory: Memory, index: int) -> tuple[nn.Module, list[str]]:
    """Return the base with the linear head that goes with a task's adapter, and the head's labels."""
    if index == len(memory.tasks) - 1:
        names, head = latest_head(base, memory)
    else:
        tensors, names = memory.tasks[index].tensors(), list(memory.tasks[index].labels)
        head = LinearHead(tensors["head.weight"], tensors["head.bias"])
    vit = base.fresh_vit(len(names))
    fill_classifier(vit, head)
    return vit, names


def _peft_model(vit: nn.Module, base: LoadedVit, weights: adapters.AdapterWeights) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter, heads = base.config.adapter, cast("Any", vit).pretrained_cfg["classifier"]
    config = LoraConfig(
        r=cast("int", adapter.rank),
        lora_alpha=cast("int", adapter.alpha),
        lora_dropout=cast("float", adapter.dropout),
        target_modules=list(base.layers),
        modules_to_save=[heads] if isinstance(heads, str) else list(heads),
    )
    model = get_peft_model(cast("Any", vit), config)
    adapters.write_slot(model, weights)
    return model.eval()


@torch.no_grad()
def check_export(
    base: LoadedVit, memory: Memory, out: Path, task: str | None, held_out: Sequence[tuple[str, ImageTask]]
) -> ExportCheck:
    """Reload with stock timm or PEFT; compare logits and accuracy with the model in memory."""
    if task is None:
        here = SingleNetwork(base, memory, "merged")
        names = here.names
        there: nn.Module = _reload_merged(out).to(base.runtime.device)
    else:
        index = _index_of(memory, task)
        vit, names = _classifier(base, memory, index)
        here = cast("SingleNetwork", _with_update(vit, memory.tasks[index].adapter()))
        there = _reload_adapter(base, out, len(names)).to(base.runtime.device)
    dtype = next(there.parameters()).dtype
    scores = {}
    probe = torch.linspace(0, 255, 8 * 3 * base.preprocessing.size[0] * base.preprocessing.size[1])
    pictures = probe.reshape(8, 3, *base.preprocessing.size).to(torch.uint8)
    largest, scale, _, _ = _compare(base, here, there, pictures, dtype)
    for name, data in held_out:
        position = {label: place for place, label in enumerate(names)}
        truth = torch.tensor([position.get(label, -1) for label in data.labels])[data.test.labels]
        difference, size, ours, theirs = _compare(base, here, there, data.test.pixels, dtype)
        largest, scale = max(largest, difference), max(scale, size)
        scores[name] = tuple(float((answer == truth).float().mean()) for answer in (ours, theirs))
    allowed = 0.01 if dtype == torch.float32 else rounded_scores(len(data.test) for _, data in held_out)
    found = cast("dict[str, tuple[float, float]]", scores)
    return ExportCheck(largest, _TOLERANCE[dtype] * max(10.0, scale), found, allowed)


def _compare(
    base: LoadedVit, here: nn.Module, there: nn.Module, pixels: Pixels, dtype: torch.dtype
) -> tuple[float, float, Tensor, Tensor]:
    """Return the largest logit difference, the largest logit and both networks' answers, on the CPU."""
    largest, scale, ours, theirs = 0.0, 0.0, [], []
    count = -(-pixels.shape[0] // _CHUNK)
    for chunk in base.runtime.reporter.track(pixels.split(_CHUNK), "Checking the export", count):
        images = base.preprocessing.normalise(chunk.to(base.runtime.device))
        a, b = here(images).float(), there(images.to(dtype)).float()
        largest, scale = max(largest, float((a - b).abs().max())), max(scale, float(a.abs().max()))
        ours.append(a.argmax(dim=1).cpu())
        theirs.append(b.argmax(dim=1).cpu())
    return largest, scale, torch.cat(ours), torch.cat(theirs)


def _reload_merged(out: Path) -> nn.Module:
    import timm

    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    from safetensors import safe_open

    with safe_open(out / "model.safetensors", framework="pt") as stored:
        dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    return model.to(dtype).eval()


def _reload_adapter(base: LoadedVit, out: Path, classes: int) -> nn.Module:
    from peft import PeftModel

    if not (out / "adapter_model.safetensors").is_file():
        raise UsageError(f"{out} holds no adapter.")
    return cast("nn.Module", PeftModel.from_pretrained(cast("Any", base.fresh_vit(classes)), str(out)).eval())


def _with_update(vit: nn.Module, weights: adapters.AdapterWeights) -> nn.Module:
    """Add an adapter's update to the weights themselves."""
    for index, layer in enumerate(weights.layers):
        weight = cast("nn.Linear", vit.get_submodule(layer)).weight
        weight += weights.update(index).to(weight.device)
    return vit.eval()
