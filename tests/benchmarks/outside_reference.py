"""Sequential LoRA as a competent user writes it: transformers' Trainer and peft, nothing of treelora.

    python tests/benchmarks/outside_reference.py images DATA --model DIR [--per-class 500] [--tasks 10] [--epochs 3]
    python tests/benchmarks/outside_reference.py texts DATA --model DIR [--gguf FILE] [--only sst-2,agnews,rte]
           [--examples 256] [--test-examples 200] [--epochs 1]
    python tests/benchmarks/outside_reference.py answers DATA --model DIR [--gguf FILE] [--only FOMC,Py150]
           [--examples 96] [--test-examples 32] [--epochs 5]

``images``: DATA holds ``train/CLASS/*``, ``test/CLASS/*`` and ``tasks.json``; one linear head over all classes, LoRA on
the attention of every block of a timm model. ``texts``: DATA holds O-LoRA's folders; LoRA on query and value
projections. ``answers``: the same training where DATA holds TRACE's folders of ``prompt`` and ``answer``; answers are
written greedily and scored as TRACE scores them (the scores are the one part of treelora in here). Prints one JSON
document: seconds of training, peak memory above the loaded base (of training alone, and
of training and scoring), OP, forgetting.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

TEXT_TASKS = {"sst-2": "SC/SST-2", "agnews": "TC/agnews", "boolqa": "BoolQA/BoolQA", "rte": "NLI/RTE"}
TRACE_SCORES = {
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "Py150": "trace_similarity",
    "ScienceQA": "trace_choice",
    "NumGLUE-cm": "exact_match",
    "20Minuten": "trace_sari",
}
"""Folders of TRACE's tasks, in its order, and how each is scored."""


def resident(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes (Linux)."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(key))
    return int(line.split()[1]) * 1024


class Peaks:
    """Largest resident memory of each kind of work, in bytes (Linux)."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    @contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Add what is inside to a kind."""
        Path("/proc/self/clear_refs").write_text("5")
        yield
        self.bytes[kind] = max(self.bytes.get(kind, 0), resident("VmHWM"))


@dataclass
class Seconds:
    """Time by the clock, and of the processor alone: on a shared machine the two differ."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        """Return both together."""
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


def train(model: nn.Module, data: Any, collator: Any, options: argparse.Namespace) -> Seconds:
    """Train on one task; returns the time it took."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            num_train_epochs=options.epochs,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            seed=options.seed,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        wall, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


# -- images ----------------------------------------------------------------------------------------


class ImageSet(torch.utils.data.Dataset[dict[str, Any]]):
    """Images in memory, mirrored at random."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.pixels[index]
        return {"images": image.flip(-1) if torch.rand(()) < 0.5 else image, "labels": self.labels[index]}


class Classifier(nn.Module):
    """A timm model with LoRA and one head over all classes of the stream."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return loss and logits."""
        logits = self.head(self.body(images)).float()
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.new_zeros(())
        return {"loss": loss, "logits": logits}


def read_images(data: Path, part: str, names: list[str], most: int, transform: Any) -> tuple[Tensor, Tensor]:
    """Return transformed images (n, 3, H, W) of some classes and their places among ``names``."""
    from PIL import Image

    found = [
        (path, place) for place, name in enumerate(names) for path in sorted((data / part / name).iterdir())[:most]
    ]
    return (
        torch.stack([transform(Image.open(path).convert("RGB")) for path, _ in found]),
        torch.tensor([place for _, place in found]),
    )


def images(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stream of images."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    tasks = json.loads((options.data / "tasks.json").read_text())["tasks"][: options.tasks]
    names = [name for task in tasks for name in task]
    body = timm.create_model(f"local-dir:{options.model}", pretrained=True, num_classes=0)
    transform = create_transform(**resolve_model_data_config(body), is_training=False)
    lora = get_peft_model(body, LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "attn.proj"]))
    model = Classifier(lora, body.num_features, len(names))
    base, peaks = resident("VmRSS"), Peaks()
    seconds, matrix = Seconds(), []
    for index, task in enumerate(tasks):
        pixels, places = read_images(options.data, "train", task, options.per_class, transform)
        own = torch.tensor([names.index(name) for name in task])[places]
        with peaks.of("train"):
            seconds += train(model, ImageSet(pixels, own), None, options)
        model.eval()
        row = []
        for seen in tasks[: index + 1]:
            pixels, places = read_images(options.data, "test", seen, options.per_class, transform)
            wanted = torch.tensor([names.index(name) for name in seen])[places]
            with torch.no_grad(), peaks.of("score"):
                known = len(task) + sum(map(len, tasks[:index]))
                logits = torch.cat([model(part)["logits"] for part in pixels.split(256)])[:, :known]
            row.append(float((logits.argmax(dim=1) == wanted).float().mean()))
        matrix.append(row)
    return summary(matrix, seconds, peaks, base)


# -- texts -----------------------------------------------------------------------------------------


def read_texts(folder: Path, part: str, most: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (prompt, answer) pairs and the labels of one of O-LoRA's folders."""
    labels = json.loads((folder / "labels.json").read_text())
    rows = json.loads((folder / f"{part}.json").read_text())
    rows = rows.get("Instances", rows) if isinstance(rows, dict) else rows
    return [
        (f"{one['sentence']}\nOptions: {', '.join(labels)}\nAnswer:", f" {one['label']}") for one in rows[:most]
    ], labels


def language_model(options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """Return the tokenizer, and the model with LoRA on every block's queries and values."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"gguf_file": options.gguf} if options.gguf else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **source)
    dense = {"quantization_config": GgufConfig(dequantize=True)} if options.gguf else {}
    body = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **source, **dense)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return tokenizer, get_peft_model(body, lora)


def stream(
    options: argparse.Namespace,
    folders: list[str],
    pairs: Callable[[Path], list[tuple[str, str]]],
    score: Callable[[nn.Module, Any, Path], float],
) -> dict[str, Any]:
    """Train on each folder's (prompt, answer) pairs in turn, and score all folders so far."""
    tokenizer, model = language_model(options)
    base, peaks = resident("VmRSS"), Peaks()
    seconds, matrix = Seconds(), []
    for index, name in enumerate(folders):
        rows = []
        for prompt, answer in pairs(options.data / name):
            head = tokenizer(prompt)["input_ids"]
            tail = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            head = head[-max(1, options.max_length - len(tail)) :]
            tail = tail[: options.max_length - len(head)]
            rows.append({"input_ids": head + tail, "labels": [-100] * len(head) + tail})
        with peaks.of("train"):
            seconds += train(model, rows, lambda batch: padded(batch, tokenizer.pad_token_id), options)
        model.eval()
        last = index == len(folders) - 1
        with peaks.of("score"):
            seen = [] if options.score_last and not last else folders[: index + 1]
            matrix.append([score(model, tokenizer, options.data / one) for one in seen])
        so_far = {"task": name, "train_seconds": asdict(seconds), "row": matrix[-1]}
        print(json.dumps(so_far), file=sys.stderr, flush=True)
    return summary(matrix, seconds, peaks, base)


def texts(options: argparse.Namespace) -> dict[str, Any]:
    """Run a stream of texts with a closed set of answers."""
    chosen = [TEXT_TASKS[name] for name in (options.only or ",".join(TEXT_TASKS)).split(",")][: options.tasks]
    return stream(
        options,
        chosen,
        lambda folder: read_texts(folder, "train", options.examples)[0],
        lambda model, tokenizer, folder: accuracy(model, tokenizer, options, folder),
    )


def answers(options: argparse.Namespace) -> dict[str, Any]:
    """Run a stream of texts with free answers."""
    chosen = (options.only or ",".join(TRACE_SCORES)).split(",")[: options.tasks]
    return stream(
        options,
        chosen,
        lambda folder: read_answers(folder, "train", options.examples),
        lambda model, tokenizer, folder: mean_score(model, tokenizer, options, folder),
    )


def read_answers(folder: Path, part: str, most: int) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of one of TRACE's folders."""
    return [(one["prompt"], f" {one['answer']}") for one in json.loads((folder / f"{part}.json").read_text())[:most]]


@torch.no_grad()
def mean_score(model: nn.Module, tokenizer: Any, options: argparse.Namespace, folder: Path) -> float:
    """Return the mean score of greedy answers, each as long as the longest answer there is; 16 prompts at a time."""
    from treelora_cli.data.text_scores import score_text

    pairs = read_answers(folder, "test", options.test_examples)
    longest = max(len(tokenizer(answer)["input_ids"]) for _, answer in pairs) + 2
    prompts = [tokenizer(prompt)["input_ids"][-options.max_length :] for prompt, _ in pairs]
    by_length = sorted(range(len(pairs)), key=lambda index: len(prompts[index]))
    total = 0.0
    for start in range(0, len(pairs), 16):
        chosen = by_length[start : start + 16]
        width = len(prompts[chosen[-1]])
        filled = [width - len(prompts[index]) for index in chosen]
        ids = torch.tensor([[tokenizer.pad_token_id] * n + prompts[i] for i, n in zip(chosen, filled, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (width - n) for n in filled])
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for index, written in zip(chosen, out[:, width:], strict=True):
            said = tokenizer.decode(written, skip_special_tokens=True)
            prompt, answer = pairs[index]
            total += score_text(TRACE_SCORES[folder.name], prompt, said.strip(), answer.strip())
    return total / len(pairs)


def padded(batch: list[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad a batch on the right."""
    width = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": pad_id, "labels": -100}
    made = {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])
        for key, value in fill.items()
    }
    made["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    )
    return made


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: Any, options: argparse.Namespace, folder: Path) -> float:
    """Return the share of test examples whose own label is the likeliest."""
    pairs, labels = read_texts(folder, "test", options.test_examples)
    right = 0
    for prompt, answer in pairs:
        head = tokenizer(prompt)["input_ids"][: options.max_length]
        tails = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in labels]
        batch = padded(
            [{"input_ids": head + t, "labels": [-100] * len(head) + t} for t in tails], tokenizer.pad_token_id
        )
        scores = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        )
        wanted = batch["labels"][:, 1:]
        found = scores.gather(2, wanted.clamp(min=0)[:, :, None])[:, :, 0] * (wanted >= 0)
        right += labels[int(found.sum(dim=1).argmax())] == answer.strip()
    return right / len(pairs)


def summary(matrix: list[list[float]], seconds: Seconds, peaks: Peaks, base: int) -> dict[str, Any]:
    """Return the figures, scores as shares."""
    last = matrix[-1]
    dropped = [row[index] - last[index] for index, row in enumerate(matrix[:-1]) if row]
    return {
        "op": sum(last) / len(last),
        "forgetting": sum(dropped) / len(dropped) if dropped else None,
        "train_seconds": round(seconds.wall, 2),
        "train_cpu_seconds": round(seconds.cpu, 2),
        "peak_mib_above_base": round((max(peaks.bytes.values()) - base) / 2**20),
        "training_peak_mib_above_base": round((peaks.bytes["train"] - base) / 2**20),
        "base_mib": round(base / 2**20),
        "matrix": matrix,
    }


def main() -> None:
    """Read the options and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kind", choices=["images", "texts", "answers"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--only", help="texts, answers: tasks in order, separated by commas")
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--test-examples", type=int, default=200)
    parser.add_argument("--score-last", action="store_true", help="texts, answers: score after the last task alone")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.batch_size = options.batch_size or (64 if options.kind == "images" else 4)
    torch.manual_seed(options.seed)
    run = {"images": images, "texts": texts, "answers": answers}[options.kind]
    print(json.dumps(run(options), indent=1))


if __name__ == "__main__":
    main()
