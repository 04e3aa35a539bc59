"""A base in a directory that timm saved, with all that it records of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from conftest import MODEL, MODEL_ARGS, make_images, must


def test_a_base_saved_without_classes_is_exported_with_those_learned(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    recorded: dict[str, Any] = {**MODEL_ARGS, "num_classes": 0, "in_chans": 3, "global_pool": "token"}
    torch.manual_seed(0)
    base = timm.create_model(MODEL, **{**MODEL_ARGS, "num_classes": 0})
    save_for_hf(base, tmp_path / "saved", model_args=recorded, safe_serialization=True)
    make_images(tmp_path / "data", ("red", "blue"))
    must(
        "init", tmp_path / "p", "--model", tmp_path / "saved", "--head-width", "64", "--epochs", "1", "--device", "cpu"
    )
    must("-C", tmp_path / "p", "train-task", tmp_path / "data")
    must("-C", tmp_path / "p", "export", tmp_path / "out")
    exported = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert exported.num_classes == 2
