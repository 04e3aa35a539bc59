"""The part of ``treelora doctor`` that examines a backend."""

from __future__ import annotations

import tempfile
from pathlib import Path

from treelora_cli.commands.context import Session
from treelora_cli.errors import CheckError


def check_backend(
    session: Session, name: str, data: Path | None, settings: list[str] | None, device: str | None
) -> None:
    """Examine a backend and show every check.

    Raises:
        CheckError: It does not meet the contract.
    """
    from treelora_cli.backend.conformance import Examination
    from treelora_cli.backend.registry import load_backend
    from treelora_cli.config.by_name import parse_set
    from treelora_cli.learning.opening import load_base

    backend, runtime, flags = load_backend(name), session.runtime(device), parse_set(settings)
    with tempfile.TemporaryDirectory() as scratch:
        findings = Examination(
            name, backend, flags, data, lambda config: load_base(backend, config, runtime), runtime, Path(scratch)
        ).run()
    unmet = [one for one in findings if one.problem is not None]
    lines = [f"{'ok  ' if one.problem is None else 'NOT '} {one.check}{_why(one.problem)}" for one in findings]
    if data is None and not unmet:
        lines.append("Learning, answers and exports were not checked: pass --data DATA.")
    document = {"backend": name, "checks": [vars(one) for one in findings], "met": not unmet}
    session.output.result(document, *lines)
    if unmet:
        raise CheckError(
            f"Backend '{name}' does not meet the contract in {len(unmet)} of {len(findings)} checks."
            f" First: {unmet[0].check}: {unmet[0].problem}"
        )


def _why(problem: str | None) -> str:
    return "" if problem is None else f": {problem}"
