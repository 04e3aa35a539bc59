"""Every parser of a project's files, as functions of bytes that may only return or raise a ``TreeLoraError``.

A file's hash guards against damage, not against somebody who writes the hash too. So each target hands a parser
content that has passed the hash check: what a crafted project can put there.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from treelora_cli.config import DEFAULTS, overlay, parse_config
from treelora_cli.errors import TreeLoraError
from treelora_cli.project import Project
from treelora_cli.project.state import parse_state, seal
from treelora_cli.project.store import FileRecord
from treelora_cli.project.unfinished import Checkpoint

Target = Callable[[bytes], None]


class _Crafted(Project):
    """A project one of whose files holds other content, with the hash to match."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, Project.open(root).state)
        self.whole = {name: super(_Crafted, self).read(name) for name in self.state.files}
        self.name, self.data = "", b""

    def read(self, name: str) -> bytes:
        return self.data if name == self.name else self.whole[name]


def _use(project: Project) -> None:
    """Read everything that commands read."""
    from treelora_cli.algorithm.bandit import pull_summary
    from treelora_cli.backend.values import DataRequest

    project.tree()
    found = project.bandit()
    if found is not None:
        pull_summary(found[0])
    project.matrix().standing()
    for task in project.state.tasks:
        DataRequest.from_json(project.task_record(task.name)["data"])
        project.labels(task.name)
    memory = project.memory()
    memory.shared()
    for one in memory.tasks:
        one.adapter()
        one.tensors()
        if one.branch is not None:
            memory.branch(one.branch)
    json.dumps({"tasks": [project.task_record(task.name)["metric"] for task in project.state.tasks]})


def targets(root: Path) -> tuple[dict[str, Target], dict[str, list[bytes]]]:
    """Return the targets by name and, for each, contents to start from; ``root`` is a project with tasks."""
    from treelora_cli.project.repair import _tree_settings

    project = _Crafted(root)
    found: dict[str, Target] = {}
    seeds: dict[str, list[bytes]] = {}

    def of_file(name: str) -> Target:
        uses: dict[str, Callable[[], object]] = {
            "tree": project.tree,
            "bandit": lambda: _bandit(project),
            "metrics": lambda: (project.matrix().standing(), project.answers(), project.watch()),
        }
        part = name.split(".")[0].split("/")[0]
        use = uses.get(part, lambda: _use(project))

        def run(data: bytes) -> None:
            project.name, project.data = name, data
            try:
                use()
                if name.endswith("steps.jsonl"):
                    project.steps(project.state.tasks[-1].name)
                if name.endswith("task.json"):
                    _tree_settings(project, set())
            except TreeLoraError:
                pass

        return run

    last = project.state.tasks[-1].directory
    names = [name for name in project.whole if "/" not in name or name.startswith((last, "metrics", "branches"))]
    for name in names:
        if name.endswith("adapter_config.json"):
            continue  # written for peft, never read
        found[name.rpartition("/")[2] if name.startswith(last) else name] = of_file(name)
        seeds[name.rpartition("/")[2] if name.startswith(last) else name] = [project.whole[name]]
    shared = "head.safetensors"
    found["shared " + shared], seeds["shared " + shared] = of_file(shared), [project.whole[shared]]
    found["state.json"], seeds["state.json"] = _state, [(root / "state.json").read_bytes()]
    found["treelora.yaml"], seeds["treelora.yaml"] = _settings, [(root / "treelora.yaml").read_bytes()]
    found["checkpoint.json"] = _Folder("run/checkpoint.json").checkpoint
    record = {
        "task": "x",
        "state": "",
        "step": 3,
        "file": "step-00000003.safetensors",
        "sha256": "0" * 64,
        "size": 1,
        "request": {},
    }
    seeds["checkpoint.json"] = [seal(record)]
    found["trash"] = _Folder("trash/0001-x.json").trash
    entry = {"tasks": ["x"], "since": 1, "back_to": "0", "states": [(root / "state.json").read_text()]}
    seeds["trash"] = [seal(entry)]
    found["pending.json"] = _Folder("pending/pending.json").pending
    waiting = {"task": last.partition("-")[2], "reason": "r", "grown_from": "0", "state": entry["states"][0]}
    seeds["pending.json"] = [seal(waiting)]
    found["watch.json"] = _watch
    sound = {"name": "w", "record": project.task_record(last.partition("-")[2]), "metric": "accuracy", "examples": 3}
    seeds["watch.json"] = [json.dumps({"sets": [{**sound, "untouched": None, "scores": [["a", 0.5]]}]}).encode()]
    found["lock.json"] = _Folder("lock.json").lock
    seeds["lock.json"] = [b'{"pid": 1, "host": "h", "command": "c", "since": 1}']
    return found, seeds


def _bandit(project: Project) -> None:
    from treelora_cli.commands.inspect_tree import _bandit as shown

    shown(project)


def _watch(data: bytes) -> None:
    from treelora_cli.project.metrics import parse_watch, watch_document

    with contextlib.suppress(TreeLoraError):
        found = parse_watch(data)
        assert parse_watch(json.dumps(watch_document(found)).encode()) == found


def _sealed(data: bytes) -> bytes:
    """Give a crafted document its right checksum, which would hide the rest."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        return seal(json.loads(data))
    return data


def _state(data: bytes) -> None:
    try:
        state = parse_state(_sealed(data))
    except TreeLoraError:
        return
    assert parse_state(state.to_json()) == state
    for name, record in state.files.items():
        assert not name.startswith("/") and ".." not in name.split("/")
        assert isinstance(record, FileRecord)


def _settings(data: bytes) -> None:
    with contextlib.suppress(TreeLoraError):
        overlay(parse_config(data.decode("utf-8", "replace"), "treelora.yaml"), DEFAULTS)


class _Folder:
    """A ``.treelora`` directory with one file of arbitrary content."""

    def __init__(self, name: str) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / ".treelora" / name
        self.path.parent.mkdir(parents=True)

    def checkpoint(self, data: bytes) -> None:
        self.path.write_bytes(_sealed(data))
        kept = Checkpoint(self.path.parent)
        try:
            facts = kept.facts()
            kept.damage()
            if facts is not None:
                kept.tensors(facts)
        except TreeLoraError:
            pass

    def trash(self, data: bytes) -> None:
        from treelora_cli.project.history import History

        self.path.write_bytes(_sealed(data))
        history = History(self.root)
        try:
            for entry in history.undone(b""):
                assert entry.tasks and entry.states
            history.drop_void(b"")
            history.kept_states(b"")
        except TreeLoraError:
            pass

    def pending(self, data: bytes) -> None:
        from treelora_cli.project.unfinished import Pending

        self.path.write_bytes(_sealed(data))
        try:
            found = Pending(self.path.parent).read()
        except TreeLoraError:
            return
        assert found is not None
        assert parse_state(found.state).tasks[-1].name == found.task

    def lock(self, data: bytes) -> None:
        from treelora_cli.project.lock import _describe

        self.path.write_bytes(data)
        assert _describe(self.path)
