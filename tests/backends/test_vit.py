"""The vit backend on every family of timm transformer: cut, adapted, merged and fed as timm itself does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from conftest import STREAM, Cli, plain_runtime
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from treelora_backends.vit import trunk as trunks
from treelora_backends.vit.backend import VitBackend, VitBase
from treelora_backends.vit.export import _compare
from treelora_backends.vit.images import make_preprocessing
from treelora_backends.vit.trunk import PLAIN_ATTENTION_TOKENS, Trunk

from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.config import AdapterConfig, BaseConfig, Config, HeadConfig, TrainConfig, TreeConfig, resolve
from treelora_cli.errors import ModelError, UsageError
from treelora_cli.learning.opening import open_base, project_config
from treelora_cli.project import Project

ARGUMENTS: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
FAMILIES = {
    "ViT with a class token": "vit_tiny_patch16_224",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT distilled": "deit_tiny_distilled_patch16_224",
    "DeiT III with layer scale": "deit3_small_patch16_224",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2",
    "CLIP, normalised before": "vit_base_patch16_clip_224",
    "SigLIP, pooled by attention": "vit_base_patch16_siglip_224",
    "EVA-02 with rope, split q/k/v": "eva02_base_patch14_224",
    "EVA-02 with rope, fused with q_bias": "eva02_tiny_patch14_224",
    "EVA without rope": "eva_giant_patch14_224",
    "DINOv3 with rope": "vit_small_patch16_dinov3",
    "BEiT with q_bias": "beit_base_patch16_224",
    "relative positions, no class token": "vit_relpos_small_patch16_224",
}
ALL = pytest.mark.parametrize("family", FAMILIES)
_QUICK = ("ViT with a class token", "EVA-02 with rope, split q/k/v", "SigLIP, pooled by attention")
"""Families that the default tests take through a whole stream; the slow tests take all."""


@cache
def _state(name: str) -> dict[str, Tensor]:
    """Weights large enough that every part of the network matters (layer scales start near 0)."""
    torch.manual_seed(1)
    vit = timm.create_model(name, num_classes=0, **ARGUMENTS)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vit.state_dict()


def vit_of(family: str, classes: int = 0) -> nn.Module:
    vit = timm.create_model(FAMILIES[family], num_classes=0, **ARGUMENTS)
    vit.load_state_dict(_state(FAMILIES[family]))
    if classes:
        vit.reset_classifier(classes)
    return vit.eval()


@pytest.fixture
def stored(family: str, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(_state(FAMILIES[family]), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def loaded(family: str, weights: Path, **adapter: Any) -> VitBase:
    base = BaseConfig(model=FAMILIES[family], weights=str(weights), model_args=ARGUMENTS)
    flags = Config(base=base, adapter=AdapterConfig(rank=2, alpha=4.0, **adapter), head=HeadConfig(width=32, blocks=3))
    backend = VitBackend()
    return backend.load(resolve(flags, Config(), backend.defaults()), plain_runtime())


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def random_adapter(base: VitBase, seed: int = 3) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    pairs = adapters.slot_parameters(base.network, base.layers)
    down = tuple(torch.randn(a.shape, generator=generator) * 0.2 for a, _ in pairs)
    up = tuple(torch.randn(b.shape, generator=generator) * 0.2 for _, b in pairs)
    return AdapterWeights(base.layers, down, up, base.scale)


# -- the cut ----------------------------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_both_parts_together_give_timms_own_features(family: str) -> None:
    vit, x = vit_of(family), images()
    expected = vit.forward_head(vit.forward_features(x), pre_logits=True)
    layered = []
    for cut in range(3):
        trunk = Trunk(vit, cut, 2)
        found = trunk.after(trunk.before(x))
        torch.testing.assert_close(found.pooled, expected, atol=1e-5, rtol=1e-5)
        assert found.layered.shape == (3, trunk.feature_width)
        layered.append(found.layered)
    torch.testing.assert_close(layered[0], layered[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layered[0], layered[2], atol=1e-5, rtol=1e-5)


@ALL
@torch.no_grad()
def test_what_lies_before_the_cut_serves_batches_of_any_size(family: str) -> None:
    vit, x = vit_of(family), images(5)
    trunk = Trunk(vit, 1, 1)
    whole = trunk.after(trunk.before(x)).pooled
    one_by_one = torch.cat([trunk.after(trunk.before(x[row : row + 1])).pooled for row in range(5)])
    torch.testing.assert_close(one_by_one, whole, atol=1e-5, rtol=1e-5)
    assert not [module for module in vit.modules() if module._forward_hooks or module._forward_pre_hooks]


@ALL
def test_attention_is_trained_as_plain_products_with_the_same_gradient(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit, calls, gradients = vit_of(family), [], []
    trunk, fused = Trunk(vit, 0, 1), scaled_dot_product_attention
    with torch.no_grad():
        tokens = trunk.before(images()).tokens
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(1), fused(*a, **k))[1]
    )
    for most in (0, PLAIN_ATTENTION_TOKENS):
        monkeypatch.setattr(trunks, "PLAIN_ATTENTION_TOKENS", most)
        trunk._class_token_alone(tokens)
        calls.clear()
        seen = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            trunk.pooled(seen).square().sum().backward()
        gradients.append(seen.grad)
        assert bool(calls) == (most == 0)
    assert nn.functional.cosine_similarity(*(one.flatten() for one in gradients), dim=0) > 0.999
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trunk.pooled(tokens)
    assert calls
    calls.clear()
    trunk.pooled(tokens.requires_grad_())
    assert calls


# -- the adapters -----------------------------------------------------------------------------------------


@ALL
@torch.no_grad()
def test_every_adapted_layer_acts_and_equals_a_changed_weight(family: str, stored: Path) -> None:
    base, x = loaded(family, stored), images()
    plain = base.trunk.after(base.trunk.before(x)).pooled.clone()
    whole = random_adapter(base)
    for index in range(len(base.layers)):
        up = tuple(part if place == index else torch.zeros_like(part) for place, part in enumerate(whole.up))
        one = AdapterWeights(base.layers, whole.down, up, base.scale)
        adapters.write_slot(base.network, one)
        found = base.trunk.after(base.trunk.before(x)).pooled
        assert not torch.allclose(found, plain, atol=1e-4), f"{base.layers[index]} is passed by"
        changed = vit_of(family)
        changed.get_submodule(base.layers[index]).weight += one.update(index)
        expected = changed.forward_head(changed.forward_features(x), pre_logits=True)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


SHORTER_LAST_BLOCK = {"ViT with a class token", "DeiT", "DeiT distilled", "DeiT III with layer scale"}


@ALL
def test_pooling_alone_gives_the_same_features_and_gradients(family: str, stored: Path) -> None:
    base, x = loaded(family, stored), images()
    adapters.write_slot(base.network, random_adapter(base))
    cut = base.trunk.before(x)
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    whole, alone = base.trunk.after(cut).pooled, base.trunk.pooled(cut.tokens)
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad(whole.square().sum(), ups)
    for one, other in zip(torch.autograd.grad(alone.square().sum(), ups), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    if family in SHORTER_LAST_BLOCK:
        seen: list[int] = []
        hook = base.trunk.blocks[-1].mlp.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[1]))
        base.trunk.pooled(cut.tokens)
        hook.remove()
        assert seen == [base.trunk.prefix_tokens]


@ALL
@torch.no_grad()
def test_the_base_is_left_alone_by_adapters(family: str, stored: Path) -> None:
    base, x = loaded(family, stored), images()
    adapters.write_slot(base.network, random_adapter(base))
    with adapters.base_only(base.network):
        found = base.trunk.after(base.trunk.before(x)).pooled
    vit = vit_of(family)
    torch.testing.assert_close(found, vit(x), atol=1e-5, rtol=1e-5)
    assert base.fingerprint == loaded(family, stored).fingerprint


@pytest.mark.parametrize(
    ("targets", "blocks", "expected"),
    [
        ("qkv", 0, ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.2.attn.qkv"]),
        ("qkv", 1, ["blocks.2.attn.qkv"]),
        ("fc1, fc2", 1, ["blocks.2.mlp.fc1", "blocks.2.mlp.fc2"]),
        ("all-linear", 1, [f"blocks.2.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]),
    ],
)
@pytest.mark.parametrize("family", ["ViT with a class token"])
def test_targets_and_blocks_choose_layers_in_network_order(
    family: str, stored: Path, targets: str, blocks: int, expected: list[str]
) -> None:
    assert list(loaded(family, stored, targets=targets, blocks=blocks).layers) == expected


@pytest.mark.parametrize("family", ["EVA-02 with rope, fused with q_bias"])
def test_a_layer_that_adapters_cannot_reach_is_refused(family: str, stored: Path) -> None:
    with pytest.raises(ModelError, match=r"Layer 'blocks\.0\.attn\.qkv' is never called by this model; choose others"):
        loaded(family, stored, targets="qkv", blocks=0)


# -- a stream on each family ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [one if one in _QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_two_tasks_and_both_exports_under_stock_code(
    cli: Cli, family: str, stored: Path, data: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("head: {merged: mean, width: 32}\ntrain: {epochs: 1, batch_size: 8}\nadapter: {rank: 2}\n")
    pairs = [part for key, value in ARGUMENTS.items() for part in ("--model-arg", f"{key}={value}")]
    options = ["--model", FAMILIES[family], "--weights", stored, *pairs, "--recipe", recipe, "--device", "cpu"]
    root = tmp_path / "p"
    made = cli("init", root, *options)
    assert made.code == 0, made.err
    for name, _ in STREAM[:2]:
        learned = cli("-C", root, "train-task", data / name, "--device", "cpu")
        assert learned.code == 0, learned.err
    for kind in ("merged", "adapter", "routed"):
        done = cli("-C", root, "export", tmp_path / kind, "--format", kind, "--json", "--device", "cpu")
        assert done.code == 0, done.err
        assert all(one["here"] == one["reloaded"] for one in done.json["scores"].values())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architecture"] == FAMILIES[family]
    stock = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True)
    assert timm.data.resolve_model_data_config(stock)["input_size"] == (3, 16, 16)
    assert stock.pretrained_cfg["label_names"] == ["red", "yellow", "blue", "cyan", "green"]


@torch.no_grad()
def test_peft_s_own_loader_puts_an_adapter_on_a_stock_timm_model(
    cli: Cli, learned_project: Path, tmp_path: Path
) -> None:
    import timm
    from conftest import MODEL, MODEL_ARGS
    from peft import PeftModel
    from safetensors.torch import load_file

    from treelora_cli.project import Project

    out = tmp_path / "cold"
    done = cli("-C", learned_project, "export", out, "--format", "adapter", "--task", "cold", "--device", "cpu")
    assert done.code == 0, done.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["modules_to_save"]) == (
        "LORA",
        4,
        8,
        ["head"],
    )
    project = Project.open(learned_project)
    stored = load_file(project.state.base["resolved"]["weights"])
    base, expected = (timm.create_model(MODEL, num_classes=3, **MODEL_ARGS).eval() for _ in range(2))
    base.load_state_dict(stored, strict=False)
    expected.load_state_dict(stored, strict=False)
    assert set(config["target_modules"]) <= {name for name, _ in base.named_modules()}
    own, head = project.adapter("cold"), project.memory().tasks[1].tensors()
    for index, layer in enumerate(own.layers):
        expected.get_submodule(layer).weight += own.update(index)
    expected.head.weight.copy_(head["head.weight"])
    expected.head.bias.copy_(head["head.bias"])
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    adapted = PeftModel.from_pretrained(base, str(out)).eval()
    torch.testing.assert_close(adapted(images), expected(images), atol=1e-5, rtol=1e-5)
    assert json.loads((out / "labels.json").read_text()) == ["blue", "cyan", "green"]


@torch.no_grad()
def test_merged_export_holds_the_base_plus_the_mean_update(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from treelora_cli.project import Project

    assert cli("-C", learned_project, "export", tmp_path / "out", "--device", "cpu").code == 0
    project = Project.open(learned_project)
    own = [project.adapter(task.name) for task in project.state.tasks]
    base = load_file(project.state.base["resolved"]["weights"])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in base.items():
        expected = value
        for index, layer in enumerate(own[0].layers):
            if key == f"{layer}.weight":
                expected = value + sum(one.update(index) for one in own) / len(own)
                assert not torch.allclose(expected, value)
        torch.testing.assert_close(merged[key], expected)
    assert merged["head.weight"].shape == (7, 32)


# -- preprocessing ----------------------------------------------------------------------------------------


def _pictures() -> Iterator[Image.Image]:
    generator = np.random.default_rng(0)
    for height, width in ((16, 16), (40, 23), (7, 90), (300, 200)):
        yield Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_base_patch16_siglip_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_tiny_patch16_224", {"crop_pct": 1.0, "interpolation": "bilinear", "mean": 0.3, "std": [0.1, 0.2, 0.3]}),
        ("vit_tiny_patch16_224", {"crop_mode": "squash", "crop_pct": 0.8}),
        ("vit_tiny_patch16_224", {"crop_mode": "border"}),
    ],
)
def test_preprocessing_equals_timms_own(name: str, overrides: dict[str, Any]) -> None:
    vit = timm.create_model(name, num_classes=0, **ARGUMENTS)
    spread = {
        key: (value,) * 3 if isinstance(value, float) and key == "mean" else value for key, value in overrides.items()
    }
    config = timm.data.resolve_data_config({**spread, "input_size": (3, 16, 16)}, model=vit)
    steps = timm.data.create_transform(**config, is_training=False)
    ours = make_preprocessing(vit, overrides)
    assert ours.size == (16, 16)
    for image in _pictures():
        image.save(stored := BytesIO(), "png")
        pixels = torch.from_numpy(ours.to_pixels(stored.getvalue(), "x.png"))[None]
        torch.testing.assert_close(ours.normalise(pixels)[0], steps(image), atol=1e-6, rtol=1e-5)


def test_preprocessing_refuses_unknown_settings() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, **ARGUMENTS)
    with pytest.raises(
        UsageError, match=r"--preprocess size: known are crop_mode, crop_pct, interpolation, mean, range, std\."
    ):
        make_preprocessing(vit, {"size": 3})
    with pytest.raises(UsageError, match=r"--preprocess: "):
        make_preprocessing(vit, {"interpolation": "sharp"})


# -- where a base comes from ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ViT with a class token"])
def test_a_directory_saved_by_timm_is_the_same_base(family: str, stored: Path, tmp_path: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(vit_of(family, 5), tmp_path / "saved", model_args=ARGUMENTS, safe_serialization=True)
    config = resolve(Config(base=BaseConfig(model=str(tmp_path / "saved"))), Config(), VitBackend().defaults())
    config = resolve(Config(adapter=AdapterConfig(rank=2)), config, Config())
    base = VitBackend().load(config, plain_runtime())
    assert base.fingerprint == loaded(family, stored).fingerprint
    assert base.preprocessing.size == (16, 16)


@pytest.mark.parametrize("family", ["ViT with a class token"])
def test_weights_with_a_classifier_are_the_same_base(family: str, stored: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(vit_of(family, 5).state_dict(), tmp_path / "with_head.safetensors")
    assert loaded(family, tmp_path / "with_head.safetensors").fingerprint == loaded(family, stored).fingerprint


@pytest.mark.parametrize("family", ["ViT with a class token"])
def test_weights_that_are_not_finite_are_refused(family: str, stored: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {key: value.clone() for key, value in _state(FAMILIES[family]).items()}
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ModelError, match=r"nan\.safetensors holds weights that are not finite\."):
        loaded(family, tmp_path / "nan.safetensors")


@pytest.mark.parametrize("inference", ["merged", "latest"])
def test_one_network_answers_in_float32_whatever_a_project_computes_in(learned_project: Path, inference: str) -> None:
    """Solved blocks hold large numbers whose small differences are the answer: bf16 would lose it."""
    project, runtime = Project.open(learned_project), plain_runtime()
    base = open_base(project, project_config(project, Config()), runtime)
    predictor = base.predictor(project.memory(), inference)
    images = torch.randn(4, 3, *base.preprocessing.size, generator=torch.Generator().manual_seed(0))
    full, *_ = predictor.class_scores(images)
    runtime.compute_as({"precision": "bf16"})
    assert torch.equal(predictor.class_scores(images)[0], full)


@pytest.mark.parametrize(
    ("said", "device", "batch", "rate"),
    [
        ({}, "cuda", 256, 0.02),
        ({}, "cpu", 64, 0.005),
        ({}, None, 64, 0.005),
        ({"batch_size": 32}, "cuda", 32, 0.005),
        ({"lr": 0.01}, "cuda", 64, 0.01),
        ({"accumulate": 2}, "cuda", 64, 0.005),
    ],
)
def test_a_gpu_takes_larger_batches_at_a_higher_rate_unless_one_of_them_is_said(
    learned_project: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
    device: str | None,
    batch: int,
    rate: float,
) -> None:
    project = Project.open(learned_project)
    monkeypatch.setattr(project, "config", Config)
    train = project_config(project, Config(train=TrainConfig(**said)), device).train
    assert (train.batch_size, train.lr) == (batch, pytest.approx(rate))


def test_tasks_that_share_adapters_keep_the_small_batches_that_were_measured() -> None:
    flags = Config(tree=TreeConfig(branch="auto"))
    train = resolve(flags, Config(), VitBackend().defaults_on({"device": "cuda"})).train
    assert (train.batch_size, train.lr) == (32, 0.001)


def test_a_checked_export_asks_for_images_as_it_goes() -> None:
    happened: list[str] = []

    class Later:
        shape = (3, 3, 2, 2)

        def split(self, _size: int) -> Iterator[Tensor]:
            for _ in range(3):
                happened.append("decoded")
                yield torch.zeros(1, 3, 2, 2, dtype=torch.uint8)

    def here(pictures: Tensor) -> Tensor:
        happened.append("scored")
        return pictures.flatten(1)

    base: Any = SimpleNamespace(runtime=plain_runtime(), preprocessing=SimpleNamespace(normalise=Tensor.float))
    _compare(base, cast("nn.Module", here), nn.Flatten(), Later(), torch.float32)
    assert happened == ["decoded", "scored"] * 3
