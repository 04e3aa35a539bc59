"""Trained blocks that torch compiles: losses and gradients are the plain ones; what does not go together is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accumulation import BATCH, of_contender, of_project, texts, with_a_classifier
from test_vit_prompts import load
from tiny_lm import assert_same, gradients, opened, tiny_models
from torch import Tensor, nn
from treelora_backends import compiled as module
from treelora_backends.causal_lm.batches import width_for
from treelora_backends.causal_lm.contenders import PlainLmSession
from treelora_backends.compiled import Compilation, Compiled
from treelora_backends.vit.contenders.prompts import PromptSession

from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compile without building kernels, which takes a compiler and minutes; holds the calls of each graph."""
    calls: list[int] = []

    def compiler(graph: Any, _inputs: Any) -> Any:
        place = len(calls)
        calls.append(0)

        def run(*inputs: Any) -> Any:
            calls[place] += 1
            return graph(*inputs)

        return run

    monkeypatch.setattr(module, "_COMPILER", compiler)
    torch.compiler.reset()
    yield calls
    torch.compiler.reset()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tiny_models(tmp_path_factory.mktemp("compiled"))["llama"]
    return found


def image_gradients(weights: Path, opened_as: Any, mode: str) -> list[Tensor]:
    session, trained = with_a_classifier(weights, opened_as, batch_size=13, compile=mode)
    loss = session.loss(BATCH)
    again = session.loss(BATCH)
    assert torch.equal(loss, again)
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("opened_as", [of_project, of_contender])
def test_compiled_images_have_the_plain_loss_and_gradients(weights: Path, opened_as: Any, graphs: list[int]) -> None:
    plain = image_gradients(weights, opened_as, "none")
    assert graphs == [], "nothing is compiled unless asked for"
    assert_same(image_gradients(weights, opened_as, "default"), plain)
    assert sum(graphs) >= 2 and min(graphs) >= 1


def text_gradients(model: Path, request: DataRequest, kind: str, mode: str) -> list[Tensor]:
    base = opened(model)
    config = replace(base.config, train=replace(base.config.train, batch_size=6, compile=mode, prompt_tail=0))
    task = base.read_task(request)
    plain = kind == "contender"
    session = PlainLmSession(base, [task], config, 0) if plain else base.session(task, Memory((), dict), config)
    session.prepare()
    base.network.train()
    loss = session.loss([0, 3, 5, 8, 10, 11])
    with torch.no_grad():
        base.lm.loss(session._collated([0])) if not plain else None  # outside of steps nothing is compiled
    return [loss.detach(), *gradients(base, loss)]


@pytest.mark.parametrize("kind", ["project", "contender"])
def test_compiled_texts_have_the_plain_loss_and_gradients(
    llama: Path, tmp_path: Path, kind: str, graphs: list[int]
) -> None:
    request = texts(tmp_path)
    plain = text_gradients(llama, request, kind, "none")
    assert graphs == []
    assert_same(text_gradients(llama, request, kind, "default"), plain)
    assert graphs, "blocks were compiled"
    assert all(calls >= 1 for calls in graphs)


def test_more_shapes_are_compiled_than_torch_takes_by_itself(graphs: list[int]) -> None:
    layer = nn.Linear(4, 4)
    made = Compiled([layer], "default")
    for rows in range(1, 13):
        given = torch.randn(rows, 4)
        with made.used():
            found = layer(given)
        torch.testing.assert_close(found, layer(given))
    assert graphs == [1] * 12


def test_a_batch_that_is_compiled_has_one_of_a_few_widths(llama: Path, tmp_path: Path) -> None:
    base = opened(llama)
    config = replace(base.config, train=replace(base.config.train, batch_size=2, compile="default"))
    session = base.session(base.read_task(texts(tmp_path)), Memory((), dict), config)
    widths = {session._collated(places).batch.ids.shape[1] for places in session.batches(0)}
    assert all(width % 16 == 0 for width in widths)
    assert session.tail == 0
    assert {width_for(longest, CPU, 4096, few=True) for longest in range(513, 1025)} == set(range(576, 1025, 64))
    assert len({width_for(longest, CPU, 4096) for longest in range(513, 1025)}) == 512


def test_what_does_not_go_together_is_said(llama: Path, weights: Path, tmp_path: Path) -> None:
    base = opened(llama)
    task = base.read_task(texts(tmp_path))
    for changes, said in (
        ({"prompt_tail": 4}, r"train\.compile does not go with train\.prompt_tail 4"),
        ({"grad_checkpointing": True}, r"train\.compile default does not go with --grad-checkpointing"),
    ):
        train = replace(base.config.train, compile="default", **changes)
        with pytest.raises(UsageError, match=said):
            base.session(task, Memory((), dict), replace(base.config, train=train))
    vit, config = load(weights, compile="default")
    with pytest.raises(UsageError, match="prompts are trained as they are"):
        PromptSession(of_contender(vit, config), None)  # type: ignore[arg-type]


def test_a_compiler_that_fails_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nwas found")

    monkeypatch.setattr(module, "_COMPILER", broken)
    layer = nn.Linear(3, 3)
    asked = Compilation("default", lambda: [layer])
    with asked.used(), pytest.raises(UsageError, match=r"cannot compile here \(.*no working C\+\+ compiler.*Leave it"):
        layer(torch.zeros(1, 3))
    torch.compiler.reset()


def test_a_backward_pass_that_cannot_be_compiled_is_said_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def broken(_graph: Any, _inputs: Any) -> Any:
        raise RuntimeError("no kernel for a gradient")

    whole = aot_autograd(fw_compiler=lambda graph, _inputs: make_boxed_func(graph.forward), bw_compiler=broken)
    monkeypatch.setattr(module, "_COMPILER", whole)
    layer = nn.Linear(3, 3)
    with Compilation("default", lambda: [layer]).used(), pytest.raises(UsageError, match="no kernel for a gradient"):
        layer(torch.zeros(1, 3)).sum().backward()
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_with_torchs_own_kernels_losses_and_gradients_are_the_plain_ones(
    llama: Path, weights: Path, tmp_path: Path, mode: str
) -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except RuntimeError:
        pytest.skip("there is no C++ compiler here")
    torch.compiler.reset()
    assert_same(image_gradients(weights, of_project, mode), image_gradients(weights, of_project, "none"))
    plain, own = (text_gradients(llama, texts(tmp_path), "project", one) for one in ("none", mode))
    assert_same(own, plain)
    torch.compiler.reset()
