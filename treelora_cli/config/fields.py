"""How a setting is declared, and how a value given for it is checked.

A backend or method declares settings of its own as a frozen dataclass of ``setting`` fields, in the attribute
``own_settings``; their values lie under ``backend_settings`` or ``method_settings`` in ``treelora.yaml``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TypeVar

from treelora_cli.errors import ConfigError, suggest

T = TypeVar("T")


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


def plain_type(hint: Any) -> type:
    """Return the type behind ``X | None`` or ``dict[...]``."""
    if typing.get_origin(hint) is dict:
        return dict
    return next(one for one in (*typing.get_args(hint), hint) if isinstance(one, type) and one is not type(None))


# -- what a backend or a method declares ------------------------------------------------------------------


def own_settings(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Return what a backend or method declares, with the values given and the defaults of the rest.

    Args:
        kind: A frozen dataclass of ``fields.setting`` fields.
        values: What is given, by name.
        where: The section, for messages: ``backend_settings`` or ``method_settings``.

    Raises:
        ConfigError: An unknown name, a value of another type or out of range.
    """
    hints = typing.get_type_hints(kind)
    known = {spec.name: spec for spec in dataclasses.fields(kind)}  # type: ignore[arg-type]
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            hint = suggest(name, known) or f". Known here: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key '{name}'{hint}.")
        read[name] = value if value is None else coerce(plain_type(hints[name]), value, name, where)
        check_range(kind, name, read[name], where)
    return kind(**read)


def check_own(declared: type[Any] | None, values: Mapping[str, Any], where: str, whose: str) -> dict[str, Any]:
    """Return the values in force of the settings that ``whose`` declares; it may declare none.

    Raises:
        ConfigError: As ``own_settings``, or values where nothing is declared.
    """
    if declared is None:
        if values:
            raise ConfigError(f"{where}: {whose} has no settings of its own; got '{next(iter(values))}'.")
        return {}
    return dict(vars(own_settings(declared, values, where)))


def fixed_own(declared: type[Any] | None, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of the declared settings that are ``fixed``, by full name: what is stored depends on them."""
    if declared is None:
        return {}
    own = vars(own_settings(declared, values, where))
    return {f"{where}.{spec.name}": own[spec.name] for spec in dataclasses.fields(declared) if spec.metadata["fixed"]}
