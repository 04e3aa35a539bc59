"""Tables at 80 columns: no line is wider, no number is cut, no text loses its end."""

from __future__ import annotations

import re

import pytest
from rich.table import Table

from treelora_cli.views.console import Output


def shown(capsys: pytest.CaptureFixture[str], table: Table, width: int = 80) -> list[str]:
    output = Output(as_json=False, quiet=False)
    output.out.width = width
    output.result({}, table)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    return lines


def numbers(count: int) -> Table:
    table = Table(title="Distances", caption="closing line")
    table.add_column("task")
    for index in range(count):
        table.add_column(f"task-{index:02d}", justify="right")
    for row in range(count):
        table.add_row(f"task-{row:02d}", *(f"{row}.{index:03d}" for index in range(count)))
    return table


def test_a_wide_table_of_numbers_goes_on_below(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, numbers(11))
    text = "\n".join(lines)
    assert set(re.findall(r"\d+\.\d{3}", text)) == {f"{a}.{b:03d}" for a in range(11) for b in range(11)}
    assert "…" not in text
    assert text.count("Distances") == text.count("closing line") == 1
    heads = [line for line in lines if line.startswith("┃ task ")]
    assert len(heads) == 2, "the first column comes back in each part"


def test_a_table_that_fits_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum("task " in line for line in shown(capsys, numbers(5))) == 1


def test_a_long_path_is_folded_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/data/" + "/".join(f"folder{index:02d}" for index in range(12)) + "/image.png"
    table = Table()
    for heading in ("input", "output", "task", "confidence"):
        table.add_column(heading, justify="right" if heading == "confidence" else "left")
    table.add_row(path, "gull", "coast", "99.5")
    lines = shown(capsys, table)
    first = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert first == path
    assert any("gull" in line and "coast" in line and "99.5" in line for line in lines)


def test_names_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_column("class")
    for name in (":bee:", "[red]x[/red]", "[bold]"):
        table.add_row(name)
    text = "\n".join(shown(capsys, table))
    assert ":bee:" in text and "[red]x[/red]" in text and "[bold]" in text
    output = Output(as_json=False, quiet=False)
    output.result({}, "labels: [a], :bee:")
    output.note("class ':cat:' [b]")
    output.error("no class ':dog:' [/c]", 4)
    done = capsys.readouterr()
    assert done.out == "labels: [a], :bee:\n"
    assert done.err == "class ':cat:' [b]\nError: no class ':dog:' [/c]\n"
