"""Identity of a frozen base: a hash over its parameters, remembered for files that have not changed since.

Hashing 7 billion weights takes longer than reading them. What was once hashed from local files is kept in the user's
cache under their paths, sizes, times of change and inodes, and under all else that decides what they are loaded as.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

_MOST_KNOWN = 256
_SETTLED_SECONDS = 2.0
"""A file that changed a moment ago may change again without another time of change; it is not remembered yet."""


def hash_parameters(network: nn.Module) -> str:
    """Return SHA-256, in hex, over names, types, shapes and bytes of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(memoryview(data.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def all_finite(network: nn.Module) -> bool:
    """Return whether every parameter is finite; the device is waited for once."""
    found = [p.detach().isfinite().all() for p in network.parameters() if p.is_floating_point()]
    return not found or bool(torch.stack(found).all())


def whole_numbers(path: Path) -> list[str]:
    """Return the tensors of a safetensors file that hold whole numbers, by name; only its head is read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, no mapping
        return [name for name, part in slices.items() if part.get_dtype().startswith(("I", "U", "BOOL"))]


def identity(files: Sequence[Path], loaded_as: Mapping[str, object], measure: Callable[[], str]) -> str:
    """Return the identity of a base that was loaded from local files.

    Args:
        files: All that decide its weights; without any, nothing is remembered.
        loaded_as: All else that decides them: type, arguments, versions of libraries.
        measure: Hashes the loaded weights.
    """
    key = _key_of(files, loaded_as) if files else None
    known = {} if key is None else _known()
    if key is not None and isinstance(known.get(key), str):
        return known[key]
    found = measure()
    if key is not None and key == _key_of(files, loaded_as):  # nothing has changed meanwhile
        _remember(key, found)
    return found


def cache_file() -> Path:
    """Return where identities are remembered: a file in the user's cache, or in the directory TREELORA_CACHE."""
    chosen = os.environ.get("TREELORA_CACHE")
    if chosen:
        return Path(chosen) / "identities.json"
    usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(usual) / "treelora" / "identities.json"


def _key_of(files: Sequence[Path], loaded_as: Mapping[str, object]) -> str | None:
    """Return the name under which an identity is remembered; ``None`` for files that are gone or just changed."""
    stamps: list[object] = []
    for path in sorted(files):
        try:
            found = path.stat()
        except OSError:
            return None
        if time.time() - found.st_mtime < _SETTLED_SECONDS:
            return None
        stamps.append([str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ino])
    content = json.dumps([stamps, dict(loaded_as)], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _known() -> dict[str, str]:
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # none yet, or not ours: what is not remembered is hashed
    return found if isinstance(found, dict) else {}


def _remember(key: str, identity: str) -> None:
    path = cache_file()
    known = dict(list(_known().items())[1 - _MOST_KNOWN :]) | {key: identity}
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="identities-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(known, file)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
