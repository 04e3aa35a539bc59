"""The checkpoint of the task in training: two files, the one that names the other written last."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import DamagedError
from treelora_cli.project.state import State, seal, unseal
from treelora_cli.project.store import FileRecord, Store, record_of, write_file

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
            raise DamagedError(f"{facts['file']} is malformed. Train the task anew, without --resume.") from error

    def clear(self) -> None:
        """Delete the checkpoint: its task was committed or is trained anew."""
        for path in [self.directory / _FACTS, *self.directory.glob("step-*.safetensors")]:
            path.unlink(missing_ok=True)
