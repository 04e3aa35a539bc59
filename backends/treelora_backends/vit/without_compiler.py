"""Import timm without torch's compiler, a second of imports that nothing here uses.

Two things ask for it: one of torchvision's operations, which no transformer has, asks whether it works on this machine,
and timm marks functions of one model, which are not to be compiled. Both are answered when they are used.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch  # first, since its own import may need the compiler's module as it is

_QUESTIONS = "torch._dynamo.utils"
"""The module that torchvision imports one function of."""


def import_timm() -> None:
    """Import timm; as usual where the compiler is imported already."""
    if "timm" in sys.modules or "_dynamo" in vars(torch):
        return
    with _compiler_later():
        importlib.import_module("timm")


@contextmanager
def _compiler_later() -> Iterator[None]:
    compiler: Any = torch.compiler
    mark = compiler.disable
    sys.modules[_QUESTIONS] = _Questions(_QUESTIONS)
    compiler.disable = _marked_later
    try:
        yield
    finally:
        compiler.disable = mark
        sys.modules.pop(_QUESTIONS, None)


class _Questions(ModuleType):
    """Stands for the compiler's module."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        """Ask the compiler."""
        return importlib.import_module(_QUESTIONS).is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        """Import the compiler at once, for whatever else another torchvision wants of it."""
        if name.startswith("__"):  # who looks through all modules for files asks for these
            raise AttributeError(name)
        sys.modules.pop(_QUESTIONS, None)
        return getattr(importlib.import_module(_QUESTIONS), name)


def _marked_later(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """Return a function that is not to be compiled, marked when a compiler meets it; as ``torch.compiler.disable``."""
    if function is None:
        return functools.partial(_marked_later, **settings)
    marked = function

    @functools.wraps(marked)
    def called(*arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(marked, **settings)(*arguments, **named)
        return marked(*arguments, **named)

    return called
