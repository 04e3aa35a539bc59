"""What the tree and its search cost with 10 to 10,000 simulated tasks, and a project of 1,000.

    python tests/benchmarks/scale.py --out recipes/plots
    python tests/benchmarks/scale.py --out FOLDER --layers 2     as many as the default trains of a small ViT

Each number of tasks is measured in a process of its own, so that its memory is its own. Prints Markdown tables and
writes ``scale.svg``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from charts import log_chart, table
from numpy.typing import NDArray

LAYERS, WIDTH, DEPTH = 12, 512, 5
"""Of the signatures: adapted layers, entries a layer; and the tree's depth, as for a whole ViT."""
STEPS = 200


def clustered_signatures(tasks: int, layers: int, seed: int = 0) -> NDArray[np.float32]:
    """Tasks in nested clusters of ten, (tasks, layers, WIDTH): branches shrink by 0.7 a level."""
    rng = np.random.default_rng(seed)
    values = np.zeros((tasks, layers, WIDTH), dtype=np.float32)
    group, size = tasks, 1.0
    while True:
        count = -(-tasks // group)
        branch = rng.standard_normal((count, layers, WIDTH), dtype=np.float32) * np.float32(size)
        values += np.repeat(branch, group, axis=0)[:tasks]
        if group == 1:
            break
        group, size = max(1, group // 10), size * 0.7
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    return values


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return seconds and result."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def resident() -> int:
    """Resident bytes of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(tasks: int, layers: int) -> dict[str, float]:
    """Build, search, insert, save and load with a number of tasks, all in this process."""
    from safetensors.numpy import load_file, save_file

    from treelora_cli.algorithm.bandit import TreeBandit
    from treelora_cli.algorithm.tree import Tree, build_tree

    values = clustered_signatures(tasks, layers)
    noise = np.random.default_rng(1).standard_normal((2 * STEPS, layers, WIDTH)).astype(np.float32)
    queries = values[tasks // 2] + 0.5 * noise / np.linalg.norm(noise, axis=-1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    before = resident()
    build, tree = timed(lambda: build_tree(values, DEPTH))
    prepare, bandit = timed(lambda: TreeBandit(tree))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = resident()
    for query in queries[:STEPS]:
        bandit.step(query)
    step = statistics.median(timed(lambda query=query: bandit.step(query))[0] for query in queries[STEPS:])
    flat = TreeBandit(tree, search="flat", arms=bandit.arms)
    flat_step = statistics.median(timed(lambda query=query: flat.step(query))[0] for query in queries[STEPS:])
    new = clustered_signatures(10, layers, seed=2)
    insert = statistics.median(timed(lambda row=row: tree.insert(row))[0] for row in new[:5])

    def save(folder: Path) -> None:
        (folder / "tree.json").write_text(json.dumps(tree.to_dict(), indent=1))
        save_file(tree.to_arrays(), folder / "tree.safetensors")
        (folder / "bandit.json").write_text(json.dumps(bandit.state_meta()))
        save_file(bandit.state_arrays(), folder / "bandit.safetensors")

    def load(folder: Path) -> Tree:
        data = json.loads((folder / "tree.json").read_text())
        loaded = Tree.from_state(data, load_file(folder / "tree.safetensors"))
        meta = json.loads((folder / "bandit.json").read_text())
        TreeBandit.from_state(loaded, load_file(folder / "bandit.safetensors"), meta)
        return loaded

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_seconds, _ = timed(lambda: save(folder))
        size = sum(path.stat().st_size for path in folder.iterdir())
        load_seconds, loaded = timed(lambda: load(folder))
    assert loaded == tree
    return {
        "tasks": tasks,
        "build": build,
        "prepare": prepare,
        "step": step,
        "flat_step": flat_step,
        "visits": bandit.node_visits / bandit.step_count / layers,
        "insert": insert,
        "save": save_seconds,
        "load": load_seconds,
        "signature_bytes": values.nbytes,
        "held_bytes": held - before,
        "peak_bytes": peak - before,
        "disk_bytes": size,
        "height": tree.height,
        "search_height": bandit.arms.height,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("recipes/plots"), help="folder of the chart")
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000, 10_000])
    parser.add_argument("--layers", type=int, default=LAYERS, help="adapted layers")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, options.layers)))
        return
    found = []
    for tasks in options.tasks:
        command = [sys.executable, __file__, "--one", str(tasks), "--layers", str(options.layers)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout))
    mib = 2**20
    heading = (
        "tasks,tree / search depth,bounds a layer and step,step ms,flat step ms,insert s,build s,arms s,save s,load s"
    )
    heading += ",signatures MiB,held beside them MiB,peak beside them MiB,disk MiB"
    rows = [
        [
            f"{one['tasks']:,}",
            f"{one['height']} / {one['search_height']}",
            f"{one['visits']:.0f}",
            f"{1e3 * one['step']:.2f}",
            f"{1e3 * one['flat_step']:.2f}",
            f"{one['insert']:.3f}",
            f"{one['build']:.2f}",
            f"{one['prepare']:.2f}",
            f"{one['save']:.2f}",
            f"{one['load']:.2f}",
            f"{one['signature_bytes'] / mib:.1f}",
            f"{one['held_bytes'] / mib:.1f}",
            f"{one['peak_bytes'] / mib:.1f}",
            f"{one['disk_bytes'] / mib:.1f}",
        ]
        for one in found
    ]
    print(table(heading.split(","), rows))
    names = {
        "step": "search step",
        "flat_step": "step of a flat search",
        "insert": "insert one task",
        "build": "build",
        "save": "save",
        "load": "load",
    }
    lines = {name: [(one["tasks"], 1e3 * one[key]) for one in found] for key, name in names.items()}
    log_chart(options.out / "scale.svg", "Cost of the task tree", "tasks", "milliseconds", lines)


if __name__ == "__main__":
    main()
