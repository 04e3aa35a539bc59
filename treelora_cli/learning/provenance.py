"""What a learned task leaves behind besides its tensors: versions, memory used, its PEFT directory."""

from __future__ import annotations

import json
import platform
import resource
import sys
from importlib import metadata
from typing import TYPE_CHECKING

from treelora_cli.backend import adapters
from treelora_cli.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from treelora_cli.backend.adapters import AdapterWeights

_PACKAGES = ("torch", "peft", "timm", "transformers", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {name: metadata.version(name) for name in _PACKAGES}
    return {"treelora": __version__, "python": platform.python_version(), **found}


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def adapter_files(network: nn.Module, base_name: str | None, weights: AdapterWeights) -> dict[str, bytes]:
    """Return the files of a stock PEFT directory, name to content."""
    from safetensors.torch import save

    config = adapters.peft_config(network, base_name)
    return {
        "adapter_config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        "adapter_model.safetensors": save(weights.to_tensors(), metadata={"format": "pt"}),
    }
