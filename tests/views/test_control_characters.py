"""Names in data cannot steer a terminal, nor make two lines of one error."""

from __future__ import annotations

import pytest
from rich.table import Table

from treelora_cli.views.console import Output, harmless

BAD = "a\nb\x1b[31mred\x07\x9b0m\u202eevil\r"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 🐝 [bold] :bee:", "plain ü 🐝 [bold] :bee:"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\u202eb\x7f", "a\\u202eb\\x7f"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert harmless(text, one_line=True) == shown.replace("\n", "\\n").replace("\t", "\\t")


def test_errors_notes_and_tables_hold_none(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False, quiet=False)
    table = Table("name")
    table.add_row(BAD)
    output.result({}, table, BAD)
    output.note(BAD)
    output.error(BAD, 4)
    shown = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & set(shown.out + shown.err)
    assert shown.err.splitlines()[-1] == "Error: a\\nb\\x1b[31mred\\x07\\x9b0m\\u202eevil\\r"
