"""Crafted project files, hash and all, are read or refused with a message; ``tests/fuzz`` runs longer."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from targets import targets

EXAMPLES = int(os.environ.get("TREELORA_FUZZ_EXAMPLES", "40"))
NAMES = [
    "adapter_model.safetensors",
    "head.safetensors",
    "labels.json",
    "task.json",
    "signature.safetensors",
    "shared head.safetensors",
    "tree.json",
    "tree.safetensors",
    "bandit.json",
    "bandit.safetensors",
    "metrics/matrix.json",
    "metrics/answers.json",
    "steps.jsonl",
    "state.json",
    "treelora.yaml",
    "checkpoint.json",
    "trash",
    "pending.json",
    "watch.json",
    "lock.json",
]
_ODD = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "../x", "x" * 99, [], {}, [[]], {"": None}, "\ud800"]


@pytest.fixture(scope="module")
def harness(learned_project: Path) -> tuple[dict[str, Callable[[bytes], None]], dict[str, list[bytes]]]:
    return targets(learned_project)


def test_every_parser_has_a_target(harness: Any) -> None:
    assert sorted(harness[0]) == sorted(NAMES)


def _with_one_value_changed(data: st.DataObject, text: bytes) -> bytes:
    """Replace, remove or add one value anywhere in a JSON document."""
    record = json.loads(text)
    if data.draw(st.integers(0, 20)) == 0 or not isinstance(record, dict | list) or not record:
        return json.dumps(data.draw(st.sampled_from(_ODD))).encode()
    target: Any = record
    while True:
        key = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict) else list(range(len(target)))))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.integers(0, 3)) == 0:
            break
        target = target[key]
    change = data.draw(st.integers(0, 3))
    if change == 0:
        del target[key]
    elif change == 1 and isinstance(target, list):
        target.append(target[key])
    else:
        target[key] = data.draw(st.sampled_from(_ODD))
    return json.dumps(record).encode()


def _mangled(data: st.DataObject, whole: bytes) -> bytes:
    """Flip, cut, insert or repeat bytes; for safetensors mostly in the header."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        reach = min(len(changed), data.draw(st.sampled_from([8, 400, len(changed)])))
        if not reach:
            break
        place = data.draw(st.integers(0, reach - 1))
        kind = data.draw(st.integers(0, 3))
        if kind == 0:
            changed[place] = data.draw(st.integers(0, 255))
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = data.draw(st.binary(max_size=8))
        else:
            changed[place:place] = changed[place : place + 32]
    return bytes(changed)


@pytest.mark.parametrize("name", NAMES)
def test_a_crafted_file_is_read_or_refused(harness: Any, name: str) -> None:
    run, (seed,) = harness[0][name], harness[1][name]

    @settings(
        max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES < 1000, database=None
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        is_json = name.endswith(".json") or name == "trash"
        run(_with_one_value_changed(data, seed) if is_json and data.draw(st.booleans()) else _mangled(data, seed))

    check()
