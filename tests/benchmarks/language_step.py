"""Processor seconds and memory of language steps: loss and gradient, from where training enters, on a CPU.

    python tests/benchmarks/language_step.py MODEL DATA [--examples 8] [--batch-size 4]

Prints one JSON document. Memory is the peak above what was held before the first step (Linux).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from outside_reference import Peaks, resident
from treelora_backends.causal_lm.backend import CausalLmBackend

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve


def main() -> None:
    """Read the options and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend, runtime = CausalLmBackend(), open_runtime("cpu", offline=True, reporter=Silent())
    flags = Config(base=BaseConfig(model=options.model), train=TrainConfig(batch_size=options.batch_size))
    config = resolve(flags, Config(), backend.defaults())
    base = backend.load(config, runtime)
    task = base.read_task(DataRequest(options.data, train_limit=options.examples, test_limit=2))
    session = base.session(task, Memory((), dict), config)
    session.prepare()
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    held, peaks, seconds, losses = resident("VmRSS"), Peaks(), [], []
    for batch in session.batches(0):
        start = time.process_time()
        with peaks.of("step"):
            loss = session.loss(batch)
            torch.autograd.grad(loss, ups)
        seconds.append(round(time.process_time() - start, 2))
        losses.append(round(float(loss.detach()), 6))
    tokens = sum(len(one.answer) for one in task.train)
    peak = round((peaks.bytes["step"] - held) / 2**20)
    print(json.dumps({"cpu_seconds": seconds, "losses": losses, "answer_tokens": tokens, "peak_mib": peak}))


if __name__ == "__main__":
    main()
