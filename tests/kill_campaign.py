"""Kill real ``train-task`` processes at random instants and look at what they left.

    python tests/kill_campaign.py --kills 200 --seconds 200

Each run is a process of its own that executes the whole command on a tiny model; it is forked from one that has
imported the libraries, which only saves their seconds. Half of the kills fall anywhere in the run, half in the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from conftest import MODEL, MODEL_ARGS, learned_hashes, make_images

from treelora_cli.app import run_command
from treelora_cli.project import Project

Work = Callable[[Callable[[], None]], int]


def spawn(work: Work) -> tuple[int, int]:
    """Run ``work`` in a forked process; returns its id and a pipe that ends of life or a call of its argument wakes."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    code = 70
    try:
        os.close(reader)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = work(lambda: os.write(writer, b"!") and None)
    finally:
        os._exit(code)


def finish(work: Work) -> int:
    """Run ``work`` to its end; returns its exit code."""
    child, reader = spawn(work)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Campaign:
    """One project whose next task is learned, killed, looked at and undone, again and again."""

    def __init__(self, root: Path, data: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.tried: Counter[str] = Counter()
        self.learn = ["-q", "-C", str(root), "train-task", str(data), "--epochs", "4", "--device", "cpu"]
        self.learn += ["--precision", "fp32"]
        self.before = Project.open(root).state
        start = time.perf_counter()
        assert finish(lambda _: run_command(self.learn)) == 0
        self.seconds = time.perf_counter() - start
        self.after = learned_hashes(root)
        self._undo()

    def _undo(self) -> None:
        project = Project.open(self.root)
        project.rollback(project.state.tasks[-1].name)
        Project.open(self.root).empty_trash()
        assert Project.open(self.root).state == self.before

    def kill_one(self) -> None:
        """Start the command, kill it at a random instant, and check what is there."""
        in_commit = self.random.random() < 0.5
        resume = Project.open(self.root).checkpoint.facts() is not None and self.random.random() < 0.3
        command = [*self.learn, "--resume" if resume else "--abandon"]

        def work(committing: Callable[[], None]) -> int:
            commit = Project.commit

            def announced(project: Project, change: object) -> Project:
                committing()
                return commit(project, change)  # type: ignore[arg-type]

            Project.commit = announced  # type: ignore[method-assign,assignment]
            return run_command(command)

        child, reader = spawn(work)
        if in_commit:
            select.select([reader], [], [], 60)
            time.sleep(self.random.random() * 0.06)
        else:
            time.sleep(self.random.random() * self.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.close(reader)
        self.tried["killed" if code == -signal.SIGKILL else "ended before the kill"] += 1
        if code != -signal.SIGKILL:
            assert code == 0, f"train-task ended with {code}"
        else:
            self.tried["killed in the commit" if in_commit else "killed anywhere"] += 1
            self.tried["killed while resuming"] += resume
        self._look(code)

    def _look(self, code: int) -> None:
        project = Project.open(self.root)
        assert project.damage() == {}, "every file is whole"
        committed = project.state != self.before
        if committed:
            self.tried["found at the new state"] += code != 0
            assert learned_hashes(self.root) == self.after
        else:
            assert code != 0
            self.tried["found at the old state"] += 1
            if project.checkpoint.facts() is not None and self.random.random() < 0.2:
                assert finish(lambda _: run_command([*self.learn, "--resume"])) == 0
                assert learned_hashes(self.root) == self.after, "resumed as if never interrupted"
                self.tried["resumed to the same hashes"] += 1
                committed = True
        if committed:
            self._undo()


def make_campaign(folder: Path, seed: int) -> Campaign:
    """Make a project of a tiny model with two tasks, and the data of a third."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = folder / "tiny.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0, **MODEL_ARGS).state_dict(), weights)
    recipe = folder / "quick.yaml"
    recipe.write_text("head: {merged: mean}\n")
    root = folder / "p"
    options = ["--recipe", str(recipe), "--model", MODEL, "--weights", str(weights), "--head-width", "64"]
    options += ["--rank", "4", "--targets", "qkv", "--blocks", "0", "--epochs", "1", "--batch-size", "8"]
    for key, value in MODEL_ARGS.items():
        options += ["--model-arg", f"{key}={value}"]
    # in this process, so that those forked from it have every library at hand
    assert run_command(["-q", "init", str(root), *options, "--device", "cpu"]) == 0
    for name, classes in (("warm", ("red", "yellow")), ("cold", ("blue", "green"))):
        images = make_images(folder / name, classes)
        assert run_command(["-q", "-C", str(root), "train-task", str(images), "--device", "cpu"]) == 0
    return Campaign(root, make_images(folder / "more", ["pink", "brown"]), seed)


def main() -> None:
    """Run the campaign for so many kills or seconds and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        campaign = make_campaign(Path(folder), given.seed)
        while campaign.tried["killed"] < given.kills and time.perf_counter() - start < given.seconds:
            campaign.kill_one()
    print(f"one run takes {campaign.seconds:.2f} s; every kill survived:", dict(campaign.tried))


if __name__ == "__main__":
    sys.exit(main())
