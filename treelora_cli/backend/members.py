"""Whether what a backend returns has the members that the contract names, and is what was asked for."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import BackendError

if TYPE_CHECKING:
    from treelora_cli.backend.contract import TaskData
    from treelora_cli.backend.values import DataRequest


def missing_members(thing: object, protocol: type[Any], without: tuple[str, ...] = ()) -> list[str]:
    """Return what ``thing`` lacks of ``protocol`` but for ``without``, as ``finish()`` or ``session(task, memory)``."""
    wanted = {name: value for name, value in vars(protocol).items() if not name.startswith("_")}
    wanted |= dict.fromkeys(protocol.__annotations__)
    found = []
    for name, member in wanted.items():
        if name in without:
            continue
        if not inspect.isfunction(member):
            found += [] if hasattr(thing, name) else [name]
        elif not _takes(getattr(thing, name, None), member):
            found.append(f"{name}({', '.join(list(inspect.signature(member).parameters)[1:])})")
    return found


def _takes(method: object, model: Any) -> bool:
    """Tell whether ``method`` can be called as the contract calls ``model``."""
    if not callable(method):
        return False
    parameters = list(inspect.signature(model).parameters.values())[1:]
    positional = [one for one in parameters if one.kind is not one.KEYWORD_ONLY]
    named = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    try:
        inspect.signature(method).bind(*positional, **dict.fromkeys(named))
    except (TypeError, ValueError):
        return False
    return True


def require(thing: object, protocol: type[Any], backend: str, without: tuple[str, ...] = ()) -> None:
    """Raise ``BackendError`` when ``thing``, which ``backend`` returned, lacks a member of ``protocol``."""
    lacking = missing_members(thing, protocol, without)
    if lacking:
        raise BackendError(
            f"Backend '{backend}': its {protocol.__name__} lacks {lacking[0]}."
            f" Check all of it with: treelora doctor --backend {backend} --data DATA"
        )


def check_honoured(request: DataRequest, task: TaskData) -> None:
    """Raise ``BackendError`` when a backend read something else than ``request`` asks for, in silence."""
    ignored = []
    if request.classes is not None and not set(task.labels) <= set(request.classes):
        ignored.append("--classes")
    groups = max(1, len(task.labels))
    for option, limit, size in (
        ("--train-limit", request.train_limit, task.train_size),
        ("--test-limit", request.test_limit, task.test_size),
    ):
        if limit is not None and size > limit * groups:
            ignored.append(option)
    if ignored:
        raise BackendError(f"The backend ignored {' and '.join(ignored)}; nothing was learned. Leave the option out.")
