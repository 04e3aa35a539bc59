"""How inputs find their task by frozen states alone, and how many of none are told.

    python tests/benchmarks/routing_texts.py TRACE_DATA OLORA_DATA --model DIR [--tokens 192]

Six tasks of TRACE, 64 training and 32 held-out inputs each, in both orders, and beside agnews, whose inputs have no
form of their own; states in bf16. The package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KNOWN = ("C-STANCE", "FOMC", "Py150", "ScienceQA", "NumGLUE-cm", "20Minuten")
OTHERS = {"agnews": "TC/agnews", "rte": "NLI/RTE", "amazon": "SC/amazon", "boolqa": "BoolQA/BoolQA"}


def main() -> None:
    """Read features once, then learn the tasks in several orders."""
    from treelora_backends.causal_lm.backend import CausalLmBackend
    from treelora_backends.causal_lm.router import TaskRouter

    from treelora_cli.backend.adapters import AdapterWeights
    from treelora_cli.backend.runtime import Silent, open_runtime
    from treelora_cli.backend.values import Memory, TaskMemory
    from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve
    from treelora_cli.data.examples import TextExample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("olora", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=192)
    given = parser.parse_args()
    backend = CausalLmBackend()
    flags = Config(base=BaseConfig(model=given.model), train=TrainConfig(max_length=given.tokens))
    config = resolve(flags, Config(), backend.defaults())
    runtime = open_runtime(None, offline=True, reporter=Silent())
    base = backend.load(config, runtime)
    runtime.compute_as({"precision": "bf16"})

    def features(folder: Path, column: str, part: str, count: int):
        rows = random.Random(0).sample(json.loads((folder / f"{part}.json").read_text(encoding="utf-8")), count)
        return base.lm.routing(base.read_features([TextExample("", row[column], "") for row in rows], ""))

    places = {name: (given.trace / name, "prompt") for name in KNOWN}
    places |= {name: (given.olora / path, "sentence") for name, path in OTHERS.items()}
    held_out = {name: features(*place, "test", 32) for name, place in places.items()}
    learned = {name: features(*places[name], "train", 64) for name in (*KNOWN, "agnews")}
    nothing = AdapterWeights((), (), (), 1.0)
    for order in (KNOWN, KNOWN[::-1], (*KNOWN, "agnews"), ("agnews", *KNOWN)):
        memory = Memory((), dict)
        for name in order:
            router = TaskRouter.restore(memory, config)
            router.add_task(learned[name], runtime)
            kept = router.task_tensors()
            one = TaskMemory(name, (), "", lambda: nothing, lambda kept=kept: kept)
            memory = memory.with_task(one, router.to_tensors)
        router = TaskRouter.restore(memory, config)
        routes = {name: router.routes(router.scores(rows, memory), memory) for name, rows in held_out.items()}
        own = [(route, index) for index, name in enumerate(order) for route in routes[name]]
        right = sum(route.task == index for route, index in own)
        doubted = {name: sum(not one.known for one in routes[name]) for name in held_out if name not in order}
        kept_own = sum(route.known for route, _ in own)
        print(f"{order[0]} first, {len(order)} tasks: {right} of {len(own)} to their own task, {kept_own} not doubted;")
        print(f"    of 32 inputs of none, doubted: {doubted}", flush=True)


if __name__ == "__main__":
    main()
