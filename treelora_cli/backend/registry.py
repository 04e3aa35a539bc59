"""Backends by name: found through entry points, loaded only when used, and held to the contract."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from treelora_cli.backend.contract import Backend
from treelora_cli.errors import BackendError, ModelError, UsageError, suggest

if TYPE_CHECKING:
    from treelora_cli.backend.contract import TaskData
    from treelora_cli.backend.values import DataRequest
    from treelora_cli.config import Config

GROUP = "treelora.backends"
_USUAL = "vit"


def registered(group: str, kind: str) -> dict[str, metadata.EntryPoint]:
    """Return the entry points of a group by name.

    Args:
        group: Such as ``treelora.backends``.
        kind: What the group's names are called in a message, such as ``Backend``.

    Raises:
        UsageError: Two distributions register different things under one name.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for point in metadata.entry_points(group=group):
        known = found.get(point.name)
        if known is not None and known.value != point.value:
            raise UsageError(
                f"{kind} '{point.name}' is registered twice ({known.value} and {point.value}). Uninstall one of them."
            )
        found[point.name] = point
    return found


def backend_names() -> list[str]:
    """Names registered by any installed distribution, sorted, without importing a backend."""
    return sorted(registered(GROUP, "Backend"))


def backend_for(model: str | None) -> str:
    """Return the family of a model that the user named without a backend: the first that recognises it, else ``vit``.

    A backend recognises models by an attribute ``recognises``, a function of the name, path or hub id.
    """
    if model is None:
        return _USUAL
    for name in backend_names():
        try:
            recognises = getattr(load_backend(name), "recognises", None)
        except (UsageError, ModelError):
            continue  # a backend that is broken is said when it is asked for
        if recognises is not None and recognises(model):
            return name
    return _USUAL


def load_backend(name: str) -> Backend:
    """Import and check the backend registered as ``name``.

    Raises:
        UsageError: Unknown name (the known ones are listed), or the object does not meet the contract.
        ModelError: A package that the backend needs is not installed.
    """
    points = registered(GROUP, "Backend")
    if name not in points:
        known = ", ".join(sorted(points)) or "none installed"
        raise UsageError(f"Unknown backend '{name}'{suggest(name, points)}. Known: {known}.")
    try:
        loaded = points[name].load()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"Backend '{name}' cannot be imported: {error}.") from error
    candidate = loaded() if isinstance(loaded, type) else loaded
    if not isinstance(candidate, Backend):
        raise UsageError(
            f"Backend '{name}' ({points[name].value}) does not meet treelora_cli.backend.contract.Backend."
        )
    if candidate.name != name:
        raise UsageError(
            f"Backend '{name}' ({points[name].value}) calls itself '{candidate.name}': a project would remember a name"
            f" that is not registered. Set its 'name' to '{name}'."
        )
    return candidate


def defaults_on(backend: Backend, facts: Mapping[str, Any]) -> Config:
    """Return a backend's defaults on a loaded base of these facts."""
    own: Callable[[Mapping[str, Any]], Config] | None = getattr(backend, "defaults_on", None)
    return backend.defaults() if own is None else own(facts)


def missing_members(thing: object, protocol: type[Any], without: tuple[str, ...] = ()) -> list[str]:
    """Return what ``thing`` lacks of ``protocol`` but for ``without``, as ``finish()`` or ``session(task, memory)``."""
    wanted = {name: value for name, value in vars(protocol).items() if not name.startswith("_")}
    wanted |= dict.fromkeys(protocol.__annotations__)
    found = []
    for name, member in wanted.items():
        if name in without:
            continue
        if not inspect.isfunction(member):
            found += [] if hasattr(thing, name) else [name]
        elif not _takes(getattr(thing, name, None), member):
            found.append(f"{name}({', '.join(list(inspect.signature(member).parameters)[1:])})")
    return found


def _takes(method: object, model: Any) -> bool:
    """Tell whether ``method`` can be called as the contract calls ``model``."""
    if not callable(method):
        return False
    parameters = list(inspect.signature(model).parameters.values())[1:]
    positional = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    try:
        inspect.signature(method).bind(*positional, **dict.fromkeys(named))
    except (TypeError, ValueError):
        return False
    return True


def require(thing: object, protocol: type[Any], backend: str, without: tuple[str, ...] = ()) -> None:
    """Raise ``BackendError`` when ``thing``, which ``backend`` returned, lacks a member of ``protocol``."""
    lacking = missing_members(thing, protocol, without)
    if lacking:
        raise BackendError(
            f"Backend '{backend}': its {protocol.__name__} lacks {lacking[0]}."
            f" Check all of it with: treelora doctor --backend {backend} --data DATA"
        )


_OFF: dict[str, Any] = {
    "train.accumulate": 1,
    "train.label_smoothing": 0.0,
    "train.class_weights": "none",
    "train.augment": None,
    "train.compile": "none",
    "head.class_weights": "none",
}
"""Settings that a backend honours only where its attribute ``honours`` names them, and the value that asks nothing."""


def check_settings(backend: Backend, config: Config) -> None:
    """Raise ``UsageError`` when the settings ask for what ``backend`` does not do: it would be ignored in silence."""
    honoured = getattr(backend, "honours", ())
    for name, off in _OFF.items():
        section, _, key = name.partition(".")
        value = getattr(getattr(config, section), key)
        if value not in (None, off) and name not in honoured:
            raise UsageError(f"{name} {value}: the backend '{backend.name}' does nothing of the kind. Leave it out.")


def check_honoured(request: DataRequest, task: TaskData) -> None:
    """Raise ``BackendError`` when a backend read something else than ``request`` asks for, in silence."""
    ignored = []
    if request.classes is not None and not set(task.labels) <= set(request.classes):
        ignored.append("--classes")
    groups = max(1, len(task.labels))
    for option, limit, size in (
        ("--train-limit", request.train_limit, task.train_size),
        ("--test-limit", request.test_limit, task.test_size),
    ):
        if limit is not None and size > limit * groups:
            ignored.append(option)
    if ignored:
        raise BackendError(f"The backend ignored {' and '.join(ignored)}; nothing was learned. Leave the option out.")
