"""What is kept of a language task beside its adapter, as tensors, and how it is read back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from treelora_backends.causal_lm.answers import Manner
from treelora_backends.causal_lm.task import LmTask
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.values import Memory, TaskMemory
from treelora_cli.data.examples import STYLES, TextExample, shared_system

_MOST_SEEN = 1024
"""Inputs of a task whose hashes are kept."""
_MARGIN, _FREE_TEXT = 8, 64
"""Tokens generated beyond the longest answer seen, and in all where there is no answer's end to see."""


def describe(task: LmTask) -> dict[str, Tensor]:
    """Return a task's style, longest answer, source, hashes of inputs and common system prompt as tensors."""
    longest = max((one.longest for one in task.train), default=0)
    system = shared_system(task.listing.train) if task.style == "chat" else ""
    return {
        "style": torch.tensor(STYLES.index(task.style)),
        "answer.tokens": torch.tensor(_FREE_TEXT if task.style == "text" else longest + _MARGIN),
        "answer.least": torch.tensor(_least_new(task)),
        "source": torch.frombuffer(bytearray.fromhex(task.source), dtype=torch.uint8),
        "seen": prompts_seen(task.listing.train),
        **({"system": torch.frombuffer(bytearray(system.encode()), dtype=torch.uint8)} if system else {}),
    }


def _least_new(task: LmTask) -> int:
    """Return the fewest tokens of an answer: 1 where a task has prompts, and no answer of its examples is empty."""
    return int(task.style != "text" and all(one.answer.strip() for one in task.listing.train))


def prompts_seen(examples: Sequence[TextExample]) -> Tensor:
    """Return 8 bytes of the hash of each input and of its answer, (k, 2); of many the inputs of the least hashes."""
    pairs = {_short_hash(one.system, one.prompt): _short_hash(one.answer.strip()) for one in examples if one.prompt}
    kept = sorted(pairs.items())[:_MOST_SEEN]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, 2)


def clashes(memory: Memory, task: LmTask) -> list[str]:
    """Say which earlier tasks have this one's very inputs with other answers: nothing can tell them apart."""
    own = {_short_hash(one.system, one.prompt): _short_hash(one.answer.strip()) for one in task.listing.train}
    lines = []
    for earlier in memory.tasks:
        seen = earlier.tensors().get("seen", torch.zeros(0, 2)).tolist()
        count = sum(prompt in own and own[prompt] != answer for prompt, answer in seen)
        if count:
            least = "at least " if len(seen) == _MOST_SEEN else ""
            lines.append(
                f"{least}{count} inputs are those of task '{earlier.name}', with other answers: nothing tells the two"
                " apart, so each gets one task's answer. A system prompt or another wording would."
            )
    return lines


def _short_hash(*texts: str) -> int:
    content = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass"))
    return int.from_bytes(content.digest()[:8], "big", signed=True)


def system_of(task: TaskMemory) -> str:
    """Return the system prompt that all of a task's examples had; empty for none."""
    kept = task.tensors().get("system")
    return "" if kept is None else bytes(kept.tolist()).decode()


def manner_of(task: TaskMemory) -> Manner:
    """Return how a learned task's inputs are rendered and answered."""
    tensors = task.tensors()
    style, longest = STYLES[int(tensors["style"])], int(tensors["answer.tokens"])
    least = int(tensors.get("answer.least", torch.tensor(0)))
    return Manner(style, task.labels, task.metric == "accuracy", longest, least)


def common_manner(memory: Memory) -> Manner:
    """Return how an input is answered when no task is chosen for it: as all tasks agree, else as a plain prompt."""
    manners = [manner_of(task) for task in memory.tasks]
    first, longest = manners[0], max(manner.most_new for manner in manners)
    least = min(manner.least_new for manner in manners)
    if all((one.style, one.labels, one.by_label) == (first.style, first.labels, first.by_label) for one in manners):
        return replace(first, most_new=longest, least_new=least)
    return Manner("plain", (), False, longest, least)


def holder_of(memory: Memory, task: LmTask) -> int | None:
    """Return the index of the learned task that this data belongs to."""
    for index, known in enumerate(memory.tasks):
        if bytes(known.tensors()["source"].tolist()).hex() == task.source:
            return index
    return None


def digest_of(weights: AdapterWeights) -> str:
    """Return SHA-256 over an adapter's weights, hex."""
    content = hashlib.sha256()
    for part in (*weights.down, *weights.up):
        content.update(part.contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def merged_adapter(memory: Memory) -> AdapterWeights:
    """Return one adapter for all tasks: nearest, at its rank, to the mean of their updates."""
    weights = [task.adapter() for task in memory.tasks]
    return weights[0] if len(weights) == 1 else adapters.merge(weights, [1.0] * len(weights))
