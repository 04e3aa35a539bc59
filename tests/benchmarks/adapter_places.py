"""Which blocks and layers of a language model learn free answers best, at which rate, and from which start.

``python tests/benchmarks/adapter_places.py DATA --model FILE.gguf`` trains plain LoRA (rank 8, alpha 32, AdamW, cosine,
batches of 4) on tasks in the layout of TRACE, as transformers' bfloat16 model runs them, and prints the loss of a token
of 48 held-out answers. DATA holds TASK/train.json and TASK/test.json of objects with ``prompt`` and ``answer``.
``--examples 256`` learns from more; ``--starts`` compares starts instead.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("Py150", "ScienceQA", "NumGLUE-cm")
HELD_OUT, BATCH, LENGTH, LONGEST_ANSWER = 48, 4, 160, 100
RANK, SCALE = 8, 4.0
INPUTS, LINEAR = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLACES = (
    (15, INPUTS, (2e-3, 4e-3, 8e-3)),
    (30, INPUTS, (2e-3, 4e-3, 8e-3)),
    (8, LINEAR, (2e-3, 4e-3, 6e-3)),
    (12, LINEAR, (4e-3,)),
    (5, LINEAR, (6e-3,)),
    (8, LINEAR[4:], (6e-3,)),
)
PAIRS = (("FOMC", "Py150"), ("FOMC", "ScienceQA"), ("FOMC", "NumGLUE-cm"), ("Py150", "ScienceQA"), ("Py150", "Py150"))
Example = tuple[list[int], list[int]]


class Lora(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.empty(RANK, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, states: Tensor) -> Tensor:
        kind = states.dtype
        return self.linear(states) + SCALE * (states @ self.down.T.to(kind)) @ self.up.T.to(kind)


class Bench:
    """The model, its tokenizer and the tasks."""

    def __init__(self, data: Path, model: Path, examples: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where: dict[str, Any] = {"gguf_file": model.name}
        self.tokenizer = AutoTokenizer.from_pretrained(model.parent, **where)
        self.model = AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.bfloat16, **where).eval()
        self.model.requires_grad_(False)
        self.data, self.examples = data, examples

    def read(self, task: str, part: str, first: int, last: int) -> list[Example]:
        records = json.loads((self.data / task / f"{part}.json").read_text())[first:last]
        return [self._encoded(record["prompt"], record["answer"]) for record in records]

    def _encoded(self, prompt: str, answer: str) -> Example:
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        told = [*self.tokenizer(answer, add_special_tokens=False).input_ids, end][:LONGEST_ANSWER]
        return self.tokenizer(text, add_special_tokens=False).input_ids[-(LENGTH - len(told)) :], told

    def loss(self, examples: list[Example]) -> tuple[Tensor, int]:
        """Return the summed loss of the answers' tokens, and their number."""
        width = max(len(prompt) + len(answer) for prompt, answer in examples)
        ids, mask, labels = (torch.zeros(len(examples), width, dtype=torch.long) for _ in range(3))
        for row, (prompt, answer) in enumerate(examples):
            stop = len(prompt) + len(answer)
            ids[row, :stop], mask[row, :stop] = torch.tensor(prompt + answer), 1
            labels[row, len(prompt) : stop] = 1
        states = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        rows, columns = torch.where(labels[:, 1:] == 1)
        logits = self.model.lm_head(states[rows, columns]).float()
        return nn.functional.cross_entropy(logits, ids[rows, columns + 1], reduction="sum"), len(rows)

    def mean_loss(self, examples: list[Example]) -> float:
        with torch.no_grad():
            parts = [self.loss(examples[at : at + BATCH]) for at in range(0, len(examples), BATCH)]
        return sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)

    def learn(
        self, train: list[Example], blocks: int, names: tuple[str, ...], rate: float, start: list[Tensor] | None = None
    ) -> tuple[list[Tensor], float]:
        """Train two epochs; returns the adapter, which stays in the model, and the first batches' loss at the start."""
        torch.manual_seed(0)
        slots = []
        for block in self.model.model.layers[-blocks:]:
            for parent in (block.self_attn, block.mlp):
                slots += [(parent, name) for name, _ in parent.named_children() if name in names]
        for parent, name in slots:
            setattr(parent, name, Lora(getattr(parent, name)))
        parts = [part for parent, name in slots for part in (getattr(parent, name).down, getattr(parent, name).up)]
        if start is not None:
            with torch.no_grad():
                for part, value in zip(parts, start, strict=True):
                    part.copy_(value)
        before = self.mean_loss(train[: 4 * BATCH])
        self._train(train, parts, rate)
        self._slots = slots
        return [part.detach().clone() for part in parts], before

    def undo(self) -> None:
        """Take the adapter out again."""
        for parent, name in self._slots:
            setattr(parent, name, getattr(parent, name).linear)

    def _train(self, train: list[Example], parts: list[nn.Parameter], rate: float) -> None:
        optimizer = torch.optim.AdamW(parts, lr=rate, weight_decay=0.0)
        steps = 2 * len(train) // BATCH
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            order = torch.randperm(len(train), generator=generator).tolist()
            for at in range(0, len(train), BATCH):
                loss, count = self.loss([train[place] for place in order[at : at + BATCH]])
                optimizer.zero_grad()
                (loss / count).backward()
                optimizer.step()
                schedule.step()


def places(bench: Bench) -> None:
    """Print a line for each place and rate."""
    for blocks, names, rates in PLACES:
        for rate in rates:
            losses, started = [], time.process_time()
            for task in TASKS:
                bench.learn(bench.read(task, "train", 0, bench.examples), blocks, names, rate)
                losses.append(bench.mean_loss(bench.read(task, "test", 0, HELD_OUT)))
                bench.undo()
            told = " ".join(f"{loss:.3f}" for loss in losses)
            seconds = time.process_time() - started
            print(
                f"last {blocks} {'+'.join(names)} {rate:g}: {told} mean {sum(losses) / len(losses):.3f} {seconds:.0f} s"
            )


def starts(bench: Bench) -> None:
    """Print for pairs of tasks what the second starts and ends with, fresh and from the first's adapter."""
    for first, second in PAIRS:
        adapter, _ = bench.learn(bench.read(first, "train", 0, bench.examples), 8, LINEAR, 5e-3)
        bench.undo()
        train = bench.read(second, "train", 128, 128 + bench.examples)  # of the first itself: other examples
        for start in (None, adapter):
            _, before = bench.learn(train, 8, LINEAR, 5e-3, start)
            held = bench.mean_loss(bench.read(second, "test", 0, HELD_OUT))
            bench.undo()
            print(f"{first} -> {second}, {'fresh' if start is None else 'from it'}: {before:.3f} at first, {held:.3f}")


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--starts", action="store_true")
    given = parser.parse_args()
    bench = Bench(given.data, given.model, given.examples)
    (starts if given.starts else places)(bench)


if __name__ == "__main__":
    main()
