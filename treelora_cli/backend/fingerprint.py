"""Identity of a frozen base: a hash over its parameters."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hash_parameters(network: nn.Module) -> str:
    """Return SHA-256, in hex, over names, types, shapes and bytes of all parameters and saved buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(memoryview(data.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
