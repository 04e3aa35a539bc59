"""Parts of ``gpu.py``: whole tasks and single steps, of treelora and of plain peft."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts import SCRATCH, Bench
from torch import Tensor, nn


def learn(bench: Bench, section: str, base: Any, project: Any, data: Path, name: str, config: Any) -> dict[str, float]:
    """Learn a task through the project and show its phases; returns the seconds."""
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.learning.evaluation import Scored
    from treelora_cli.learning.task import learn_task
    from treelora_cli.project import Project

    held = bench.allocated()
    with Project.open(project.root).lock("benchmark") as locked:
        seconds, report = bench.timed(
            lambda: learn_task(
                locked, base, DataRequest(data), name, config, base.runtime, evaluate=Scored.NONE, resume=False
            )
        )
    kept = Project.open(project.root).task_record(name)["facts"].get("kept", {})
    outside = ("read", "evaluate", "commit")
    training = sum(value for phase, value in report.seconds.items() if phase not in outside)
    phases = {phase: round(value, 2) for phase, value in report.seconds.items() if value >= 0.005}
    bench.table.row(
        section,
        f"treelora, {name}, batch {config.train.batch_size}",
        seconds=training,
        total=seconds,
        steps=report.steps,
        **phases,
        peak_gib=bench.peak(held),
        kept=f"{kept.get('mib')} MiB, {kept.get('place')}",
        arithmetic=base.runtime.precision,
    )
    return report.seconds | {"training": training}


# -- steps -----------------------------------------------------------------------------------------


def shown_steps(
    bench: Bench, section: str, what: str, steps: list[tuple[tuple[int, ...], float]], peak: float
) -> float:
    """Show the steps, (shape, seconds) each; returns the median of those whose shape was seen before."""
    known: set[tuple[int, ...]] = set()
    first, later = [], []
    for shape, seconds in steps:
        (later if shape in known else first).append(seconds)
        known.add(shape)
    median = statistics.median(later or first)
    bench.table.row(
        section,
        what,
        ms=1000 * median,
        slowest_later=max(later or first) / median,
        first_of_shape_ms=1000 * statistics.median(first),
        shapes=len(known),
        steps=len(steps),
        peak_gib=peak,
    )
    return median


def treelora_steps(
    bench: Bench, section: str, base: Any, task: Any, config: Any, most: int, how: str = ""
) -> tuple[float, float, list[Any]]:
    """Take steps of one task one by one; returns the median, the peak and the batches; ``how`` ends the row's name."""
    from treelora_cli.backend.values import Memory
    from treelora_cli.learning.trainer import Trainer, TrainSettings
    from treelora_cli.methods.base import Unprotected

    held = bench.allocated()
    session = base.session(task, Memory((), dict), config)
    base.runtime.compute_as({"precision": "fp32" if bench.dry else "bf16"})
    session.prepare()
    from treelora_cli.backend import adapters

    slot = adapters.slot_parameters(base.network, base.layers)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
    trainer = Trainer(session, Unprotected(), slot, TrainSettings.of(config.train, 0), base.runtime)
    batches, steps = [], []
    for batch in trainer._remaining():
        seconds, _ = bench.timed(lambda batch=batch: trainer._guarded_step(batch))
        batches.append(batch)
        steps.append((shape_of(session, batch), seconds))
        if len(steps) == most:
            break
    peak = bench.peak(held)
    what = f"treelora step, batch {config.train.batch_size}" + (f", {how}" if how else "")
    median = shown_steps(bench, section, what, steps, peak)
    if not bench.dry:
        bench.part(section, "GPU busy", 20, lambda: busy_share(bench, section, trainer, session, median))
    return median, peak, batches


def shape_of(session: Any, batch: Any) -> tuple[int, ...]:
    """The shape of a batch on the device."""
    from treelora_backends.causal_lm.batches import width_for

    if isinstance(batch, tuple):
        return (len(batch[0]),)
    longest = max(session.lengths[place] for place in batch)
    few = session.compilation.mode is not None
    return len(batch), width_for(longest, session.base.lm.device, session.base.encoder.context, few=few)


def busy_share(bench: Bench, section: str, trainer: Any, session: Any, median: float) -> None:
    """Show for what share of some further steps the GPU works, and how many kernels a step launches."""
    from torch.profiler import ProfilerActivity, profile

    some = [batch for batch, _ in zip(session.batches(0), range(4), strict=False)]
    trainer._guarded_step(some[0])
    bench.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        start = time.perf_counter()
        for batch in some:
            trainer._guarded_step(batch)
        bench.wait()
        wall = time.perf_counter() - start
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    bench.table.row(
        section,
        "the same: GPU busy",
        share_under_profiler=busy / wall,
        share_of_median=busy / len(some) / median,
        kernels_a_step=len(events) / len(some),
    )


def peft_steps(bench: Bench, section: str, model: Any, made: list[Any], lr: float, size: int) -> tuple[float, float]:
    """Steps of plain peft as the Trainer takes them, on the same batches; returns the median and the peak."""
    held = bench.allocated()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=not bench.dry)
    model.train()
    steps = []
    for batch in made:

        def step(batch: Any = batch) -> None:
            given = {key: value.to(bench.device, non_blocking=True) for key, value in batch.items()}
            with torch.autocast(bench.device.type, dtype=torch.bfloat16, enabled=not bench.dry):
                loss = model(**given)["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        seconds, _ = bench.timed(step)
        steps.append((tuple(next(iter(batch.values())).shape[:2]), seconds))
    peak = bench.peak(held)
    return shown_steps(bench, section, f"plain peft step, all blocks, batch {size}", steps, peak), peak


def trainer_seconds(
    bench: Bench, model: nn.Module, data: Any, collator: Any, batch_size: int, epochs: int, workers: int = 0
) -> float:
    """Seconds of transformers' Trainer for one task."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(SCRATCH / "trainer"),
        per_device_train_batch_size=batch_size,
        num_train_epochs=epochs,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        bf16=not bench.dry,
        use_cpu=bench.dry,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
    )
    made = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    with contextlib.redirect_stdout(sys.stderr):
        return bench.timed(made.train)[0]


def output_layer(bench: Bench) -> None:
    """The loss behind a wide output layer and its gradient, of few positions and of many: treelora's and Liger's."""
    from treelora_backends.causal_lm.network.ahead import OutputLoss
    from treelora_backends.causal_lm.network.liger import fused_loss

    width, vocabulary, dtype = (64, 512, torch.float32) if bench.dry else (2048, 128_256, torch.bfloat16)
    head = nn.Linear(width, vocabulary, bias=False, device=bench.device, dtype=dtype).requires_grad_(False)
    ours = OutputLoss(lambda states: head(states).float(), None, bench.device, vocabulary)
    ways = {"treelora": lambda states, targets: ours(states, targets)}
    fused = fused_loss(head, bench.device)
    if fused is not None:
        ways["Liger"] = lambda states, targets: fused(states, targets, 0.0)
    for count in (64, 600, 4096):
        states = torch.randn(count, width, device=bench.device, dtype=dtype)
        targets = torch.arange(count, device=bench.device) % vocabulary
        for name, way in ways.items():

            def step(way: Any = way, states: Tensor = states, targets: Tensor = targets) -> Tensor:
                leaf = states.clone().requires_grad_()
                loss = way(leaf, targets)
                loss.backward()
                return loss.detach()

            step()
            held = bench.allocated()
            seconds, loss = bench.timed(step)
            what = f"{name}, {count} positions, {-(-count // ours.at_once)} chunks of ours"
            bench.table.row("output", what, ms=1000 * seconds, peak_gib=bench.peak(held), loss=float(loss))
    if fused is None:
        bench.table.row("output", "Liger", absent="not installed, or no CUDA")
