"""A tiny vision transformer, tiny image folders, and the command line as a user types it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
_CACHE = tempfile.TemporaryDirectory()
os.environ["TREELORA_CACHE"] = _CACHE.name
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")

FAULT_STEP = int(os.environ.get("TREELORA_FAULT_STEP", "6"))
"""Tests that put a fault at every operation take every sixth unless told otherwise; 1 takes them all."""
MODEL = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}
STREAM = (("warm", ("red", "yellow")), ("cold", ("blue", "green", "cyan")), ("grey", ("black", "white")))
"""Three tasks, of two, three and two classes."""
_COLOURS = {
    "red": (220, 30, 30),
    "yellow": (220, 220, 30),
    "blue": (30, 30, 220),
    "green": (30, 180, 30),
    "cyan": (30, 200, 200),
    "black": (10, 10, 10),
    "white": (240, 240, 240),
    "pink": (240, 150, 190),
    "brown": (110, 70, 30),
}


_TWO_TASKS = """# Two small tasks.
backend: vit
base:
  model: {model}
  weights: {weights}
  model_args: {arguments}
adapter: {adapter}
head: {{width: 64, merged: mean}}
train: {{epochs: 1, batch_size: 8, precision: fp32}}
stream:
  data: {data}
  tasks:
    - {{name: warm, path: warm}}
    - {{name: cold, path: cold, epochs: 2}}
"""


def two_task_recipe(weights: Path, data: Path, *, adapter: str) -> str:
    """A recipe of the tasks ``warm`` and ``cold`` under ``data``; ``adapter`` is the section in YAML."""
    arguments = json.dumps(MODEL_ARGS)
    return _TWO_TASKS.format(model=MODEL, weights=weights, arguments=arguments, adapter=adapter, data=data)


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str
    arguments: tuple[str, ...] = ()

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one JSON document it must be."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


Cli = Callable[..., Result]


def picture(name: str, seed: int, size: int = 16) -> Image.Image:
    """Draw one noisy image of a colour class."""
    generator = np.random.default_rng([seed, *name.encode()])
    noise = generator.normal(0, 30, (size, size, 3)) + generator.normal(0, 80, 3)  # the tint makes classes overlap
    colour = np.asarray(_COLOURS[name], dtype=np.float64)
    return Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8))


def make_images(folder: Path, classes: Sequence[str], *, train: int = 8, test: int = 8, seed: int = 0) -> Path:
    """Write ``train/CLASS/*.png`` and, unless ``test`` is 0, ``test/CLASS/*.png``."""
    for part, count, offset in (("train", train, 0), ("test", test, 1000)):
        for name in classes:
            for index in range(count):
                path = folder / part / name / f"{index:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(name, seed + offset + index).save(path)
    return folder


def tree_hash(root: Path) -> dict[str, str]:
    """SHA-256 of every file below ``root``, the lock left out."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not path.name.startswith("lock")
    }


def learned_hashes(root: Path) -> dict[str, str]:
    """Recorded hashes of everything learned; ``task.json`` and ``steps.jsonl`` hold timings and are left out."""
    files = json.loads((root / "state.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if not name.endswith(("task.json", "steps.jsonl"))}


def child_environment(**more: str) -> dict[str, str]:
    """Environment of a child process: offline, one thread."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **more}


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> Result:
    """Run a Python program in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=child_environment(), cwd=cwd
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_process(*arguments: object, cwd: Path | None = None) -> Result:
    """Run ``python -m treelora_cli`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "treelora_cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=child_environment(),
        cwd=cwd,
    )
    return Result(done.returncode, done.stdout, done.stderr, tuple(map(str, arguments)))


BAD_INPUTS: dict[tuple[str, int, str], None] = {}
"""Every bad input that a test tried, in order: the command as typed, its exit code and its line."""


def record_bad_input(done: Result) -> None:
    """Remember a refused command for ``--bad-input-table``; temporary directories are left out."""
    typed = " ".join(shlex.quote(part) if part else "''" for part in done.arguments)
    line = done.err.splitlines()[-1].removeprefix("Error: ")
    short = [re.sub(r"/tmp/[^\s:'\"]*/", "", text).replace("|", "/").replace("\n", "\\n") for text in (typed, line)]
    BAD_INPUTS[f"treelora {short[0]}", done.code, short[1]] = None


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each processor for the whole suite; this one alone where files are named, which starts sooner."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bad-input-table", help="write the bad inputs that were tried, with codes and lines, here")


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--bad-input-table")
    if target:
        rows = [f"| `{typed}` | {code} | {line} |" for typed, code, line in BAD_INPUTS]
        Path(target).write_text("\n".join(["| as typed | code | line |", "| --- | --- | --- |", *rows]) + "\n")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        from treelora_cli.app import hoist_globals, run_command

        capsys.readouterr()
        code = run_command(hoist_globals([str(argument) for argument in arguments]))
        shown = capsys.readouterr()
        return Result(code, shown.out, shown.err, tuple(map(str, arguments)))

    return run


@pytest.fixture
def process() -> Cli:
    """Run a command in a process of its own."""
    return run_process


def must(*arguments: object) -> None:
    """Run a command in this process that has to succeed (for session fixtures)."""
    from treelora_cli.app import hoist_globals, run_command

    assert run_command(hoist_globals(["-q", *map(str, arguments)])) == 0


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the tiny transformer."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(MODEL, num_classes=0, **MODEL_ARGS).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def init_options(weights: Path) -> list[str]:
    """Options of ``init`` that make everything quick; the mean of updates is much smaller than solved blocks."""
    recipe = weights.parent / "quick.yaml"
    recipe.write_text("head: {merged: mean}\n")
    options = ["--recipe", str(recipe), "--model", MODEL, "--weights", str(weights), "--head-width", "64"]
    options += ["--rank", "4", "--alpha", "8", "--targets", "qkv", "--blocks", "0"]
    for key, value in MODEL_ARGS.items():
        options += ["--model-arg", f"{key}={value}"]
    return [*options, "--epochs", "2", "--batch-size", "8", "--lr", "0.01", "--device", "cpu"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image folders of the three tasks of ``STREAM``, by task name."""
    root = tmp_path_factory.mktemp("data")
    for name, classes in STREAM:
        make_images(root / name, classes)
    return root


@pytest.fixture(scope="session")
def _empty_project(tmp_path_factory: pytest.TempPathFactory, init_options: list[str]) -> Path:
    root = tmp_path_factory.mktemp("empty") / "p"
    must("init", root, *init_options)
    return root


@pytest.fixture(scope="session")
def _learned_project(tmp_path_factory: pytest.TempPathFactory, _empty_project: Path, data: Path) -> Path:
    root = tmp_path_factory.mktemp("learned") / "p"
    shutil.copytree(_empty_project, root)
    for name, _ in STREAM:
        must("-C", root, "train-task", data / name, "--device", "cpu", "--precision", "fp32")
    return root


@pytest.fixture(scope="module")
def served(_learned_project: Path) -> Iterator[Any]:
    """A server on the learned project, one for each test file."""
    from serving_client import serving

    with serving(_learned_project) as server:
        yield server


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny Llama with a chat template."""
    from tiny_lm import TEMPLATE, save_model

    return Path(save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a tiny GPT-2 without a template."""
    from tiny_lm import save_model

    return Path(save_model(tmp_path_factory.mktemp("gpt2"), "gpt2"))


@pytest.fixture(scope="module")
def lm_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a table of texts for each format."""
    from tiny_lm import write_tables

    return Path(write_tables(tmp_path_factory.mktemp("tables")))


@pytest.fixture(scope="session")
def images(data: Path) -> list[Path]:
    """Four held-out images of each class of the stream."""
    return sorted(data.glob("*/test/*/0[0-3].png"))


@pytest.fixture
def empty_project(_empty_project: Path, tmp_path: Path) -> Path:
    """A copy of a project with no task."""
    return Path(shutil.copytree(_empty_project, tmp_path / "p"))


@pytest.fixture
def project(_learned_project: Path, tmp_path: Path) -> Path:
    """A copy of a project that learned the three tasks of ``STREAM``."""
    return Path(shutil.copytree(_learned_project, tmp_path / "p"))


@pytest.fixture(scope="session")
def learned_project(_learned_project: Path) -> Path:
    """The project that learned ``STREAM``, shared between tests: only to be read."""
    return _learned_project


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("COLUMNS", raising=False)  # 80 in a process of pytest-xdist: tables would be cut there


def plain_runtime() -> Any:
    """A runtime of one process on the CPU that shows nothing."""
    from treelora_cli.backend.runtime import Silent, open_runtime

    return open_runtime("cpu", offline=True, reporter=Silent())


def check_error(done: Result, code: int, line: str) -> None:
    """One line of error with the documented code and nothing else to be afraid of."""
    assert done.code == code, done.err or done.out
    assert "Traceback" not in done.err
    errors = [text for text in done.err.splitlines() if text.startswith("Error: ")]
    assert len(errors) == 1, done.err
    assert done.err.splitlines()[-1] == errors[0], "the message is one line, the last"
    assert re.search(line, errors[0]), errors[0]
    record_bad_input(done)
