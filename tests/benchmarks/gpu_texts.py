"""Parts of ``gpu.py``: a language model's steps, whole tasks, answers and gradients, beside plain peft."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_parts import BYTES, SCRATCH, Bench, lm_config, new_project, random_llama, texts, word_tokenizer
from gpu_steps import learn, peft_steps, trainer_seconds, treelora_steps
from torch import Tensor


def causal_lm(bench: Bench, section: str, name: str, plans: tuple[tuple[int, bool], ...]) -> None:
    """A Llama: 200 examples with prompts of about 700 tokens, 2 epochs, at batch sizes of 4 and 16.

    Steps come first, treelora's and plain peft's, then whole tasks and the Trainer's: what is cut is the least needed.

    Args:
        bench: Device and table.
        section: Names the rows.
        name: The model's size.
        plans: Batch sizes, and whether whole tasks are learned at each.
    """
    count, prompt = (24, (20, 60)) if bench.dry else (200, (500, 900))
    dtype = torch.float32 if bench.dry else torch.bfloat16
    seconds, model = bench.timed(partial(random_llama, "tiny" if bench.dry else name, bench.device, dtype))
    size = sum(one.numel() * one.element_size() for one in model.parameters()) / BYTES
    bench.table.row(section, f"Llama {name}, random weights on the device", seconds=seconds, gib=size)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    files = [texts(folder / f"task-{seed}", seed, count, prompt) for seed in (1, 2)]
    configs = {batch: lm_config(bench, batch, epochs=2) for batch, _ in plans}
    model = steps_beside_peft(bench, section, model, files[0], configs)
    whole = {batch: configs[batch] for batch, wanted in plans if wanted}
    tasks_beside_trainer(bench, section, model, files, whole)


def opened(bench: Bench, model: Any, config: Any) -> Any:
    """A base around a model in memory."""
    from treelora_backends.causal_lm.backend import CausalLmBackend

    return CausalLmBackend.around(model, word_tokenizer(), "0" * 64, config, bench.runtime())


def with_peft(model: Any) -> Any:
    """The model under plain peft: queries and values of every block."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def steps_beside_peft(bench: Bench, section: str, model: Any, data: Path, configs: dict[int, Any]) -> Any:
    """Show steps at each batch size; returns the bare model."""
    from treelora_cli.backend.values import DataRequest

    base = opened(bench, model, next(iter(configs.values())))
    task = base.read_task(DataRequest(data))
    ours = {}
    for batch, config in configs.items():
        taking = partial(treelora_steps, bench, section, base, task, config, 4 if bench.dry else 40)
        ours[batch] = bench.part(section, f"treelora step, batch {batch}", 25, taking)
    bench.part(section, "free answers to held-out prompts", 20, partial(scoring, bench, section, base, task))
    model = with_peft(base.network.unload())
    for batch, found in ours.items():
        if found is None:
            continue
        seconds, peak, batches = found
        rows = [padded_rows([task.train[place] for place in places]) for places in batches]
        taking = partial(peft_steps, bench, section, model, rows, 1e-3, batch)
        theirs = bench.part(section, f"plain peft step, batch {batch}", 20, taking)
        if theirs is not None:
            share = peak / theirs[1] if theirs[1] else 0.0
            what = f"step, batch {batch}: treelora by plain peft"
            bench.table.row(section, what, time=seconds / theirs[0], peak=share)
    return model.unload()


def tasks_beside_trainer(bench: Bench, section: str, model: Any, files: list[Path], configs: dict[int, Any]) -> None:
    """Show whole tasks at each batch size, and what the Trainer takes for one."""
    from treelora_cli.backend.values import DataRequest

    base = opened(bench, model, next(iter(configs.values())))
    task = base.read_task(DataRequest(files[0]))
    data = [{"ids": np.concatenate([one.prompt, one.answer]), "prompt": len(one.prompt)} for one in task.train]
    ours: dict[int, list[float]] = {batch: [] for batch in configs}
    for batch, config in configs.items():
        learning = partial(tasks_of, bench, section, base, config, files, ours[batch])
        bench.part(section, f"whole tasks, batch {batch}", 60, learning)
    model = with_peft(base.network.unload())
    del base, learning
    for batch, totals in ours.items():
        held = bench.allocated()
        what = f"Trainer, all blocks, batch {batch}, a task"
        seconds = bench.part(section, what, 40, partial(trainer_seconds, bench, model, data, collated, batch, 2))
        if seconds is not None:
            share = {"treelora_share": totals[-1] / seconds} if totals else {}
            bench.table.row(section, what, seconds=seconds, peak_gib=bench.peak(held), **share)


def tasks_of(bench: Bench, section: str, base: Any, config: Any, files: list[Path], totals: list[float]) -> None:
    """Learn whole tasks, one after the other, in a project of their own; their seconds go to ``totals``."""
    from treelora_backends.causal_lm.backend import CausalLmBackend

    project = new_project(base, CausalLmBackend(), config)
    for number, path in enumerate(files, start=1):
        totals.append(learn(bench, section, base, project, path, f"task-{number}", config)["training"])


def gradient(bench: Bench) -> None:
    """The gradient of closed answers through whole texts and through the ends of prompts: what the project measures."""
    from treelora_backends.causal_lm import session as module

    from treelora_cli.backend import adapters
    from treelora_cli.backend.values import DataRequest, Memory

    size, dtype = ("tiny", torch.float32) if bench.dry else ("1B", torch.bfloat16)
    base = opened(bench, random_llama(size, bench.device, dtype), lm_config(bench, 4))
    base.runtime.compute_as({"precision": "fp32" if bench.dry else "bf16"})
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    for words in ((20, 30), (20, 60)) if bench.dry else ((40, 80), (500, 900)):
        task = base.read_task(DataRequest(texts(Path(tempfile.mkdtemp(dir=SCRATCH)) / "task", 1, 64, words)))
        for batch in (4, 16):
            session = base.session(task, Memory((), dict), lm_config(bench, batch))
            session.prepare()
            least: dict[str, float] = {}
            for _ in range(3):  # the first of each shape is the slowest
                for name, way in (("whole", module._WHOLE), ("divided", module._DIVIDED)):
                    session.take_gradient(way)
                    seconds, _ = bench.timed(lambda session=session: session.try_gradient(ups, longest=False))
                    least[name] = min(seconds, least.get(name, seconds))
            what = f"gradient of {words[0]} to {words[1]} tokens, batch {batch}"
            shown = {f"{name}_ms": 1000 * seconds for name, seconds in least.items()}
            bench.table.row("gradient", what, **shown, divided_by_whole=least["divided"] / least["whole"])


def padded_rows(examples: list[Any]) -> dict[str, Tensor]:
    """A batch as the Trainer sees it: padded to its own longest text."""
    return collated([{"ids": np.concatenate([one.prompt, one.answer]), "prompt": len(one.prompt)} for one in examples])


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad a batch on the right; labels are on the answers."""
    width = max(len(row["ids"]) for row in rows)
    ids = torch.ones(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(np.asarray(row["ids"], dtype=np.int64))
        ids[place, : len(tokens)], mask[place, : len(tokens)] = tokens, 1
        labels[place, row["prompt"] : len(tokens)] = tokens[row["prompt"] :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def scoring(bench: Bench, section: str, base: Any, task: Any) -> None:
    """Show how long free answers to 32 prompts take; random weights never end one before the most tokens."""
    from treelora_backends.causal_lm.answers import Answerer
    from treelora_backends.causal_lm.memory import describe

    try:
        from treelora_backends.causal_lm.answers import Manner

        base.network.eval()
        answerer = Answerer(base.lm, base.encoder, base.runtime)
        longest = int(describe(task)["answer.tokens"])
        manner = Manner(task.style, task.labels, False, longest)
        some = task.test[:32]
        seconds, answers = bench.timed(lambda: answerer.answers(some, manner, base.context))
        bench.table.row(
            section, "free answers to held-out prompts", seconds=seconds, most_new=longest, answers=len(answers)
        )
    except (TypeError, AttributeError, ImportError) as error:  # the package's own parts, which may have moved
        bench.table.row(section, "free answers to held-out prompts", failed=f"{type(error).__name__}: {error}")
