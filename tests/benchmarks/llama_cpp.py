"""Whether llama.cpp answers as the project does, from the file that ``export --format gguf`` writes.

::

    mkdir DIR && cd DIR && npm install --ignore-scripts node-llama-cpp@3.22.1
    python tests/benchmarks/llama_cpp.py PROJECT --node DIR [--prompts 10] [--dtype float16]

Held-out prompts of every task, as its data renders them, are tokenised, read and answered greedily by llama.cpp on the
CPU (the library that npm ships, no program of treelora) and by the project's own network. Rows: the untouched base,
whose file the user gave; the export; and the export with every weight unpacked to float32, in which llama.cpp rounds
nothing. Columns: prompts with equal tokens, the same through the chat template in the file, the largest difference of
log probabilities of the first token among those above 0.001, equal first tokens, equal whole answers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from treelora_backends.causal_lm.answers import Answerer, Manner
from treelora_backends.causal_lm.batches import pad
from treelora_backends.causal_lm.loading import source_of
from treelora_backends.causal_lm.memory import manner_of, merged_adapter

from treelora_cli import Project
from treelora_cli.backend import adapters
from treelora_cli.data.examples import TextExample
from treelora_cli.learning.evaluation import read_held_out

_LEAST = 1e-3
"""Probability below which a first token is not compared."""


@dataclass(frozen=True)
class Asked:
    """A held-out prompt and how it is answered."""

    example: TextExample
    manner: Manner
    text: str
    ids: list[int]

    def request(self) -> dict[str, Any]:
        """Return what llama.cpp is asked."""
        turns = [{"role": one.role, "content": one.content} for one in self.example.asked]
        plain = all(one["role"] in ("system", "user") for one in turns)
        chat = {"turns": turns} if self.manner.style == "chat" and plain else {}
        return {"text": self.text, "ids": self.ids, "most": self.manner.most_new, **chat}


def prompts_of(project: Project, base: Any, most: int) -> list[Asked]:
    """Return some held-out prompts of every task."""
    found = []
    for one in read_held_out(base, {name: project.record(name) for name in project.tasks}, None):
        task = next(task for task in project._stored.memory().tasks if task.name == one.name)
        manner = manner_of(task)
        manner = Manner(manner.style, manner.labels, False, manner.most_new)  # written, whatever the labels
        for example in one.data.test[:most] if one.data is not None else ():
            text, ids = base.encoder.fitted_prompt(example, manner.style, manner.labels, base.context)
            found.append(Asked(example, manner, text, [int(token) for token in ids]))
    return found


def own(base: Any, weights: Any, prompts: Sequence[Asked]) -> Iterator[tuple[Tensor, str]]:
    """Yield log probabilities of the first token (V,) and the greedy answer of each prompt."""
    adapters.write_slot(base.network, weights)
    base.network.eval()
    answerer = Answerer(base.lm, base.encoder, base.runtime)
    for one in prompts:
        batch = pad([np.asarray(one.ids, dtype=np.int32)], base.encoder.pad_id)
        with torch.no_grad():
            logits = base.lm.logits_at(batch, torch.arange(1), batch.lengths - 1).float()[0]
        yield logits.log_softmax(dim=0), answerer.answers([one.example], one.manner, base.context)[0][0]


def by_llama_cpp(model: Path, base: Any, prompts: Sequence[Asked], node: Path) -> dict[str, Any]:
    """Ask the same of llama.cpp."""
    asked = [one.request() for one in prompts]
    request = {"model": str(model), "context": base.context, "least": _LEAST / 2, "prompts": asked, "node": str(node)}
    command = ["node", str(Path(__file__).with_suffix(".mjs"))]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unpacked(model: Path, out: Path) -> Path:
    """Write a GGUF file again with every weight in float32."""
    import gguf
    from treelora_backends.causal_lm.gguf_export import _copy_with

    tensors = gguf.GGUFReader(str(model)).tensors
    _copy_with(model, out, {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in tensors}, "float32")
    return out


def row(
    name: str, found: dict[str, Any], ours: Sequence[tuple[Tensor, str]], prompts: Sequence[Asked], base: Any
) -> str:
    """Return one line of the table."""
    answers = found["answers"]
    tokens = sum(there["tokens"] == one.ids for there, one in zip(answers, prompts, strict=True))
    chats = [there["templated"] == one.ids for there, one in zip(answers, prompts, strict=True) if "templated" in there]
    largest, first, whole = 0.0, 0, 0
    for there, (likely, answer), one in zip(answers, ours, prompts, strict=True):
        theirs = {int(token): math.log(p) for token, p in there["likely"]}
        compared = [token for token in theirs if max(theirs[token], float(likely[token])) > math.log(_LEAST)]
        largest = max([largest, *(abs(theirs[token] - float(likely[token])) for token in compared)])
        first += max(theirs, key=lambda token: theirs[token]) == int(likely.argmax())
        text = base.encoder.decode(there["answer"], one.manner.style)
        whole += text == answer
        if text != answer:
            print(f"  {name}: project {answer!r}, llama.cpp {text!r}", file=sys.stderr)
    templated = f"{sum(chats)} of {len(chats)}" if chats else "-"
    total = len(prompts)
    return f"| {name} | {tokens} of {total} | {templated} | {largest:.4f} | {first} of {total} | {whole} of {total} |"


def main() -> None:
    """Export, ask both, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--node", type=Path, required=True, help="where node-llama-cpp is installed")
    parser.add_argument("--prompts", type=int, default=10, help="of each task")
    parser.add_argument("--dtype", default="float32", help="of the adapted weights in the file")
    given = parser.parse_args()
    project = Project.open(given.project, device="cpu", offline=True)
    base: Any = project._loaded(project._config(), exact=True)
    prompts = prompts_of(project, base, given.prompts)
    memory = project._stored.memory()
    untouched = adapters.reference_point(base.network, base.layers, 1.0, 0)
    source = source_of(str(base.config.base.model))
    print("| file | tokens | template | first token, log p | first token | answer |\n|" + " --- |" * 6)
    with tempfile.TemporaryDirectory() as folder:
        out, plain = Path(folder) / "out", Path(folder) / "plain.gguf"
        done = project.export(out, kind="gguf", dtype=given.dtype, limit=2)
        print(f"export: largest logit difference {done.check.largest_difference:.1e}", file=sys.stderr)
        files = {"base": Path(source.name) / str(source.gguf), f"export, {given.dtype}": out / "model.gguf"}
        files["export, all unpacked to float32"] = unpacked(out / "model.gguf", plain)
        for name, model in files.items():
            weights = untouched if name == "base" else merged_adapter(memory)
            found = by_llama_cpp(model, base, prompts, given.node.absolute())
            print(row(name, found, list(own(base, weights, prompts)), prompts, base), flush=True)


if __name__ == "__main__":
    main()
