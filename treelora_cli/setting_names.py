"""Every setting by its full name: what it means, its default and what it may be."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treelora_cli.config import DEFAULTS, Config, from_flags
from treelora_cli.errors import UsageError, suggest
from treelora_cli.fields import choices_of

_NOT_SET = ("stream",)
"""Sections of recipes only."""


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: Full name, such as ``train.epochs``.
        meaning: What it does, with its unit.
        default: Value where nothing is given; ``None`` where the backend or the data decides.
        allowed: Choices or range in words; the kind of value where anything goes.
    """

    name: str
    meaning: str
    default: Any
    allowed: str


def all_settings() -> tuple[Setting, ...]:
    """Return every setting of ``treelora.yaml`` in its order."""
    found: list[Setting] = []
    for spec in dataclasses.fields(Config):
        default = getattr(DEFAULTS, spec.name)
        if spec.name in _NOT_SET:
            continue
        if not dataclasses.is_dataclass(default):
            found.append(_setting(Config, spec, default, ""))
            continue
        kind: Any = type(default)
        for inner in dataclasses.fields(kind):
            found.append(_setting(kind, inner, getattr(default, inner.name), f"{spec.name}."))
    return tuple(found)


def _setting(kind: type[Any], spec: dataclasses.Field[Any], default: Any, section: str) -> Setting:
    hint = typing.get_type_hints(kind)[spec.name]
    options = [one for one in typing.get_args(hint) or (hint,) if one is not type(None)]
    allowed = _allowed(spec.metadata, options[0])
    return Setting(
        f"{section}{spec.name}", spec.metadata["doc"], default or None if default == {} else default, allowed
    )


def _allowed(metadata: Mapping[str, Any], kind: Any) -> str:
    choices, low, high = choices_of(metadata), metadata.get("low"), metadata.get("high")
    if choices:
        return ", ".join(choices)
    if low is not None:
        return f"{low:,} to {high:,}" if high is not None else f"{low:,} or more"
    return {bool: "true, false", str: "text", int: "whole number", float: "number"}.get(kind, "key: value")


def from_names(values: Mapping[str, Any]) -> Config:
    """Turn full names and values into the uppermost level of precedence.

    Raises:
        UsageError: No such setting, or a value out of range.
    """
    known = [one.name for one in all_settings()]
    for name in values:
        if name not in known:
            raise UsageError(f"'{name}' is no setting{suggest(name, known)}. List them: treelora settings")
    return from_flags(**{name.replace(".", "__"): value for name, value in values.items()})
