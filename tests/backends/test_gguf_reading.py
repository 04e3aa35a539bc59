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
    model = write_gguf(tmp_path / "tiny.gguf", gguf)
    parsed: list[str] = []
    original = gguf.GGUFReader

    def counted(path: Any, mode: str = "r") -> Any:
        parsed.append(str(path))
        return original(path, mode)

    monkeypatch.setattr(gguf, "GGUFReader", counted)
    base = load(model)
    assert parsed == [str(model)]
    assert gguf.GGUFReader is counted
    assert len(base.tokenizer) > 0
