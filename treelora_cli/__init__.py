"""treelora: continual learning of large pre-trained models on the command line, and in Python as ``Project``."""

from typing import TYPE_CHECKING, Any

from treelora_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from treelora_cli.api import Evaluation as Evaluation
    from treelora_cli.api import Project as Project


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is first asked for: commands that do not need it stay quick."""
    if name in ("Project", "Evaluation"):
        from treelora_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'treelora_cli' has no attribute {name!r}")
