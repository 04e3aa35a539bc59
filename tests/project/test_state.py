"""``state.json`` and the names in it: strict when read, the same bytes when written."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from treelora_cli.errors import DamagedError, ProjectError, UsageError
from treelora_cli.project import State, TaskEntry, check_task_name
from treelora_cli.project.state import SCHEMA, parse_state, seal
from treelora_cli.project.store import FileRecord


@pytest.mark.parametrize("change", [{"directory": "../x"}, {"adapter": "/x"}, {"adapter": "tasks/002-cold/no"}])
def test_task_entries_that_escape_are_refused(learned_project: Path, change: dict[str, str]) -> None:
    record = json.loads((learned_project / "state.json").read_text())
    record["tasks"][0].update(change)
    with pytest.raises(DamagedError, match=r"not allowed|is damaged"):
        parse_state(seal(record))


@given(st.text(max_size=70))
@example("a\n")
@example("nul.txt")
def test_task_names_that_pass_are_plain(name: str) -> None:
    allowed = set(string.ascii_letters + string.digits + "._-")
    try:
        assert check_task_name(name) == name
    except UsageError:
        return
    assert set(name) <= allowed
    assert name[0] not in "._-" and len(name) <= 64
    assert Path("tasks", name).name == name


_NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
_RECORDS = st.builds(FileRecord, st.binary(min_size=32, max_size=32).map(bytes.hex), st.integers(0, 2**50))
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def _states(draw: st.DrawFn) -> State:
    names = draw(st.lists(_NAMES, unique=True, max_size=4))
    tasks = tuple(TaskEntry(name, f"tasks/{i:03d}-{name}", f"tasks/{i:03d}-{name}") for i, name in enumerate(names))
    files = {f"{task.adapter}/adapter_model.safetensors": draw(_RECORDS) for task in tasks}
    files |= draw(st.dictionaries(_NAMES, _RECORDS, max_size=3))
    layers = draw(st.lists(st.text(max_size=9), max_size=3))
    base = {"layers": layers, "fingerprint": draw(st.text()), "facts": draw(st.dictionaries(st.text(), st.integers()))}
    fixed = draw(st.dictionaries(st.text(), st.none() | st.integers() | st.text()))
    return State(draw(st.text()), base, fixed, tasks, files, draw(st.integers(0, 10**9)), draw(st.text()))


@given(_states())
def test_state_round_trip(state: State) -> None:
    assert parse_state(state.to_json()) == state
    assert parse_state(state.to_json()).to_json() == state.to_json()


@given(st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"schema": true}')
@example(b'{"schema": 1e999}')
@example(b"9" * 5000)
def test_arbitrary_bytes_are_refused_as_damage(data: bytes) -> None:
    with pytest.raises(ProjectError, match=r"state\.json"):
        parse_state(data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_state_with_one_value_changed_is_read_or_refused(learned_project: Path, data: st.DataObject) -> None:
    record = json.loads((learned_project / "state.json").read_text())
    target: Any = record
    while True:
        keys = sorted(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(target[key], dict | list) or not target[key] or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(_JSON)
    try:
        state = parse_state(seal(record))
    except ProjectError:
        return
    assert state.generation >= 0 and all(isinstance(task.name, str) for task in state.tasks)
    assert json.loads(state.to_json())["schema"] == SCHEMA
