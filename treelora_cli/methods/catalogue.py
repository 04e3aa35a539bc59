"""Methods by name, found through entry points and loaded only when used.

TreeLoRA, the contenders of ``treelora compare`` and anyone else's method register alike, each in its own file.
"""

from __future__ import annotations

from treelora_cli.backend.registry import registered
from treelora_cli.errors import ModelError, UsageError, suggest
from treelora_cli.methods.base import Entry

GROUP = "treelora.methods"
OURS = "treelora"
"""The method that the project is about; the default of a project, and of a comparison's ratios."""


def method_names() -> list[str]:
    """Names registered by any installed distribution, ours first, without importing a method."""
    return sorted(registered(GROUP, "Method"), key=lambda name: (name != OURS, name))


def check_method(name: str) -> None:
    """Raise ``UsageError`` when ``name`` is no method."""
    known = method_names()
    if name not in known:
        raise UsageError(f"Unknown method '{name}'{suggest(name, known)}. Known: {', '.join(known)}.")


def load_method(name: str) -> Entry:
    """Import what is registered as ``name``.

    Raises:
        UsageError: Unknown name (the known ones are listed), or what is registered is no ``Entry``.
        ModelError: A package that the method needs is not installed.
    """
    check_method(name)
    point = registered(GROUP, "Method")[name]
    try:
        loaded = point.load()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"Method '{name}' cannot be imported: {error}.") from error
    if not isinstance(loaded, Entry):
        raise UsageError(f"Method '{name}' ({point.value}) is not a treelora_cli.methods.base.Entry.")
    return loaded


def runs_in_project(name: str) -> bool:
    """Return whether ``compare`` runs a method through a real project instead of in memory."""
    return name == OURS or load_method(name).in_project


def project_method(name: str) -> Entry:
    """Return a method that a project can be made with.

    Raises:
        UsageError: Unknown name, or a method that runs in ``compare`` only.
    """
    entry = load_method(name)
    if not entry.in_project:
        fitting = ", ".join(other for other in method_names() if runs_in_project(other))
        raise UsageError(
            f"Method '{name}' runs in treelora compare only: it keeps nothing in a project. Choose --method {fitting}."
        )
    return entry


def choose_head(method: str, offered: tuple[str, ...], backend: str) -> str:
    """Return the kind of head that the contender ``method`` works with on a backend.

    Raises:
        UsageError: The backend offers none of them.
    """
    for head in load_method(method).heads:
        if head in offered:
            return head
    fitting = [name for name in method_names() if runs_in_project(name) or set(load_method(name).heads) & set(offered)]
    raise UsageError(f"'{method}' does not work with the {backend} backend. These do: {', '.join(fitting)}.")
