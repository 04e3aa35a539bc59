"""Identity of a base: its hash is remembered for files that have not changed, and never wrongly."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from treelora_cli.backend import fingerprint
from treelora_cli.backend.fingerprint import all_finite, cache_file, hash_parameters, identity
from treelora_cli.backend.runtime import Runtime
from treelora_cli.config import BaseConfig
from treelora_cli.learning.opening import held_in


class Measured:
    """Counts how often weights are hashed; each time they have another identity."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> str:
        self.times += 1
        return f"identity {self.times}"


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that changed an hour ago, and an empty cache."""
    monkeypatch.setenv("TREELORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_a_second_command_hashes_nothing(weights: Path) -> None:
    measured = Measured()
    assert [identity([weights], {"dtype": "float32"}, measured) for _ in range(3)] == ["identity 1"] * 3
    assert measured.times == 1
    assert list(json.loads(cache_file().read_text()).values()) == ["identity 1"]
    assert [one.name for one in cache_file().parent.iterdir()] == ["identities.json"]


def replaced(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    other = path.with_suffix(".new")
    other.write_bytes(b"w3ights")
    os.utime(other, ns=(stamp, stamp))
    os.replace(other, path)


def touched(path: Path) -> None:
    os.utime(path, (time.time() - 1800,) * 2)


def longer(path: Path) -> None:
    stamp = path.stat().st_mtime_ns
    path.write_bytes(b"more weights")
    os.utime(path, ns=(stamp, stamp))


@pytest.mark.parametrize("change", [replaced, touched, longer])
def test_files_that_changed_are_hashed_again(weights: Path, change: Callable[[Path], None]) -> None:
    measured = Measured()
    identity([weights], {}, measured)
    change(weights)
    assert identity([weights], {}, measured) == "identity 2"


def test_what_the_files_are_loaded_as_counts_too(weights: Path) -> None:
    measured = Measured()
    found = [identity([weights], {"dtype": dtype}, measured) for dtype in ("float32", "bfloat16", "float32")]
    assert found == ["identity 1", "identity 2", "identity 1"]


def test_what_changed_just_now_or_is_gone_or_is_not_local_is_not_remembered(weights: Path, tmp_path: Path) -> None:
    measured = Measured()
    os.utime(weights)
    for files in ([weights], [tmp_path / "gone"], []):
        before = measured.times
        identity(files, {}, measured)
        identity(files, {}, measured)
        assert measured.times == before + 2
    assert not cache_file().exists()


def test_files_that_change_while_they_are_hashed_are_not_remembered(weights: Path) -> None:
    def measure() -> str:
        touched(weights)
        return "old or new"

    assert identity([weights], {}, measure) == "old or new"
    assert not cache_file().exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, '{"a": 1}'])
def test_a_damaged_cache_costs_a_hash(weights: Path, content: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(content)
    measured = Measured()
    assert identity([weights], {}, measured) == "identity 1"
    assert identity([weights], {}, measured) == "identity 1"


def test_a_cache_that_cannot_be_written_costs_a_hash(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREELORA_CACHE", str(weights / "below-a-file"))
    measured = Measured()
    assert [identity([weights], {}, measured) for _ in range(2)] == ["identity 1", "identity 2"]


def test_few_identities_are_kept(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_MOST_KNOWN", 3)
    measured = Measured()
    for number in range(5):
        identity([weights], {"number": number}, measured)
    assert list(json.loads(cache_file().read_text()).values()) == ["identity 3", "identity 4", "identity 5"]


def test_weights_that_are_not_finite_are_found() -> None:
    network = nn.Linear(2, 2)
    assert all_finite(network) and all_finite(nn.Identity())
    with torch.no_grad():
        network.weight[1, 0] = float("nan")
    assert not all_finite(network)
    assert len(hash_parameters(network)) == 64


@pytest.mark.parametrize(
    ("device", "backend_dtype", "told", "held"),
    [
        ("cuda", "bfloat16", None, "bfloat16"),
        ("cuda", "bfloat16", "float32", "float32"),
        ("cuda", None, None, None),
        ("cpu", "bfloat16", None, None),
    ],
)
def test_a_new_project_on_a_gpu_holds_its_base_in_the_backends_type(
    device: str, backend_dtype: str | None, told: str | None, held: str | None
) -> None:
    backend: Any = SimpleNamespace() if backend_dtype is None else SimpleNamespace(gpu_dtype=backend_dtype)
    runtime = cast("Runtime", SimpleNamespace(device=torch.device(device)))
    assert held_in(backend, BaseConfig(dtype=told), runtime).dtype == held
