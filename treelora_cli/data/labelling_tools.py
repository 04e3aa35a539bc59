"""JSON that labelling tools write for themselves: named, with what to give instead."""

from __future__ import annotations

from typing import Any

from treelora_cli.errors import DataError

_CROP = "Crop what it marks into folders CLASS/*.png, or write a table of path,label."


def refuse_tools_own(content: Any, where: str) -> None:
    """Raise ``DataError`` when the content of a JSON file is COCO's, LabelMe's or Label Studio's own."""
    first = content[0] if isinstance(content, list) and content else content
    if not isinstance(first, dict):
        return
    if {"images", "annotations"} <= set(first):
        raise DataError(f"{where} is COCO: what is where in an image, not one class an image. {_CROP}")
    if {"shapes", "imagePath"} <= set(first):
        raise DataError(f"{where} is LabelMe's: what is where in an image, not one class an image. {_CROP}")
    if isinstance(first.get("data"), dict) and {"annotations", "completions"} & set(first):
        raise DataError(f"{where} is Label Studio's own JSON. Export as JSON-MIN or CSV there, and give that.")
