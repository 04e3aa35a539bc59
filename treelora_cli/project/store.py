"""Verified files behind fixed names.

``state.json`` records the SHA-256 of every file. A commit first writes new contents into
``.treelora/objects/<sha256>``, then replaces ``state.json`` (the commit point), then links each object to
its fixed name and moves the content it replaces into ``objects``. A reader that finds another content under a
fixed name looks in ``objects``; so at every instant the state it holds can be read whole.

A power cut may lose every directory entry that was not flushed. So a directory that gains a content is flushed
before the one that gives it up: an object stays until the directories of its names have reached the disk, and
whoever finds an object of the current state knows that its publication is not finished.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias

from treelora_cli.errors import DamagedError, ProjectError, ResourceError

_COMPONENT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,80}$")
_ATTEMPTS = 5
_READ_AT_ONCE = 2**20
_ASIDE = ".treelora-new-"
"""Prefix of files not yet renamed to their place."""


@dataclass(frozen=True)
class FileRecord:
    """Content of one file: SHA-256 in hex, and size in bytes."""

    sha256: str
    size: int


Files = Mapping[str, FileRecord]
"""The files of one state, by name."""


Content: TypeAlias = bytes | Sequence[memoryview]
"""What a file is to hold: whole, or as bytes that lie in several places and are too large to be copied together."""


def _parts(content: Content) -> Sequence[bytes | memoryview]:
    return (content,) if isinstance(content, bytes) else content


def record_of(content: Content) -> FileRecord:
    """Return the record of a content."""
    return _record_of_parts(_parts(content))


def _record_of_parts(parts: Iterable[bytes | memoryview]) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        size += len(part)
    return FileRecord(digest.hexdigest(), size)


def check_inner_name(name: str) -> str:
    """Return ``name`` when it is a plain relative path inside a project, else raise ``DamagedError``."""
    if not all(_COMPONENT.fullmatch(part) for part in name.split("/")):
        raise DamagedError(f"state.json: file name {name!r} is not allowed. Run treelora doctor.")
    return name


def write_file(path: Path, data: Content) -> None:
    """Write ``data`` aside, flush it to the disk and rename it to ``path``.

    Raises:
        ResourceError: The disk or the quota is full; nothing is left behind.
        ProjectError: The directory cannot be written.
    """
    try:
        make_directory(path.parent)
        _write_aside(path, data)
        sync_directory(path.parent)
    except OSError as error:
        raise as_user_error(error, path) from error


def make_directory(path: Path) -> None:
    """Make a directory and those above it; the entries that name the new ones are flushed to the disk."""
    missing = [one for one in (path, *path.parents) if not one.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_directory(one.parent)


def _write_aside(path: Path, data: Content) -> None:
    descriptor, aside = tempfile.mkstemp(prefix=_ASIDE, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in _parts(data):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), user_mode())
        os.replace(aside, path)
    except BaseException:
        # whatever ends the write, also Ctrl-C, must not leave the temporary file
        Path(aside).unlink(missing_ok=True)
        raise


def user_mode() -> int:
    """Return the rights that the user's umask leaves a new file."""
    current = os.umask(0o022)
    os.umask(current)
    return 0o666 & ~current


def as_user_error(error: OSError, path: Path) -> ProjectError | ResourceError:
    """Return what to tell the user when ``path`` could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"Disk full while writing {path.name}; nothing was committed. Free space and retry.")
    return ProjectError(f"{path} cannot be written: {error.strerror or error}.")


def refuse_links(root: Path, names: Iterable[str]) -> None:
    """Refuse symbolic links among ``names`` and the directories that lead there: writing would follow them.

    Raises:
        ProjectError: One of them is a link; the message names it.
    """
    parts = {name for full in names for name in (full, *map(str, PurePosixPath(full).parents))} - {"."}
    for name in sorted(parts):
        if (root / name).is_symlink():
            raise ProjectError(f"{root / name} is a symbolic link; nothing outside a project is read or written.")


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

    def put(self, data: Content) -> FileRecord:
        """Write a content into ``objects`` and return its record."""
        record = record_of(data)
        target = self.objects / record.sha256
        if _holds(target, record):
            sync_directory(self.objects)  # whoever wrote it may have died before doing so
        else:
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

    def publish(
        self,
        new: Mapping[str, FileRecord],
        old: Mapping[str, FileRecord],
        kept: Iterable[Mapping[str, FileRecord]] = (),
    ) -> None:
        """Bring contents to their fixed names; what they replace, or what is gone, moves to ``objects``.

        Args:
            new: Files of the current state.
            old: Files of the state whose contents lie under the fixed names.
            kept: Files of other states, some of whose contents may do so because a process died publishing.
        """
        for name, record in old.items():
            if new.get(name) != record:
                self._retire(name, record, replaced=name in new)
        pending = {name: record for name, record in new.items() if (self.objects / record.sha256).exists()}
        absent = {name for name, record in pending.items() if not _holds(self.root / name, record)}
        left = [
            (name, record)
            for files in kept
            for name, record in files.items()
            if (name not in new or name in absent) and new.get(name) != record and _holds(self.root / name, record)
        ]
        for name, record in left:
            self._retire(name, record, replaced=name in new)
        if pending or left or set(old.items()) - set(new.items()):
            make_directory(self.objects)
            sync_directory(self.objects)
        for name in absent:
            self._place(name, pending[name])
        folders = {folder for name in pending for folder in (self.root / name).parents if self._is_inside(folder)}
        for folder in sorted(folders, key=lambda one: -len(one.parts)):
            sync_directory(folder)
        for name in {*old, *(name for name, _ in left)} - set(new):
            self._drop_empty_parents((self.root / name).parent)

    def _is_inside(self, folder: Path) -> bool:
        return folder == self.root or self.root in folder.parents

    def _retire(self, name: str, record: FileRecord, *, replaced: bool) -> None:
        current, kept = self.root / name, self.objects / record.sha256
        if current.is_symlink() or not current.is_file() or current.stat().st_size != record.size:
            return
        if not _holds(kept, record):
            make_directory(self.objects)
            os.replace(current, kept)
        elif not replaced:
            current.unlink()

    def _place(self, name: str, record: FileRecord) -> None:
        source, target = self.objects / record.sha256, self.root / name
        make_directory(target.parent)
        aside = target.parent / f"{_ASIDE}{record.sha256[:16]}"
        try:
            aside.unlink(missing_ok=True)
            os.link(source, aside)
        except OSError:  # a file system without hard links
            write_file(target, source.read_bytes())
            return
        try:
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def _drop_empty_parents(self, directory: Path) -> None:
        while directory != self.root and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
            directory = directory.parent

    def needed(self, published: Files, kept: Iterable[Files]) -> set[str]:
        """Return the names of the objects that other states than the current one need.

        Args:
            published: Files of the current state, all at their fixed names.
            kept: Files of each other state.
        """
        return {record.sha256 for files in kept for name, record in files.items() if published.get(name) != record}

    def keep_only(self, names: set[str]) -> None:
        """Delete every other object."""
        for path in self._objects():
            if path.name not in names:
                path.unlink(missing_ok=True)

    def _objects(self) -> list[Path]:
        return list(self.objects.iterdir()) if self.objects.is_dir() else []

    def object_bytes(self, names: set[str]) -> int:
        """Return the bytes of the named objects."""
        return sum(path.stat().st_size for path in self._objects() if path.name in names)

    def sweep(self, names: Iterable[str]) -> None:
        """Delete temporary files that a process killed while writing left beside the named files."""
        for directory in {(self.root / name).parent for name in names}:
            for path in directory.glob(f"{_ASIDE}*"):
                path.unlink(missing_ok=True)


def _holds(path: Path, record: FileRecord) -> bool:
    try:
        with _open_plain(path, record.size) as file:
            return file is not None and _record_of_parts(iter(lambda: file.read(_READ_AT_ONCE), b"")) == record
    except (ProjectError, OSError):
        return False  # writing it again is always right


def _read_plain(path: Path, size: int) -> bytes | None:
    """Return the bytes of a regular file of the recorded size, ``None`` when there is none, nothing when it differs."""
    with _open_plain(path, size) as file:
        return None if file is None else file.read()


@contextmanager
def _open_plain(path: Path, size: int) -> Iterator[BinaryIO | None]:
    """Open a regular file of the recorded size, ``None`` when there is none, an empty one when it is another thing."""
    try:
        # without O_NONBLOCK a named pipe in the file's place would hold the reader for ever
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise ProjectError(f"{path} cannot be read: {error.strerror}.") from error
        yield BytesIO()  # a symbolic link never holds the recorded content
        return
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(file.fileno())
        plain = stat.S_ISREG(facts.st_mode) and facts.st_size == size
        yield file if plain else BytesIO()
