"""Facts on real data. Run with ``TREELORA_REAL_DATA=DIR pytest -m real``; DIR holds cifar100_50classes/."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from treelora_cli.algorithm.distances import l1_distance
from treelora_cli.algorithm.signature import SignatureAccumulator, SketchSpec
from treelora_cli.algorithm.tree import build_tree
from treelora_cli.backend import adapters
from treelora_cli.backend.registry import load_backend
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import Config, resolve

ROOT = os.environ.get("TREELORA_REAL_DATA")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(ROOT is None, reason="TREELORA_REAL_DATA names no directory"),
]


@pytest.fixture(scope="module")
def signatures():
    """Signatures of six pairs of tasks: two halves of the same five classes each, (12, D, m)."""
    data = Path(str(ROOT)) / "cifar100_50classes"
    tasks = json.loads((data / "tasks.json").read_text())["tasks"][:6]
    backend = load_backend("vit")
    config = resolve(Config(), Config(), backend.defaults())
    config = dataclasses.replace(config, base=backend.resolve_base(config.base, offline=True))
    base = backend.load(config, open_runtime("cpu", offline=True, reporter=Silent()))
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, base.scale, 0))
    found = []
    for classes in tasks:
        task = base.read_task(DataRequest(path=data, classes=tuple(classes), test_limit=1))
        for half in (0, 1):
            pictures = type(task.train)(task.train.pixels[half::2], task.train.labels[half::2])
            session = base.session(dataclasses.replace(task, train=pictures), Memory((), dict), config)
            session.prepare()
            accumulator = SignatureAccumulator(SketchSpec(width=512, seed=0))
            for loss in session.probe_losses(12):
                accumulator.add(list(torch.autograd.grad(loss, ups)))
            found.append(accumulator.signature().numpy())
    return np.stack(found)


def test_nearest_signature_is_the_twin_in_every_layer(signatures):
    distances = np.stack([l1_distance(signatures, one) for one in signatures])  # (12, 12, D)
    for layer in range(distances.shape[2]):
        others = distances[:, :, layer] + 9 * np.eye(12)
        assert others.argmin(axis=1).tolist() == [index ^ 1 for index in range(12)]


def test_twins_are_siblings_in_the_tree(signatures):
    tree = build_tree(signatures, 5)
    assert [tree.tree_distance(2 * pair, 2 * pair + 1) <= 2 for pair in range(6)] == [True] * 6
