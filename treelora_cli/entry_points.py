"""What installed distributions register: names in a group, found without importing what they name."""

from __future__ import annotations

from importlib import metadata

from treelora_cli.errors import UsageError


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
