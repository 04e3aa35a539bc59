"""What is kept of a task that is not committed yet: its checkpoint, its steps, and that it waits for a decision.

``.treelora/run`` holds the task in training: the checkpoint is two files, the one that names the other written last;
``steps.jsonl`` is what every step showed, and goes with the task. ``.treelora/pending/pending.json`` holds a learned
task that its gate refused: the ``state.json`` that accepting enters, verbatim; what that state names lies in
``.treelora/objects`` already. It belongs to the state it grew from: any other commit voids it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import DamagedError, ProjectError
from treelora_cli.project.state import State, parse_state, seal, unseal
from treelora_cli.project.store import FileRecord, Store, make_directory, record_of, write_file

if TYPE_CHECKING:
    from torch import Tensor

_FACTS = "checkpoint.json"
_KINDS = {"task": str, "state": str, "step": int, "request": dict, "file": str, "sha256": str, "size": int}


class Checkpoint:
    """Reads and writes a project's ``.treelora/run``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint; an error leaves the earlier one, and nothing else.

        Args:
            facts: Holds the ``task``, its ``request``, the ``step`` and the digest of the ``state`` it grows from.
            tensors: What training continues from.
        """
        from safetensors.torch import save

        data = save(tensors)
        name = f"step-{facts['step']:08d}.safetensors"
        try:
            write_file(self.directory / name, data)
            written = {**facts, "file": name, **dataclasses.asdict(record_of(data))}
            write_file(self.directory / _FACTS, seal(json.loads(json.dumps(written))))
        finally:
            self._drop_unnamed()

    def _drop_unnamed(self) -> None:
        """Delete tensors that ``checkpoint.json`` does not name."""
        try:
            facts = self.facts()
        except DamagedError:
            return  # which ones it named is not known
        for path in self.directory.glob("step-*.safetensors"):
            if facts is None or path.name != facts["file"]:
                path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """True when a task was interrupted, whether or not its checkpoint is whole."""
        return (self.directory / _FACTS).exists()

    def facts(self) -> dict[str, Any] | None:
        """Return what was saved with the tensors, ``None`` when there is no checkpoint.

        Raises:
            DamagedError: The file is not what this program writes.
        """
        try:
            facts = unseal(json.loads((self.directory / _FACTS).read_text(encoding="utf-8")))
            for key, kind in _KINDS.items():
                if type(facts[key]) is not kind:
                    raise TypeError(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedError(".treelora/run/checkpoint.json is damaged. Train the task anew.") from error
        return facts

    def fits(self, state: State) -> bool:
        """Return whether there is a whole checkpoint of a task that grows from ``state``."""
        try:
            facts = self.facts()
        except DamagedError:
            return False
        return facts is not None and facts["state"] == state.digest()

    def damage(self) -> dict[str, str]:
        """Return what is wrong with the checkpoint, by file name; empty when it is whole or there is none."""
        try:
            facts = self.facts()
        except DamagedError:
            return {f".treelora/run/{_FACTS}": "damaged"}
        if facts is None:
            return {}
        try:
            Store(self.directory).read(facts["file"], FileRecord(facts["sha256"], facts["size"]))
        except DamagedError:
            return {f".treelora/run/{facts['file']}": "damaged or missing"}
        return {}

    def tensors(self, facts: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the verified tensors that ``facts`` describes.

        Raises:
            DamagedError: The file does not match its hash, or is no safetensors file.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        record = FileRecord(facts["sha256"], facts["size"])
        try:
            return load(Store(self.directory).read(str(facts["file"]), record))
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(
                f"{facts['file']} is malformed. Train the task anew: train-task DATA --abandon."
            ) from error

    def clear(self) -> None:
        """Delete the checkpoint: its task was committed or is trained anew."""
        for path in [self.directory / _FACTS, *self.directory.glob("step-*.safetensors")]:
            path.unlink(missing_ok=True)


STEPS = "steps.jsonl"
"""The file's name, in ``.treelora/run`` and in a task's directory."""


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        step: From 1.
        loss: The task's own loss.
        pull: The method's term beside it; ``None`` without one.
        lr: Learning rate.
        seconds: Time of the step.
        examples_per_second: Examples of a full batch by that time.
        selected: Index of the earlier task selected for each layer, (D,); empty without a search.
    """

    step: int
    loss: float
    pull: float | None
    lr: float
    seconds: float
    examples_per_second: float
    selected: tuple[int, ...] = ()


class StepLog:
    """Writes the steps of the task in training.

    Args:
        path: The file; absent before the first step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, taken: int) -> None:
        """Keep the lines of the first ``taken`` steps, which are continued, and no other."""
        try:
            kept = self.path.read_bytes().splitlines(keepends=True)[:taken]
        except OSError:
            kept = []
        make_directory(self.path.parent)
        self.path.write_bytes(b"".join(kept) if len(kept) == taken else b"")

    def add(self, steps: Iterable[Step]) -> None:
        """Write some more steps."""
        lines = "".join(json.dumps(vars(one), separators=(",", ":")) + "\n" for one in steps)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def read(self) -> bytes:
        """Return all lines; nothing before the first step."""
        return self.path.read_bytes() if self.path.is_file() else b""

    def clear(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def parse_steps(data: bytes) -> tuple[Step, ...]:
    """Read a task's steps.

    Raises:
        DamagedError: They are not what this program writes.
    """
    try:
        return tuple(_step(json.loads(line)) for line in data.splitlines())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise DamagedError(f"{STEPS} is malformed ({type(error).__name__}). Run treelora doctor.") from error


def _step(record: Mapping[str, Any]) -> Step:
    selected = tuple(record["selected"])
    if type(record["step"]) is not int or not all(type(one) is int and one >= 0 for one in selected):
        raise TypeError("step")
    pull = None if record["pull"] is None else float(record["pull"])
    loss, lr, seconds, rate = (float(record[key]) for key in ("loss", "lr", "seconds", "examples_per_second"))
    return Step(record["step"], loss, pull, lr, seconds, rate, selected)


_FILE = "pending.json"
PENDING = f".treelora/pending/{_FILE}"
"""The file's name in a project."""


@dataclass(frozen=True)
class Waiting:
    """A task that waits for a decision.

    Attributes:
        task: Its name.
        reason: Which figure failed, one line without its end.
        grown_from: Digest of the state it was learned on.
        state: The ``state.json`` that accepting it enters.
    """

    task: str
    reason: str
    grown_from: str
    state: bytes


class Pending:
    """Reads and writes a project's ``.treelora/pending``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, waiting: Waiting) -> None:
        """Put a task in the waiting place, in place of any before."""
        record = {
            "task": waiting.task,
            "reason": waiting.reason,
            "grown_from": waiting.grown_from,
            "state": waiting.state.decode(),
        }
        write_file(self.directory / _FILE, seal(record))

    def read(self) -> Waiting | None:
        """Return the task that waits, ``None`` when none does.

        Raises:
            DamagedError: The file is not what this program writes.
        """
        try:
            record = unseal(json.loads((self.directory / _FILE).read_text(encoding="utf-8")))
            texts = [record[key] for key in ("task", "reason", "grown_from", "state")]
            if not all(type(text) is str for text in texts):
                raise TypeError("text expected")
            task, reason, grown_from, state = texts
            if parse_state(state.encode()).tasks[-1].name != task:
                raise ValueError("task")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, ProjectError) as error:
            raise DamagedError(f"{PENDING} is damaged. Drop it with: treelora train-task --drop") from error
        return Waiting(task, reason, grown_from, state.encode())

    def of(self, current: State) -> Waiting | None:
        """Return the task that waits on ``current``; a void or damaged one is none."""
        try:
            found = self.read()
        except DamagedError:
            return None
        return found if found is not None and found.grown_from == current.digest() else None

    def exists(self) -> bool:
        """Return whether there is a file, whatever it holds."""
        return (self.directory / _FILE).exists()

    def clear(self) -> None:
        """Delete the file."""
        (self.directory / _FILE).unlink(missing_ok=True)
