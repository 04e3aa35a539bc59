"""Held-out loss of answers, by texts a step and rate.

python tests/benchmarks/text_batches.py MODEL DATA... [--texts 96] [--held-out 64] [--seeds 0,1] [--plans 4:1,16:2]
       [--epochs 1] [--max-length 160] [--precision fp32]

A plan is texts a step and a factor on the rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from treelora_backends.causal_lm.backend import CausalLmBackend

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve
from treelora_cli.learning.trainer import Trainer, TrainSettings
from treelora_cli.methods.base import Unprotected


def main() -> None:
    """Print a line for each data set, seed and plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--plans", default="4:1,16:1,16:2,16:4")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--precision", default="fp32")
    options = parser.parse_args()
    plans = [(int(size), float(factor)) for size, factor in (one.split(":") for one in options.plans.split(","))]
    backend, runtime = CausalLmBackend(), open_runtime("cpu", offline=True, reporter=Silent())
    train = TrainConfig(precision=options.precision, max_length=options.max_length, epochs=options.epochs)
    runtime.compute_as({"precision": options.precision})
    flags = Config(base=BaseConfig(model=options.model), train=train)
    config = resolve(flags, Config(), backend.defaults())
    base = backend.load(config, runtime)
    for path in options.data:
        task = base.read_task(DataRequest(path, train_limit=options.texts, test_limit=options.held_out))
        session, held_out = base.session(task, Memory((), dict), config), held_out_session(base, task, config)
        session.prepare()
        held_out.prepare()
        held_out.tail = session.tail
        for seed in map(int, options.seeds.split(",")):
            for size, factor in plans:
                began = time.process_time()
                found = f"{learned(base, session, seed, size, factor)}, {time.process_time() - began:.0f} CPU s"
                print(f"{path.name}, seed {seed}, batch {size}, rate x{factor:g}: {found}", end=", ", flush=True)
                print(f"held-out loss {loss_of(base, held_out):.4f}", flush=True)


def held_out_session(base: Any, task: Any, config: Config) -> Any:
    """A session over the held-out examples."""
    encoded = [base.encoder.encode(one, task.style, task.labels) for one in task.test]
    listing = dataclasses.replace(task.listing, train=task.listing.test)
    return base.session(dataclasses.replace(task, train=encoded, listing=listing), Memory((), dict), config)


def learned(base: Any, session: Any, seed: int, size: int, factor: float) -> str:
    """Train the slot from the reference point; returns what to show of it."""
    train = base.config.train
    session.seed, session._steps = seed, -(-len(session.own) // size)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, seed))
    settings = dataclasses.replace(TrainSettings.of(train, seed), lr=factor * train.lr, batch_size=size)
    slot = adapters.slot_parameters(base.network, base.layers)
    report = Trainer(session, Unprotected(), slot, settings, base.runtime).run(lambda *_: None)
    return f"{report.steps} steps"


@torch.no_grad()
def loss_of(base: Any, session: Any) -> float:
    """The mean loss over held-out answers."""
    base.network.eval()
    losses = [(float(session.loss_of(places)), len(places)) for places in session.batches(0)]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


if __name__ == "__main__":
    main()
