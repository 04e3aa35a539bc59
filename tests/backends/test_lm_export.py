"""Exports of language models in every pair of types, and whether the check still notices a wrong one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Cli, check_error
from tiny_lm import TEMPLATE, save_model

from treelora_cli.backend.values import ExportCheck, rounded_scores


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE, depth=4)


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "moods.jsonl"
    rows = [{"prompt": f"How is {n}?", "answer": ("happy", "sad")[n % 2]} for n in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def learned(cli: Cli, root: Path, model: Path, data: Path, dtype: str) -> Path:
    options = ["--backend", "causal-lm", "--model", model, "--dtype", dtype, "--epochs", "2", "--lr", "0.01"]
    assert cli("init", root, *options, "--device", "cpu").code == 0
    assert cli("-C", root, "train-task", data, "--device", "cpu").code == 0
    return root


@pytest.mark.parametrize("own", ["float32", "bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_base_of_any_type_is_exported(cli: Cli, llama: Path, moods: Path, tmp_path: Path, own: str) -> None:
    root = learned(cli, tmp_path / "p", llama, moods, own)
    for written in ("float32", "bfloat16"):
        done = cli("-C", root, "--json", "export", tmp_path / written, "--dtype", written, "--device", "cpu")
        assert done.code == 0, done.err
        found = done.json
        assert found["largest_logit_difference"] <= found["tolerance"]
        assert (found["tolerance"] == 1e-3) == (own == written == "float32")
        assert 1e-3 <= found["tolerance"] < 5, "logits of this model are of the order of 10"
    done = cli("-C", root, "--json", "export", tmp_path / "a", "--format", "adapter", "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["largest_logit_difference"] <= done.json["tolerance"]


@pytest.mark.parametrize("own", ["float32", "bfloat16"])
def test_an_export_that_lacks_what_was_learned_fails_the_check(
    cli: Cli, llama: Path, moods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    from treelora_backends.causal_lm import export

    root = learned(cli, tmp_path / "p", llama, moods, own)
    monkeypatch.setattr(export, "_add_update", lambda _model, _weights: None)
    check_error(cli("-C", root, "export", tmp_path / "out", "--device", "cpu"), 7, "differs from the model in memory")


def test_the_tolerance_is_what_the_types_do_to_the_base_alone(llama: Path) -> None:
    """Measured by hand: the base in bfloat16 against itself in float32."""
    from tiny_lm import load
    from treelora_backends.causal_lm.batches import pad
    from treelora_backends.causal_lm.export import _rounding
    from treelora_backends.causal_lm.network.network import LmNetwork

    exact, rounded = (load(llama, dtype=dtype) for dtype in ("float32", "bfloat16"))
    batch = pad([np.array([5, 6, 7, 8]), np.array([9, 10])], exact.encoder.pad_id)
    place = torch.arange(2)
    with torch.no_grad():
        ones, others = (
            LmNetwork(base.lm.model).logits_at(batch, place, batch.lengths - 1).float() for base in (exact, rounded)
        )
    expected = float((ones - others).abs().max())
    assert expected > 1e-3
    assert _rounding(rounded, batch, "float32") == pytest.approx(expected, rel=0.3)
    assert _rounding(exact, batch, "bfloat16") == pytest.approx(expected, rel=0.3)
    assert _rounding(rounded, batch, "bfloat16") == pytest.approx(2 * expected, rel=0.3)
    assert _rounding(exact, batch, "float32") is None


def test_scores_may_move_by_two_examples_or_a_twentieth() -> None:
    assert rounded_scores([64]) == 0.05
    assert rounded_scores([8, 64]) == 0.25
    assert rounded_scores([]) == 2.0
    assert ExportCheck(0.1, 0.2, {"a": (0.5, 0.54)}, 0.05).passed
    assert not ExportCheck(0.1, 0.2, {"a": (0.5, 0.56)}, 0.05).passed
    assert not ExportCheck(0.1, 0.2, {"a": (0.5, 0.52)}).passed
    assert not ExportCheck(0.3, 0.2, {}).passed
