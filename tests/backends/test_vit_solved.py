"""Blocks appended to the frozen network compute what was solved, in a plain timm model."""

import pytest
import timm
import torch
from accelerate import Accelerator
from treelora_backends.vit.shared_head import SharedHead
from treelora_backends.vit.solved import fits, solved_statistics
from treelora_backends.vit.trunk import Trunk, normalised

from treelora_cli.backend.adapters import attach
from treelora_cli.backend.linear_slots import attach_linear
from treelora_cli.backend.runtime import Runtime
from treelora_cli.backend.values import Memory, TaskMemory
from treelora_cli.config import Config, HeadConfig, resolve
from treelora_cli.heads.ridge import RidgeStatistics, ridge_share

RIDGE = 0.003


def make_vit(classes=0, depth=2, **arguments):
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        num_classes=classes,
        img_size=16,
        patch_size=8,
        embed_dim=32,
        num_heads=2,
        depth=depth,
        **arguments,
    )
    torch.manual_seed(3)  # after timm drew a classifier of this or that size
    for parameter in vit.parameters():  # timm starts small; spread the features
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
    return vit.eval()


def solve_two_tasks(**arguments):
    """Two tasks of two and three classes; returns the head, the memory, what it saw and the images."""
    vit = make_vit(**arguments)
    trunk = Trunk(vit, 1, None)
    runtime = Runtime(Accelerator(cpu=True))
    config = resolve(Config(), Config(head=HeadConfig(width=600, ridge=RIDGE)), Config())
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    memory = Memory((), dict)
    for rows, classes in ((slice(0, 24), 2), (slice(24, 60), 3)):
        head = SharedHead.restore(memory.shared(), trunk, config, runtime)
        labels = torch.arange(rows.stop - rows.start) % classes
        head.open_task(classes)
        with torch.no_grad():
            head.add(trunk.after(trunk.before(images[rows])), labels)
        head.close_task()
        names = tuple(f"{rows.start}-{one}" for one in range(classes))
        own, shared = head.task_tensors(), head.to_tensors
        task = TaskMemory(names[0], names, "accuracy", lambda: None, lambda own=own: own)
        memory = memory.with_task(task, shared)
    with torch.no_grad():
        seen = trunk.after(trunk.before(images))
    return SharedHead.restore(memory.shared(), trunk, config, runtime), memory, seen, images


def linear_and_random(head, seen):
    """What the blocks compute, from their definition: (60, C + R)."""
    solved = head.features.solved
    width = seen.token.shape[1]
    mean = head.features.plain.mean[-width:]
    linear = solved.read(normalised(seen.token) - mean) / solved.scales[0]
    return torch.cat([linear, solved(seen.token)], dim=1)


def wanted_head(head, memory, seen):
    phi = linear_and_random(head, seen)
    labels = torch.cat([torch.arange(24) % 2, 2 + torch.arange(36) % 3])
    statistics = RidgeStatistics.empty(phi.shape[1], 5, torch.device("cpu"))
    statistics.add(phi, labels)
    return statistics.solve(ridge_share(RIDGE, phi.shape[1], 60)), phi, statistics


def test_the_grown_model_gives_the_solved_scores():
    head, memory, seen, images = solve_two_tasks()
    solved, phi, _ = wanted_head(head, memory, seen)
    wanted = solved(phi)
    grown = make_vit(classes=5)
    head.grow_blocks(grown, memory, torch.arange(5), 5)
    with torch.no_grad():
        found = grown(images)
    # centred: a shift common to all classes is not written; positive scale differs a little from image to image
    wanted, found = wanted - wanted.mean(1, keepdim=True), found - found.mean(1, keepdim=True)
    similarity = torch.nn.functional.cosine_similarity(wanted, found, dim=1)
    assert similarity.min() > 0.995
    assert (wanted.argmax(1) == found.argmax(1)).all()
    assert len(grown.blocks) > 2


def test_layer_scale_is_neutral_in_the_appended_blocks():
    head, memory, seen, images = solve_two_tasks(init_values=0.1)
    solved, phi, _ = wanted_head(head, memory, seen)
    grown = make_vit(classes=5, init_values=0.1)
    head.grow_blocks(grown, memory, torch.arange(5), 5)
    with torch.no_grad():
        assert (grown(images).argmax(1) == solved(phi).argmax(1)).all()


def test_the_blocks_sums_are_a_part_of_the_shared_heads():
    head, memory, seen, _ = solve_two_tasks()
    _, phi, wanted = wanted_head(head, memory, seen)
    sums = torch.cat([task.tensors()["anchor.sums"] for task in memory.tasks])
    counts = torch.cat([task.tensors()["anchor.counts"] for task in memory.tasks])
    shared = RidgeStatistics(head.gram, sums, counts)
    found = solved_statistics(shared, head.features.solved, head.features.plain.scale[-32:])
    torch.testing.assert_close(found.gram.dense(), wanted.gram.dense(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.sums, wanted.sums, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.gram.dense(), phi.T @ phi, rtol=1e-3, atol=1e-2)


def test_a_class_in_two_tasks_is_scored_once():
    head, memory, _, images = solve_two_tasks()
    grown = make_vit(classes=4)
    head.grow_blocks(grown, memory, torch.tensor([0, 1, 1, 2, 3]), 4)
    assert grown(images[:3]).shape == (3, 4)


def test_average_pooling_cannot_carry_solved_blocks():
    assert fits(Trunk(make_vit(), 1, None))
    assert not fits(Trunk(make_vit(global_pool="avg"), 1, None))


@pytest.mark.parametrize("attach", [attach, attach_linear])
def test_a_network_whose_layers_all_hold_slots_carries_them_as_before(attach):
    vit = make_vit()
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    layers = [f"blocks.{block}.{part}" for block in range(len(vit.blocks)) for part in parts]
    attach(vit, layers, rank=2, alpha=4.0, dropout=0.0)
    assert fits(Trunk(vit, 0, None))


@pytest.mark.parametrize(("depth", "first"), [(1, 0), (2, 1), (4, 1)])
def test_features_come_from_every_block_but_the_first_where_they_are_few(depth, first):
    trunk = Trunk(make_vit(depth=depth), depth - 1, None)
    assert trunk.first_feature == first
    with torch.no_grad():
        features = trunk.after(trunk.before(torch.randn(2, 3, 16, 16)))
    assert features.layered.shape == (2, trunk.feature_width)
