"""Frozen blocks whose weights are divided between processes, and gathered while a block runs.

A base that fits no card is held in shares: of every block each process keeps one part of its bytes, and has the whole
of one block at a time. Nothing of a frozen weight is trained, so nothing is sent back.

Torch's own ``fully_shard`` needs every process to run the same blocks in the same order. Here they do not: each has
other texts, batches and lengths of answers, and a step skips the blocks that were run before. So each process says
which block it needs next, all hand out their shares of those, and a process that waits where all meet, at every sum
and gather of ``Runtime``, goes on handing out until the others arrive.

Symbols: ``N`` processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from treelora_cli.errors import ModelError, UsageError

_ALIGNED = 256
"""Bytes at whose multiples weights begin, as kernels want them."""
_MEETS = -1
"""Said by a process that needs no block before it meets the others."""

FSDP = "ACCELERATE_USE_FSDP"
_OTHERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""How ``accelerate launch`` hands on that the model is to be divided between processes in another way."""
_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "a base in the processors' memory (fsdp_offload_params)",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing; say train-task --grad-checkpointing instead",
}
"""What a configuration of FSDP may ask for beside, and is not done."""
_TRUE = ("true", "1", "yes", "on")


class Shards:
    """The divided blocks of a base, and how processes hand them out; made in all of them together."""

    def __init__(self) -> None:
        self._talk: Any = dist.new_group(backend="gloo")  # from host to host: no GPU is waited for
        self._blocks: list[_Block] = []
        self._held: set[int] = set()

    @property
    def own_bytes(self) -> int:
        """Bytes of the blocks that this process keeps."""
        return sum(block.own.numel() for block in self._blocks)

    @property
    def all_bytes(self) -> int:
        """Bytes of the blocks over all processes."""
        return self.own_bytes * dist.get_world_size()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run what is within in one process of a machine after the other: each has the whole base in memory there."""
        turns = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
        own = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
        for _ in range(own):
            dist.barrier(self._talk)
        try:
            yield
        finally:
            for _ in range(turns - own):
                dist.barrier(self._talk)

    def divide(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """Keep of each block's frozen weights a share on ``device``; what is trained in it stays as it is.

        Args:
            blocks: Run one after the other; gradients come back in the opposite order. None is inside another.
            device: Where they run.

        Raises:
            ModelError: Two of them have a weight in common.
        """
        for block in blocks:
            index = len(self._blocks)
            self._blocks.append(_Block(block, device))
            block.register_forward_pre_hook(partial(self._before, index))
            block.register_forward_hook(partial(self._after, index))

    @staticmethod
    def place_rest(network: nn.Module, device: torch.device) -> None:
        """Put on ``device`` what is not divided: adapters, embeddings, the output layer, buffers."""
        for parameter in network.parameters():
            if not is_released(parameter):
                parameter.data = parameter.detach().to(device)
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def meet(self) -> None:
        """Hand out shares until every process is here; no block runs while one waits."""
        for index in list(self._held):
            self._release(index)
        while any(said != _MEETS for said in self._round(_MEETS)):
            pass

    def leave(self) -> None:
        """End the exchange with the other processes, before Python ends; blocks do not run any more."""
        talk, self._talk = self._talk, None
        if dist.is_initialized():
            dist.destroy_process_group(talk)

    # -- while blocks run -----------------------------------------------------------------------------

    def _before(self, index: int, block: nn.Module, _inputs: Any) -> None:
        if not _is_skipped(block):
            self._need(index)

    def _after(self, index: int, block: nn.Module, _inputs: Any, output: Any) -> None:
        if _is_skipped(block):
            return
        if not self._blocks[index].returning:  # else its backward pass computes it again, and needs it still
            self._release(index)
        for tensor in _tensors_in(output):
            if tensor.requires_grad:
                cast("Any", tensor).register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, _gradient: Tensor) -> None:
        """Gather a block again; those behind it are through, since its output's gradient is complete."""
        self._need(index)
        self._blocks[index].returning = True

    def _need(self, index: int) -> None:
        for other in self._held - {index}:
            self._release(other)
        if index not in self._held:
            self._held.add(index)
            self._round(index)

    def _release(self, index: int) -> None:
        self._held.discard(index)
        self._blocks[index].release()

    def _round(self, wanted: int) -> list[int]:
        """Say which block is needed, and gather those that any process needs, in one order; returns what all said."""
        own = torch.tensor([wanted])
        said = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(said, own, self._talk)
        needs = [int(one) for one in said]
        for index in sorted(set(needs) - {_MEETS}):
            self._blocks[index].gather()
            if index not in self._held:
                self._blocks[index].release()
        return needs


class _Block:
    """One block's frozen weights.

    Attributes:
        own: This process's share of their bytes.
        returning: True from its backward pass on until it is released.
    """

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        if any(is_released(one) for one in block.parameters()):
            raise ModelError("Blocks of this model share weights: it cannot be divided between processes.")
        frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
        processes, size = dist.get_world_size(), 0
        starts = []
        for parameter in frozen:
            starts.append(size)
            size += -(-parameter.numel() * parameter.element_size() // _ALIGNED) * _ALIGNED
        share = -(-size // (processes * _ALIGNED)) * _ALIGNED
        self._whole = torch.zeros(processes * share, dtype=torch.uint8, device=device)
        for parameter, start in zip(frozen, starts, strict=True):
            held = self._whole[start : start + parameter.numel() * parameter.element_size()]
            place = held.view(parameter.dtype).view(parameter.shape)
            place.copy_(parameter.detach())
            parameter.data = place
        self.own = self._whole[dist.get_rank() * share :][:share].clone()
        self.returning = False
        self.release()

    def gather(self) -> None:
        """Have the whole of it: tensors that autograd kept see it, too, since the memory's address is looked up."""
        self._whole.untyped_storage().resize_(self._whole.numel())
        _gather_all(self._whole, self.own)

    def release(self) -> None:
        """Give back the memory of all but the share."""
        self.returning = False
        self._whole.untyped_storage().resize_(0)


_gather_all: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13


def is_released(weight: Tensor) -> bool:
    """Return whether a weight is divided between processes and not gathered: reading it would fail."""
    return weight.numel() > 0 and weight.untyped_storage().nbytes() == 0


def _is_skipped(block: nn.Module) -> bool:
    """Return whether something else stands in for a block, which needs no weights."""
    return "forward" in vars(block)


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from _tensors_in(one)


# -- what accelerate is told ----------------------------------------------------------------------


def base_is_divided() -> bool:
    """Return whether accelerate's configuration asks for FSDP.

    Raises:
        UsageError: It asks for something else that divides a base, or for more.
    """
    asked = next((what for name, what in _OTHERS.items() if _is_true(name)), None)
    if asked is not None:
        raise UsageError(
            f"accelerate's configuration asks for {asked}; treelora divides a base between processes by FSDP alone."
            " A base that does not fit one card: use_fsdp, or init --dtype nf4."
        )
    if not _is_true(FSDP):
        return False
    more = next((what for name, what in _OF_FSDP.items() if _is_true(name)), None)
    if more is not None:
        raise UsageError(f"accelerate's configuration of FSDP asks for {more}. Leave it out.")
    return True


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Within, no such variable is in the environment."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value
