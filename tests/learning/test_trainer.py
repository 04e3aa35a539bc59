"""One task's loop: a step by hand, resuming bit for bit, and every way it can go wrong."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import plain_runtime
from torch import Tensor, nn

from treelora_cli.algorithm.tree import build_tree
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.values import Learned
from treelora_cli.config import Config, TrainConfig, resolve
from treelora_cli.errors import Interrupted, ResourceError, TreeLoraError
from treelora_cli.learning.trainer import Trainer, TrainSettings, stop_on_signal
from treelora_cli.methods import treelora
from treelora_cli.methods.base import Past, StepView, TaskContext, Unprotected
from treelora_cli.methods.treelora import TreeLora

STEPS = 5
Checkpoints = dict[int, dict[str, Tensor]]


class Toy:
    """Learns ``up @ down`` towards a matrix, with dropout on the inputs."""

    def __init__(self, trouble: Exception | float | None = None, at: int = 3, dropout: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        self.down = nn.Parameter(torch.randn(2, 3, generator=generator))
        self.up = nn.Parameter(torch.randn(4, 2, generator=generator))
        self.bias = nn.Parameter(torch.zeros(4))
        self.inputs = torch.randn(20, 3, generator=generator)
        self.targets = torch.randn(20, 4, generator=generator)
        self.trouble, self.at, self.dropout, self.seen = trouble, at, dropout, 0

    @property
    def slot(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(self.down, self.up)]

    @property
    def steps_per_epoch(self) -> int:
        return STEPS

    def batches(self, epoch: int) -> Iterator[Tensor]:
        yield from torch.randperm(20, generator=torch.Generator().manual_seed(epoch)).split(4)

    def loss(self, rows: Tensor) -> Tensor:
        self.seen += 1
        if self.seen == self.at and isinstance(self.trouble, Exception):
            raise self.trouble
        x = nn.functional.dropout(self.inputs[rows], self.dropout)
        loss = (x @ self.down.T @ self.up.T + self.bias - self.targets[rows]).square().mean()
        return loss * self.trouble if self.seen == self.at and isinstance(self.trouble, float) else loss

    def parameters(self) -> list[nn.Parameter]:
        return [self.bias]

    def try_step(self, parameters: Sequence[Tensor]) -> None:
        """No arithmetic to choose."""

    def try_forward(self) -> None:
        """No arithmetic to choose."""

    def prepare(self) -> None:
        """Nothing to prepare."""

    def probe_losses(self, count: int) -> Iterator[Tensor]:
        return iter(())

    def finish(self) -> Learned:
        return Learned({}, dict, {})


class Plain(Unprotected):
    """Protects nothing; records the steps it saw."""

    def __init__(self) -> None:
        self.views: list[StepView] = []

    def begin(self, task: TaskContext) -> AdapterWeights:
        return task.fresh

    def penalty(self, view: StepView, loss: Tensor) -> Tensor | None:
        self.views.append(view)
        return None

    def after_step(self, view: StepView) -> None:
        assert self.views[-1] is view


def trainer_of(toy: Toy, method: Any = None, **changed: Any) -> Trainer:
    values = {"epochs": 3, "lr": 0.05, "weight_decay": 0.01, "batch_size": 4, "seed": 11, **changed}
    return Trainer(toy, method or Plain(), toy.slot, TrainSettings(**values), plain_runtime())


def parameters_of(toy: Toy) -> list[Tensor]:
    return [toy.down.detach().clone(), toy.up.detach().clone(), toy.bias.detach().clone()]


def treelora_of(
    toy: Toy,
    *,
    reg: float = 0.5,
    update: str = "penalty",
    start: str = "nearest",
    warm: bool = True,
    losses: Mapping[float, float] = MappingProxyType({}),
) -> TreeLora:
    """The method over three earlier tasks, with adapters of their own; the new task is like the second.

    ``losses`` are the new task's under adapters, by their down matrices' value: the second's is 2, a fresh one's 10.
    """
    rows = np.eye(3, 8, dtype=np.float32)[:, None, :]
    tree = build_tree(rows, 3)
    queries = rows[1][None].repeat(4, axis=0)

    def earlier(index: int) -> AdapterWeights:
        return AdapterWeights(("x",), (torch.full((2, 3), index + 1.0),), (torch.full((4, 2), -1.0 - index),), 1.0)

    config = resolve(Config(train=TrainConfig(reg=reg, update=update, warm_start=start)), Config(), Config())
    past = Past(tree, queries, earlier, lambda start: losses[float(start.down[0][0, 0])])
    method = TreeLora()
    fresh = earlier(9)
    start = method.begin(
        TaskContext(3, nn.Module(), ("x",), toy.slot, 1.0, fresh, lambda _: iter(()), 5, config, past=past)
    )
    assert torch.equal(start.up[0], (earlier(1) if warm else fresh).up[0])
    assert (method.found().nearest, method.found().parent) == (1, 1 if warm else None)
    return method


@pytest.mark.parametrize(("start", "warm"), [("nearest", True), ("better", False), ("none", False)])
@pytest.mark.parametrize("loss", [1.0, 1.5])
def test_an_adapter_under_which_the_first_batches_lose_no_less_is_no_better_start(
    start: str, warm: bool, loss: float
) -> None:
    treelora_of(Toy(), start=start, warm=warm, losses={2.0: loss, 10.0: 1.0})
    treelora_of(Toy(), start=start, warm=start != "none", losses={2.0: 0.9, 10.0: 1.0})


# -- a step by hand ---------------------------------------------------------------------------------------


def test_one_adamw_step_with_the_penalty_by_hand() -> None:
    toy = Toy(dropout=0.0)
    method = treelora_of(toy)
    trainer = trainer_of(toy, method, lr=0.1, weight_decay=0.2)
    trainer.step = 2  # ramp 2/5, cosine at 2 of 15
    before = parameters_of(toy)
    batch = torch.arange(4)
    view = StepView(2, 15, STEPS, 0.1, toy.slot)
    target = method._targets(method.selected(method.bandit, view), view)[0]

    loss = toy.loss(batch)
    grads = torch.autograd.grad(loss, [toy.down, toy.up, toy.bias])
    trainer._take_step(batch)

    size = sum(float(part.abs().sum()) for part in target)
    pull = 0.5 * (2 / 5) * float(loss.detach()) / size
    own = [grads[0] + pull * (before[0] - target[0]).sign(), grads[1] + pull * (before[1] - target[1]).sign(), grads[2]]
    lr = 0.1 * 0.5 * (1 + math.cos(math.pi * 2 / 15))
    for parameter, start, grad in zip((toy.down, toy.up, toy.bias), before, own, strict=True):
        first, second = 0.1 * grad, 0.001 * grad.square()  # Adam's moments after one step
        step = (first / (1 - 0.9)) / ((second / (1 - 0.999)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.detach(), start * (1 - lr * 0.2) - lr * step)


def test_the_penalty_is_absent_without_strength_but_the_search_goes_on() -> None:
    toy = Toy(dropout=0.0)
    method, plain = treelora_of(toy, reg=0.0), Toy(dropout=0.0)
    searched = method.bandit.step_count
    trainer_of(toy, method).run(lambda *_: None)
    trainer_of(plain).run(lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(toy), parameters_of(plain), strict=True))
    assert method.bandit.step_count == searched + 3 * STEPS


def test_a_strong_pull_ends_at_the_selected_adapter() -> None:
    toy = Toy(dropout=0.0)
    method = treelora_of(toy, reg=1e4)
    trainer_of(toy, method, epochs=60, weight_decay=0.0, lr=0.1).run(lambda *_: None)
    assert method.found().nearest == 1
    target = method._target(1, 0, torch.device("cpu"))
    assert float((toy.down.detach() - target[0]).abs().max()) < 0.2
    assert float((toy.up.detach() - target[1]).abs().max()) < 0.2


def test_the_proximal_update_leaves_entries_exactly_at_the_target() -> None:
    toy = Toy(dropout=0.0)
    method = treelora_of(toy, reg=20.0, update="prox")
    trainer_of(toy, method, epochs=40, weight_decay=0.0).run(lambda *_: None)
    target = method._target(method.found().nearest, 0, torch.device("cpu"))
    assert int((toy.down == target[0]).sum() + (toy.up == target[1]).sum()) > 0


def test_learning_rate_falls_as_a_cosine_to_zero() -> None:
    method = Plain()
    report = trainer_of(Toy(), method).run(lambda *_: None)
    rates = [view.lr for view in method.views]
    assert rates == pytest.approx([0.025 * (1 + math.cos(math.pi * step / 15)) for step in range(15)])
    assert [view.step for view in method.views] == list(range(15))
    assert report.steps == 15
    assert report.last_loss is not None and report.last_loss > 0


def test_no_epochs_change_nothing() -> None:
    toy = Toy()
    before = parameters_of(toy)
    report = trainer_of(toy, epochs=0).run(lambda *_: None)
    assert (report.steps, report.last_loss) == (0, None)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(toy), strict=True))


# -- checkpoints ------------------------------------------------------------------------------------------


def test_a_checkpoint_after_each_epoch_but_the_last() -> None:
    saved: Checkpoints = {}
    trainer_of(Toy()).run(saved.__setitem__)
    assert list(saved) == [STEPS, 2 * STEPS]


@pytest.mark.parametrize("ahead", [1, 4, 32])
def test_a_search_that_runs_ahead_selects_what_one_step_by_step_does(
    ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(treelora, "_AHEAD", ahead)
    method, alone = treelora_of(Toy()), treelora_of(Toy())
    searched = alone.bandit.step_count
    slot = [(nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4, 2)))]
    for step in range(10):
        assert method.state()[1]["step_count"] == searched + step // ahead * ahead, "the state where it went ahead"
        view = StepView(step, 10, 5, 0.1, slot)
        method.penalty(view, torch.ones(()))
        expected = alone.bandit.step(alone.past.queries[step % 4])
        for _ in range(2):
            assert np.array_equal(method.selected(method.bandit, view), expected), "however often it is asked"
    assert method.state()[1] == alone.state()[1]
    for name, array in alone.state()[0].items():
        assert np.array_equal(method.state()[0][name], array), name


@pytest.mark.parametrize("stop_after", range(1, 15))
@pytest.mark.parametrize("protect", [0, 4, 32])
def test_resuming_after_any_step_is_bit_identical(
    stop_after: int, protect: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``protect`` is the number of steps that the search runs ahead, 0 for no protection."""
    monkeypatch.setattr(treelora, "_AHEAD", protect)
    whole = Toy()
    whole_method = treelora_of(whole) if protect else Plain()
    trainer_of(whole, whole_method).run(lambda *_: None)

    part = Toy()
    part_method = treelora_of(part) if protect else Plain()
    saved: Checkpoints = {}
    original = part.loss

    def loss(rows: Tensor) -> Tensor:
        found = original(rows)
        if part.seen == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return found

    part.loss = loss  # type: ignore[method-assign]
    with pytest.raises(Interrupted, match=rf"^Interrupted after step {stop_after} of 15; nothing was committed\."):
        trainer_of(part, part_method).run(saved.__setitem__)
    arrays, facts = part_method.state()
    copied = {key: np.array(value) for key, value in arrays.items()}

    rest = Toy()
    rest_method = treelora_of(rest) if protect else Plain()
    rest_method.load_state(copied, facts)
    trainer = trainer_of(rest, rest_method)
    trainer.load(stop_after, {key: value.clone() for key, value in saved[stop_after].items()})
    torch.randn(7)  # nothing may depend on the global generator
    assert trainer.run(lambda *_: None).steps == 15
    assert all(torch.equal(a, b) for a, b in zip(parameters_of(rest), parameters_of(whole), strict=True))
    (arrays, facts), (expected, expected_facts) = rest_method.state(), whole_method.state()
    assert facts == expected_facts
    assert all(np.array_equal(array, arrays[name]) for name, array in expected.items())


# -- trouble ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_naming_the_learning_rate(bad: float) -> None:
    saved: Checkpoints = {}
    line = r"^Training diverged: the loss is not finite by step 5; nothing was committed\. Retry with a smaller --lr"
    with pytest.raises(TreeLoraError, match=line + r" than 0\.05\.$"):
        trainer_of(Toy(bad)).run(saved.__setitem__)
    assert saved == {}, "a diverged state is not kept for resuming"


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_names_step_and_smaller_batch(error: Exception) -> None:
    line = (
        r"^Out of memory at step 3; nothing was committed\. Retry with --batch-size 2"
        r" --set train\.accumulate=2 --lr 0\.\d+, the same steps, or --grad-checkpointing\.$"
    )
    with pytest.raises(ResourceError, match=line):
        trainer_of(Toy(error)).run(lambda *_: None)


def test_other_errors_pass_through_and_give_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError, match="by hand"):
        trainer_of(Toy(ZeroDivisionError("by hand"))).run(lambda *_: None)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_ctrl_c_interrupts_at_once() -> None:
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_session_without_gradient_for_a_parameter_still_trains() -> None:
    toy = Toy(dropout=0.0)
    toy.parameters = lambda: [toy.bias, nn.Parameter(torch.ones(2))]  # type: ignore[method-assign]
    assert trainer_of(toy).run(lambda *_: None).steps == 15
