"""The version of treelora, and of all else that a result depends on."""

from __future__ import annotations

__version__ = "0.1.0"
_PACKAGES = ("torch", "peft", "timm", "transformers", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    import platform
    from importlib import metadata

    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"treelora": __version__, "python": platform.python_version(), **found}
