"""Import timm and torchvision without torch's compiler and torchvision's models, seconds that nothing here uses.

Two things ask for the compiler: one of torchvision's operations, which no transformer has, asks whether it works on
this machine, and timm marks functions of one model, which are not to be compiled. torchvision itself asks for its
models, and timm for how features are taken from models of others. All are answered when they are used.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch  # first, since its own import may need the compiler's module as it is

_QUESTIONS = "torch._dynamo.utils"
"""The module that torchvision imports one function of."""
_MODELS = "torchvision.models"
_EXTRACTION = f"{_MODELS}.feature_extraction"


def import_timm() -> None:
    """Import timm; as usual where the compiler is imported already."""
    if "timm" in sys.modules or "_dynamo" in vars(torch):
        return
    with _compiler_later():
        importlib.import_module("timm")


def import_torchvision() -> None:
    """Import torchvision, which transformers asks for when it is there; as usual where the compiler is imported."""
    if "torchvision" in sys.modules or "_dynamo" in vars(torch):
        return
    with _compiler_later(), suppress(ImportError):
        importlib.import_module("torchvision")


@contextmanager
def _compiler_later() -> Iterator[None]:
    compiler: Any = torch.compiler
    mark = compiler.disable
    stands: list[ModuleType] = [_Questions(_QUESTIONS)]
    if "torchvision" not in sys.modules:
        stands += [_Later(_MODELS), _Extraction(_EXTRACTION)]
    sys.modules.update({stand.__name__: stand for stand in stands})
    compiler.disable = _marked_later
    try:
        yield
    finally:
        compiler.disable = mark
        for stand in stands:
            if sys.modules.get(stand.__name__) is stand:
                del sys.modules[stand.__name__]


class _Later(ModuleType):
    """Stands for a module until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        """Import the module."""
        if name.startswith("__"):  # who looks through all modules for files asks for these
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Extraction(_Later):
    """Stands for torchvision's way to take features from a model, whose functions timm wraps when it is imported."""

    @staticmethod
    def create_feature_extractor(*arguments: Any, **named: Any) -> Any:
        """Call the module's own."""
        return importlib.import_module(_EXTRACTION).create_feature_extractor(*arguments, **named)

    @staticmethod
    def get_graph_node_names(*arguments: Any, **named: Any) -> Any:
        """Call the module's own."""
        return importlib.import_module(_EXTRACTION).get_graph_node_names(*arguments, **named)


class _Questions(_Later):
    """Stands for the compiler's module, and is it for whatever else another torchvision wants of it."""

    @staticmethod
    def is_compile_supported(device_type: Any) -> Any:
        """Ask the compiler."""
        return importlib.import_module(_QUESTIONS).is_compile_supported(device_type)


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
