"""Transformer blocks that run as torch compiles them while a task is trained: fewer, larger kernels.

Each shape of a batch is compiled by itself, which takes seconds, so that it pays where steps are many, shapes few and
launches dear: on a GPU. Off unless ``train.compile`` asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from treelora_backends.standing_in import standing_in
from treelora_cli.errors import UsageError, first_line, is_out_of_memory

_COMPILER = "inductor"
_AS_GRAPHS = "reduce-overhead"
_MOST_GRAPHS = 256
"""Graphs of one kind of block, one for each shape and for whether its input has a gradient; torch stops at 8."""


class Compiled:
    """Modules whose forward passes are compiled.

    Args:
        modules: Each runs by itself, none inside another.
        mode: As ``torch.compile`` names it.
    """

    def __init__(self, modules: Sequence[nn.Module], mode: str) -> None:
        _prepare_compiler()
        self._pairs = [(one, _compiled(one.forward, mode)) for one in modules]

    def used(self) -> AbstractContextManager[None]:
        """Return the context in which the modules run compiled; what is differentiated later may leave it."""
        return standing_in(self._pairs)


def _prepare_compiler() -> None:
    """Let enough graphs be compiled, and backward passes with their forward ones, where a failure is said."""
    import torch._dynamo.config as limits
    import torch._functorch.config as passes

    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # until torch 2.5
    setattr(limits, name, max(getattr(limits, name), _MOST_GRAPHS))
    if hasattr(passes, "force_non_lazy_backward_lowering"):
        passes.force_non_lazy_backward_lowering = True


class Compilation:
    """What ``train.compile`` asks for, carried out when the first step is taken.

    Args:
        setting: A mode of ``torch.compile``, or none.
        modules: Returns the modules that are trained.
        recomputed: True under gradient checkpointing.

    Raises:
        UsageError: Blocks are to be recomputed in the backward pass, outside of every context.
    """

    def __init__(
        self, setting: str | None, modules: Callable[[], Sequence[nn.Module]], *, recomputed: bool | None = False
    ) -> None:
        self.mode = None if setting in (None, "none") else setting
        self._modules = modules
        self._made: Compiled | None = None
        if self.mode is not None and recomputed:
            raise UsageError(f"train.compile {self.mode} does not go with --grad-checkpointing. Leave one out.")

    def used(self) -> AbstractContextManager[None]:
        """Return the context of a step."""
        if self.mode is None:
            return nullcontext()
        if self.mode == _AS_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs of the step before returned may be overwritten
        self._made = self._made or Compiled(self._modules(), self.mode)
        return self._made.used()


def _compiled(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    given = mode if _COMPILER == "inductor" else None  # other compilers know no modes
    made = torch.compile(forward, dynamic=False, backend=_COMPILER, mode=given)

    def run(*inputs: Any, **named: Any) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return made(*inputs, **named)
        except TorchDynamoException as error:
            if is_out_of_memory(error):
                raise
            reason = first_line(getattr(error, "inner_exception", error))
            raise UsageError(
                f"train.compile {mode}: torch cannot compile here ({reason[:200]}). Leave it out."
            ) from error

    return run
