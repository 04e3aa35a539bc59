"""The files of a routed export: ``router.safetensors``, ``routed.json``, and ``predict.py`` word for word a loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from treelora_cli.errors import CheckError


def write_routed(out: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any], loader: Path) -> None:
    """Write router and heads, how they are asked, and the module that loads them."""
    from safetensors.torch import save_file

    save_file({key: one.contiguous() for key, one in tensors.items()}, out / "router.safetensors")
    (out / "routed.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(loader, out / "predict.py")


def check_loader(out: Path, loader: Path) -> None:
    """Compare the loader in ``out`` with this package's, which is what runs.

    Raises:
        CheckError: Somebody else wrote there.
    """
    if (out / "predict.py").read_bytes() != loader.read_bytes():
        raise CheckError(f"{out / 'predict.py'} is not the loader that was written there.")
