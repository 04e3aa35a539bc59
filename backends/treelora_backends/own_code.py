"""Refuse a model that brings code of its own, before any library reads its files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from treelora_cli.errors import ModelError

_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
"""Where a repository of the hub may name code; of a local directory every ``*config.json`` is read."""
_POINTER, _POINTER_SIZE = b"version https://git-lfs.github.com/spec/", 1024
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Where a path names a kernel that transformers would fetch and run."""


def refuse_own_code(name: str, *, offline: bool) -> None:
    """Look through the configurations of a model for code that its repository brings.

    The libraries are told not to run any; this says so in one line, and before they read anything.

    Args:
        name: Directory or hub id.
        offline: Never ask the network.

    Raises:
        ModelError: A configuration names code.
    """
    for path in _configurations(name, offline):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            continue  # the loader says what is wrong with it
        found = next(_named_code(content), None)
        if found is not None:
            raise ModelError(
                f"{name}: {path.name} names code of the model's own ({found[:80]!r}), which is never run."
                " Use a model that transformers knows by itself."
            )


def refuse_pointers(name: str) -> None:
    """Raise ``ModelError`` when a file of a local model is what Git LFS puts in place of what it did not fetch."""
    folder = Path(name)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.stat().st_size < _POINTER_SIZE and path.read_bytes().startswith(_POINTER):
            raise ModelError(f"{path} is a pointer of Git LFS and not the file. Fetch it: git lfs pull")


def refuse_kernels(arguments: Mapping[str, Any]) -> None:
    """Raise ``ModelError`` when an argument of the architecture names a kernel to fetch."""
    found = next(_named_code(arguments), None)
    if found is not None:
        raise ModelError(f"Model argument {found[:80]!r}: code that is fetched for a model is never run.")


def _configurations(name: str, offline: bool) -> Iterator[Path]:
    folder = Path(name)
    if folder.exists():
        yield from sorted(folder.glob("*config.json"))
        return
    from transformers.utils.hub import cached_file

    for file in _CONFIGS:
        try:
            found = cached_file(
                name,
                file,
                local_files_only=offline,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
        except (OSError, ValueError):
            return  # no such repository, or an id that is none: the loader says it in its own words
        if found is not None:
            yield Path(found)


def _named_code(content: Any) -> Iterator[str]:
    """Yield the names of code in a configuration, its nested ones included."""
    if isinstance(content, list):
        for one in content:
            yield from _named_code(one)
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if key == "auto_map" and value:
            yield _first_name(value)
        elif key in _KERNEL_KEYS:
            yield from (text for text in _texts(value) if "/" in text)
        else:
            yield from _named_code(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def _first_name(value: Any) -> str:
    return next(_texts(value), str(value))
