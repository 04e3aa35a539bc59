"""Processor time of image steps: loss and gradient through adapters of all blocks of a ViT-S, on one core.

    python tests/benchmarks/image_step.py [--size 112] [--batch-size 32]

Each way is measured in turn, ``--rounds`` times, and the least counts: slots of PEFT, which cast inputs to and fro, or
the slots that images are learned with, and torch's fused attention or plain matrix products.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import timm
import torch
from charts import table
from treelora_backends.vit import trunk as trunks
from treelora_backends.vit.trunk import Trunk

from treelora_cli.backend import adapters
from treelora_cli.backend.linear_slots import attach_linear


def main() -> None:
    """Read the options and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    networks = {"PEFT": _network(given.size, adapters.attach), "own": _network(given.size, attach_linear)}
    with torch.no_grad():
        images = torch.randn(given.batch_size, 3, given.size, given.size)
        tokens = networks["own"].before(images).tokens
    networks["PEFT"].before(images[:1])
    most = trunks.PLAIN_ATTENTION_TOKENS

    def step(precision: str, attention: str, slots: str) -> None:
        trunks.PLAIN_ATTENTION_TOKENS = 0 if attention == "fused" else max(most, tokens.shape[1])
        trunk = networks[slots]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = trunk.pooled(tokens).square().mean()
        torch.autograd.grad(loss, [one for one in trunk.vit.parameters() if one.requires_grad], allow_unused=True)

    ways = [("bf16", "fused", "PEFT"), ("bf16", "plain", "PEFT"), ("bf16", "plain", "own"), ("fp32", "fused", "own")]
    least = dict.fromkeys(ways, float("inf"))
    for _ in range(given.rounds):
        for way in ways:
            least[way] = min(least[way], _seconds(lambda way=way: step(*way)))
    rows = [
        [precision, attention, slots, f"{1000 * seconds / given.batch_size:.1f}"]
        for (precision, attention, slots), seconds in least.items()
    ]
    print(f"{tokens.shape[1]} tokens an image")
    print(table(["precision", "attention", "slots", "CPU ms an image"], rows))


def _network(size: int, attach: Callable[..., object]) -> Trunk:
    """Return a ViT-S with an adapter on every linear layer of its blocks."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=size)
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    attach(vit, [f"blocks.{i}.{part}" for i in range(12) for part in parts], rank=8, alpha=16.0, dropout=0.0)
    for layer in vit.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            layer.cast_input_dtype_enabled = True  # as PEFT has it
    return Trunk(vit, 0, None)


def _seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
