"""Bytes and text of data files: unpacked, and decoded by what they are."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

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
_ARCHIVES = (
    (b"PK\x03\x04", 0, "zip"),
    (b"Rar!\x1a\x07", 0, "rar"),
    (b"7z\xbc\xaf\x27\x1c", 0, "7z"),
    (b"ustar", 257, "tar"),
)
_PACKED_TARS = (".tgz", ".tbz2", ".txz")
_ARCHIVE_SUFFIXES = (".zip", ".tar", *_PACKED_TARS, ".rar", ".7z", *COMPRESSED)
_SHEETS = (".xlsx", ".xlsm", ".xls", ".ods")
_FOREIGN = {
    **dict.fromkeys((".h5", ".hdf5"), "HDF5"),
    **dict.fromkeys((".npy", ".npz"), "NumPy's"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), "a pickle, which is never opened"),
    ".mat": "MATLAB's",
    ".mdb": "LMDB",
    **dict.fromkeys((".nii", ".nrrd", ".mha", ".mhd"), "a volume of medical images"),
    **dict.fromkeys((".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".m4v", ".wmv"), "a video"),
}
"""Files that hold data which is not read here, by a part of their names."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What stands in place of a file that Git LFS did not fetch."""
_LINE = re.compile(r"\r\n|\n|\r")
_MARK = re.compile("(?<=[\r\n])\ufeff")
"""A mark of byte order at a line's start: files that have one were joined."""
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
    if data.startswith(LFS_POINTER):
        raise DataError(f"{path} is a pointer of Git LFS and not the data. Fetch it: git lfs pull")
    _refuse_packed_together(data, path)
    packing = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    if packing is None:
        return data
    unpacked = _unpacked(data, packing, path)
    _refuse_packed_together(unpacked, path)
    return unpacked


def refuse_archive(path: Path) -> None:
    """Raise ``DataError`` when a file is an archive or a spreadsheet, which have to be opened by something else."""
    refuse_foreign(path)
    try:
        read_bytes(path) if path.suffix.lower() in COMPRESSED else _refuse_head(path)
    except OSError:
        return  # whoever reads it says so


def _refuse_head(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(512)
    if path.suffix.lower() in _PACKED_TARS:
        raise _archive(path, "tar")
    _refuse_packed_together(head, path)


def refuse_foreign(file: Path) -> None:
    """Raise ``DataError`` when a file's name says that it holds data which only another tool opens."""
    kind = next((kind for ending, kind in _FOREIGN.items() if ending in map(str.lower, file.suffixes)), None)
    if kind is None and ".tfrecord" in file.name.lower():  # its shards have a number behind it
        kind = "a TFRecord of TensorFlow"
    if kind is not None and file.is_file():
        raise DataError(f"{file} is {kind}; it is not read here. Write images in folders CLASS/*.png, CSV or parquet.")


def refuse_archives_in(folder: Path) -> None:
    """Raise ``DataError`` when a folder without data holds an archive or a spreadsheet, in which data may be."""
    for file in sorted(folder.rglob("*")):
        refuse_foreign(file)
        if file.parent == folder and file.suffix.lower() in (*_ARCHIVE_SUFFIXES, *_SHEETS) and file.is_file():
            refuse_archive(file)


def _archive(path: Path, kind: str) -> DataError:
    """Return the error that says how an archive is unpacked."""
    name = path
    while name.suffix.lower() in (*_ARCHIVE_SUFFIXES, *COMPRESSED):
        name = name.with_suffix("")
    folder = quote(str(name if name != path else path.with_name(f"{path.name}-unpacked")))
    file = quote(str(path))
    commands = {
        "zip": f"unzip -q {file} -d {folder}",
        "tar": f"mkdir {folder} && tar -xf {file} -C {folder}",
        "rar": f"unrar x {file} {folder}/",
        "7z": f"7z x {file} -o{folder}",
    }
    return DataError(f"{path} is a {kind} archive. Unpack it and give what is inside: {commands[kind]}")


def _refuse_packed_together(data: bytes, path: Path) -> None:
    if path.suffix.lower() in _SHEETS:
        raise DataError(f"{path} is a spreadsheet: save it as CSV and give that.")
    archive = next((name for magic, at, name in _ARCHIVES if data[at : at + len(magic)] == magic), None)
    if archive is not None:
        raise _archive(path, archive)


def _unpacked(data: bytes, packing: str, path: Path) -> bytes:
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


def lines_of(text: str) -> list[str]:
    """Return the lines of a text; only line feeds and carriage returns end one, no form feed or U+2028."""
    lines = _LINE.split(text)
    return lines[:-1] if lines[-1] == "" else lines


def refuse_zeros(text: str, path: Path) -> None:
    """Raise ``DataError`` when a text that is no JSON holds a NUL, which no text does."""
    place = text.find("\0")
    if place >= 0:
        line = len(_LINE.findall(text, 0, place)) + 1
        raise DataError(f"{path.name}:{line}: holds a NUL byte; is this text?")


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
    return _MARK.sub("", text)


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
