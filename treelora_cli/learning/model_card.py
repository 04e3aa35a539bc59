"""What every export's model card says beside what the backend wrote: scores, data, method, limits.

The same scores stand in the card's head as ``model-index``, where the hub reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_METHOD = """Tasks are LoRA adapters on a frozen base, learned one after the other; heads are solved from sums, and no
example of any task is stored. Method `{method}`{paper}: {settings}.
Made with treelora {version}."""
_PAPER = ", a tree over the tasks' gradients that says where a new one starts (TreeLoRA, Qian et al., ICML 2025)"
_LIMITS = """- It answers as it was taught: with the classes or answers named above, whatever it is shown.
- Scores are of held-out examples of the tasks' own data, one run, one seed; other data may score otherwise.
- What the base may be used for, and what it was trained on, its own card says; so does its licence."""
_SETTINGS = (("epochs", "epochs"), ("lr", "learning rate"), ("batch_size", "batch size"))


@dataclass(frozen=True)
class CardScores:
    """What was measured when an export was written.

    Attributes:
        own: The export's scores in [0, 1], by task; empty when not measured.
        project: The project's own scores of the same examples.
        inference: How the project answers.
        advice: A line about the difference; may be empty.
    """

    own: Mapping[str, float]
    project: Mapping[str, float]
    inference: str
    advice: str


def complete_card(card: Path, name: str, records: Sequence[Mapping[str, Any]], scores: CardScores) -> None:
    """Add scores, data, method and limits to a card, and the scores to its head.

    Args:
        card: The file; its head is YAML between two lines of ``---``.
        name: Of the model.
        records: ``task.json`` of each task that the export holds, in order.
        scores: What was measured.
    """
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head, body = _divided(text)
    if scores.own:
        head["model-index"] = [{"name": name, "results": _results(head, records, scores.own)}]
    parts = [body.strip(), _score_section(scores), _data_section(records)]
    if records:
        parts += [_method_section(records[-1]), f"## Limits\n\n{_LIMITS}"]
    written = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=120) if head else ""
    front = f"---\n{written}---\n" if written else ""
    card.write_text(front + "\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _divided(text: str) -> tuple[dict[str, Any], str]:
    """Return a card's head and body."""
    if not text.startswith("---\n") or "\n---\n" not in text[4:]:
        return {}, text
    head, _, body = text[4:].partition("\n---\n")
    return dict(yaml.safe_load(head) or {}), body


def _results(
    head: Mapping[str, Any], records: Sequence[Mapping[str, Any]], scores: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return the scores as the hub's ``model-index`` has them, in percent."""
    kind = str(head.get("pipeline_tag", "other"))
    metric_of = {str(one.get("name")): str(one.get("metric")) for one in records}
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": name, "type": name, "split": "held-out"},
            "metrics": [{"type": metric_of.get(name, "accuracy"), "value": round(100 * value, 2)}],
        }
        for name, value in scores.items()
    ]


def _score_section(scores: CardScores) -> str:
    if not scores.own:
        return "## Scores\n\nIts scores were not measured when it was written."
    rows = [f"| {one} | {_percent(scores.project.get(one))} | {_percent(own)} |" for one, own in scores.own.items()]
    lines = ["Percent, on held-out examples of each task, when this directory was written:", ""]
    lines += [f"| task | project, `{scores.inference}` | this directory |", "| --- | --- | --- |", *rows]
    return "\n".join(["## Scores", "", *lines, *(["", scores.advice] if scores.advice else [])])


def _data_section(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return ""
    rows = [
        f"| {one.get('name')} | {one.get('train_examples', '-')} | {one.get('test_examples', '-')}"
        f" | {one.get('metric', '-')} | `{str(one.get('data_sha256', ''))[:12]}` |"
        for one in records
    ]
    head = ["| task | learned examples | held out | metric | SHA-256 of the data |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(["## Tasks and data", "", "In order of arrival:", "", *head, *rows])


def _method_section(record: Mapping[str, Any]) -> str:
    settings = record.get("settings") or {}
    train, adapter = settings.get("train") or {}, settings.get("adapter") or {}
    shown = [f"{name} {train[key]:g}" for key, name in _SETTINGS if train.get(key) is not None]
    shown += [f"rank {adapter['rank']}"] if adapter.get("rank") is not None else []
    version = (record.get("versions") or {}).get("treelora", "")
    method = settings.get("method", "treelora")
    paper = _PAPER if method == "treelora" else ""
    text = _METHOD.format(method=method, paper=paper, settings=", ".join(shown), version=version)
    return f"## Method\n\n{text}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
