"""Backends by name, found through entry points and loaded only when used."""

from __future__ import annotations

from treelora_cli.backend.contract import Backend
from treelora_cli.entry_points import registered
from treelora_cli.errors import ModelError, UsageError, suggest

GROUP = "treelora.backends"
_USUAL = "vit"


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
