"""Errors meant for the person at the terminal, each with its documented exit code.

Every message is one line: what is wrong, where, and what to do next.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Sequence


class TreeLoraError(Exception):
    """Base of every error a user can cause or mend; ``exit_code`` is the process's."""

    exit_code = 1


class UsageError(TreeLoraError):
    """An option, argument or configuration value that cannot be used."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration or recipe file with an unknown key or a value out of range."""


class ProjectError(TreeLoraError):
    """No project here, or its state is missing, damaged or from another base."""

    exit_code = 3


class DamagedError(ProjectError):
    """A project file that does not match its recorded hash, size or shape."""


class DataError(TreeLoraError):
    """Training or test data that is missing, malformed or of the wrong kind."""

    exit_code = 4


class ModelError(TreeLoraError):
    """A base model that is unknown, not available offline or does not fit."""

    exit_code = 5


class BackendError(TreeLoraError):
    """A model family's code failed on a project that is whole: the fault is the backend's."""

    exit_code = 1


class ResourceError(TreeLoraError):
    """Memory or disk ran out."""

    exit_code = 6


class CheckError(TreeLoraError):
    """A verification or a threshold that was asked for failed."""

    exit_code = 7


class LockedError(TreeLoraError):
    """Another process is writing this project."""

    exit_code = 8


class Interrupted(TreeLoraError):
    """Stopped by the user; what was trained so far can be resumed."""

    exit_code = 130


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on an accelerator or, where torch says so in words only, on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def suggest(value: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name nearest to ``value``, or nothing."""
    near = nearest(value, known)
    return "" if near is None else f" (did you mean '{near}'?)"


def nearest(value: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to ``value``, whatever its case; ``None`` where none is near."""
    names = sorted(known)
    same = next((name for name in names if name.casefold() == value.casefold()), None)
    return same or next(iter(difflib.get_close_matches(value, names, n=1, cutoff=0.6)), None)


def first_line(error: BaseException, otherwise: str = "") -> str:
    """Return the first line of an error's words, or ``otherwise`` where it has none."""
    return (str(error).splitlines() or [otherwise])[0]


SKIP_BAD = " Mend it, or pass --skip-bad."
"""How a line on a bad example ends, where examples can be skipped."""


def skipped(bad: Sequence[str], kind: str) -> str:
    """Return what to tell of bad examples, one line each, that ``--skip-bad`` left out."""
    return f"{len(bad)} bad {kind} were skipped, such as {bad[0].removesuffix(SKIP_BAD)}"


def _errno_of(error: BaseException) -> int | None:
    """Return the system's number of an error, also where a library in Rust wrapped it, as safetensors does."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return None if found is None else int(found[1])


def describe_error(error: BaseException) -> tuple[str, int]:
    """Return the line to show and the exit code."""
    if isinstance(error, TreeLoraError):
        return str(error), error.exit_code
    import typer

    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "Interrupted; nothing was committed.", Interrupted.exit_code
    format_message = getattr(error, "format_message", None)
    if format_message is not None:  # the parser's own usage errors
        context = getattr(error, "ctx", None)
        hint = f" See: {context.command_path} --help" if context is not None else ""
        return f"{format_message()}{hint}", 2
    if is_out_of_memory(error):
        return "Out of memory; nothing was committed. Retry with a smaller --batch-size.", ResourceError.exit_code
    if _errno_of(error) in (errno.ENOSPC, errno.EDQUOT):
        return "Disk full; nothing was committed. Free space and retry.", ResourceError.exit_code
    return f"Unexpected {type(error).__name__}: {first_line(error)}. Run again with --debug and report it.", 1
