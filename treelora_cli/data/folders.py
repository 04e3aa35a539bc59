"""Folders, looked through once: the files of the wanted kind in them, and what was passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from treelora_cli.errors import DataError

_TOOLS_FOLDERS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "lost+found", "system volume information"}
_TOOLS_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"}
_SHOWN = 6
_DEEPEST = 40


@dataclass(frozen=True)
class Folder:
    """A folder and what it holds of the wanted kind.

    Attributes:
        path: The folder.
        files: Wanted files directly in it, sorted.
        inner: Folders in it that hold any, sorted.
    """

    path: Path
    files: tuple[Path, ...]
    inner: tuple[Folder, ...]

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    def all_files(self) -> list[Path]:
        """Return all wanted files in it and below."""
        return [*self.files, *(file for folder in self.inner for file in folder.all_files())]


@dataclass
class Passed:
    """What was passed over, for the user.

    Attributes:
        others: Files of another kind, counted by ending.
        tools: Files and folders that tools leave behind.
        empty: Folders that hold nothing wanted.
        links: Links to a file or folder beside them, and what they lead to.
        notes: Further lines.
    """

    others: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    empty: list[Path] = field(default_factory=list)
    links: list[tuple[Path, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self, root: Path, kind: str) -> list[str]:
        """Return what to tell; ``kind`` names the wanted files."""
        lines = list(self.notes)
        if self.others:
            named = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in self.others.most_common(5))
            lines.append(f"{self.others.total()} files in {root} are not {kind} and were left out ({named}).")
        if self.empty:
            named = ", ".join(str(path.relative_to(root)) for path in self.empty[:_SHOWN])
            lines.append(f"{len(self.empty)} folders without {kind} were passed over: {named}.")
        if self.links:
            named = ", ".join(f"{path.relative_to(root)} to {target}" for path, target in self.links[:_SHOWN])
            lines.append(f"{len(self.links)} links to what lies beside them were passed over ({named}).")
        if self.tools:
            lines.append(f"{self.tools} files and folders that tools left behind were passed over.")
        return lines


def scan(root: Path, wanted: Callable[[Path], bool], passed: Passed) -> Folder:
    """Look through a folder once; links are followed, but not in circles."""
    return _scan(root, wanted, passed, frozenset())


def _scan(path: Path, wanted: Callable[[Path], bool], passed: Passed, above: frozenset[str]) -> Folder:
    files: list[Path] = []
    inner: list[Folder] = []
    real = os.path.realpath(path)
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    repeated = _repeated(entries)
    for entry in entries:
        if _of_tools(entry):
            passed.tools += 1
        elif entry in repeated:
            passed.links.append((entry, repeated[entry]))
        elif entry.is_dir():
            if os.path.realpath(entry) in above | {real} or len(above) >= _DEEPEST:
                continue
            folder = _scan(entry, wanted, passed, above | {real})
            if folder.files or folder.inner:
                inner.append(folder)
            else:
                passed.empty.append(entry)
        elif entry.is_file() or not entry.exists():  # a link that leads nowhere is an unreadable file
            if wanted(entry):
                files.append(entry)
            elif not entry.exists() and not entry.suffix:
                raise DataError(
                    f"{entry} leads to {os.readlink(entry)}, which is not there. Mend the link or remove it."
                )
            else:
                passed.others[entry.suffix.lower()] += 1
    return Folder(path, tuple(files), tuple(inner))


def _repeated(entries: Sequence[Path]) -> dict[Path, str]:
    """Return the links among neighbours that lead to another one, which would count twice, and that one's name."""
    links = [entry for entry in entries if entry.is_symlink()]
    if not links:
        return {}
    home, linked = os.path.realpath(links[0].parent), set(links)
    leads = {entry: os.path.realpath(entry) for entry in links}
    first = {leads[entry]: entry for entry in reversed(links)}
    first |= {os.path.join(home, entry.name): entry for entry in entries if entry not in linked}
    kept = {entry: first[leads[entry]] for entry in links}
    return {entry: one.name for entry, one in kept.items() if one != entry and not _of_tools(one)}


def _of_tools(entry: Path) -> bool:
    name = entry.name.lower()
    return name.startswith(".") or name in _TOOLS_FOLDERS or name in _TOOLS_FILES
