"""Answer images as the project did that wrote this directory, with timm, peft and safetensors.

::

    python predict.py photo.jpg ...

    from predict import Routed
    answers = Routed("DIRECTORY").answer([PIL.Image.open("photo.jpg")])

Nothing of treelora is needed. The frozen base sees an image and its mirror image; a linear router on what its last
blocks show says how likely each (task, class) is; the adapters of the likeliest tasks, or of the branches that tasks
share, then say which of their classes it is, and both opinions are multiplied.

Symbols: ``B`` images, ``K`` columns, one for each task and class, ``F`` features, ``C`` width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import timm
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.nn import functional

_TRANSPARENT = ("RGBA", "RGBa", "LA", "La", "PA")
_NEAR_WHITE = 224
"""A drawing of one colour is on white unless it is this bright, of 255."""


class Routed:
    """Base, adapters, router and heads of one export.

    Args:
        folder: The directory that holds this file.
        device: Where to compute.
    """

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        self.folder = Path(folder).resolve()
        self.device = torch.device(device)
        self.config: dict[str, Any] = json.loads((self.folder / "routed.json").read_text(encoding="utf-8"))
        self.labels: list[str] = self.config["labels"]
        self.tasks: list[str] = [task["name"] for task in self.config["tasks"]]
        self.tensors = load_file(self.folder / "router.safetensors", device=device)
        vit = timm.create_model(f"local-dir:{self.folder / 'base'}", pretrained=True, num_classes=0)
        self.transform: Any = create_transform(**resolve_model_data_config(vit), is_training=False)
        self.vit: Any = vit.to(self.device).eval()
        self.network: Any = None
        for path in self.config["adapters"]:
            where = str(self.folder / path)
            if self.network is None:
                self.network = PeftModel.from_pretrained(cast("Any", vit), where, adapter_name=_named(path)).eval()
            else:
                self.network.load_adapter(where, adapter_name=_named(path))
        columns = torch.tensor(self.config["columns"], device=self.device)
        self.task_of, self.label_of = columns[:, 0], columns[:, 1]

    def answer(self, images: list[Any], count: int = 32) -> list[dict[str, Any]]:
        """Return label, probability and likeliest task of PIL images, ``count`` at a time."""
        answers = []
        for start in range(0, len(images), count):
            inputs = torch.stack([self.transform(_as_rgb(one)) for one in images[start : start + count]])
            scores, tasks = self.scores(inputs.to(self.device))
            sure, best = scores.softmax(dim=1).max(dim=1)
            for label, chance, task in zip(best.tolist(), sure.tolist(), tasks.tolist(), strict=True):
                answers.append({"label": self.labels[label], "probability": chance, "task": self.tasks[task]})
        return answers

    @torch.no_grad()
    def scores(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the labels (B, labels) and the likeliest task (B,) of normalised images."""
        views = images, images.flip(-1)
        with self.network.disable_adapter():
            seen = [self._features(view) for view in views]
        router = sum(self._router(*one) for one in seen) / len(views)
        columns = (self.config["sharpness"] * router).log_softmax(dim=1)  # (B, K)
        if self.config["branches"]:
            self._ask_branches(columns, views, [layered for layered, _ in seen])
        tasks = self._ask_tasks(columns, images)
        return _by_group(columns, self.label_of, len(self.labels)), tasks

    # -- the frozen base ------------------------------------------------------------------------------

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the last blocks show (B, F), and the first token after the last of them (B, C)."""
        seen: list[Tensor] = []
        last = self.vit.blocks[self.config["first_block"] :]
        hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in last]
        try:
            self.vit.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        parts = [_summary(tokens[:, getattr(self.vit, "num_prefix_tokens", 0) :]) for tokens in seen]
        if getattr(self.vit, "cls_token", None) is not None:
            parts.append(_normalised(seen[-1][:, 0]))
        return torch.cat(parts, dim=1), seen[-1][:, 0].float()

    def _router(self, layered: Tensor, token: Tensor) -> Tensor:
        """Return the router's scores of every column, (B, K)."""
        held = self.tensors
        z = (layered - held["mean"]) / held["scale"]
        parts = [z]
        if "projection" in held:
            parts.append(functional.gelu(z @ held["projection"]))
        if "token.projection" in held:
            parts.append(self._of_token(token))
        return torch.cat(parts, dim=1) @ held["weight"].T + held["bias"]

    def _of_token(self, token: Tensor) -> Tensor:
        """Return random features of the first token under the activation of the base's own MLPs."""
        held, first = self.tensors, self.config["first_random"]
        z = _normalised(token)
        z = z - (z @ held["token.axes"]) @ held["token.axes"].T
        z = z - z.mean(dim=-1, keepdim=True)
        length = z.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        parts = z, z * (z.shape[-1] ** 0.5 / length)
        one, other = (
            (part - mean) / scale
            for part, mean, scale in zip(parts, held["token.means"], held["token.scales"], strict=True)
        )
        weight = held["token.projection"]
        drawn = torch.cat([one @ weight[:first].T, other @ weight[first:].T], dim=1)
        return cast("Tensor", self.vit.blocks[-1].mlp.act(drawn))

    # -- adapters -------------------------------------------------------------------------------------

    def _ask_tasks(self, columns: Tensor, images: Tensor) -> Tensor:
        """Multiply in what the adapters of each image's likeliest tasks say; returns the likeliest task, (B,)."""
        by_task = _by_group(columns, self.task_of, len(self.tasks))
        asked = by_task.topk(min(self.config["tasks_asked"], len(self.tasks)), dim=1).indices
        for task in asked.unique().tolist():
            if not self.config["tasks"][task]["asked"]:
                continue
            rows = (asked == task).any(dim=1).nonzero().squeeze(1)
            own = (self.task_of == task).nonzero().squeeze(1)
            self.network.set_adapter(_named(self.config["tasks"][task]["adapter"]))
            pooled = self.vit.forward_head(self.vit.forward_features(images[rows]), pre_logits=True).float()
            opinion = pooled @ self.tensors[f"task.{task}.weight"].T + self.tensors[f"task.{task}.bias"]
            inside = columns[rows][:, own] - by_task[rows, task][:, None]
            fused = (inside + self.config["adapter_share"] * opinion.log_softmax(dim=1)).log_softmax(dim=1)
            columns[rows[:, None], own[None, :]] = fused + by_task[rows, task][:, None]
        return asked[:, 0]

    def _ask_branches(self, columns: Tensor, views: tuple[Tensor, Tensor], frozen: list[Tensor]) -> None:
        """Put in what the heads of each image's likeliest branches say, which see it with and without adapter."""
        branches = self.config["branches"]
        branch_of = torch.tensor(self.config["branch_of"], device=self.device)[self.task_of]
        by_branch = _by_group(columns, branch_of, len(branches))
        top = by_branch.topk(min(self.config["branches_asked"], len(branches)), dim=1)
        for sure, place in zip(top.values.T, top.indices.T, strict=True):
            open_still = sure >= columns.max(dim=1).values  # a branch less likely than a class cannot hold the answer
            for index in place[open_still].unique().tolist():
                if branches[index]["adapter"] is not None:
                    rows = (open_still & (place == index)).nonzero().squeeze(1)
                    own = (branch_of == index).nonzero().squeeze(1)
                    inside = columns[rows][:, own] - by_branch[rows, index][:, None]
                    opinion = self._branch_opinion(index, rows, views, frozen)
                    fused = (opinion + self.config["frozen_share"] * inside).log_softmax(dim=1)
                    columns[rows[:, None], own[None, :]] = fused + by_branch[rows, index][:, None]

    def _branch_opinion(self, index: int, rows: Tensor, views: tuple[Tensor, Tensor], frozen: list[Tensor]) -> Tensor:
        """Return log-probabilities of a branch's columns for some images, (n, own)."""
        branch, read = self.config["branches"][index], self.tensors["branch.columns"]
        self.network.set_adapter(_named(branch["adapter"]))
        scores = []
        for view, plain in zip(views, frozen, strict=True):
            both = torch.cat([plain[rows][:, read], self._features(view[rows])[0][:, read]], dim=1)
            scores.append(self._branch_head(index, both) / len(views))
        opinion: Tensor = (branch["sharpness"] * torch.stack(scores).sum(dim=0)).log_softmax(dim=1)
        return opinion

    def _branch_head(self, index: int, features: Tensor) -> Tensor:
        """Return a branch's scores of its columns from what is read of both views' features."""
        own = f"branch.{index}"
        z = (features - self.tensors[f"{own}.mean"]) / self.tensors[f"{own}.scale"]
        drawn = functional.gelu(z @ self.tensors["branch.projection"])
        return torch.cat([z, drawn], dim=1) @ self.tensors[f"{own}.weight"].T + self.tensors[f"{own}.bias"]


def _as_rgb(image: Any) -> Any:
    """Return a PIL image without its transparency; where that alone holds the drawing, on white, or else black."""
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    *colours, (least, most) = image.getextrema()
    if least == most or any(high > low for low, high in colours):
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, "white" if min(low for low, _ in colours) < _NEAR_WHITE else "black")
    return Image.alpha_composite(paper, image).convert("RGB")


def _named(path: str) -> str:
    """Return PEFT's name of the adapter in a directory; it may hold no dot."""
    return Path(path).name.replace(".", "_")


def _normalised(tokens: Tensor) -> Tensor:
    return functional.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


def _summary(patches: Tensor) -> Tensor:
    """Return mean and deviation of the normalised patches, (B, L, C) -> (B, 2C)."""
    patches = _normalised(patches)
    mean, count = patches.mean(dim=1), patches.shape[1]
    spread = (patches.square().sum(dim=1) - count * mean.square()).clamp(min=0)
    return torch.cat([mean, (spread / max(1, count - 1)).sqrt()], dim=1)


def _by_group(columns: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum probabilities of columns of the same group, in logarithms: (B, K) -> (B, groups)."""
    top = columns.max(dim=1, keepdim=True).values
    sums = torch.zeros(len(columns), groups, device=columns.device)
    sums.index_add_(1, group, (columns - top).exp())
    return sums.clamp(min=1e-30).log() + top


def main() -> None:
    """Answer the image files named on the command line."""
    from PIL import ImageOps

    if len(sys.argv) < 2:
        sys.exit("usage: python predict.py IMAGE...")
    model = Routed(Path(__file__).parent)
    for path in sys.argv[1:]:
        with Image.open(path) as image:
            found = model.answer([ImageOps.exif_transpose(image)])[0]
        print(f"{path}\t{found['label']}\t{found['probability']:.3f}\t{found['task']}")


if __name__ == "__main__":
    main()
