"""How a setting is declared, and how a value given for it is checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from treelora_cli.errors import ConfigError, suggest


def setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] | None = None,
    fixed: bool = False,
) -> Any:
    """Declare one field with its meaning (unit included) and its range.

    ``fixed`` is for settings that a backend or method declares: a project keeps the value that it was made with.
    """
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "fixed": fixed}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def coerce(wanted: type, value: Any, key: str, where: str) -> Any:
    """Return ``value`` as ``wanted`` when nothing is lost by it, else raise ``ConfigError``."""
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if type(value) is wanted:
        return value
    raise ConfigError(f"{where}: '{key}' needs {wanted.__name__}, got {value!r}.")


def choices_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values that a field declared with ``setting`` may have; empty where they are not counted up."""
    choices = metadata.get("choices") or ()
    return tuple(choices() if callable(choices) else choices)


def check_range(kind: type[Any], key: str, value: Any, where: str) -> None:
    """Raise ``ConfigError`` when ``value`` is outside what the field ``key`` of ``kind`` allows."""
    metadata: Mapping[str, Any] = next(spec.metadata for spec in dataclasses.fields(kind) if spec.name == key)
    low, high = metadata.get("low"), metadata.get("high")
    if value is None:
        return
    choices = choices_of(metadata)
    if choices and value not in choices:
        hint = suggest(str(value), choices)
        raise ConfigError(f"{where}: '{key}' is one of {', '.join(choices)}; got {value!r}{hint}.")
    if isinstance(value, float) and value != value:
        raise ConfigError(f"{where}: '{key}' is not a number.")
    too_low = low is not None and value < low
    if too_low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{where}: '{key}' must be {bounds}; got {value}.")
