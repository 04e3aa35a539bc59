"""Liger's kernel behind the output layer: used where it helps on CUDA, with the loss and gradient of plain torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from treelora_backends.causal_lm.network.ahead import OutputLoss
from treelora_backends.causal_lm.network.liger import fused_loss

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
"""Only their names are used here."""
_FAKE = '''
import torch

CALLS = []


class LigerFusedLinearCrossEntropyLoss:
    """Takes what Liger's takes, and computes it plainly."""

    def __init__(self, label_smoothing=0.0):
        self.smoothing = label_smoothing

    def __call__(self, lin_weight, _input, target, bias=None):
        CALLS.append((len(target), self.smoothing))
        assert lin_weight.dtype == _input.dtype
        logits = torch.nn.functional.linear(_input, lin_weight, bias).float()
        return FACTOR * torch.nn.functional.cross_entropy(logits, target, label_smoothing=self.smoothing)
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a package of Liger's name whose loss is the plain one times ``factor``; returns its calls."""

    def made(factor: str = "1.0") -> list[tuple[int, float]]:
        package = tmp_path / "liger_kernel"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "transformers.py").write_text(f"FACTOR = {factor}\n{_FAKE}")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        import liger_kernel.transformers as fake  # type: ignore[import-not-found, unused-ignore]

        return fake.CALLS  # type: ignore[no-any-return]

    yield made
    for name in ("liger_kernel", "liger_kernel.transformers"):
        sys.modules.pop(name, None)


def frozen(vocabulary: int = 50, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)


def with_gradient(loss, states: Tensor, *rest) -> tuple[Tensor, Tensor]:
    leaf = states.clone().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(3 * value, leaf)[0]


def output(head: nn.Module, device: torch.device, at_once: int) -> OutputLoss:
    made = OutputLoss(lambda states: head(states).float(), head, device, 50)
    made.at_once = at_once
    return made


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [True, False])
def test_on_cuda_liger_takes_what_does_not_fit_at_once_with_the_same_loss_and_gradient(install, smoothing, bias):
    calls, head = install(), frozen(bias=bias)
    states, targets = torch.randn(11, 8), torch.randint(50, (11,))
    fused = with_gradient(output(head, CUDA, 4), states, targets, smoothing)
    assert calls[-1] == (11, smoothing)
    calls.clear()
    plain = with_gradient(output(head, CPU, 4), states, targets, smoothing)
    assert calls == []
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-7)


def test_few_positions_and_weighted_ones_stay_with_plain_torch(install):
    calls, head = install(), frozen()
    states, targets = torch.randn(11, 8), torch.randint(50, (11,))
    output(head, CUDA, 11)(states, targets)
    output(head, CUDA, 4)(states, targets, 0.0, torch.ones(11))
    assert calls == []


def test_states_are_cast_to_the_type_of_the_output_layer(install):
    calls, head = install(), frozen(dtype=torch.bfloat16)
    states, targets = torch.randn(11, 8), torch.randint(50, (11,))
    assert output(head, CUDA, 4)(states, targets).dtype == torch.float32
    assert calls[-1] == (11, 0.0)


@pytest.mark.parametrize("factor", ["1.1", "1 / 0", "float('nan')"])
def test_a_kernel_that_fails_or_finds_another_loss_is_not_used(install, factor, monkeypatch):
    if factor == "1 / 0":
        install()
        fake = sys.modules["liger_kernel.transformers"]
        monkeypatch.delattr(fake, "LigerFusedLinearCrossEntropyLoss")  # as in another version
    else:
        install(factor)
    assert fused_loss(frozen(), CUDA) is None


def test_only_a_frozen_linear_layer_on_cuda_fits(install):
    install()
    assert fused_loss(frozen(), CUDA) is not None
    assert fused_loss(frozen(), CPU) is None
    assert fused_loss(None, CUDA) is None
    assert fused_loss(nn.Linear(8, 50), CUDA) is None
    assert fused_loss(nn.Sequential(frozen()), CUDA) is None


def test_without_liger_plain_torch_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert fused_loss(frozen(), CUDA) is None


_INTERPRETED = """
import torch
from torch import nn
from treelora_backends.causal_lm.network.liger import fused_loss

torch.manual_seed(0)
head = nn.Linear(32, 1000, bias=False).requires_grad_(False)
loss = fused_loss(head, torch.device("cuda"))
states, targets = torch.randn(37, 32), torch.randint(1000, (37,))
for smoothing in (0.0, 0.1):
    found = []
    for one in (loss, lambda some, wanted, part: nn.functional.cross_entropy(head(some), wanted, label_smoothing=part)):
        leaf = states.clone().requires_grad_()
        value = one(leaf, targets, smoothing)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_ligers_own_kernel_interpreted_on_the_cpu_has_the_plain_loss_and_gradient() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
