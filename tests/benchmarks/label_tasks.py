"""What adapters alone learn of closed answers: one row for each task and setting, on whatever device there is.

    python tests/benchmarks/label_tasks.py OLORA_DATA --model DIR [--tasks NLI/RTE,BoolQA/BoolQA]
        [--examples 256] [--test-examples 277] [--settings "blocks=15 tail=8 lr=2e-3;blocks=0 tail=0 lr=5e-4 epochs=5"]

A setting names ``blocks``, ``tail`` (0: the whole gradient), ``lr``, ``epochs``, ``targets``, ``rank``, ``alpha``,
``batch`` and ``first`` (1: only the first token of a label is learned). Each row: untouched accuracy, then loss and
accuracy on held-out examples after every epoch, and accuracy on 100 training examples. The package need not be
installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SETTINGS = (
    "blocks=15 tail=8 lr=2e-3 epochs=2;blocks=15 tail=0 lr=2e-3 epochs=4;blocks=0 tail=0 lr=1e-3 epochs=3;"
    "blocks=0 tail=0 lr=3e-4 epochs=4;blocks=0 tail=0 lr=3e-4 epochs=8;"
    "blocks=0 tail=0 lr=5e-4 epochs=5 targets=all-linear;"
    "blocks=0 tail=0 lr=2e-4 epochs=5 targets=all-linear;blocks=0 tail=0 lr=3e-4 epochs=8 first=1;"
    "blocks=0 tail=0 lr=2e-4 epochs=8 targets=all-linear first=1 batch=8"
)


def row(model: str, data: Path, setting: dict[str, str], examples: int, tests: int) -> dict[str, Any]:
    """Train one adapter and return what came of it."""
    from treelora_backends.causal_lm.answers import Answerer, Manner
    from treelora_backends.causal_lm.backend import CausalLmBackend

    from treelora_cli.backend import adapters
    from treelora_cli.backend.arithmetic import choose_arithmetic
    from treelora_cli.backend.runtime import Silent, open_runtime
    from treelora_cli.backend.values import DataRequest, Memory
    from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig, resolve
    from treelora_cli.learning.trainer import Trainer, TrainSettings
    from treelora_cli.methods.base import Unprotected

    adapter = AdapterConfig(
        blocks=int(setting.get("blocks", 15)),
        targets=setting.get("targets"),
        rank=int(setting.get("rank", 8)),
        alpha=float(setting.get("alpha", 32)),
    )
    train = TrainConfig(
        epochs=int(setting.get("epochs", 2)),
        lr=float(setting.get("lr", 2e-3)),
        batch_size=int(setting.get("batch", 4)),
        prompt_tail=int(setting.get("tail", 0)),
    )
    backend = CausalLmBackend()
    flags = Config(base=BaseConfig(model=model), adapter=adapter, train=train)
    config = resolve(flags, Config(), backend.defaults())
    base = backend.load(config, open_runtime(None, offline=True, reporter=Silent()))
    task = base.read_task(DataRequest(data, train_limit=examples, test_limit=tests))
    if "first" in setting:
        task.train[:] = [dataclasses.replace(one, answer=one.answer[: int(setting["first"])]) for one in task.train]
    scale = float(config.adapter.alpha or 1) / int(config.adapter.rank or 1)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, scale, 0))
    session = base.session(task, Memory((), dict), config)
    slot = adapters.slot_parameters(base.network, base.layers)
    choose_arithmetic(base.runtime, "auto", session, [up for _, up in slot])
    session.prepare()
    manner = Manner("labels", task.labels, by_label=True, most_new=16)

    def accuracy(some: list[Any]) -> float:
        base.network.eval()
        answers = Answerer(base.lm, base.encoder, base.runtime).answers(some, manner, base.context)
        return round(100 * sum(text == one.answer for (text, _), one in zip(answers, some, strict=True)) / len(some), 1)

    found: dict[str, Any] = {"task": data.name, **setting, "untouched": accuracy(task.test), "epochs_seen": []}
    trainer = Trainer(session, Unprotected(), slot, TrainSettings.of(config.train, 0), base.runtime)
    losses: list[float] = []
    step = trainer._guarded_step
    trainer._guarded_step = lambda batch: losses.append(loss := step(batch)) or loss  # type: ignore[method-assign]
    per_epoch = session.steps_per_epoch
    mean = lambda: round(float(sum(losses[-per_epoch:])) / per_epoch, 3)  # noqa: E731
    started = time.perf_counter()
    trainer.run(lambda _step, _tensors: found["epochs_seen"].append((mean(), accuracy(task.test))))
    found["epochs_seen"].append((mean(), accuracy(task.test)))
    found |= {"train": accuracy(task.listing.train[:100]), "seconds": round(time.perf_counter() - started, 1)}
    return found


def main() -> None:
    """Read the command line and print a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", default="NLI/RTE,BoolQA/BoolQA")
    parser.add_argument("--settings", default=SETTINGS)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--test-examples", type=int, default=277)
    given = parser.parse_args()
    for written in given.settings.split(";"):
        setting = dict(pair.split("=") for pair in written.split())
        for task in given.tasks.split(","):
            try:
                found = row(given.model, given.data / task, setting, given.examples, given.test_examples)
            except (RuntimeError, ValueError) as error:
                found = {"task": task, **setting, "failed": str(error)[:200]}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
