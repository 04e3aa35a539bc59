"""Questions whose choices stand in a column each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.records import prompt_of
from treelora_cli.data.tables import Row
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError


def pairs(folder: Path, *records: dict[str, Any]) -> list[tuple[str, str]]:
    """Return prompt and answer of each record."""
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [(one.prompt, one.answer) for one in list_texts(DataRequest(path, held_out=0.0)).train]


LETTERS = {"question": "Sky?", "A": "red", "B": "blue", "C": "grey"}
LETTERED = "Sky?\nA. red\nB. blue\nC. grey"


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "blue"])
def test_a_choice_by_letter_or_text(tmp_path: Path, answer: str) -> None:
    assert pairs(tmp_path, {**LETTERS, "answer": answer}) == [(LETTERED, "B")]


@pytest.mark.parametrize(
    ("columns", "key"),
    [
        (("opa", "opb", "opc"), "cop"),
        (("answerA", "answerB", "answerC"), "label"),
        (("option_a", "option_b", "option_c"), "correct"),
    ],
)
def test_numbers_count_from_where_they_begin_or_end(tmp_path: Path, columns: tuple[str, ...], key: str) -> None:
    record = {"question": "Sky?", **dict(zip(columns, ("red", "blue", "grey"), strict=True))}
    from_0 = pairs(tmp_path, {**record, key: 0}, {**record, key: "2"})
    assert from_0 == [(LETTERED, "A"), (LETTERED, "C")]
    from_1 = pairs(tmp_path, {**record, key: "1"}, {**record, key: 3})
    assert from_1 == [(LETTERED, "A"), (LETTERED, "C")]
    with pytest.raises(DataError, match=rf"d\.jsonl:1: do the numbers in '{key}' count choices from 0 or from 1\?"):
        pairs(tmp_path, {**record, key: 1})


def test_numbered_choices_keep_their_numbers(tmp_path: Path) -> None:
    record = {"question": "The _ is big.", "option1": "ant", "option2": "cow"}
    asked = "The _ is big.\n1. ant\n2. cow"
    assert pairs(tmp_path, {**record, "answer": "2"}, {**record, "answer": "1"}) == [(asked, "2"), (asked, "1")]
    assert pairs(tmp_path, {**record, "label": 0}, {**record, "label": 1}) == [(asked, "1"), (asked, "2")]


def test_a_question_may_have_fewer_choices(tmp_path: Path) -> None:
    assert pairs(tmp_path, {**LETTERS, "C": None, "answer": "A"}) == [("Sky?\nA. red\nB. blue", "A")]


def test_choices_of_what_is_not_called_a_question_are_refused_with_what_to_type(tmp_path: Path) -> None:
    record = {"goal": "Cool it.", "sol1": "Fridge.", "sol2": "Oven.", "label": 0}
    with pytest.raises(DataError, match=r"sol1, sol2 look like choices .* Try --map goal=question$"):
        pairs(tmp_path, record)


def test_columns_of_numbers_called_by_letters_are_no_choices(tmp_path: Path) -> None:
    records = [{"text": word, "label": word, "A": 0.5, "B": 2} for word in ("x", "y")]
    assert pairs(tmp_path, *records) == [("x", "x"), ("y", "y")]


def test_a_question_is_asked_as_it_is_learned() -> None:
    assert prompt_of(Row(LETTERS, "d.jsonl:1")) == LETTERED
