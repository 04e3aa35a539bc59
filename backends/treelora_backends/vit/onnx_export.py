"""The merged network as one ONNX file, written by torch's exporter and compared under onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treelora_backends.vit.decoding import Pixels
from treelora_backends.vit.export import merged_content, model_config
from treelora_backends.vit.single import SingleNetwork
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_backends.vit.images import ImageTask
    from treelora_backends.vit.loaded import LoadedVit
    from treelora_cli.backend.contract import TaskData

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_FILE = "model.onnx"
_TOLERANCE = 1e-4
"""Largest logit difference, as a share of the largest logit (at least 10)."""
_CHUNK = 64
_MOST_IMAGES = 2**31 - 1
_CARD = """---
library_name: onnx
pipeline_tag: image-classification
base_model: {base}
tags: [image-classification, treelora, onnx]
---
# {architecture}, merged by treelora, as ONNX

A vision transformer: {content}, and one linear head over {classes} classes of {tasks} tasks: {names}.

`model.onnx` takes `images`, float32 (batch, 3, {height}, {width}), any batch size, and gives `logits`,
(batch, {classes}). `labels.json` names the classes in order, `preprocessing.json` holds what follows.

Preprocessing: an RGB image of 8 bits is resized so that its shorter side is 1 / {crop_pct} of the input's
({interpolation}, crop mode `{crop_mode}`), cropped in the middle, divided by 255, then normalised by mean {mean} and
deviation {std}. In Python: `timm.data.create_transform(**json.load(open("preprocessing.json")))`.

```python
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(None, {{"images": images}})[0]
```
"""


class OnnxExport:
    """Meets ``FurtherExport``.

    Args:
        base: The loaded network.

    Raises:
        UsageError: A package is missing.
    """

    def __init__(self, base: LoadedVit) -> None:
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"--format onnx needs {', '.join(missing)}. Run: pip install 'treelora[onnx]'")
        self.base = base

    @torch.no_grad()
    def write(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write network, labels, preprocessing and card.

        Raises:
            UsageError: torch cannot export this architecture.
        """
        network = SingleNetwork(self.base, memory, "merged")
        vit = network.vit.to("cpu").eval()
        images = torch.zeros(2, 3, *self.base.preprocessing.size)
        batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
        try:
            with _quiet():
                program = torch.onnx.export(
                    vit,
                    (images,),
                    dynamo=True,
                    verbose=False,
                    input_names=["images"],
                    output_names=["logits"],
                    dynamic_shapes=({0: batch},),
                )
        except Exception as error:  # the exporter raises many kinds for operations that it does not know
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UsageError(f"torch cannot write {self.base.facts['architecture']} as ONNX ({line}).") from error
        assert program is not None
        program.save(str(out / _FILE))
        self._describe(network.names, len(cast("Any", vit).blocks), memory, out)

    def _describe(self, names: Sequence[str], blocks: int, memory: Memory, out: Path) -> None:
        config = model_config(self.base, len(names))
        preprocessing = {key: value for key, value in config.items() if key != "num_classes"}
        (out / "labels.json").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "preprocessing.json").write_text(json.dumps(preprocessing, indent=1) + "\n", encoding="utf-8")
        height, width = self.base.preprocessing.size
        card = _CARD.format(
            base=Path(str(self.base.config.base.model)).name,
            architecture=self.base.facts["architecture"],
            content=merged_content(self.base, blocks, len(memory.tasks)),
            classes=len(names),
            names=", ".join(names),
            tasks=len(memory.tasks),
            height=height,
            width=width,
            **{key: preprocessing[key] for key in ("crop_pct", "crop_mode", "interpolation")},
            **{key: [round(one, 4) for one in preprocessing[key]] for key in ("mean", "std")},
        )
        (out / "README.md").write_text(card, encoding="utf-8")

    def load_line(self, out: Path) -> str:
        """Return the line that loads it."""
        return f"onnxruntime.InferenceSession('{out}/{_FILE}')"

    @torch.no_grad()
    def check(self, memory: Memory, out: Path, held_out: Sequence[tuple[str, TaskData]]) -> ExportCheck:
        """Run it under onnxruntime, in batches of several sizes, and compare with the network in memory."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(out / _FILE), providers=["CPUExecutionProvider"])
        network = SingleNetwork(self.base, memory, "merged")
        network.to("cpu")
        probe = torch.linspace(0, 255, 7 * 3 * self.base.preprocessing.size[0] * self.base.preprocessing.size[1])
        pictures = probe.reshape(7, 3, *self.base.preprocessing.size).to(torch.uint8)
        largest, scale, scores = 0.0, 10.0, {}
        for pixels in (pictures[:1], pictures[:3], pictures):
            difference, size, _, _ = self._compared(network, session, pixels)
            largest, scale = max(largest, difference), max(scale, size)
        for name, task in held_out:
            data = cast("ImageTask", task)
            position = {label: place for place, label in enumerate(network.names)}
            truth = torch.tensor([position.get(label, -1) for label in data.labels])[data.test.labels]
            difference, size, ours, theirs = self._compared(network, session, data.test.pixels)
            largest, scale = max(largest, difference), max(scale, size)
            scores[name] = (float((ours == truth).float().mean()), float((theirs == truth).float().mean()))
        return ExportCheck(largest, _TOLERANCE * scale, scores)

    def _compared(self, network: SingleNetwork, session: Any, pixels: Pixels) -> tuple[float, float, Tensor, Tensor]:
        """Return the largest logit difference, the largest logit and both answers."""
        largest, scale, ours, theirs = 0.0, 0.0, [], []
        for chunk in pixels.split(_CHUNK):
            images = self.base.preprocessing.normalise(chunk)
            one, other = network(images), torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
            largest, scale = max(largest, float((one - other).abs().max())), max(scale, float(one.abs().max()))
            ours.append(one.argmax(dim=1))
            theirs.append(other.argmax(dim=1))
        return largest, scale, torch.cat(ours), torch.cat(theirs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own lines and warnings from the user."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
