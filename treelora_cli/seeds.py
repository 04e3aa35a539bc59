"""Every seed that is derived from another, by name, so that who must draw the same numbers asks the same function.

All are whole numbers; torch takes any below 2**64. The factors are primes or nearly so, and part of what a project's
hashes depend on: a changed one makes other adapters of the same data.
"""

from __future__ import annotations


def of_task(seed: int, index: int) -> int:
    """Seed of the project's or stream's task ``index``, from 0."""
    return seed * 10_007 + index


def of_order(task_seed: int, epoch: int) -> int:
    """Seed of the order in which an epoch, from 0, visits a task's examples: a contender sees what TreeLoRA sees."""
    return task_seed * 104_729 + epoch


def of_probe(task_seed: int, number: int = 0) -> int:
    """Seed of the mini-batches that are probed: ``number`` tells processes, or repeated draws, apart."""
    return task_seed * 7919 + number


def of_step(task_seed: int, step: int) -> int:
    """Seed of what is drawn within a training step, such as dropout."""
    return (task_seed * 1_000_003 + step) % (1 << 64)


def of_view(task_seed: int, view: int, first: int) -> int:
    """Seed of what is changed in one view of some of a task's images, told by the index of the first."""
    return (task_seed * 32_452_843 + view * 1_000_003 + first) % (1 << 63)


def of_layer(seed: int, layer: int) -> int:
    """Seed of what is drawn for an adapted layer, from 0: where its adapter starts, how its gradients are sketched."""
    return (seed * 1_000_003 + layer) % (1 << 63)


def of_kept_out(task_seed: int) -> int:
    """Seed of the choice of images that are kept out of a branch adapter's training."""
    return (task_seed * 15_485_863) % (1 << 63)


def of_blocks(seed: int) -> int:
    """Seed of the random features that grown blocks compute, apart from those of the head."""
    return seed + 1
