"""A load on ``treelora serve`` over loopback: rate, p50, p99 and errors, while another task is committed.

    python tests/benchmarks/serve_load.py PROJECT IMAGES --requests 2000 --clients 8 --train DATA [OPTION...]

``PROJECT`` is copied, ``IMAGES`` a folder of images to ask with, ``DATA`` the task that is learned meanwhile, with its
options. The clients are threads of this process, each with one connection that is kept; one image a request.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any


class Load:
    """Requests of several clients, and what came of them."""

    def __init__(self, address: str, images: list[bytes], count: int) -> None:
        self.address, self.images, self.left = address, images, iter(range(count))
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.statuses: Counter[Any] = Counter()
        self.commits: Counter[str] = Counter()

    def client(self) -> None:
        connection = http.client.HTTPConnection(self.address, timeout=120)
        while True:
            with self.lock:
                number = next(self.left, None)
            if number is None:
                return
            started = time.perf_counter()
            try:
                body = self.images[number % len(self.images)]
                connection.request("POST", "/predict", body, {"Content-Type": "application/octet-stream"})
                answer = connection.getresponse()
                found = json.loads(answer.read())
                status: Any = answer.status
            except (OSError, http.client.HTTPException, ValueError) as error:
                found, status = {}, type(error).__name__
                connection.close()
            with self.lock:
                self.seconds.append(time.perf_counter() - started)
                self.statuses[status] += 1
                self.commits[found.get("commit", "-")] += 1


def start(root: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server on a free port; return it and its address."""
    command = [sys.executable, "-m", "treelora_cli", "-C", str(root), "serve", "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip().removeprefix("http://")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="the rest: arguments of train-task")
    given = parser.parse_args()
    suffixes = {".png", ".jpg", ".jpeg"}
    images = [one.read_bytes() for one in sorted(given.images.rglob("*")) if one.suffix.lower() in suffixes][:500]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(given.project, Path(folder) / "project"))
        server, address = start(root)
        load = Load(address, images, given.requests)
        learning = None
        if given.train:
            options = ["train-task", *given.train, "--device", "cpu"]
            command = [sys.executable, "-m", "treelora_cli", "-q", "-C", str(root), *options]
            learning = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        started = time.perf_counter()
        clients = [threading.Thread(target=load.client) for _ in range(given.clients)]
        for one in clients:
            one.start()
        for one in clients:
            one.join()
        wall = time.perf_counter() - started
        learned = None if learning is None else learning.wait()
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
    ranked = sorted(load.seconds)
    print(f"{len(ranked)} requests, {given.clients} at a time: {len(ranked) / wall:.1f} a second")
    p50, p99 = statistics.median(ranked), ranked[int(0.99 * len(ranked))]
    print(f"p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, longest {1000 * ranked[-1]:.0f} ms")
    print(f"statuses {dict(load.statuses)}, by commit {dict(load.commits)}")
    print(f"train-task ended with {learned}, the server with {ended}")


if __name__ == "__main__":
    main()
