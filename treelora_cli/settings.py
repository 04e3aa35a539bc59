"""Settings by name, as ``--set`` writes them, and settings that a backend or a method declares for itself.

A backend or method declares its own as a frozen dataclass of ``fields.setting`` fields, in the attribute
``own_settings``; their values lie under ``backend_settings`` or ``method_settings`` in ``treelora.yaml``.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from treelora_cli.config import Config, from_flags, overlay
from treelora_cli.errors import ConfigError, UsageError, suggest
from treelora_cli.fields import check_range, coerce

T = TypeVar("T")

SECTIONS = ("backend_settings", "method_settings")
"""Sections whose keys the backend or the method declares."""


def known_settings(without: Iterable[str] = ("stream",)) -> dict[str, type]:
    """Return the type of every scalar or mapping setting by its full name, such as ``train.lr``.

    Args:
        without: Sections and top-level settings to leave out.
    """
    left_out, found = set(without), dict[str, type]()
    for section, hint in typing.get_type_hints(Config).items():
        if section in left_out:
            continue
        if not dataclasses.is_dataclass(hint):
            found[section] = _plain_type(hint)
            continue
        for key, inner in typing.get_type_hints(hint).items():
            found[f"{section}.{key}"] = _plain_type(inner)
    return found


def _plain_type(hint: Any) -> type:
    if typing.get_origin(hint) is dict:
        return dict
    return next(one for one in (*typing.get_args(hint), hint) if isinstance(one, type) and one is not type(None))


def parse_set(pairs: Sequence[str] | None, option: str = "--set") -> Config:
    """Read ``KEY=VALUE`` pairs; a key is a setting's full name, any unique last part of it, or ``SECTION.KEY.NAME``.

    Raises:
        UsageError: Not a pair, an unknown key, a key that fits several settings, or a value out of range.
    """
    values: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        where = f"{option} {pair}"
        if not (key and equals):
            raise UsageError(f"{where}: expected KEY=VALUE.")
        name, inner, kind = _named(key, where)
        value = _value(text, where)
        flag = name.replace(".", "__")
        if inner:
            values.setdefault(flag, {})[inner] = value
        elif flag in values:
            raise UsageError(f"{where}: '{name}' is given twice.")
        else:
            values[flag] = coerce(kind, value, name, where)
    return from_flags(**values)


def _named(key: str, where: str) -> tuple[str, str, type]:
    """Return a setting's full name, the key inside it where it is a mapping, and its type."""
    known = known_settings()
    for name, kind in known.items():
        if kind is dict and key.startswith(f"{name}.") and len(key) > len(name) + 1:
            return name, key[len(name) + 1 :], dict
    found = [name for name, kind in known.items() if kind is not dict and (name == key or name.endswith(f".{key}"))]
    if len(found) == 1:
        return found[0], "", known[found[0]]
    if found:
        raise UsageError(f"{where}: '{key}' fits {' and '.join(found)}. Write one of them.")
    shown = [*known, *(name.rpartition(".")[2] for name in known)]
    raise UsageError(
        f"{where}: unknown setting '{key}'{suggest(key, shown)}. What a backend or method declares is written"
        f" {' or '.join(f'{section}.NAME' for section in SECTIONS)}."
    )


def _value(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: not a number, word or list.") from error


def add_set(flags: Config, pairs: Sequence[str] | None) -> Config:
    """Return ``flags`` with what ``--set`` gives beside them.

    Raises:
        UsageError: Bad pairs, or a setting that both give.
    """
    more = parse_set(pairs)
    both = sorted(given_settings(flags).keys() & given_settings(more).keys())
    if both:
        raise UsageError(f"--set {both[0]}: the setting's own option gives it, too. Leave one of them out.")
    return overlay(more, flags)


def given_settings(config: Config) -> dict[str, Any]:
    """Return the settings that a level gives, by full name; mappings key by key."""
    found: dict[str, Any] = {}
    for section, part in vars(config).items():
        inner = {section: part}
        if dataclasses.is_dataclass(part):
            inner = {f"{section}.{key}": value for key, value in vars(part).items()}
        for name, value in inner.items():
            if isinstance(value, dict):
                found |= {f"{name}.{key}": one for key, one in value.items()}
            elif value is not None and value != ():
                found[name] = value
    return found


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
        read[name] = value if value is None else coerce(_plain_type(hints[name]), value, name, where)
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
