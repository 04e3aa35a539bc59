"""Bytes and text of data files: unpacked, and decoded by what they are."""

from __future__ import annotations

import re
from pathlib import Path

from treelora_cli.errors import DataError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
"""Endings of packed files, and the names of their packing."""
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"BZh", "bz2"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\0", "xz"))
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_FOREIGN_RUN = re.compile(rb"[\x80-\xff]{3,}")
_FOREIGN_SHARE = 0.25
"""Windows-1252 is Western: its letters beyond ASCII stand alone or in pairs and are few."""


def unpacked_name(path: Path) -> Path:
    """Return the path without the ending of its packing: ``a.jsonl.gz`` is ``a.jsonl``."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes, unpacked when it is packed, whatever its ending.

    Raises:
        DataError: It cannot be read or unpacked.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    packing = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    if packing is None:
        return data
    try:
        return _unpack(data, packing)
    except MemoryError:
        raise
    except Exception as error:  # four libraries, each with errors of its own
        raise DataError(f"{path}: damaged {packing} file ({error}).") from error


def _unpack(data: bytes, packing: str) -> bytes:
    if packing == "gzip":
        import gzip

        return gzip.decompress(data)
    if packing == "bz2":
        import bz2

        return bz2.decompress(data)
    if packing == "xz":
        import lzma

        return lzma.decompress(data)
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return bytes(stream.read())


def decode(data: bytes, path: Path, notes: list[str], *, western: bool) -> str:
    """Return the text of a file.

    UTF-8, or UTF-16 and UTF-32 by their mark or their zeros; with ``western`` also Windows-1252 where the bytes look
    like it. Whatever is not UTF-8 is said in ``notes``.

    Raises:
        DataError: None of these.
    """
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), None) or _by_zeros(data) or "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding == "utf-8" and western and _looks_western(data):
            notes.append(f"{path.name} is not UTF-8; it was read as Windows-1252.")
            return data.decode("cp1252")
        wanted = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise DataError(f"{path}: not {wanted} text (byte {error.start}). Convert it to UTF-8.") from error
    if not encoding.startswith("utf-8"):
        notes.append(f"{path.name} was read as {encoding.upper().removesuffix('-LE').removesuffix('-BE')}.")
    return text


def _by_zeros(data: bytes) -> str | None:
    """Tell UTF-16 without a mark by the zeros beside its ASCII letters."""
    head = data[:200]
    if len(head) < 4 or len(data) % 2:
        return None
    even, odd = head[::2].count(0) / len(head[::2]), head[1::2].count(0) / len(head[1::2])
    if odd > 0.7 and even == 0:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 and odd == 0 else None


def _looks_western(data: bytes) -> bool:
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return False
    letters = sum(len(run) for run in re.findall(rb"[A-Za-z\x80-\xff]+", data))
    foreign = sum(len(run) for run in re.findall(rb"[\x80-\xff]+", data))
    return b"\0" not in data and foreign <= _FOREIGN_SHARE * letters and _FOREIGN_RUN.search(data) is None
