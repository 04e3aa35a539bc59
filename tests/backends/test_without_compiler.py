"""What stands for torch's compiler while timm is imported: used in every form, and called, it changes nothing."""

from __future__ import annotations

from treelora_backends.vit.without_compiler import _marked_later


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
