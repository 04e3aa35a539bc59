"""Own heads of image adapters learned in small and large batches: accuracy and loss on held-out images, by rate.

    python tests/benchmarks/batch_sizes.py DATA [--classes 10] [--train 160] [--test 80]

DATA is an image folder (``train/CLASS``, ``test/CLASS``). Some of its classes, and others, are tasks of their own, each
learned with two seeds, from the embedded ViT with the backend's defaults, at every batch size and rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from charts import table
from treelora_backends.vit.backend import VitBackend

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve
from treelora_cli.learning.trainer import Trainer, TrainSettings
from treelora_cli.methods.base import Unprotected

RULES = {
    "64": (64, 1, 3),
    "256, the same rate": (256, 1, 3),
    "256, twice the rate": (256, 2, 3),
    "256, four times the rate": (256, 4, 3),
    "256, twice the rate, 6 epochs": (256, 2, 6),
    "256, four times the rate, 6 epochs": (256, 4, 6),
}
"""Batch size, factor on the rate, epochs."""


def main() -> None:
    """Read the options and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--classes", type=int, default=10, help="of a task")
    parser.add_argument("--starts", default="0,10", help="where tasks begin among the names")
    parser.add_argument("--names", help="classes, with commas; by default all, sorted")
    parser.add_argument("--train", type=int, default=160)
    parser.add_argument("--test", type=int, default=80)
    given = parser.parse_args()
    torch.set_num_threads(1)
    backend, runtime = VitBackend(), open_runtime("cpu", offline=True, reporter=Silent())
    config = resolve(Config(base=BaseConfig(model="embedded")), Config(), backend.defaults())
    base = backend.load(config, runtime)
    names = given.names.split(",") if given.names else sorted(one.name for one in (given.data / "train").iterdir())
    found: dict[str, list[tuple[int, float, float]]] = {rule: [] for rule in RULES}
    for start in map(int, given.starts.split(",")):
        classes = tuple(names[start : start + given.classes])
        task = base.read_task(DataRequest(given.data, classes=classes, train_limit=given.train, test_limit=given.test))
        for seed in (0, 1):
            session = base.session(task, Memory((), dict), dataclasses.replace(config, seed=seed))
            session.prepare()
            for rule, (size, factor, epochs) in RULES.items():
                train = dataclasses.replace(
                    config.train, batch_size=size, lr=factor * (config.train.lr or 0.0), epochs=epochs
                )
                found[rule].append(learned(base, session, train, seed))
    rows = [
        [rule, *(f"{statistics.mean(column):.2f}" for column in zip(*results, strict=True))]
        for rule, results in found.items()
    ]
    print(table(["images a step", "steps", "accuracy", "loss"], rows))


def learned(base: Any, session: Any, train: TrainConfig, seed: int) -> tuple[int, float, float]:
    """Learn the task anew; returns steps, accuracy in percent and loss of its own head on held-out images."""
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, seed))
    session.batch_size = train.batch_size
    for parameter in session.parameters():
        parameter.data.zero_()
    slot = adapters.slot_parameters(base.network, base.layers)
    report = Trainer(session, Unprotected(), slot, TrainSettings.of(train, seed), base.runtime).run(lambda *_: None)
    test, logits = session.task.test, []
    with torch.no_grad():
        for pixels in test.pixels.split(64):
            tokens = base.trunk.before(base.preprocessing.normalise(pixels)).tokens
            logits.append(session.head(base.trunk.pooled(tokens)))
    scores = torch.cat(logits)
    right = float((scores.argmax(dim=1) == test.labels).float().mean())
    return report.steps, 100 * right, float(torch.nn.functional.cross_entropy(scores, test.labels))


if __name__ == "__main__":
    main()
