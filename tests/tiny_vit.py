"""The test suite's tiny ViT, loaded for contenders: every block adapted, in fp32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import MODEL, MODEL_ARGS, plain_runtime
from treelora_backends.vit.backend import VitBackend, VitBase

from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig, resolve


def load_vit(weights: Path, **train: Any) -> tuple[VitBase, Config]:
    """Return the model with these weights, and the configuration with these settings of training."""
    flags = Config(
        base=BaseConfig(model=MODEL, weights=str(weights), model_args=MODEL_ARGS),
        adapter=AdapterConfig(rank=2, alpha=4.0, blocks=0),
        train=TrainConfig(**{"precision": "fp32", **train}),
    )
    backend = VitBackend()
    config = resolve(flags, Config(), backend.defaults())
    return backend.load(config, plain_runtime()), config
