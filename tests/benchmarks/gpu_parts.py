"""Parts of ``gpu.py``: its table, its clock, models of random weights and made-up data."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tomllib

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: threads that spin take a busy machine
SCRATCH = Path(tempfile.mkdtemp(prefix="treelora-gpu-"))
os.environ["TREELORA_CACHE"] = str(SCRATCH / "cache")


def register() -> None:
    """Make the package importable with its entry points where it is not installed."""
    from importlib import metadata

    sys.path[:0] = [str(ROOT), str(ROOT / "backends")]
    if metadata.entry_points(group="treelora.backends"):
        return
    made = SCRATCH / "site" / "treelora-0.dist-info"
    made.mkdir(parents=True)
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in of.items()) for group, of in groups.items()
    ]
    (made / "entry_points.txt").write_text("\n".join(lines))
    (made / "METADATA").write_text("Metadata-Version: 2.1\nName: treelora\nVersion: 0\n")
    sys.path.append(str(made.parent))


register()
import torch  # noqa: E402

BYTES = 2**30


# -- rows ------------------------------------------------------------------------------------------


class Table:
    """Prints and keeps rows as they come."""

    def __init__(self, out: str | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.out = Path(out) / "gpu.json" if out else None
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()

    def row(self, section: str, what: str, **values: Any) -> None:
        """Add one row."""
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        self.rows.append({"section": section, "what": what, **shown})
        cells = "  ".join(f"{key} {value}" for key, value in shown.items())
        print(f"[{time.perf_counter() - self.started:6.1f} s] {section:9} | {what:44} | {cells}", flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.rows, indent=1))


class OutOfTimeError(Exception):
    """A section took longer than it may."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise within, between two lines of Python, when the time is over, or that of a limit around this one."""

    def stop(*_arguments: object) -> None:
        raise OutOfTimeError(f"out of time after {time.perf_counter() - began:.0f} s")

    began = time.perf_counter()
    before, (outer, _) = signal.signal(signal.SIGALRM, stop), signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, min(seconds, outer or seconds)))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, outer - (time.perf_counter() - began)))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every section needs."""

    table: Table
    dry: bool

    @property
    def device(self) -> torch.device:
        """Where it is measured."""
        return torch.device("cpu" if self.dry else "cuda")

    def wait(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes in use, after what is not needed has gone."""
        gc.collect()
        if self.dry:
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self, base: int) -> float:
        """GiB above ``base`` since ``allocated`` was asked."""
        return 0.0 if self.dry else (torch.cuda.max_memory_allocated() - base) / BYTES

    def timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of some work, and what it returns."""
        self.wait()
        start = time.perf_counter()
        found = work()
        self.wait()
        return time.perf_counter() - start, found

    def part(self, section: str, what: str, seconds: float, work: Callable[[], T]) -> T | None:
        """Do a part of a section, whose failure or length leaves the rest of it; a dry run has ten times as long."""
        try:
            with limited(10 * seconds if self.dry else seconds):
                return work()
        except Exception as error:  # whatever it is, the other parts are worth having
            traceback.print_exc()
            self.table.row(section, what, failed=f"{type(error).__name__}: {str(error)[:200]}")
        return None

    def runtime(self, device: str | None = None) -> Any:
        """A runtime of treelora; transformers' Trainer may have left accelerate in another precision."""
        from accelerate.state import AcceleratorState

        from treelora_cli.backend.runtime import Silent, open_runtime

        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)

        if device == "cpu":  # accelerate keeps one device for a process
            from types import SimpleNamespace

            from treelora_cli.backend.runtime import Runtime

            alone = SimpleNamespace(
                device=torch.device("cpu"),
                num_processes=1,
                process_index=0,
                is_main_process=True,
                backward=lambda loss: loss.backward(),
            )
            return Runtime(accelerator=alone, offline=True)  # type: ignore[arg-type]
        return open_runtime("cpu" if self.dry else "cuda", offline=True, reporter=Silent())


# -- models and data -------------------------------------------------------------------------------


def random_vit(bench: Bench, small: bool = False) -> Any:
    """A ViT-B/16 of random weights, or a tiny one."""
    import timm

    torch.manual_seed(0)
    if small or bench.dry:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": 4}
        return timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes).eval()
    return timm.create_model("vit_base_patch16_224", num_classes=0).eval().to(bench.device)


LLAMAS = {"1B": (2048, 8192, 16, 8, 128_256), "7B": (4096, 11_008, 32, 32, 32_000), "tiny": (64, 128, 4, 2, 512)}
"""Width, inner width, blocks, heads of keys, vocabulary."""


def random_llama(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A Llama of random weights, made straight on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, inner, blocks, heads, vocabulary = LLAMAS[name]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        num_attention_heads=4 if name == "tiny" else 32,
        max_position_embeddings=2048,
        tie_word_embeddings=name == "1B",
        bos_token_id=None,
        eos_token_id=1,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)


def word_tokenizer() -> Any:
    """A tokenizer of 400 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<end>": 1, **{f"w{index}": index + 2 for index in range(400)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unk>")


def texts(folder: Path, seed: int, count: int, prompt: tuple[int, int]) -> Path:
    """Examples with prompts of so many words and answers of 8 to 24, as treelora reads them."""
    drawn = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(f"w{drawn.randrange(400)}" for _ in range(drawn.randint(low, high)))

    rows = [{"prompt": words(*prompt), "answer": words(8, 24)} for _ in range(count)]
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:32])))
    return folder / "train.jsonl"


def image_task(seed: int, classes: int, each: int, size: tuple[int, int]) -> Any:
    """Images of noise around a colour of each class, in memory."""
    from treelora_backends.vit.images import ImageTask, Pictures

    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    colours = torch.randint(0, 128, (classes, 3, 1, 1), generator=generator)
    noise = torch.randint(0, 128, (len(labels), 3, *size), generator=generator, dtype=torch.uint8)
    pixels = (noise + colours[labels]).to(torch.uint8)
    fields = {field.name for field in dataclasses.fields(Pictures)}
    extra = {"hashes": tuple(f"{seed:032x}{row:032x}" for row in range(len(labels)))} if "hashes" in fields else {}
    pictures = Pictures(pixels=pixels, labels=labels, **extra)
    names = tuple(f"class{seed}-{index}" for index in range(classes))
    return ImageTask(names, pictures, pictures, f"{seed:064x}", (), "")


def lm_config(bench: Bench, batch_size: int, **train: Any) -> Any:
    """The backend's own settings, at a batch size."""
    from treelora_backends.causal_lm.backend import CausalLmBackend

    from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve

    flags = Config(
        backend="causal-lm",
        base=BaseConfig(model=str(SCRATCH), dtype="float32" if bench.dry else "bfloat16"),
        train=TrainConfig(batch_size=batch_size, max_length=1024, **train),
    )
    return resolve(flags, Config(), CausalLmBackend().defaults())


def new_project(base: Any, backend: Any, config: Any) -> Any:
    """A project around a base in memory."""
    from treelora_cli.config import to_yaml
    from treelora_cli.learning.opening import fixed_settings
    from treelora_cli.project import Project

    resolved = dataclasses.asdict(config.base)
    record = {
        "fingerprint": base.fingerprint,
        "layers": list(base.layers),
        "facts": base.facts,
        "resolved": resolved,
        "given": resolved,
    }
    root = Path(tempfile.mkdtemp(dir=SCRATCH)) / "project"
    fixed = fixed_settings(config, backend)
    return Project.create(root, to_yaml(config, "benchmark"), backend=backend.name, base=record, fixed=fixed)
