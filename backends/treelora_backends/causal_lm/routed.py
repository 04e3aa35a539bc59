"""An export that answers as ``routed`` does: adapters, router and heads, with a loader that needs no treelora.

Which task an input is from, heads solved on frozen states and one adapter a task make the score; no single model holds
them. They are written as safetensors and JSON beside ``predict.py``, which is the module ``standalone`` word for word.
The base itself is named, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treelora_backends.causal_lm.answers import Answer, Manner, sum_scores
from treelora_backends.causal_lm.card import write_card
from treelora_backends.causal_lm.closed import ClosedHead
from treelora_backends.causal_lm.loading import source_of
from treelora_backends.causal_lm.memory import common_manner, manner_of, system_of
from treelora_backends.causal_lm.modelfile import write_modelfile
from treelora_backends.causal_lm.network.layers import blocks_of
from treelora_backends.causal_lm.predictor import LmPredictor
from treelora_backends.causal_lm.router import TaskRouter
from treelora_backends.routed_files import check_loader, write_routed
from treelora_cli.backend import adapters
from treelora_cli.backend.values import ExportCheck, ExportOptions, Memory, Prediction, Turn, rounded_scores
from treelora_cli.errors import DataError

if TYPE_CHECKING:
    from treelora_backends.causal_lm.loaded import LoadedLm
    from treelora_backends.causal_lm.standalone import Routed
    from treelora_backends.causal_lm.task import LmTask
    from treelora_cli.backend.contract import TaskData
    from treelora_cli.data.examples import TextExample

_EXACT, _ROUNDED = 1e-3, 0.05
"""Allowed difference of a score or probability where everything is float32, and where the base is not."""
_FORMAT = 1
_LOADER = Path(__file__).with_name("standalone.py")
_USE = """
`python predict.py "a prompt"` answers with stock transformers, peft and safetensors; `--base` names the base where it
lies elsewhere than when this was written. From Python: `Routed("PATH").answer("a prompt")`, or a list of messages.
"""


class RoutedExport:
    """Meets ``FurtherExport``.

    Args:
        base: The loaded model.
    """

    def __init__(self, base: LoadedLm) -> None:
        self.base = base

    def write(self, memory: Memory, out: Path, options: ExportOptions) -> None:
        """Write adapters, router, heads, tokenizer and loader."""
        base = self.base
        places = _save_adapters(base, memory, out)
        tensors, tasks = _tasks(base, memory, places)
        document = {**_facts(base, memory), "tasks": tasks, "adapters": list(dict.fromkeys(places)), "floors": None}
        if len(memory.tasks) > 1:
            router = TaskRouter.restore(memory, base.config)
            weight, bias = router.folded(memory)
            tensors |= {"router.weight": weight, "router.bias": bias}
            floors = router.thresholds(memory)
            document["floors"] = None if floors is None else floors.tolist()
        write_routed(out, {key: one.float() for key, one in tensors.items()}, document, _LOADER)
        base.tokenizer.save_pretrained(out / "tokenizer")
        content = f"LoRA adapters of {len(memory.tasks)} tasks, the router that chooses among them and the tasks' heads"
        for place, name in {place: task.name for task, place in zip(memory.tasks, places, strict=True)}.items():
            write_modelfile(base, [one for one in memory.tasks if one.name == name], out / place, adapter=True)
        write_card(base, content, _USE, memory.tasks, out, lora=True)

    def load_line(self, out: Path) -> str:
        """Return the command that answers with it."""
        return f'python {out}/predict.py "a prompt"'

    def check(self, memory: Memory, out: Path, held_out: Sequence[tuple[str, TaskData]]) -> ExportCheck:
        """Load it by its own loader and compare scores of tasks, probabilities and answers with the project's."""
        loaded = load_standalone(out, self.base.runtime.device)
        ours = LmPredictor(self.base, memory, "routed")
        largest, same, count = 0.0, 0, 0
        scores, counts = {}, []
        for name, task in held_out:
            data = cast("LmTask", task)
            pairs = [(one, *pair) for one in data.test if (pair := _answered(ours, loaded, one)) is not None]
            for _, here, there in pairs:
                largest = max(largest, _difference(here, there))
                same += here.output == there["output"] and here.task == there["task"]
            count += len(pairs)
            metric = next(one.metric for one in memory.tasks if one.name == name)
            if pairs and metric != "token_accuracy":
                examples = [one for one, *_ in pairs]
                counts.append(len(pairs))
                scores[name] = (
                    _mean_score(examples, [(here.output, None) for _, here, _ in pairs], metric),
                    _mean_score(examples, [(str(there["output"]), None) for *_, there in pairs], metric),
                )
        exact = (self.base.config.base.dtype or "float32") == "float32"
        allowed, moved = (_EXACT, 0.01) if exact else (_ROUNDED, rounded_scores(counts))
        return ExportCheck(
            largest, allowed, scores, moved, measured="difference of probabilities", same=(same, count)
        )  # fmt: skip


def load_standalone(out: Path, device: torch.device) -> Routed:
    """Load an export by its loader; the file in ``out`` is compared with this package's, which is what runs.

    Raises:
        CheckError: Somebody else wrote there.
    """
    from treelora_backends.causal_lm.standalone import Routed

    check_loader(out, _LOADER)
    return Routed(out, None, str(device))


def _facts(base: LoadedLm, memory: Memory) -> dict[str, Any]:
    """Return what the loader must know of the base and of the way texts are written."""
    encoder, source = base.encoder, source_of(str(base.config.base.model))
    try:
        form = encoder.template.form
    except DataError:  # a template that writes no chat, so that none was learned
        form = None
    return {
        "format": _FORMAT,
        "base": {
            "name": source.name,
            "gguf": source.gguf,
            "dtype": base.config.base.dtype or "float32",
            "model_args": base.config.base.model_args,
        },
        "common": _manner(common_manner(memory)),
        "blocks": _path_of_blocks(base.lm.model),
        "read_blocks": base.lm.read_blocks,
        "max_length": encoder.max_length,
        "context": base.context,
        "end_ids": list(encoder.end_ids),
        "stop_ids": list(encoder.stop_ids),
        "pad_id": encoder.pad_id,
        "start_id": encoder.start_id,
        "has_template": encoder.has_template,
        "takes_system": encoder.template.takes_system,
        "takes_parts": encoder.template.takes_parts,
        "only_asked": form.only_asked if form else "",
        "opening": form.opening if form else "",
    }


def _save_adapters(base: LoadedLm, memory: Memory, out: Path) -> list[str]:
    config = adapters.peft_config(base.network, source_of(str(base.config.base.model)).name)
    return adapters.save_each([(task.name, task.adapter()) for task in memory.tasks], config, out)


def _tasks(base: LoadedLm, memory: Memory, places: Sequence[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of the tasks' solved heads, and how each task is asked."""
    tensors: dict[str, Tensor] = {}
    found = []
    for index, (task, place) in enumerate(zip(memory.tasks, places, strict=True)):
        manner = manner_of(task)
        solved = base.config.head.closed == "solved" and manner.by_label
        head = ClosedHead.from_tensors(task.tensors()) if solved else None
        if head is not None:
            tensors |= {f"closed.{index}.weight": head.head.weight, f"closed.{index}.bias": head.head.bias}
        more = {"system": system_of(task), "sharpness": None if head is None else head.sharpness}
        found.append({"name": task.name, "adapter": place, **_manner(manner), **more})
    return tensors, found


def _manner(manner: Manner) -> dict[str, Any]:
    return asdict(manner) | {"labels": list(manner.labels)}


def _path_of_blocks(model: Any) -> str:
    blocks = blocks_of(model)
    return next(str(path) for path, module in model.named_modules() if module is blocks)


# -- check ----------------------------------------------------------------------------------------


def _answered(ours: LmPredictor, theirs: Routed, one: TextExample) -> tuple[Prediction, dict[str, Any]] | None:
    """Return the project's and the loader's answer to one input; ``None`` where it does not fit the context."""
    turns = one.turns
    given: str | tuple[Turn, ...] = turns or one.content
    messages: Any = [turn.fields() for turn in turns] if turns else one.content
    try:
        here = ours.predict([given])[0]
    except DataError:
        return None
    return here, theirs.answer(messages)


def _difference(here: Prediction, there: dict[str, Any]) -> float:
    """Return the largest difference of the probabilities of answer and task."""
    found = [0.0]
    if here.confidence is not None and there["probability"] is not None and here.output == there["output"]:
        found.append(abs(here.confidence - there["probability"]))
    if here.task_confidence is not None and there["task_scores"] is not None:
        shares = torch.tensor(there["task_scores"]).clamp(min=0, max=1)
        found.append(abs(here.task_confidence - float(shares.max() / shares.sum().clamp(min=1e-6))))
    return max(found)


def _mean_score(examples: Sequence[TextExample], answers: Sequence[Answer], metric: str) -> float:
    total, count = sum_scores(examples, answers, metric)
    return total / max(1.0, count)
