"""LoRA slots: what PEFT computes, what is stored, and what merging gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MODEL, MODEL_ARGS
from torch import Tensor, nn

from treelora_cli.algorithm.budget import merge_to_budget
from treelora_cli.algorithm.tree import build_tree
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import SLOT, AdapterWeights
from treelora_cli.errors import DamagedError, ModelError

LAYERS = ("first", "second")


class Two(nn.Module):
    """Two linear layers of different shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def attached(rank: int = 2, alpha: float = 6.0) -> nn.Module:
    torch.manual_seed(0)
    return adapters.attach(Two(), LAYERS, rank=rank, alpha=alpha, dropout=0.0)


def some(seed: int, rank: int = 2, scale: float = 3.0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((7, 5), (3, 7))
    down = tuple(torch.randn(rank, wide, generator=generator) for _, wide in shapes)
    up = tuple(torch.randn(tall, rank, generator=generator) for tall, _ in shapes)
    return AdapterWeights(LAYERS, down, up, scale)


# -- the slot ---------------------------------------------------------------------------------------------


def test_only_the_slot_is_trainable() -> None:
    network = attached()
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.{layer}.lora_{part}.{SLOT}.weight" for layer in LAYERS for part in "AB"}
    slot = adapters.slot_parameters(network, LAYERS)
    assert [(tuple(a.shape), tuple(b.shape)) for a, b in slot] == [((2, 5), (7, 2)), ((2, 7), (3, 2))]


def test_the_slot_adds_scale_times_b_a() -> None:
    network, weights = attached(), some(1)
    adapters.write_slot(network, weights)
    x = torch.randn(4, 5)
    base = network.get_base_model()
    plain = [base.first.base_layer, base.second.base_layer]
    dense = [layer.weight + 3.0 * weights.up[i] @ weights.down[i] for i, layer in enumerate(plain)]
    hidden = torch.relu(x @ dense[0].T + plain[0].bias)
    torch.testing.assert_close(network(x), hidden @ dense[1].T + plain[1].bias)
    merged = network.merge_and_unload()
    torch.testing.assert_close(merged.first.weight, dense[0])
    torch.testing.assert_close(merged.second.weight, dense[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_inputs_that_are_not_cast_give_the_same(autocast: bool) -> None:
    network, seen = attached(), torch.randn(4, 5)
    adapters.write_slot(network, some(1))
    outputs = []
    for cast_first in (False, True):
        for layer in LAYERS:
            network.get_submodule(f"base_model.model.{layer}").cast_input_dtype_enabled = cast_first
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(network(seen))
    assert torch.equal(*outputs)


def test_inputs_of_layers_in_bf16_are_still_cast() -> None:
    network = adapters.attach(Two().bfloat16(), LAYERS, rank=2, alpha=6.0, dropout=0.0)
    assert network(torch.randn(4, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_reading_returns_what_was_written() -> None:
    network, weights = attached(), some(2)
    adapters.write_slot(network, weights)
    found = adapters.read_slot(network, LAYERS, 3.0)
    assert all(torch.equal(a, b) for a, b in zip(found.down + found.up, weights.down + weights.up, strict=True))
    adapters.write_slot(network, some(3))
    assert torch.equal(found.up[0], weights.up[0]), "a copy, not a view of the slot"


def test_base_only_and_added_leave_the_network_as_it_was() -> None:
    network, weights, x = attached(), some(4), torch.randn(3, 5)
    adapters.write_slot(network, some(5))
    before = network(x)
    with adapters.base_only(network):
        plain = network(x)
    with adapters.added(network, weights):
        inside = network(x)
    assert torch.equal(network(x), before)
    assert not torch.allclose(plain, before)
    adapters.write_slot(network, weights)
    torch.testing.assert_close(inside, network(x))
    with pytest.raises(RuntimeError, match="stop"), adapters.added(network, weights):
        raise RuntimeError("stop")
    with adapters.base_only(network):
        assert torch.equal(network(x), plain)


def test_a_module_that_cannot_be_adapted_is_refused() -> None:
    with pytest.raises(ModelError, match="LoRA does not fit this model"):
        adapters.attach(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), ["1"], rank=2, alpha=2.0, dropout=0.0)


def test_the_reference_point_depends_on_the_seed_alone() -> None:
    network = attached()
    first = adapters.reference_point(network, LAYERS, 3.0, 7)
    torch.randn(100)
    adapters.write_slot(network, some(1))
    again = adapters.reference_point(network, LAYERS, 3.0, 7)
    other = adapters.reference_point(network, LAYERS, 3.0, 8)
    assert all(torch.equal(a, b) for a, b in zip(first.down, again.down, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.down, other.down, strict=True))
    assert all(not part.any() for part in first.up)
    assert all(part.abs().max() <= part.shape[1] ** -0.5 for part in first.down)


# -- merging ----------------------------------------------------------------------------------------------


def dense(weights: AdapterWeights) -> list[Tensor]:
    return [weights.update(index) for index in range(len(weights.layers))]


def test_mean_update_is_exact() -> None:
    parts = [some(1), some(2, rank=1, scale=0.5), some(3)]
    mean = adapters.mean_update(parts)
    assert mean.rank == 5
    for index, found in enumerate(dense(mean)):
        torch.testing.assert_close(found, sum(part.update(index) for part in parts) / 3)


@pytest.mark.parametrize("shares", [[1.0, 1.0], [3.0, 1.0], [2.0, 0.0]])
def test_merge_is_the_best_rank_r_approximation_of_the_mean(shares: list[float]) -> None:
    parts = [some(1), some(2)]
    merged = adapters.merge(parts, shares)
    assert merged.rank == 2 and merged.scale == 3.0
    for index, found in enumerate(dense(merged)):
        mean = sum(share * part.update(index) for share, part in zip(shares, parts, strict=True)) / sum(shares)
        u, s, vh = torch.linalg.svd(mean.double(), full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        torch.testing.assert_close(found.double(), best, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close((found.double() - mean).norm(), s[2:].norm(), atol=1e-5, rtol=1e-5)


def test_merging_an_adapter_with_itself_keeps_its_update() -> None:
    one = some(1)
    for found, own in zip(dense(adapters.merge([one, one, one], [1, 2, 5])), dense(one), strict=True):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


def test_a_merge_is_factored_as_its_greatest_share_is() -> None:
    one, two = some(1), some(2)
    alone = adapters.merge([one], [1.0])
    for found, own in zip((*alone.down, *alone.up), (*one.down, *one.up), strict=True):
        torch.testing.assert_close(found, own, atol=1e-4, rtol=1e-4)

    def apart(merged: adapters.AdapterWeights, own: adapters.AdapterWeights) -> float:
        return sum(float((a - b).norm()) for a, b in zip(merged.down, own.down, strict=True))

    both = adapters.merge([one, two], [9.0, 1.0])
    assert apart(both, one) < 0.5 * apart(both, two)
    for found, again in zip(dense(both), dense(adapters.merge([two, one], [1.0, 9.0])), strict=True):
        torch.testing.assert_close(found, again, atol=1e-5, rtol=1e-5)


def test_merging_of_more_rank_than_the_layer_has_is_padded() -> None:
    parts = [some(1, rank=4), some(2, rank=4)]
    merged = adapters.merge(parts, [1, 1])
    assert [tuple(a.shape) for a in merged.down] == [(4, 5), (4, 7)]
    assert [tuple(b.shape) for b in merged.up] == [(7, 4), (3, 4)]
    mean = (parts[0].update(1) + parts[1].update(1)) / 2  # of rank 3, so nothing is lost
    torch.testing.assert_close(merged.update(1), mean, atol=1e-5, rtol=1e-5)


def test_averaging_the_factors_would_not_be_the_mean() -> None:
    one, two = some(1), some(2)
    naive = 3.0 * ((one.up[0] + two.up[0]) / 2) @ ((one.down[0] + two.down[0]) / 2)
    mean = (one.update(0) + two.update(0)) / 2
    assert (naive - mean).norm() > (adapters.merge([one, two], [1, 1]).update(0) - mean).norm()


def test_budget_merges_until_it_holds_weighing_by_tasks() -> None:
    signatures = torch.nn.functional.normalize(
        torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.1]], [[1.0, 0.2]]]), dim=2
    )
    tree = build_tree(signatures.numpy(), 2)
    own = [some(seed) for seed in range(4)]
    groups = merge_to_budget(tree, ["a", "b", "c", "d"], own.__getitem__, 2, adapters.merge)
    assert [group.members for group in groups] == [(0, 2, 3)]
    pair = adapters.merge([own[0], own[2]], [1, 1]) if tree.nearest_leaves()[:2] == (0, 2) else None
    expected = pair or adapters.merge([own[2], own[3]], [1, 1])
    last = [expected, own[3]] if pair else [own[0], expected]
    shares = [2.0, 1.0] if pair else [1.0, 2.0]
    torch.testing.assert_close(groups[0].adapter.update(0), adapters.merge(last, shares).update(0))
    assert merge_to_budget(tree, ["a", "b", "c", "d"], own.__getitem__, 0, adapters.merge) == []
    assert merge_to_budget(tree, ["a", "b", "a", "a"], own.__getitem__, 2, adapters.merge) == []


# -- files ------------------------------------------------------------------------------------------------


def test_tensors_round_trip_and_are_checked() -> None:
    weights = some(1)
    tensors = weights.to_tensors()
    back = AdapterWeights.from_tensors(tensors, LAYERS, 3.0, "f")
    assert all(torch.equal(a, b) for a, b in zip(back.down + back.up, weights.down + weights.up, strict=True))
    key = "base_model.model.first.lora_A.weight"
    cases = [
        ({k: v for k, v in tensors.items() if k != key}, rf"f: tensor '{key}' is missing or unexpected"),
        ({**tensors, "x": tensors[key]}, r"f: tensor 'x' is missing or unexpected"),
        ({**tensors, key: torch.zeros(3, 5)}, r"f: shapes of layer 'first' do not fit"),
        ({**tensors, key: torch.zeros(2)}, r"f: shapes of layer 'first' do not fit"),
        ({**tensors, key: torch.full((2, 5), float("nan"))}, r"f: layer 'first' holds values that are not finite"),
    ]
    for broken, line in cases:
        with pytest.raises(DamagedError, match=line):
            AdapterWeights.from_tensors(broken, LAYERS, 3.0, "f")


def test_a_task_directory_is_a_stock_peft_directory(learned_project: Path, weights: Path) -> None:
    import timm
    from peft import PeftModel
    from safetensors.torch import load_file

    from treelora_cli.project import Project

    folder = learned_project / "tasks" / "001-warm"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8.0, MODEL)

    def bare() -> nn.Module:
        vit = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
        vit.load_state_dict(load_file(weights))
        return vit.eval()

    x = torch.randn(2, 3, 16, 16)
    stored = Project.open(learned_project).adapter("warm")
    by_hand = bare()
    with torch.no_grad():
        for index, layer in enumerate(stored.layers):
            by_hand.get_submodule(layer).weight += stored.update(index)
        loaded = PeftModel.from_pretrained(bare(), str(folder)).eval()
        torch.testing.assert_close(loaded(x), by_hand(x), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(loaded(x), bare()(x), atol=1e-3)
