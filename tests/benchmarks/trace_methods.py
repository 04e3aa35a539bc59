"""All methods on ``trace_small`` at once, for a borrowed GPU: one process a method, then one table.

    python tests/benchmarks/trace_methods.py DATA --model FILE [--out DIR] [--at-once 7] [--seconds 240] [-- --limit 64]

The processes share the device, so scores, memory and kept bytes are each method's own, but seconds are not: for those
give ``--at-once 1``. A method that runs out of time leaves the others' rows. What follows ``--`` goes to
``treelora compare``. In the end the project of treelora is scored again: who answered whose inputs, other definitions
of the scores, and the untouched model. The package need not be installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
METHODS = "treelora,seqlora,olora,ewc,hidelora,inflora,joint"
_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "PYTHONWARNINGS": "ignore",
    "COLUMNS": "200",
}


def treelora(*arguments: str, shown: bool = True) -> subprocess.Popen[str]:
    """Start a command."""
    command = [sys.executable, "-m", "treelora_cli", "--offline", *arguments]
    return subprocess.Popen(
        command, env=_ENVIRONMENT, cwd=ROOT, text=True, stdout=None if shown else subprocess.DEVNULL
    )


def run_all(methods: list[str], common: list[str], at_once: int, seconds: float) -> None:
    """Run every method, so many at a time, until the time is up."""
    started = time.monotonic()
    waiting, running = list(methods), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            method = waiting.pop(0)
            running[method] = treelora("-q", "compare", "trace_small", "--methods", method, *common, shown=False)
        time.sleep(0.2)
        late = time.monotonic() - started > seconds
        for method, process in list(running.items()):
            if late:
                process.terminate()
                process.wait()
            if process.poll() is not None:
                print(f"{method}: code {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)
                del running[method]
        waiting = [] if late else waiting


def main() -> None:
    """Read the command line, run, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "trace_small-compare")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--at-once", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=240)
    own, _, more = " ".join(sys.argv[1:]).partition(" -- ")
    given = parser.parse_args(own.split())
    out = given.out.absolute()
    common = [
        "--data",
        str(given.data.absolute()),
        "--model",
        str(given.model.absolute()),
        "--out",
        str(out),
        *more.split(),
    ]
    methods = given.methods.split(",")
    run_all(methods, common, given.at_once, given.seconds)
    done = [method for method in methods if (out / f"{method}-seed0.json").is_file()]
    if done:  # results are there, so nothing runs again
        table = str(out / "table.csv")
        treelora("compare", "trace_small", "--methods", ",".join(done), *common, "--csv", table).wait()
    if "treelora" in done:
        project = str(out / "treelora-seed0")
        for inference in ("routed", "base", "latest", "merged"):
            treelora("-C", project, "--json", "eval", "--inference", inference).wait()


if __name__ == "__main__":
    main()
