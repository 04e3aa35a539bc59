"""An export that answers as ``routed`` does: base, adapters, router and heads, with a loader that needs no treelora.

Routed answers come from a router, several heads and some of many adapters, which no single network holds. They are
written as safetensors and JSON beside ``predict.py``, which is the module ``standalone`` word for word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treelora_backends.routed_files import check_loader, write_routed
from treelora_backends.vit.branch_answers import BRANCHES_ASKED, BranchAnswers
from treelora_backends.vit.decoding import Pixels
from treelora_backends.vit.export import model_config, save_stock
from treelora_backends.vit.images import images_at_once
from treelora_backends.vit.predictor import ADAPTER_SHARE, ANCHOR_SHARPNESS, TASKS_ASKED, VitPredictor
from treelora_backends.vit.shared_head import SharedHead, class_names, class_of_column, columns_of
from treelora_cli.backend import adapters
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory
from treelora_cli.heads.two_views import FROZEN_SHARE

if TYPE_CHECKING:
    from treelora_backends.vit.images import ImageTask
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_backends.vit.standalone import Routed
    from treelora_cli.backend.contract import TaskData

_TOLERANCE = 1e-3
"""Allowed difference of a class's probability."""
_FORMAT = 1
_LOADER = Path(__file__).with_name("standalone.py")
_CARD = """---
library_name: timm
pipeline_tag: image-classification
base_model: {base}
tags: [image-classification, lora, treelora]
---
# {count} tasks on {architecture}, routed

The frozen base (`base/`, a timm model), {adapters} LoRA adapters (`adapters/`, PEFT directories), a router and the
tasks' heads (`router.safetensors`, `routed.json`), made with treelora. They answer with {classes} classes of
{count} tasks, without being told the task: {names}.

`python predict.py IMAGE...` answers with stock timm, peft and safetensors; from Python:
`Routed("PATH").answer([PIL.Image.open("photo.jpg")])`. Images of 8 bits, preprocessed as `base/config.json` says.
"""


class RoutedExport:
    """Meets ``FurtherExport``.

    Args:
        base: The loaded network.
    """

    def __init__(self, base: LoadedVit) -> None:
        self.base = base

    def write(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write base, adapters, router, heads and loader."""
        _save_base(self.base, out / "base")
        places = _save_adapters(self.base, memory, out)
        columns = columns_of(memory)
        tensors, facts = _router(self.base, memory)
        names = class_names(columns)
        shared = self.base.config.tree.branch != "never"
        if not shared:
            tensors |= _task_heads(memory)
        document: dict[str, Any] = {
            "format": _FORMAT,
            "labels": names,
            "tasks": [
                {"name": task.name, "adapter": place, "labels": list(task.labels), "asked": not shared}
                for task, place in zip(memory.tasks, places, strict=True)
            ],
            "adapters": list(dict.fromkeys(places)),
            "columns": [
                [one.task, label] for one, label in zip(columns, class_of_column(columns).tolist(), strict=True)
            ],
            "first_block": self.base.trunk.first_feature,
            "sharpness": ANCHOR_SHARPNESS,
            "tasks_asked": TASKS_ASKED,
            "adapter_share": ADAPTER_SHARE,
            "branches": [],
            **facts,
        }
        if shared:
            more, branches = _branches(self.base, memory, places)
            tensors |= more
            document |= branches
        write_routed(out, {key: one.cpu() for key, one in tensors.items()}, document, _LOADER)
        card = _CARD.format(
            base=Path(str(self.base.config.base.model)).name,
            architecture=self.base.facts["architecture"],
            count=len(memory.tasks),
            adapters=len(document["adapters"]),
            classes=len(names),
            names=", ".join(names),
        )
        (out / "README.md").write_text(card, encoding="utf-8")

    def load_line(self, out: Path) -> str:
        """Return the command that answers with it."""
        return f"python {out}/predict.py IMAGE..."

    @torch.no_grad()
    def check(self, memory: Memory, out: Path, held_out: Sequence[tuple[str, TaskData]]) -> ExportCheck:
        """Load it by its own loader and compare probabilities and answers with the project's."""
        loaded = load_standalone(out, self.base.runtime.device)
        ours = VitPredictor(self.base, memory, "routed")
        largest = _preprocessing_difference(self.base, loaded)
        probe = torch.linspace(0, 255, 8 * 3 * self.base.preprocessing.size[0] * self.base.preprocessing.size[1])
        difference, _, _ = _compared(ours, loaded, probe.reshape(8, 3, *self.base.preprocessing.size).to(torch.uint8))
        largest = max(largest, difference)
        scores, same, count = {}, 0, 0
        for name, task in held_out:
            data = cast("ImageTask", task)
            position = {label: place for place, label in enumerate(loaded.labels)}
            truth = torch.tensor([position.get(label, -1) for label in data.labels])[data.test.labels]
            difference, one, other = _compared(ours, loaded, data.test.pixels)
            largest = max(largest, difference)
            scores[name] = (float((one == truth).float().mean()), float((other == truth).float().mean()))
            same, count = same + int((one == other).sum()), count + len(one)
        return ExportCheck(largest, _TOLERANCE, scores, same=(same, count), measured="difference of probabilities")


def load_standalone(out: Path, device: torch.device) -> Routed:
    """Load an export by its loader; the file in ``out`` is compared with this package's, which is what runs.

    Raises:
        CheckError: Somebody else wrote there.
    """
    from treelora_backends.vit.standalone import Routed

    check_loader(out, _LOADER)
    return Routed(out, str(device))


def _save_base(base: LoadedVit, out: Path) -> None:
    save_stock(base, base.fresh_vit(0).to("cpu"), out, model_config(base, 0))


def _save_adapters(base: LoadedVit, memory: Memory, out: Path) -> list[str]:
    config = adapters.peft_config(base.network, Path(str(base.config.base.model)).name)
    return adapters.save_each([(task.name, task.adapter()) for task in memory.tasks], config, out)


def _router(base: LoadedVit, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the router's features and its solved head."""
    shared = SharedHead.restore(memory.shared(), base.trunk, base.config, base.runtime)
    assert shared.features is not None
    plain, solved = shared.features.plain, shared.features.solved
    tensors = {"mean": plain.mean, "scale": plain.scale}
    facts: dict[str, Any] = {}
    if plain.projection.shape[1]:
        tensors["projection"] = plain.projection
    if solved is not None:
        own = {"axes": solved.axes, "means": solved.means, "scales": solved.scales, "projection": solved.projection}
        tensors |= {f"token.{key}": one for key, one in own.items()}
        facts["first_random"] = solved.first
    head = shared.solve_(memory)
    return {**tensors, "weight": head.weight, "bias": head.bias}, facts


def _task_heads(memory: Memory) -> dict[str, Tensor]:
    """Return the heads that go with the tasks' own adapters."""
    found: dict[str, Tensor] = {}
    for index, task in enumerate(memory.tasks):
        tensors = task.tensors()
        found |= {f"task.{index}.{part}": tensors[f"head.{part}"] for part in ("weight", "bias")}
    return found


def _branches(base: LoadedVit, memory: Memory, places: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the heads of the branches."""
    task_of = torch.tensor([column.task for column in columns_of(memory)], device=base.runtime.device)
    answers = BranchAnswers(base, memory, task_of)
    tensors: dict[str, Tensor] = {}
    branches: list[dict[str, Any]] = []
    for index, name in enumerate(answers.names):
        if name is None:
            branches.append({"name": None, "adapter": None})
            continue
        solved = answers.solved(name)
        features, head = solved.features, solved.head
        own = {"mean": features.mean, "scale": features.scale, "weight": head.weight, "bias": head.bias}
        tensors |= {f"branch.{index}.{key}": one for key, one in own.items()}
        tensors |= {"branch.projection": features.projection, "branch.columns": answers.settings.columns}
        opener = next(place for task, place in zip(memory.tasks, places, strict=True) if task.branch == name)
        branches.append({"name": name, "adapter": opener, "sharpness": solved.sharpness})
    return tensors, {
        "branches": branches,
        "branch_of": [answers.names.index(task.branch) for task in memory.tasks],
        "branches_asked": BRANCHES_ASKED,
        "frozen_share": FROZEN_SHARE,
    }


# -- check ----------------------------------------------------------------------------------------


def _compared(ours: VitPredictor, theirs: Routed, pixels: Pixels) -> tuple[float, Tensor, Tensor]:
    """Return the largest difference of a probability, and both answers, on the CPU."""
    largest, answers = 0.0, ([torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)])
    for chunk in pixels.split(images_at_once(ours.device)):
        images = ours.base.preprocessing.normalise(chunk.to(ours.device))
        one, other = ours.class_scores(images)[0].softmax(dim=1), theirs.scores(images)[0].softmax(dim=1)
        largest = max(largest, float((one - other).abs().max()))
        for found, chances in zip(answers, (one, other), strict=True):
            found.append(chances.argmax(dim=1).cpu())
    return largest, torch.cat(answers[0]), torch.cat(answers[1])


def _preprocessing_difference(base: LoadedVit, loaded: Routed) -> float:
    """Return by how much the loader's input of a picture differs from the project's."""
    from PIL import Image

    height, width = base.preprocessing.size
    shades = torch.linspace(0, 255, (height + 9) * (width + 5) * 3).reshape(height + 9, width + 5, 3)
    picture = Image.fromarray(shades.to(torch.uint8).numpy())
    ours = base.preprocessing.normalise(torch.from_numpy(base.preprocessing.resized(picture))[None])[0]
    return float((ours - loaded.transform(picture)).abs().max())
