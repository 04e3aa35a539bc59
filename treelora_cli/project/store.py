"""Verified files behind fixed names.

``state.json`` records the SHA-256 of every file. A commit first writes new contents into
``.treelora/objects/<sha256>``, then replaces ``state.json`` (the commit point), then moves each object to
its fixed name and the content it replaces into ``objects``. A reader that finds another content under a
fixed name looks in ``objects``; so at every instant the state it holds can be read whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import DamagedError, ProjectError, ResourceError

_COMPONENT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
_ATTEMPTS = 5
_ASIDE = ".treelora-new-"
"""Prefix of files not yet renamed to their place."""


@dataclass(frozen=True)
class FileRecord:
    """Content of one file: SHA-256 in hex, and size in bytes."""

    sha256: str
    size: int


def record_of(data: bytes) -> FileRecord:
    """Return the record of a content."""
    return FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def check_inner_name(name: str) -> str:
    """Return ``name`` when it is a plain relative path inside a project, else raise ``DamagedError``."""
    if not all(_COMPONENT.fullmatch(part) for part in name.split("/")):
        raise DamagedError(f"state.json: file name {name!r} is not allowed. Run treelora doctor.")
    return name


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` aside, flush it to the disk and rename it to ``path``.

    Raises:
        ResourceError: The disk or the quota is full; nothing is left behind.
        ProjectError: The directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_aside(path, data)
        sync_directory(path.parent)
    except OSError as error:
        raise _as_user_error(error, path) from error


def _write_aside(path: Path, data: bytes) -> None:
    descriptor, aside = tempfile.mkstemp(prefix=_ASIDE, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        os.replace(aside, path)
    except BaseException:
        # whatever ends the write, also Ctrl-C, must not leave the temporary file
        Path(aside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


def _as_user_error(error: OSError, path: Path) -> ProjectError | ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"Disk full while writing {path.name}; nothing was committed. Free space and retry.")
    return ProjectError(f"{path} cannot be written: {error.strerror or error}.")


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """The files of one project directory, by name relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = root / ".treelora" / "objects"

    def put(self, data: bytes) -> FileRecord:
        """Write a content into ``objects`` (a no-op when it is there) and return its record."""
        record = record_of(data)
        target = self.objects / record.sha256
        if not (target.exists() and target.stat().st_size == record.size):
            write_file(target, data)
        return record

    def read(self, name: str, record: FileRecord) -> bytes:
        """Return the recorded content of a file.

        Raises:
            DamagedError: Neither the file nor ``objects`` holds that content.
        """
        check_inner_name(name)
        problem = "is missing"
        for _ in range(_ATTEMPTS):  # a commit may be moving the file this moment
            for path in (self.root / name, self.objects / record.sha256):
                data = _read_plain(path, record.size)
                if data is None:
                    continue
                if record_of(data) == record:
                    return data
                problem = "hash mismatch"
        separator = ": " if problem == "hash mismatch" else " "
        raise DamagedError(f"{name}{separator}{problem}. Run treelora doctor.")

    def publish(self, new: dict[str, FileRecord], old: dict[str, FileRecord]) -> None:
        """Move contents to their fixed names; what they replace, or what is gone, moves to ``objects``."""
        for name, record in old.items():
            if new.get(name) != record:
                self._retire(name, record)
        uses = Counter(new.values())
        for name, record in new.items():
            source = self.objects / record.sha256
            if old.get(name) == record and (self.root / name).exists():
                continue
            target = self.root / name
            if source.exists() and not _holds(target, record):
                target.parent.mkdir(parents=True, exist_ok=True)
                if uses[record] > 1:
                    write_file(target, source.read_bytes())
                else:
                    os.replace(source, target)
        for name in set(old) - set(new):
            self._drop_empty_parents((self.root / name).parent)

    def _retire(self, name: str, record: FileRecord) -> None:
        current = self.root / name
        if current.is_symlink() or not current.is_file() or current.stat().st_size != record.size:
            return
        self.objects.mkdir(parents=True, exist_ok=True)
        os.replace(current, self.objects / record.sha256)

    def _drop_empty_parents(self, directory: Path) -> None:
        while directory != self.root and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
            directory = directory.parent

    def collect_garbage(self, keep: Iterable[FileRecord]) -> None:
        """Delete objects that no kept state refers to."""
        wanted = {record.sha256 for record in keep}
        if not self.objects.is_dir():
            return
        for path in self.objects.iterdir():
            if path.name not in wanted:
                path.unlink(missing_ok=True)

    def sweep(self, names: Iterable[str]) -> None:
        """Delete temporary files that a process killed while writing left beside the named files."""
        for directory in {(self.root / name).parent for name in names}:
            for path in directory.glob(f"{_ASIDE}*"):
                path.unlink(missing_ok=True)


def _holds(path: Path, record: FileRecord) -> bool:
    try:
        data = _read_plain(path, record.size)
    except ProjectError:
        return False  # writing it again is always right
    return data is not None and record_of(data) == record


def _read_plain(path: Path, size: int) -> bytes | None:
    """Return the bytes of a regular file of the recorded size, ``None`` when there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP:
            return b""  # a symbolic link never holds the recorded content
        raise ProjectError(f"{path} cannot be read: {error.strerror}.") from error
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size != size:
            return b""
        return file.read()
