"""What a borrowed GPU can show in six minutes: treelora's phases and steps beside plain peft, at real sizes.

    python tests/benchmarks/gpu.py [--sections equal,places,vit,...] [--seconds 330] [--dry-run]

Random weights, no network, no files but its own. Every row is printed as soon as it is measured, and kept in
``$OUT/gpu.json`` where OUT is set; a section that fails or runs out of its time leaves the others' rows. ``--dry-run``
does all of it with tiny models on the CPU. The package need not be installed.

The reference is transformers' Trainer with peft on every block, in bf16, at the same batch size.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_parts import (
    SCRATCH,
    Bench,
    Table,
    image_task,
    limited,
    lm_config,
    new_project,
    random_llama,
    random_vit,
    texts,
    word_tokenizer,
)
from gpu_steps import learn, output_layer, peft_steps, trainer_seconds, treelora_steps
from gpu_texts import causal_lm, gradient
from torch import Tensor, nn

# -- sections --------------------------------------------------------------------------------------


def equal(bench: Bench) -> None:
    """Losses of an epoch and features on the device beside the CPU's, small models in float32."""
    from treelora_backends.causal_lm.backend import CausalLmBackend
    from treelora_backends.vit.backend import VitBackend

    from treelora_cli.backend import adapters
    from treelora_cli.backend.values import DataRequest, Memory
    from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    data = texts(SCRATCH / "equal", 1, 24, (20, 60))
    found: dict[str, list[Any]] = {"vit": [], "causal-lm": []}
    for where in ("cpu", None):
        runtime = bench.runtime(where)
        config = dataclasses.replace(lm_config(bench, 4, epochs=1, prompt_tail=0))
        config = dataclasses.replace(config, base=dataclasses.replace(config.base, dtype="float32"))
        model = random_llama("tiny", torch.device("cpu"), torch.float32).to(runtime.device)
        lm = CausalLmBackend.around(model, word_tokenizer(), "0" * 64, config, runtime)
        vit_flags = Config(base=BaseConfig(model="embedded"), train=TrainConfig(epochs=1, batch_size=16))
        vit_config = resolve(vit_flags, Config(), VitBackend().defaults())
        vit = VitBackend.around(random_vit(bench, small=True).to(runtime.device), "0" * 64, vit_config, runtime)
        tasks = {"vit": (vit, image_task(1, 3, 20, (32, 32)), vit_config), "causal-lm": (lm, None, config)}
        for name, (base, task, settings) in tasks.items():
            task = task or base.read_task(DataRequest(data))
            session = base.session(task, Memory((), dict), settings)
            runtime.compute_as({"precision": "fp32"})
            start = adapters.reference_point(base.network, base.layers, base.scale, 0)
            adapters.write_slot(base.network, start)
            session.prepare()
            slot = adapters.slot_parameters(base.network, base.layers)
            losses, gradients = [], []
            for batch in session.batches(0):
                loss = session.loss(batch)
                losses.append(loss.detach().cpu())
                gradients.append(torch.autograd.grad(loss, [up for _, up in slot])[0].cpu())
            found[name].append((torch.stack(losses), torch.stack(gradients)))
    for name, ((ours, our_gradients), (theirs, their_gradients)) in found.items():
        scale = float(our_gradients.abs().max())
        bench.table.row(
            "equal",
            f"{name}: an epoch on {bench.device.type} and CPU, float32",
            largest_loss_difference=float((ours - theirs).abs().max()),
            largest_gradient_difference=float((our_gradients - their_gradients).abs().max()) / max(scale, 1e-12),
            losses=len(ours),
        )


def places(bench: Bench) -> None:
    """The same rows read from the device, from memory and from a file, with and without reading ahead."""
    from treelora_backends.kept import Keeping, KeptRows, each_expected

    count, shape, batch = (64, (17, 48), 8) if bench.dry else (2000, (197, 768), 128)
    rows = torch.randn(count, *shape, device=bench.device).bfloat16()
    batches = list(torch.randperm(count, generator=torch.Generator().manual_seed(0)).split(batch))
    work = torch.randn(64, 64, device=bench.device) if bench.dry else torch.randn(8192, 8192, device=bench.device)
    for place in ("device", "memory", "file"):
        keeping = Keeping(bench.device)
        object.__setattr__(keeping, "place", lambda _wanted, place=place, **_again: place)
        kept = KeptRows(count, shape, keeping)
        kept.write(torch.arange(count), rows)
        same = all(torch.equal(kept.read(some), rows[some.to(bench.device)]) for some in batches)

        def alone(kept: Any = kept) -> None:
            for some in batches:
                kept.read(some)

        def beside_work(kept: Any = kept) -> None:
            for some in each_expected(kept, batches, lambda some: some):
                kept.read(some)
                work @ work

        bench.table.row(
            "places",
            f"{count} rows of {KeptRows(1, shape, keeping).bytes / 1024:.0f} KiB, {place}",
            same=same,
            read_gb_s=kept.bytes / 1e9 / bench.timed(alone)[0],
            beside_work_s=bench.timed(beside_work)[0],
            work_alone_s=bench.timed(lambda: [work @ work for _ in batches])[0],
        )


class Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Decoded images, normalised one by one, as a data loader gives them."""

    def __init__(self, pictures: Any) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"images": self.pictures.pixels[index].float() / 127.5 - 1, "labels": self.pictures.labels[index]}


class Classifier(nn.Module):
    """A ViT with one head."""

    def __init__(self, body: Any, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(body.num_features, classes)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(images)).float()
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def vit(bench: Bench) -> None:
    """ViT-B/16: two tasks of 5 classes, 200 images each, 10 epochs, batch 128."""
    from peft import LoraConfig, get_peft_model
    from treelora_backends.vit.backend import VitBackend

    from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve

    each, epochs, batch = (8, 2, 16) if bench.dry else (200, 10, 128)
    size = (32, 32) if bench.dry else (224, 224)
    flags = Config(base=BaseConfig(model="embedded"), train=TrainConfig(epochs=epochs, batch_size=batch))
    config = resolve(flags, Config(), VitBackend().defaults())
    base = VitBackend.around(random_vit(bench), "0" * 64, config, bench.runtime())
    tasks = {f"task {seed}": image_task(seed, 5, each, size) for seed in (1, 2)}
    project = new_project(base, VitBackend(), config)
    ours = []
    for name, task in tasks.items():
        object.__setattr__(base, "read_task", lambda _request, task=task: task)  # images that are in memory
        ours.append(learn(bench, "vit", base, project, SCRATCH / name, name.replace(" ", "-"), config)["training"])
    taking = partial(treelora_steps, bench, "vit", base, tasks["task 1"], config, 3 * -(-5 * each // batch))
    bench.part("vit", f"treelora step, batch {batch}", 20, taking)
    del base, project
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "attn.proj"])
    model = Classifier(get_peft_model(random_vit(bench), lora), 5).to(bench.device)
    workers = 0 if bench.dry else 12
    held = bench.allocated()
    what = f"Trainer, all blocks, batch {batch}, {workers} workers"
    training = partial(trainer_seconds, bench, model, Images(tasks["task 1"].train), None, batch, epochs, workers)
    seconds = bench.part("vit", what, 40, training)
    if seconds is not None:
        share = max(ours) / seconds
        bench.table.row("vit", what, seconds=seconds, peak_gib=bench.peak(held), treelora_share=share)
    pixels, labels = tasks["task 1"].train.pixels.to(bench.device), tasks["task 1"].train.labels
    rows = [some for some in torch.randperm(len(labels)).split(batch) for _ in range(2)]
    made = [{"images": pixels[some.to(bench.device)].float() / 127.5 - 1, "labels": labels[some]} for some in rows]
    peft_steps(bench, "vit", model, made, 1e-3, batch)


def compiled(bench: Bench) -> None:
    """Steps of one width as they are, compiled, and as CUDA graphs: what ``train.compile`` gains, and costs at first.

    A dry run builds no kernels: that takes a processor minutes.
    """
    from treelora_backends import compiled as compiling
    from treelora_backends.causal_lm.backend import CausalLmBackend

    from treelora_cli.backend.values import DataRequest

    compiling._COMPILER = "aot_eager" if bench.dry else "inductor"
    count, prompt = (24, (30, 30)) if bench.dry else (64, (700, 700))
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    data = texts(folder / "task", 1, count, prompt)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    base = CausalLmBackend.around(
        random_llama("tiny" if bench.dry else "1B", bench.device, dtype),
        word_tokenizer(),
        "0" * 64,
        lm_config(bench, 4, epochs=2),
        bench.runtime(),
    )
    task = base.read_task(DataRequest(data))
    for mode in ("none", "default", *([] if bench.dry else ["reduce-overhead"])):
        torch.compiler.reset()
        config = lm_config(bench, 4, epochs=2, compile=mode, prompt_tail=0)
        steps = partial(treelora_steps, bench, "compiled", base, task, config, 8 if bench.dry else 24)
        bench.part(
            "compiled", f"train.compile {mode}", 60, lambda mode=mode, steps=steps: steps(f"train.compile {mode}")
        )


def startup(bench: Bench, section: str, name: str) -> None:
    """Load a checkpoint twice: the first time its identity is hashed, the second time it is remembered."""
    from treelora_backends.causal_lm.backend import CausalLmBackend

    folder = SCRATCH / f"model-{name}"
    model = random_llama("tiny" if bench.dry else name, bench.device, torch.float32 if bench.dry else torch.bfloat16)
    saving, _ = bench.timed(partial(model.save_pretrained, folder, max_shard_size="5GB"))
    word_tokenizer().save_pretrained(folder)
    del model
    bench.allocated()
    files = [one for one in folder.iterdir() if one.is_file()]
    for one in files:
        os.utime(one, (time.time() - 3600,) * 2)
    config = lm_config(bench, 4)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, model=str(folder)))
    reading, _ = bench.timed(lambda: [sum(len(part) for part in chunks(one)) for one in files])
    found = []
    for what in ("first command: identity hashed", "second command: identity remembered"):
        seconds, base = bench.timed(lambda: CausalLmBackend().load(config, bench.runtime()))
        found.append((seconds, base.fingerprint))
        bench.table.row(section, f"Llama {name}, {what}", seconds=seconds, reading=reading, dtype=base.facts["dtype"])
        del base
        bench.allocated()
    bench.table.row(section, "the same identity", same=found[0][1] == found[1][1], saving=saving)


def chunks(path: Path) -> Iterator[bytes]:
    """A file's content, piece by piece."""
    with path.open("rb") as file:
        while part := file.read(2**26):
            yield part


SECTIONS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "equal": (40, equal),
    "places": (25, places),
    "vit": (70, vit),
    "lm1": (120, lambda bench: causal_lm(bench, "lm1", "1B", ((4, True), (16, True)))),
    "startup": (40, lambda bench: startup(bench, "startup", "1B")),
    "lm7": (110, lambda bench: causal_lm(bench, "lm7", "7B", ((4, True), (16, False)))),
    "startup7": (90, lambda bench: startup(bench, "startup7", "7B")),
    "output": (20, output_layer),
    "gradient": (20, gradient),
    "compiled": (90, compiled),
}
"""Sections in the order of their importance, with the most seconds of each."""


def main() -> None:
    """Read the options and run the sections."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=330, help="in all; of a dry run ten times as many")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not (options.dry_run or torch.cuda.is_available()):
        parser.error("no GPU here; --dry-run shows the table with tiny models on the CPU")

    most_seconds = options.seconds * (
        10 if options.dry_run else 1
    )  # a lent card's time is dear, a processor's is shared
    warnings.filterwarnings("ignore")
    bench = Bench(Table(os.environ.get("OUT")), options.dry_run)
    device = "CPU, tiny models" if options.dry_run else torch.cuda.get_device_name()
    import transformers

    bench.table.row("machine", device, torch=torch.__version__, transformers=transformers.__version__)
    for name in options.sections.split(","):
        most, section = SECTIONS[name]
        left = most_seconds - (time.perf_counter() - bench.table.started)
        if left < 10:
            bench.table.row(name, "left out: no time", left=left)
            continue
        try:
            with limited(left if options.dry_run else min(most, left)):
                section(bench)
        except Exception as error:  # whatever it is, the other sections are worth having
            traceback.print_exc()
            bench.table.row(name, "failed", error=f"{type(error).__name__}: {str(error)[:200]}")
        bench.allocated()
    bench.table.row("done", f"{len(bench.table.rows)} rows", seconds=time.perf_counter() - bench.table.started)


if __name__ == "__main__":
    main()
