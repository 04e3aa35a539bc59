"""How many different shapes the batches of an epoch have, padded to their longest text and to the widths of a GPU.

python tests/benchmarks/shapes.py MODEL DATA... [--texts 400]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.batches import shuffled_batches, width_for

from treelora_cli import seeds
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest
from treelora_cli.config import BaseConfig, Config, resolve


def main() -> None:
    """Print a line for each data set and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--texts", type=int, default=400)
    options = parser.parse_args()
    backend, runtime = CausalLmBackend(), open_runtime("cpu", offline=True, reporter=Silent())
    config = resolve(Config(base=BaseConfig(model=options.model)), Config(), backend.defaults())
    base = backend.load(config, runtime)
    for path in options.data:
        task = base.read_task(DataRequest(path, train_limit=options.texts, test_limit=2))
        lengths = [len(one) for one in task.train]
        for size in (4, 16):
            order = seeds.of_order(seeds.of_task(0, 0), 0)
            batches = list(shuffled_batches(lengths, -(-len(lengths) // size), order))
            longest = [(len(some), max(lengths[one] for one in some)) for some in batches]
            few = [(count, width_for(width, torch.device("cuda"), base.encoder.context)) for count, width in longest]
            more = sum(count * width for count, width in few) / sum(count * width for count, width in longest) - 1
            print(
                f"{path.name}: {len(lengths)} texts of {min(lengths)} to {max(lengths)} tokens, batch {size}:"
                f" {len(batches)} steps, {len(set(longest))} -> {len(set(few))} shapes, {100 * more:.1f} % more tokens",
                flush=True,
            )


if __name__ == "__main__":
    main()
