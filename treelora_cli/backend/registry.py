"""Backends by name, found through entry points and loaded only when used."""

from __future__ import annotations

from treelora_cli.backend.contract import Backend
from treelora_cli.entry_points import registered
from treelora_cli.errors import ModelError, UsageError, suggest

GROUP = "treelora.backends"


def backend_names() -> list[str]:
    """Names registered by any installed distribution, sorted, without importing a backend."""
    return sorted(registered(GROUP, "Backend"))


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
