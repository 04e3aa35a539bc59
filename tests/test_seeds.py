"""Derived seeds: their values, which every project's hashes depend on, and that they stand in one file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from treelora_cli import seeds

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("derived", "value"),
    [
        (seeds.of_task(0, 0), 0),
        (seeds.of_task(3, 4), 30_025),
        (seeds.of_order(30_025, 2), 3_144_488_227),
        (seeds.of_probe(30_025), 237_767_975),
        (seeds.of_probe(30_025, 2), 237_767_977),
        (seeds.of_step(30_025, 7), 30_025_090_082),
        (seeds.of_layer(3, 5), 3_000_014),
        (seeds.of_layer(2**62, 1), (2**62 * 1_000_003 + 1) % 2**63),
        (seeds.of_blocks(3), 4),
        (seeds.of_kept_out(30_025), 464_963_036_575),
    ],
)
def test_a_derived_seed_is_what_it_always_was(derived: int, value: int) -> None:
    assert derived == value


def test_torch_takes_the_largest_seeds_there_are() -> None:
    task = seeds.of_task(2**31 - 1, 999)
    for seed in (
        seeds.of_order(task, 9999),
        seeds.of_probe(task, 63),
        seeds.of_kept_out(task),
        seeds.of_layer(2**63 - 1, 10**6),
        seeds.of_step(task, 10**9),
    ):
        torch.Generator().manual_seed(seed)


def test_no_other_file_derives_a_seed() -> None:
    factors = re.compile(r"10_007|10007|104_729|104729|1_000_003|1000003|\b7919\b|15_485_863")
    files = [path for package in ("treelora_cli", "backends") for path in (ROOT / package).rglob("*.py")]
    assert [path.name for path in files if factors.search(path.read_text(encoding="utf-8"))] == ["seeds.py"]
