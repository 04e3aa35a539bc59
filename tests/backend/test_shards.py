"""Blocks divided between processes: in one process here, and in two that do not do the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import child_environment
from torch import nn
from torch.utils.checkpoint import checkpoint

from treelora_cli.backend import adapters
from treelora_cli.backend.shards import Shards, base_is_divided, is_released
from treelora_cli.errors import ModelError, UsageError

CPU = torch.device("cpu")


@pytest.fixture
def alone():
    """A group of one process, which sends its shares to itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """A frozen layer between a trained one and an odd type."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.trained = nn.Linear(8, 8)
        self.small = nn.Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, states):
        return states + torch.tanh(self.trained(self.frozen(states))) * self.small[0].float()


def blocks_of(seed=0, count=3):
    torch.manual_seed(seed)
    return [Block() for _ in range(count)]


def run(blocks, states, recompute=False):
    """The gradient of everything trained, and how many blocks are whole after each."""
    whole = []
    for block in blocks:
        states = checkpoint(block, states, use_reentrant=False) if recompute else block(states)
        whole.append(sum(not is_released(one.frozen.weight) for one in blocks))
    trained = [parameter for block in blocks for parameter in block.trained.parameters()]
    return torch.autograd.grad(states.pow(2).mean(), trained), whole


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_whole_blocks_step_after_step(alone, recompute):
    plain, divided = blocks_of(), blocks_of()
    shards = Shards()
    shards.divide(divided, CPU)
    assert shards.own_bytes == shards.all_bytes == 3 * 768, "256 for the weights, 32 and 6 bytes take 256 each"
    for step in range(3):
        torch.manual_seed(step)
        states = torch.randn(4, 8, requires_grad=recompute)
        wanted, _ = run(plain, states, recompute)
        found, whole = run(divided, states, recompute)
        assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
        assert whole == [0, 0, 0], "each is given back before the next runs"
        assert [is_released(one.frozen.weight) for one in divided] == [False, True, True], "the last of the way back"
        shards.meet()


def test_a_block_that_something_stands_in_for_is_not_gathered(alone):
    (block,) = blocks_of(count=1)
    Shards().divide([block], CPU)
    block.forward = lambda states: states
    states = torch.ones(1, 8)
    assert torch.equal(block(states), states)
    assert is_released(block.frozen.weight)
    del block.forward
    with torch.no_grad():
        assert not torch.equal(block(states), states)
    assert is_released(block.frozen.weight)
    assert is_released(block.small)
    assert not is_released(block.trained.weight)


def test_what_is_not_divided_is_placed_and_the_divided_is_not_read(alone):
    network = nn.Sequential(*blocks_of(count=1), nn.BatchNorm1d(8))
    shards = Shards()
    shards.divide([network[0]], CPU)
    before = {name: tensor.clone() for name, tensor in network[1].state_dict().items()}
    shards.place_rest(network, CPU)
    assert is_released(network[0].frozen.weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in network[1].state_dict().items())
    assert not is_released(network[0].trained.weight)


def test_blocks_with_a_weight_in_common_are_refused(alone):
    one, other = blocks_of(count=2)
    other.frozen = one.frozen
    with pytest.raises(ModelError, match=r"Blocks of this model share weights: it cannot be divided between processes"):
        Shards().divide([one, other], CPU)


def test_an_update_is_not_folded_into_what_is_not_here(alone):
    network = nn.ModuleDict({"block": nn.ModuleDict({"linear": nn.Linear(8, 8)})})
    adapted = adapters.attach(network, ["block.linear"], rank=2, alpha=4.0, dropout=0.0)
    Shards().divide([network["block"]], CPU)
    with pytest.raises(ModelError, match=r"changes the base's weights, and processes hold them together \(FSDP\)"):
        adapters.fold_slot(adapted, ["block.linear"], 2.0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FSDP_OFFLOAD_PARAMS", r"asks for a base in the processors' memory \(fsdp_offload_params\)\. Leave it out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", r"asks for fsdp_activation_checkpointing; say train-task --grad-checkpoint"),
    ],
)
def test_what_accelerate_may_ask_for_beside(monkeypatch, name, said):
    monkeypatch.setenv(name, "true")
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert not base_is_divided()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(UsageError, match=said):
        base_is_divided()
    monkeypatch.setenv(name, "false")
    assert base_is_divided()


_TWO = """
import atexit, json, sys
import torch
from torch import nn
from test_shards import blocks_of, run
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.shards import is_released

runtime = open_runtime("cpu", offline=True, reporter=Silent())
rank = runtime.accelerator.process_index
plain, divided = blocks_of(), blocks_of()
assert runtime.shards is not None and runtime.accelerator.num_processes == 2
with runtime.shards.in_turn():
    runtime.shards.divide(divided, torch.device("cpu"))
same = []
for step in range(2 + 3 * rank):  # the other has fewer passes to make
    states = torch.randn(1 + rank, 8)
    pairs = zip(run(plain, states)[0], run(divided, states)[0], strict=True)
    same.append(all(torch.equal(one, other) for one, other in pairs))
    if rank == 0:
        with torch.no_grad():
            divided[2](states)  # and another order of blocks
total = float(runtime.sum(torch.tensor(float(len(same)))))
runtime.meet()
sizes = [[parameter.untyped_storage().nbytes() for parameter in block.frozen.parameters()] for block in divided[1:]]
found = [all(same), len(same), total, runtime.shards.own_bytes, runtime.shards.all_bytes, sizes]
print(json.dumps(runtime.gather_json([found]))) if rank == 0 else runtime.gather_json([found])
atexit._run_exitfuncs()  # else a thread of gloo's may outlive Python, which aborts
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_two_processes_with_other_passes_hand_out_their_shares(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    asked = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    here = Path(__file__).parent
    environment = child_environment(PYTHONPATH=os.pathsep.join([str(here), str(here.parent)]), **asked)
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)
    assert first == [True, 2, 7.0, 3 * 512, 2 * 3 * 512, [[0, 0], [0, 0]]]
    assert second == [True, 5, 7.0, 3 * 512, 2 * 3 * 512, [[0, 0], [0, 0]]]
