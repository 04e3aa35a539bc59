"""A disk that forgets what was not flushed: what a directory may hold after the power is cut at any instant.

The model is the least that POSIX promises. A file's content is on the disk once the file was flushed, else it is
empty. A directory's entries are on the disk as they were when the directory was flushed; of the changes since then any
number may have reached it, and two directories do so independently, so that a rename may be half done.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Entries = dict[str, tuple[str, int]]
"""Names in a directory: ("file" or "folder", identity)."""
_OPERATIONS = ("replace", "link", "unlink", "mkdir", "rmdir", "fsync", "open")


class Disk:
    """Watches one directory tree; everything in it is on the disk to begin with."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._numbers = itertools.count()
        self._files: dict[int, int] = {}  # inode -> identity; inodes are used again, identities are not
        self._folders: dict[Path, int] = {}
        self.contents: dict[int, bytes] = {}  # flushed content by identity
        self.seen: dict[int, list[Entries]] = {}  # entries by folder since it was flushed, the flushed ones first
        self.operations = 0
        for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
            self._folders[folder] = next(self._numbers)
        for path in root.rglob("*"):
            if path.is_file():
                identity = self._files.setdefault(path.stat().st_ino, next(self._numbers))
                self.contents[identity] = path.read_bytes()
        for folder, identity in self._folders.items():
            self.seen[identity] = [self._entries(folder)]

    def _entries(self, folder: Path) -> Entries:
        found: Entries = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    found[entry.name] = "folder", self._folders[Path(entry.path)]
                else:
                    inode = entry.stat(follow_symlinks=False).st_ino
                    found[entry.name] = "file", self._files.setdefault(inode, next(self._numbers))
        return found

    @contextmanager
    def watched(self, after: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Record every operation; ``after`` is called when one is done."""
        originals = {name: getattr(os, name) for name in _OPERATIONS}

        def wrapped(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                result = originals[name](*arguments, **keywords)
                if self._note(name, arguments, result):
                    self.operations += 1
                    with pytest.MonkeyPatch.context() as inner:
                        for other, original in originals.items():
                            inner.setattr(os, other, original)
                        after()
                return result

            return call

        with pytest.MonkeyPatch.context() as patch:
            for name in _OPERATIONS:
                patch.setattr(os, name, wrapped(name))
            yield

    def _note(self, name: str, arguments: tuple[Any, ...], result: Any) -> bool:
        if name == "fsync":
            return self._flush(arguments[0])
        path = Path(arguments[0])
        if name == "open":
            if not arguments[1] & os.O_CREAT or self.root not in path.parents:
                return False
            self._files[os.fstat(result).st_ino] = next(self._numbers)
        elif self.root not in path.parents:
            return False
        elif name == "mkdir":
            identity = self._folders[path] = next(self._numbers)
            self.seen[identity] = [{}]
        for folder in {Path(one).parent for one in arguments[:2] if isinstance(one, str | os.PathLike)}:
            if folder in self._folders and folder.is_dir():
                self.seen[self._folders[folder]].append(self._entries(folder))
        return True

    def _flush(self, descriptor: int) -> bool:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path != self.root and self.root not in path.parents:
            return False
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            self.seen[self._folders[path]] = [self._entries(path)]
        else:
            self.contents[self._files[os.fstat(descriptor).st_ino]] = path.read_bytes()
        return True

    def image(self, target: Path, choose: Callable[[list[Entries]], Entries]) -> Path:
        """Write to ``target`` what the disk may hold now; ``choose`` picks among a folder's possible entries."""
        shutil.rmtree(target, ignore_errors=True)
        self._write(target, self._folders[self.root], choose)
        return target

    def _write(self, target: Path, folder: int, choose: Callable[[list[Entries]], Entries]) -> None:
        target.mkdir()
        for name, (kind, identity) in choose(self.seen[folder]).items():
            if kind == "folder":
                self._write(target / name, identity, choose)
            else:
                (target / name).write_bytes(self.contents.get(identity, b""))


def choices(seed: int) -> list[Callable[[list[Entries]], Entries]]:
    """The least that may be on the disk, the most, and two mixtures."""
    generator = random.Random(seed)
    return [lambda seen: seen[0], lambda seen: seen[-1], generator.choice, generator.choice]
