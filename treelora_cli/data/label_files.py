"""Files that say what numbers of labels mean: names in order, or numbers beside names, as lines, JSON or YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from treelora_cli.data.files import decode, lines_of, read_bytes
from treelora_cli.data.labels import are_numbers
from treelora_cli.data.names import tidy_label
from treelora_cli.data.paths import existing
from treelora_cli.data.tables import Row
from treelora_cli.errors import DataError, first_line

_NUMBER_FIRST = re.compile(r"\s*(-?\d{1,9})\s*[:,;\t]\s*(.*\S)\s*")
_NUMBER_LAST = re.compile(r"\s*(.*?\S)\s*[:,;\t]\s*(-?\d{1,9})\s*")
_NUMBER_AND_SPACE = re.compile(r"\s*(\d{1,9})[ .)-]+\S.*")
_INSIDE = ("id2label", "label2id", "names", "class_names", "classes", "labels", "categories")
"""Keys of a document below which names are kept."""
_BESIDE = {
    *("classes", "labels", "names", "classnames", "labelnames", "labelmap", "labelsmap", "labelmapping", "id2label"),
    *("label2id", "classtoidx", "idxtoclass", "indextoname", "cattoname", "synsetwords", "data", "dataset"),
}
"""What a file of names may be called beside a table, without its signs; the last two only as YAML."""
_ENDINGS = (".txt", ".json", ".names", ".yaml", ".yml", ".csv")
_YAML = (".yaml", ".yml")
_WANTED = "names in their order, one a line or as a JSON list, or numbers and names (0: cat)"

Names = Mapping[int, str]
"""Class names by number."""


def label_names(given: Path | None, data: Path) -> tuple[Path, Names] | None:
    """Return the file of label names and these by number; ``None`` where there is none.

    Args:
        given: The user's file; ``labels.json`` beside the data, or in its folder, when ``None``.
        data: Where the data lies.

    Raises:
        DataError: No such file, or nothing that names numbers.
    """
    if given is not None:
        source = existing(given)
    else:
        source = (data if data.is_dir() else data.parent) / "labels.json"
        if not source.is_file():
            return None
    return source, _read(source)


def names_beside(labels: Sequence[str], data: Path) -> list[str]:
    """Return a line where labels are numbers, and a file beside their table may name them, though nobody said so."""
    if not are_numbers(labels):
        return []
    folder = data if data.is_dir() else data.parent
    file = next((one for one in sorted(folder.iterdir()) if one != data and _may_name(one)), None)
    if file is None:
        return []
    return [f"Labels are numbers. If {file.name} beside them says what they mean: --label-names {quote(str(file))}"]


def _may_name(file: Path) -> bool:
    plain, ending = re.sub(r"[\W_]", "", file.stem.lower()), file.suffix.lower()
    known = plain in _BESIDE and ending in _ENDINGS and (ending in _YAML or not plain.startswith("data"))
    return known and file.is_file()


def named(labels: Sequence[str | None], rows: Sequence[Row], names: Names, source: Path) -> list[str | None]:
    """Replace whole numbers by their names; names stay.

    Raises:
        DataError: A number that has none.
    """
    result: list[str | None] = []
    for label, row in zip(labels, rows, strict=True):
        if label is None or label in names.values() or not re.fullmatch(r"-?\d{1,9}", label):
            result.append(label)
        elif int(label) in names:
            result.append(names[int(label)])
        else:
            raise DataError(f"{row.where}: label {label} is not among the {len(names)} names in {source}.")
    return result


def _read(path: Path) -> Names:
    ending = path.suffix.lower()
    try:
        text = decode(read_bytes(path), path, [], western=True)
        if ending in (".json", *_YAML):
            found = _in_document(json.loads(text) if ending == ".json" else _from_yaml(text))
        else:
            found = _in_lines(lines_of(text), path)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: no list of label names ({first_line(error)}).") from error
    if not found or len(set(found.values())) < len(found):
        raise DataError(f"{path}: expected distinct {_WANTED}.")
    return found


def _from_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def _in_document(content: Any) -> dict[int, str]:
    """Return the names in a list, in records of ``id`` and ``name``, or by number or the other way round."""
    if isinstance(content, dict):
        content = next((content[key] for key in _INSIDE if isinstance(content.get(key), list | dict)), content)
    if isinstance(content, list) and all(isinstance(one, dict) for one in content):
        content = {one.get("name"): one.get("id") for one in content}
    if isinstance(content, list):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        return {}
    pairs = list(content.items())
    if not all(_is_number(number) for number, _ in pairs):
        pairs = [(number, name) for name, number in pairs]
    if not all(_is_number(number) and isinstance(name, str) and name.strip() for number, name in pairs):
        return {}
    found = {int(number): tidy_label(name) for number, name in pairs}
    return found if len(found) == len(pairs) else {}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value) is not None)


def _in_lines(lines: list[str], path: Path) -> dict[int, str]:
    """Return the names in lines: one a line, or each with its number, below a head or not.

    Raises:
        DataError: Numbers and names are divided by nothing but a space, or a line between others is empty.
    """
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    if empty := next((place for place, line in enumerate(lines, start=1) if not line.strip()), None):
        raise DataError(f"{path}:{empty}: an empty line between label names; which number is meant?")
    for form, number, name in ((_NUMBER_FIRST, 1, 2), (_NUMBER_LAST, 2, 1)):
        matches = [form.fullmatch(line) for line in lines]
        found = matches if matches and matches[0] is not None else matches[1:]
        pairs = [(int(one[number]), tidy_label(one[name])) for one in found if one is not None]
        if pairs and len(pairs) == len(found):
            return dict(pairs) if len(dict(pairs)) == len(pairs) else {}
    if len(lines) > 1 and all(_NUMBER_AND_SPACE.fullmatch(line) for line in lines):
        raise DataError(
            f"{path}: every line begins with a number. If numbers are what the labels are, write '0: name'; if they are"
            " part of the names, a JSON list."
        )
    return {place: tidy_label(line) for place, line in enumerate(lines)}
