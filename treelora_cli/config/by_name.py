"""Settings by their full names, such as ``train.lr``: from flags, ``--set`` and Python, and all of them listed."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml

from treelora_cli.config.config import DEFAULTS, Config, overlay
from treelora_cli.config.fields import check_range, choices_of, coerce, plain_type
from treelora_cli.errors import UsageError, suggest

SECTIONS = ("backend_settings", "method_settings")
"""Sections whose keys the backend or the method declares."""
_RECIPES_ONLY = ("stream",)


def from_flags(**sections: Any) -> Config:
    """Build the uppermost level from command-line values, ``None`` where a flag was not given.

    Keyword ``section__field=value`` sets a nested field; a plain keyword a top-level one.

    Raises:
        ConfigError: A value is out of range; the message names the option.
    """
    options = {name: f"--{name.rpartition('__')[2].replace('_', '-')}" for name in sections}
    return _checked(sections, options)


def _checked(values: Mapping[str, Any], places: Mapping[str, str]) -> Config:
    """Check values and put them in their sections; by name, as ``from_flags`` takes them, and where each was given."""
    hints = typing.get_type_hints(Config)
    kinds = {name: cast("type[Any]", kind) for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    nested: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition("__")
        check_range(kinds[section] if section else Config, key, value, places[name])
        (nested.setdefault(section, {}) if section else top)[key] = value
    top |= {name: kinds[name](**values) for name, values in nested.items()}
    return Config(**top)


def from_names(values: Mapping[str, Any]) -> Config:
    """Turn full names and values into the uppermost level of precedence.

    Raises:
        UsageError: No such setting, or a value out of range.
    """
    known = known_settings()
    for name in values:
        if name not in known:
            raise UsageError(f"'{name}' is no setting{suggest(name, known)}. List them: treelora settings")
    flags = {name.replace(".", "__"): name for name in values}
    return _checked({flag: values[name] for flag, name in flags.items()}, flags)


def parse_set(pairs: Sequence[str] | None, option: str = "--set") -> Config:
    """Read ``KEY=VALUE`` pairs; a key is a setting's full name, any unique last part of it, or ``SECTION.KEY.NAME``.

    Raises:
        UsageError: Not a pair, an unknown key, a key that fits several settings, or a value out of range.
    """
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    for pair in pairs or ():
        key, equals, text = pair.partition("=")
        where = f"{option} {pair}"
        if not (key and equals):
            raise UsageError(f"{where}: expected KEY=VALUE.")
        name, inner, kind = _named(key, where)
        value = _value(text, where)
        flag = name.replace(".", "__")
        places[flag] = where
        if inner:
            values.setdefault(flag, {})[inner] = value
        elif flag in values:
            raise UsageError(f"{where}: '{name}' is given twice.")
        else:
            values[flag] = coerce(kind, value, name, where)
    return _checked(values, places)


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


def _named(key: str, where: str) -> tuple[str, str, type]:
    """Return a setting's full name, the key inside it where it is a mapping, and its type."""
    known = known_settings()
    for name, kind in known.items():
        if kind is dict and key.startswith(f"{name}.") and len(key) > len(name) + 1:
            return name, key[len(name) + 1 :], dict
    found = [name for name, kind in known.items() if kind is not dict and (name == key or name.endswith(f".{key}"))]
    if len(found) == 1:
        return found[0], "", known[found[0]]
    if known.get(key) is dict:
        raise UsageError(f"{where}: '{key}' has entries. Write each as {key}.NAME=VALUE.")
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


def known_settings(without: Iterable[str] = _RECIPES_ONLY) -> dict[str, type]:
    """Return the type of every scalar or mapping setting by its full name, such as ``train.lr``.

    Args:
        without: Sections and top-level settings to leave out.
    """
    left_out, found = set(without), dict[str, type]()
    for section, hint in typing.get_type_hints(Config).items():
        if section in left_out:
            continue
        if not dataclasses.is_dataclass(hint):
            found[section] = plain_type(hint)
            continue
        for key, inner in typing.get_type_hints(hint).items():
            found[f"{section}.{key}"] = plain_type(inner)
    return found


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
        if spec.name in _RECIPES_ONLY:
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
