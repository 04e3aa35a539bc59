"""Tables and the images they name, written and read by tests."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from conftest import picture

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.images import ImageListing, list_images
from treelora_cli.data.tables import read_table


def rows(path: Path, notes: list[str] | None = None, **columns: str) -> list[dict[str, Any]]:
    return [row.values for row in read_table(path, None, columns, notes)]


def written(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def listed(path: Path, **options: Any) -> ImageListing:
    return list_images(DataRequest(path=path, held_out=0, **options))


def csv_with_labels(folder: Path, labels: list[str], head: str = "path,label") -> Path:
    for index in range(len(labels)):
        picture("red", index, size=4).save(folder / f"{index}.png")
    return written(folder / "m.csv", "\n".join([head, *(f"{index}.png,{one}" for index, one in enumerate(labels))]))


def with_features(table: Any, features: dict[str, Any]) -> Any:
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture("red", seed, size=4).save(buffer, format="PNG")
    return buffer.getvalue()
