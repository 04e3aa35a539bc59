"""What only a GPU can show to be right: pytest -m gpu. The figures are those of ``tests/benchmarks/gpu.py``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_lm import tiny_models
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.kept import Keeping, KeptRows, each_expected
from treelora_backends.vit.images import images_at_once

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Runtime, Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig, resolve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def precise() -> Any:
    """Products of float32 in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("place", ["device", "memory", "file"])
def test_rows_are_read_from_anywhere_while_the_gpu_works(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(Keeping, "place", lambda _self, _wanted, **_again: place)
    kept = KeptRows(256, (65, 192), Keeping.of(CUDA, None))
    rows = torch.randn(256, 65, 192, device=CUDA)
    for start in range(0, 256, 64):
        kept.write(torch.arange(start, start + 64).flip(0), rows[start : start + 64].flip(0))
    batches = list(torch.randperm(256, generator=torch.Generator().manual_seed(0)).split(32)) * 4
    work = torch.randn(2048, 2048, device=CUDA)
    read = []
    for batch in each_expected(kept, batches, lambda batch: batch):
        read.append(kept.read(batch))
        work = work @ work / 50
    assert all(torch.equal(found, rows[batch.to(CUDA)].bfloat16()) for found, batch in zip(read, batches, strict=True))
    assert all(found.device.type == "cuda" for found in read)


@pytest.fixture
def no_waiting() -> Any:
    """Whatever waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_a_batch_is_read_from_the_gpu_without_waiting_for_it(request: pytest.FixtureRequest) -> None:
    kept = KeptRows(64, (65, 192), Keeping.of(CUDA, None))
    rows = torch.randn(64, 65, 192, device=CUDA)
    kept.write(torch.arange(64), rows)
    request.getfixturevalue("no_waiting")
    found = kept.read(torch.arange(0, 64, 2))
    torch.cuda.set_sync_debug_mode("default")
    assert kept.place == "device"
    assert torch.equal(found, rows[::2].bfloat16())


def test_little_is_kept_on_the_gpu_and_the_limit_holds() -> None:
    assert Keeping.of(CUDA, None).place(2**20) == "device"
    assert Keeping.of(CUDA, 1).place(2**20 + 1) == "file"
    assert images_at_once(CUDA) >= 32


def cpu_runtime() -> Runtime:
    """accelerate keeps one device for a process; this is the other one's."""
    alone = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=True)
    return Runtime(accelerator=alone, offline=True)  # type: ignore[arg-type]


def losses_of(model: Path, runtime: Runtime, data: Path) -> tuple[torch.Tensor, list[torch.Tensor], str]:
    """Losses of an epoch on a device, the gradients of the first, and where its states were kept."""
    backend = CausalLmBackend()
    flags = Config(base=BaseConfig(model=str(model)), adapter=AdapterConfig(blocks=3), train=TrainConfig(prompt_tail=0))
    base = backend.load(resolve(flags, Config(), backend.defaults()), runtime)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    runtime.compute_as({"precision": "fp32"})
    session = base.session(base.read_task(DataRequest(data)), Memory((), dict), base.config)
    session.prepare()
    slot = adapters.slot_parameters(base.network, base.layers)
    losses = [session.loss(batch) for batch in session.batches(0)]
    gradients = torch.autograd.grad(losses[0], [up for _, up in slot])
    place = session._entering.place if session._entering is not None else "nowhere"
    return torch.stack(losses).detach().cpu(), [one.cpu() for one in gradients], place


@pytest.mark.usefixtures("precise")
def test_losses_and_gradients_are_those_of_the_cpu(tmp_path: Path) -> None:
    rows = [
        {"prompt": "red " * (3 + place % 23), "answer": " ".join(["green"] * (1 + place % 5))} for place in range(40)
    ]
    data, model = tmp_path / "texts.jsonl", tiny_models(tmp_path)["llama"]
    data.write_text("\n".join(map(json.dumps, rows)))
    mine = losses_of(model, cpu_runtime(), data)
    theirs = losses_of(model, open_runtime("cuda", offline=True, reporter=Silent()), data)
    torch.testing.assert_close(theirs[0], mine[0], rtol=1e-3, atol=1e-3)
    for one, other in zip(theirs[1], mine[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
    assert (mine[2], theirs[2]) == ("memory", "device")
