"""``state.json``: the commit point. What a project is made of, strictly checked when read."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from treelora_cli.errors import DamagedError, ProjectError, UsageError
from treelora_cli.project.store import FileRecord, check_inner_name

SCHEMA = 1
"""Version of the project layout this program writes."""
STATE = "state.json"
"""The file that says what a project is made of."""
CONFIG = "treelora.yaml"
"""The file that the user may edit."""
_CHECKSUM = "checksum"
_TASK_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
_DEVICE_NAMES = {"con", "prn", "aux", "nul", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}


def check_task_name(name: str) -> str:
    """Return a safe task name.

    Raises:
        UsageError: Not letters, digits, ``.``, ``_``, ``-``, starting with a letter or digit, at most 64.
    """
    if name.lower().split(".")[0] in _DEVICE_NAMES:
        raise UsageError(f"Task name {name!r} is not allowed: Windows keeps it for a device. Give another with --name.")
    if not _TASK_NAME.fullmatch(name) or name.endswith("."):
        raise UsageError(
            f"Task name {name!r} is not allowed: use letters, digits, '.', '_' and '-', at most 64."
            " Letters are A to Z, first stands a letter or digit, and last no '.'. Give one with --name."
        )
    return name


@dataclass(frozen=True)
class TaskEntry:
    """One learned task.

    Attributes:
        name: As the user gave it.
        directory: Where its records lie, such as ``tasks/001-birds``.
        adapter: Directory that holds its adapter: its own, or that of the group it was merged into.
    """

    name: str
    directory: str
    adapter: str


@dataclass(frozen=True)
class State:
    """Everything ``state.json`` says.

    Attributes:
        backend: Registered model family.
        base: Identity of the frozen model: fingerprint, adapted layers, facts.
        fixed: Settings that every stored adapter depends on and that cannot change any more.
        tasks: In order of arrival.
        files: Record of every file by its name in the project.
        generation: Commits so far.
        written_by: Version of treelora that wrote it.
    """

    backend: str
    base: dict[str, Any]
    fixed: dict[str, Any]
    tasks: tuple[TaskEntry, ...] = ()
    files: dict[str, FileRecord] = field(default_factory=dict)
    generation: int = 0
    written_by: str = ""

    def to_json(self) -> bytes:
        """Render with sorted keys: the same state is the same bytes."""
        return seal({"schema": SCHEMA, **asdict(self)})

    def digest(self) -> str:
        """Return the SHA-256 of ``state.json``: it stands for every file of the project."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def task(self, name: str) -> TaskEntry | None:
        """Return the task called ``name``, whatever its case."""
        return next((task for task in self.tasks if task.name.lower() == name.lower()), None)


def read_state(root: Path) -> bytes:
    """Return ``state.json`` of the project at ``root``, verbatim.

    Raises:
        ProjectError: There is none, or it cannot be read.
    """
    try:
        return (root / STATE).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ProjectError(f"No treelora project at {root}. Run: treelora init {root} --model ...") from error
    except OSError as error:
        raise ProjectError(f"{root / STATE} cannot be read: {error.strerror}.") from error


def seal(record: dict[str, Any]) -> bytes:
    """Render ``record`` with the checksum of everything else in it: no file holds the hash of ``state.json``."""
    body = {key: value for key, value in record.items() if key != _CHECKSUM}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, _CHECKSUM: checksum}, indent=1, sort_keys=True) + "\n").encode()


def unseal(record: dict[str, Any]) -> dict[str, Any]:
    """Return what ``seal`` was given.

    Raises:
        ValueError: The checksum is another.
        KeyError: There is none.
    """
    if json.loads(seal(record))[_CHECKSUM] != record[_CHECKSUM]:
        raise ValueError("checksum")
    return {key: value for key, value in record.items() if key != _CHECKSUM}


@functools.lru_cache(maxsize=16)  # a commit looks at the same few earlier states several times
def parse_state(data: bytes) -> State:
    """Read ``state.json``.

    Raises:
        ProjectError: It was written by a newer version.
        DamagedError: It is not what this program writes.
    """
    try:
        record = json.loads(data)
        schema = record.pop("schema")
        if type(schema) is int and schema > SCHEMA:
            raise ProjectError(f"state.json has schema {schema}; this treelora reads up to {SCHEMA}. Upgrade treelora.")
        if schema != SCHEMA:
            raise ValueError("schema")
        record = unseal({"schema": schema, **record})
        del record["schema"]
        return _build(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"state.json is damaged ({type(error).__name__}). Run treelora doctor.") from error


def _build(record: dict[str, Any]) -> State:
    texts = [record["backend"], record["written_by"]]
    if not all(type(text) is str for text in texts):
        raise TypeError("text expected")
    if type(record["generation"]) is not int or record["generation"] < 0:
        raise ValueError("generation")
    files = {
        check_inner_name(name): FileRecord(_hex(entry["sha256"]), _size(entry["size"]))
        for name, entry in record["files"].items()
    }
    tasks = tuple(TaskEntry(**{key: _text(value) for key, value in task.items()}) for task in record["tasks"])
    for task in tasks:
        check_inner_name(task.directory)
        check_inner_name(task.adapter)
        if f"{task.adapter}/adapter_model.safetensors" not in files:
            raise ValueError("adapter without a file")
    if len({task.name for task in tasks}) != len(tasks):
        raise ValueError("task names")
    base, fixed = record["base"], record["fixed"]
    if type(base) is not dict or type(fixed) is not dict or not _is_text_list(base["layers"]):
        raise TypeError("mapping expected")
    _text(base["fingerprint"])
    return State(
        backend=record["backend"],
        base=base,
        fixed=fixed,
        tasks=tasks,
        files=files,
        generation=record["generation"],
        written_by=record["written_by"],
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError("text expected")
    return value


def _is_text_list(value: Any) -> bool:
    return type(value) is list and all(type(item) is str for item in value)


def _hex(value: Any) -> str:
    if len(_text(value)) != 64 or set(value) - set("0123456789abcdef"):
        raise ValueError("hash")
    return str(value)


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("size")
    return value
