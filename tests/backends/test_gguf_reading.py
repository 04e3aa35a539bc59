"""A GGUF file is parsed once for all that is taken from it."""

from pathlib import Path
from typing import Any

import pytest
from test_causal_lm import write_gguf
from tiny_lm import load


def test_a_gguf_file_is_parsed_once_and_the_library_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    written = write_gguf(tmp_path / "tiny.gguf", gguf)
    model = tmp_path / "link.gguf"
    model.symlink_to(written)
    parsed: list[str] = []
    tables: list[tuple[Any, ...]] = []
    original, table = gguf.GGUFReader, gguf.get_tensor_name_map

    def counted(path: Any, mode: str = "r") -> Any:
        parsed.append(str(path))
        return original(path, mode)

    def counted_table(*architecture: Any) -> Any:
        tables.append(architecture)
        return table(*architecture)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    monkeypatch.setattr(gguf, "get_tensor_name_map", counted_table)
    base = load(model)
    assert parsed == [str(written)]
    assert len(tables) == 1
    assert gguf.GGUFReader is counted
    assert gguf.get_tensor_name_map is counted_table
    assert len(base.tokenizer) > 0
