"""The checkpoint of the task in training: two files, the one that names the other written last."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from treelora_cli.errors import DamagedError
from treelora_cli.project.store import FileRecord, Store, record_of, write_file

if TYPE_CHECKING:
    from torch import Tensor

_FACTS = "checkpoint.json"
_KINDS = {"task": str, "step": int, "request": dict, "file": str, "sha256": str, "size": int}


class Checkpoint:
    """Reads and writes a project's ``.treelora/run``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save(self, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint; ``facts`` holds the ``step``."""
        from safetensors.torch import save

        data = save(tensors)
        name = f"step-{facts['step']:08d}.safetensors"
        write_file(self.directory / name, data)
        written = {**facts, "file": name, **dataclasses.asdict(record_of(data))}
        text = json.dumps(written, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_file(self.directory / _FACTS, text.encode())
        for old in self.directory.glob("step-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any] | None:
        """Return what was saved with the tensors, ``None`` when there is no checkpoint.

        Raises:
            DamagedError: The file is not what this program writes.
        """
        try:
            facts = json.loads((self.directory / _FACTS).read_text(encoding="utf-8"))
            for key, kind in _KINDS.items():
                if type(facts[key]) is not kind:
                    raise TypeError(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedError(".treelora/run/checkpoint.json is damaged. Train the task anew.") from error
        return cast("dict[str, Any]", facts)

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
