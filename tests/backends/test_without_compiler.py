"""What stands for torch's compiler while timm is imported: used in every form, and called, it changes nothing."""

from __future__ import annotations

from conftest import run_python
from treelora_backends.without_compiler import _marked_later


@_marked_later
def plain(value: int) -> int:
    """Add one."""
    return value + 1


@_marked_later(recursive=False, reason="none")
def with_settings(value: int) -> int:
    """Add two."""
    return value + 2


def test_a_function_that_is_not_to_be_compiled_is_called_as_it_is() -> None:
    assert (plain(1), with_settings(1)) == (2, 3)
    assert (plain.__name__, with_settings.__doc__) == ("plain", "Add two.")


_LATER = """
import sys
from treelora_backends.without_compiler import import_timm
import_timm()
import timm, torch, torchvision
for name in ("torchvision.models", "torch._dynamo"):
    assert name not in sys.modules, name
assert torchvision.models.resnet18.__name__ == "resnet18"
assert torchvision.models is sys.modules["torchvision.models"]
from timm.layers import get_graph_node_names
assert get_graph_node_names(torch.nn.Sequential(torch.nn.ReLU()))[0] == ["input", "0"]
"""


def test_models_of_others_are_imported_when_they_are_used() -> None:
    done = run_python(_LATER)
    assert done.code == 0, done.err


_TRANSFORMERS = """
import sys
import treelora_backends.causal_lm
import transformers.image_utils
assert "torchvision" in sys.modules
for name in ("torchvision.models", "torch._dynamo"):
    assert name not in sys.modules, name
"""


def test_transformers_takes_torchvision_without_the_compiler() -> None:
    done = run_python(_TRANSFORMERS)
    assert done.code == 0, done.err
