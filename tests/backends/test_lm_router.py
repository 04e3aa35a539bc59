"""The classifier that tells which task an input is from."""

import pytest
import torch
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.router import TaskRouter, left_out_scores

from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import Memory, TaskMemory
from treelora_cli.config import Config, resolve
from treelora_cli.heads.gram import Gram


def test_router_tells_tasks_of_unequal_sizes_apart():
    runtime = open_runtime("cpu", offline=True, reporter=Silent())
    config = resolve(Config(), Config(), CausalLmBackend().defaults())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 40, generator=generator)
    drawn = [centres[task] + 0.8 * torch.randn(n, 40, generator=generator) for task, n in enumerate((500, 20, 60))]
    fresh = [centres[task] + 0.8 * torch.randn(50, 40, generator=generator) for task in range(3)]
    memory, none = Memory((), dict), AdapterWeights((), (), (), 1.0)
    for task, features in enumerate(drawn):
        router = TaskRouter.restore(memory, config)
        router.add_task(features, runtime)
        tensors, shared = router.task_tensors(), router.to_tensors
        memory = memory.with_task(TaskMemory(f"t{task}", (), "", lambda: none, lambda kept=tensors: kept), shared)
    router = TaskRouter.restore(memory, config)
    assert "route.floor" not in memory.tasks[0].tensors()
    own = router.routes(router.scores(torch.cat(fresh), memory), memory)
    assert sum(route.known for route in own) >= 147
    assert all(0 <= route.margin <= route.probability <= 1 for route in own)
    foreign = router.routes(router.scores(0.8 * torch.randn(50, 40, generator=generator), memory), memory)
    assert sum(route.known for route in foreign) <= 15
    for task, features in enumerate(fresh):
        assert (router.scores(features, memory).argmax(dim=1) == task).float().mean() > 0.95


def test_scores_of_inputs_left_out_are_those_of_a_router_without_them():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 6, generator=generator) + shift for n, shift in ((9, 0.0), (7, 1.0)))

    def solved(own):
        """Weighted ridge onto indicators: each task weighs 1, an input of the second 1/7 though one is missing."""
        rows = torch.cat([first, own]).double()
        weights = torch.cat([torch.full((9,), 1 / 9), torch.full((len(own),), 1 / 7)]).double()
        targets = torch.cat([torch.zeros(9), torch.ones(len(own))]).double()
        middle, level = (weights[:, None] * rows).sum(0) / weights.sum(), (weights * targets).sum() / weights.sum()
        centred = rows - middle
        matrix = centred.T @ (weights[:, None] * centred) + penalty * torch.eye(6)
        weight = torch.linalg.solve(matrix, centred.T @ (weights * (targets - level)))
        return lambda row: level + (row.double() - middle) @ weight

    gram = Gram.from_dense(first.T @ first / 9 + second.T @ second / 7)
    means = torch.stack([first.mean(0), second.mean(0)])
    middle = means.mean(0)
    penalty = 0.1 * float((gram.dense() - 2 * torch.outer(middle, middle)).diagonal().mean())
    found = left_out_scores(gram, means, second, 1 / 7)
    for index in range(7):
        without = solved(torch.cat([second[:index], second[index + 1 :]]))
        assert float(found[index]) == pytest.approx(float(without(second[index])), abs=1e-4)
