"""Recipes: find one by file or shipped name, and turn its stream into data requests."""

from __future__ import annotations

import random
from pathlib import Path

from treelora_cli.backend.values import DataRequest
from treelora_cli.config import StreamConfig, StreamTask
from treelora_cli.errors import ConfigError, DataError, suggest
from treelora_cli.locations import lasting


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with treelora, by name."""
    import treelora_recipes

    folder = Path(treelora_recipes.__file__).parent
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the recipe file: an existing path, else a shipped name.

    Raises:
        ConfigError: Neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name in shipped:
        return shipped[name]
    raise ConfigError(f"No recipe '{name}'{suggest(name, shipped)}. Shipped: {', '.join(shipped)}.")


def stream_data(stream: StreamConfig, given: Path | None, recipe: Path) -> Path:
    """Return the directory a stream's tasks are relative to: ``--data``, else the recipe's, beside the recipe.

    Raises:
        ConfigError: Neither is given.
        DataError: It does not exist.
    """
    if given is not None:
        directory = given
    elif stream.data is not None:
        beside = recipe.parent / stream.data
        directory = beside if beside.exists() else Path(stream.data)
    else:
        raise ConfigError(f"{recipe.name} names no data. Pass --data DIR.")
    if not directory.exists():
        raise DataError(f"{directory} not found. Pass --data DIR.")
    return lasting(directory)


def stream_tasks(stream: StreamConfig, data: Path, seed: int, recipe: str) -> tuple[StreamTask, ...]:
    """Return the stream's tasks: as listed, or the folder's classes divided into ``split`` tasks.

    Raises:
        ConfigError: Neither tasks nor a split, or fewer than two classes for each task.
    """
    if stream.split is None:
        if not stream.tasks:
            raise ConfigError(f"{recipe} lists no tasks under 'stream'.")
        return stream.tasks
    folder = data / "train" if (data / "train").is_dir() else data
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2 * stream.split:
        raise ConfigError(
            f"{recipe}: {len(classes)} classes in {folder} do not make {stream.split} tasks of two or more."
        )
    random.Random(f"classes/{seed}").shuffle(classes)
    size, larger = divmod(len(classes), stream.split)
    tasks, start = [], 0
    for index in range(stream.split):
        end = start + size + (index < larger)
        tasks.append(StreamTask(name=f"t{index + 1:02d}", classes=tuple(classes[start:end])))
        start = end
    return tuple(tasks)


def task_request(task: StreamTask, stream: StreamConfig, data: Path, *, seed: int, limit: int | None) -> DataRequest:
    """Return what to read for one task of a stream; ``limit`` caps both parts."""

    def capped(own: int | None) -> int | None:
        return own if limit is None else min(limit, own or limit)

    return DataRequest(
        path=lasting(data / task.path) if task.path else data,
        classes=task.classes,
        metric=task.metric or stream.metric,
        train_limit=capped(stream.train_limit),
        test_limit=capped(stream.test_limit),
        seed=seed,
    )
