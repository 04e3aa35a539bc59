"""Second halves of learned tasks: do they find the first, and where do they start?

    python tests/benchmarks/split_task.py PROJECT DATA --tasks fomc=FOMC,py150=Py150 [--first 64] [--examples 32]

PROJECT learned each task from ``train_limit: --first`` examples of its folder below DATA, with seed 0. For each task a
copy of PROJECT learns ``--examples`` others in one epoch, once from the nearest task's adapter and once from a fresh
one, by adapters alone. Printed: which task was found, and the score on held-out examples. PROJECT stays as it is. The
package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}


def treelora(*arguments: str) -> dict[str, Any]:
    """Run a command and return its document."""
    command = [sys.executable, "-m", "treelora_cli", "--json", "-q", *arguments]
    done = subprocess.run(command, env=_ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return dict(json.loads(done.stdout))


def drawn(rows: list[Any], limit: int, seed: str) -> list[Any]:
    """Return what a recipe's limit with seed 0 chooses."""
    return random.Random(f"limit/{seed}/0").sample(rows, limit)


def second_half(data: Path, out: Path, first: int, examples: int, tests: int) -> Path:
    """Write a task of training examples that the first half does not have, and of the same held-out ones."""
    out.mkdir(parents=True)
    train, test = (json.loads((data / f"{part}.json").read_text("utf-8")) for part in ("train", "test"))
    taken = set(drawn(list(range(len(train))), first, "train"))
    rest = [row for place, row in enumerate(train) if place not in taken]
    (out / "train.json").write_text(json.dumps(rest[:examples]), "utf-8")
    (out / "test.json").write_text(json.dumps(drawn(test, tests, "test")), "utf-8")
    return out


def main() -> None:
    """Read the command line, run, and print one JSON row a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", required=True, help="task=FOLDER, separated by commas")
    parser.add_argument("--first", type=int, default=64)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--test-examples", type=int, default=32)
    given = parser.parse_args()
    for pair in given.tasks.split(","):
        name, _, folder = pair.partition("=")
        for start in ("nearest", "none"):
            with tempfile.TemporaryDirectory() as scratch:
                project = Path(scratch) / "p"
                shutil.copytree(given.project, project)
                half = second_half(
                    given.data / folder, Path(scratch) / folder, given.first, given.examples, given.test_examples
                )
                own = ["--name", f"{name}-b", "--epochs", "1", "--warm-start", start]
                told = treelora("-C", str(project), "train-task", str(half), *own, "--no-eval")
                scored = treelora("-C", str(project), "eval", "--tasks", f"{name}-b", "--inference", "latest")
                task = scored["tasks"][f"{name}-b"]
                found = {key: told.get(key) for key in ("nearest", "warm_start_from")}
                print(json.dumps({"task": name, "start": start, **found, "score": task["score"]}), flush=True)


if __name__ == "__main__":
    main()
