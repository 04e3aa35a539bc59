"""Blocks appended to the frozen network compute what was solved, in a plain timm model."""

import timm
import torch
from accelerate import Accelerator
from treelora_backends.vit_solved import SolvedBlocks, fits
from treelora_backends.vit_trunk import Trunk

from treelora_cli.heads import RidgeStatistics, ridge_share, symmetric
from treelora_cli.runtime import Runtime


def make_vit(classes=0, **arguments):
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        num_classes=classes,
        img_size=16,
        patch_size=8,
        embed_dim=32,
        num_heads=2,
        depth=2,
        **arguments,
    )
    torch.manual_seed(3)  # after timm drew a classifier of this or that size
    for parameter in vit.parameters():  # timm starts small; spread the features
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
    return vit.eval()


def solve_two_tasks(vit):
    """Two tasks of two and three classes; returns the solved blocks, tokens and the tasks' tensors."""
    trunk = Trunk(vit, 1, None)
    runtime = Runtime(Accelerator(cpu=True))
    blocks = SolvedBlocks(trunk, seed=0, ridge=1e-3, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, 16, 16, generator=generator)
    with torch.no_grad():
        tokens = trunk.after(trunk.before(images)).token
    tasks, shared = [], None
    for rows, classes in ((slice(0, 24), 2), (slice(24, 60), 3)):
        if shared is not None:
            blocks = SolvedBlocks(trunk, seed=0, ridge=1e-3, device=torch.device("cpu")).restore(shared)
        labels = torch.arange(rows.stop - rows.start) % classes
        blocks.add_task(tokens[rows], labels, classes, runtime)
        tasks.append(blocks.task_tensors())
        shared = blocks.shared_tensors()
    return blocks, images, tokens, tasks


def test_the_grown_model_gives_the_solved_scores():
    blocks, images, tokens, tasks = solve_two_tasks(make_vit())
    sums = torch.cat([task["solved.sums"] for task in tasks])
    counts = torch.cat([task["solved.counts"] for task in tasks])
    head = RidgeStatistics(blocks.gram, sums, counts).solve(ridge_share(1e-3, blocks.features.width, 60))
    wanted = head(blocks.features(tokens))
    grown = make_vit(classes=5)
    blocks.grow(grown, tasks, torch.arange(5), 5)
    with torch.no_grad():
        found = grown(images)
    # centred: a shift common to all classes is not written; positive scale differs a little from image to image
    wanted, found = wanted - wanted.mean(1, keepdim=True), found - found.mean(1, keepdim=True)
    similarity = torch.nn.functional.cosine_similarity(wanted, found, dim=1)
    assert similarity.min() > 0.995
    assert (wanted.argmax(1) == found.argmax(1)).all()
    assert len(grown.blocks) > 2


def test_the_sums_do_not_depend_on_the_order_of_arrival_of_examples():
    blocks, _, tokens, tasks = solve_two_tasks(make_vit())
    assert blocks.features is not None
    phi = blocks.features(tokens)
    torch.testing.assert_close(symmetric(blocks.gram), phi.T @ phi, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(tasks[1]["solved.sums"].sum(0), phi[24:].sum(0), rtol=1e-4, atol=1e-3)


def test_a_class_in_two_tasks_is_scored_once():
    blocks, images, _, tasks = solve_two_tasks(make_vit())
    grown = make_vit(classes=4)
    blocks.grow(grown, tasks, torch.tensor([0, 1, 1, 2, 3]), 4)
    assert grown(images[:3]).shape == (3, 4)


def test_layer_scale_is_neutral_in_the_appended_blocks():
    blocks, images, tokens, tasks = solve_two_tasks(make_vit(init_values=0.1))
    head = RidgeStatistics(
        blocks.gram,
        torch.cat([task["solved.sums"] for task in tasks]),
        torch.cat([task["solved.counts"] for task in tasks]),
    ).solve(ridge_share(1e-3, blocks.features.width, 60))
    grown = make_vit(classes=5, init_values=0.1)
    blocks.grow(grown, tasks, torch.arange(5), 5)
    with torch.no_grad():
        assert (grown(images).argmax(1) == head(blocks.features(tokens)).argmax(1)).all()


def test_average_pooling_cannot_carry_solved_blocks():
    assert fits(Trunk(make_vit(), 1, None))
    assert not fits(Trunk(make_vit(global_pool="avg"), 1, None))
