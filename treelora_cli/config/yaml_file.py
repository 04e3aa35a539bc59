"""``treelora.yaml`` and recipes: read strictly, and written with each setting's meaning beside it."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Union

import yaml

from treelora_cli.config.config import Config
from treelora_cli.config.fields import check_range, coerce
from treelora_cli.errors import ConfigError, suggest

_NULL = "tag:yaml.org,2002:null"


def load_config(path: Path) -> Config:
    """Read a recipe or ``treelora.yaml`` strictly.

    Raises:
        ConfigError: The file is missing or malformed, or holds an unknown key or a value out of range;
            the message names file, line and, for a key, the nearest known one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path} not found.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return parse_config(text, path.name)


def parse_config(text: str, source: str) -> Config:
    """Parse configuration text; ``source`` is the file name used in messages."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or "malformed"
        raise ConfigError(f"{where}: invalid YAML ({problem}).") from error
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _NULL):
        return Config()
    parsed = _read_dataclass(Config, node, source)
    assert isinstance(parsed, Config)
    return parsed


def _where(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _read_dataclass(kind: type[Any], node: yaml.Node, source: str) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{_where(source, node)}: expected a mapping of settings.")
    specs = {spec.name: spec for spec in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        if key not in specs:
            raise ConfigError(f"{_where(source, key_node)}: unknown key '{key}'{_key_hint(key, list(specs))}.")
        if key in values:
            raise ConfigError(f"{_where(source, key_node)}: '{key}' is given twice.")
        values[key] = _read_value(hints[key], value_node, source, key)
        check_range(kind, key, values[key], _where(source, value_node))
    return kind(**values)


def _key_hint(key: str, here: list[str]) -> str:
    """Say where an unknown key belongs, which known one is nearest, or which are known here."""
    sections = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    elsewhere = {spec.name: name for name, kind in sections.items() for spec in dataclasses.fields(kind)}
    if key in elsewhere:
        return f" here; it belongs under '{elsewhere[key]}'"
    known = [*here, *elsewhere, *(spec.name for spec in dataclasses.fields(Config))]
    near = suggest(key, known) or suggest(key.rpartition("_")[2], known)
    return near or f". Known here: {', '.join(here)}"


def _read_value(hint: Any, node: yaml.Node, source: str, key: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if isinstance(node, yaml.ScalarNode) and node.tag == _NULL:
        if type(None) in options:
            return None
        raise ConfigError(f"{_where(source, node)}: '{key}' needs a value.")
    wanted = next(option for option in options if option is not type(None))
    if dataclasses.is_dataclass(wanted):
        return _read_dataclass(typing.cast("type[Any]", wanted), node, source)
    if typing.get_origin(wanted) is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise ConfigError(f"{_where(source, node)}: '{key}' needs a list.")
        item = typing.get_args(wanted)[0]
        return tuple(_read_value(item, child, source, key) for child in node.value)
    value = _plain(node, source)
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{_where(source, node)}: '{key}' needs a mapping.")
        return value
    return coerce(wanted, value, key, _where(source, node))


def _plain(node: yaml.Node, source: str) -> Any:
    try:
        return yaml.safe_load(yaml.serialize(node))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{_where(source, node)}: invalid value.") from error


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def to_yaml(config: Config, heading: str) -> str:
    """Render the settings that are given, one commented line each, as ``treelora.yaml``."""
    lines = [f"# {line}" for line in heading.splitlines()]
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if spec.name == "stream":
            continue
        if not dataclasses.is_dataclass(value):
            if value not in (None, {}):
                lines.append(_yaml_line(spec, value, ""))
            continue
        inner = [
            _yaml_line(child, getattr(value, child.name), "  ")
            for child in dataclasses.fields(value)
            if getattr(value, child.name) not in (None, {}, ())
        ]
        if inner:
            lines += ["", f"{spec.name}:", *inner]
    return "\n".join(lines) + "\n"


def _yaml_line(spec: Any, value: Any, indent: str) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    text = text.removesuffix("...").strip()
    return f"{indent}{spec.name}: {text}  # {spec.metadata['doc']}"
