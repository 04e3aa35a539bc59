"""Columns by the names people give them, and what of rated answers is learned."""

import json
from pathlib import Path
from typing import Any

import pytest

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.inputs import text_inputs
from treelora_cli.data.text import TextListing, list_texts
from treelora_cli.errors import DataError


def listed(folder: Path, *records: dict[str, Any], **options: Any) -> TextListing:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list_texts(DataRequest(path, held_out=0.0, **options))


def of_csv(folder: Path, text: str) -> TextListing:
    path = folder / "d.csv"
    path.write_text(text)
    return list_texts(DataRequest(path, held_out=0.0))


def pairs(listing: TextListing) -> list[tuple[str, str]]:
    return [(one.prompt, one.answer) for one in listing.train]


def roles(listing: TextListing) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in listing.train[0].messages]


@pytest.mark.parametrize(
    "head",
    ["Text,Label", " TEXT , LABEL ", "review,sentiment", "Tweet,Category", "Comment_Text,target", "message,class"],
)
def test_texts_and_labels_go_by_many_names_in_any_case(tmp_path: Path, head: str) -> None:
    found = of_csv(tmp_path, f"{head}\nfine,good\npoor,bad\n")
    assert (found.style, found.labels, pairs(found)) == ("labels", ("bad", "good"), [("fine", "good"), ("poor", "bad")])


@pytest.mark.parametrize(
    "head",
    ["Prompt,Answer", "Question,ANSWER", "Instruction,Output", "input,output", "Query,Response", "document,summary"],
)
def test_prompts_and_answers_go_by_many_names_in_any_case(tmp_path: Path, head: str) -> None:
    found = of_csv(tmp_path, f"{head}\nwhy,so\n")
    assert (found.style, pairs(found)) == ("plain", [("why", "so")])


def test_a_query_about_a_passage_is_asked_with_it(tmp_path: Path) -> None:
    record = {"context": "Tom sings.", "query": "Who sings?", "answer": "Tom"}
    assert pairs(listed(tmp_path, record)) == [("Tom sings.\n\nWho sings?", "Tom")]
    (tmp_path / "d.jsonl").write_text(json.dumps({key: record[key] for key in ("context", "query")}))
    assert text_inputs([str(tmp_path / "d.jsonl")], bytes) == ["Tom sings.\n\nWho sings?"]


def test_a_name_that_two_columns_could_have_is_nobodys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Found Text, TEXT, label"):
        of_csv(tmp_path, "Text,TEXT,label\na,b,c\n")


def test_the_very_name_goes_before_another_spelling(tmp_path: Path) -> None:
    assert pairs(of_csv(tmp_path, "Text,text,label\na,b,c\n")) == [("b", "c")]


def test_capitals_are_asked_as_they_are_learned(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("Instruction,Input\nSay,Hi\n")
    assert text_inputs([str(tmp_path / "q.csv")], lambda: b"") == ["Say\n\nHi"]


def test_of_preferences_the_chosen_answer_is_learned(tmp_path: Path) -> None:
    found = listed(tmp_path, {"prompt": "Hi", "chosen": "Ho", "rejected": "No"})
    assert pairs(found) == [("Hi", "Ho")]
    assert found.notes == ()


def test_of_chats_of_preferences_the_chosen_one_is_learned(tmp_path: Path) -> None:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]

    found = listed(tmp_path, {"chosen": chat("Ho"), "rejected": chat("No")})
    assert roles(found) == [("user", "Hi"), ("assistant", "Ho")]


def test_two_texts_of_preferences_are_never_learned_as_question_and_answer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Try --map chosen=text$"):
        listed(tmp_path, {"chosen": "Human: Hi", "rejected": "Human: No"})


def test_unwanted_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": word, "label": word == "Ho"} for word in ("Ho", "No", "Na")]
    found = listed(tmp_path, *rows)
    assert pairs(found) == [("Hi", "Ho")]
    assert found.notes == ("2 answers with label false are unwanted ones and were left out.",)
    with pytest.raises(DataError, match=r"^d\.jsonl:1: by label all answers are unwanted; there is nothing to learn"):
        listed(tmp_path, *rows[1:])


def test_a_system_prompt_beside_a_question_is_read(tmp_path: Path) -> None:
    found = listed(tmp_path, {"system_prompt": "Be kind.", "question": "Hi", "response": "Ho"})
    assert found.style == "chat"
    assert roles(found) == [("system", "Be kind."), ("user", "Hi"), ("assistant", "Ho")]


@pytest.mark.parametrize(
    ("record", "system"),
    [
        ({"system": [{"text": "Be kind."}]}, "Be kind."),
        ({"systemInstruction": {"parts": [{"text": "Be kind."}]}}, "Be kind."),
        ({"system": None}, None),
        ({"system": "  "}, None),
    ],
)
def test_a_system_prompt_beside_messages_is_read_in_every_form(tmp_path: Path, record: Any, system: str | None) -> None:
    said = [{"role": "user", "content": [{"text": "Hi"}]}, {"role": "assistant", "content": [{"text": "Ho"}]}]
    opening = [("system", system)] if system else []
    assert roles(listed(tmp_path, {**record, "messages": said})) == [*opening, ("user", "Hi"), ("assistant", "Ho")]


def test_a_system_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    with pytest.raises(DataError, match=r"^d\.jsonl:1: 'system' is not text but int\."):
        listed(tmp_path, {"system": 3, "messages": said})


@pytest.mark.parametrize(
    "record",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["Hi", "Ho"]}},
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Ho"}]}]},
        {"dialog": [{"speaker": "human", "text": "Hi"}, {"speaker": "bot", "text": "Ho"}], "id": "a"},
        {"messages": [{"type": "human", "content": "Hi"}, {"type": "ai", "content": "Ho"}]},
        {"messages": "[{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': \"Ho\"}]"},
    ],
)
def test_chats_are_known_in_many_forms(tmp_path: Path, record: dict[str, Any]) -> None:
    assert roles(listed(tmp_path, record)) == [("user", "Hi"), ("assistant", "Ho")]


def test_messages_as_pandas_prints_them_without_commas_are_refused(tmp_path: Path) -> None:
    text = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Ho'}]"
    with pytest.raises(DataError, match=r"^d\.jsonl:1: 'messages' is invalid JSON\. Mend it, or pass --skip-bad"):
        listed(tmp_path, {"messages": text})


def test_a_turn_that_calls_a_function_is_a_call(tmp_path: Path) -> None:
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    said = [("human", "1?"), ("function_call", call), ("observation", "2"), ("gpt", "Two")]
    found = listed(tmp_path, {"conversations": [{"from": who, "value": what} for who, what in said]})
    (turn,) = (one for one in found.train[0].turns if one.role == "assistant")
    assert turn.content == ""
    assert turn.fields()["tool_calls"] == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    spoken = [{"from": "human", "value": "1?"}, {"from": "function_call", "value": "add(1)"}]
    assert listed(tmp_path, {"conversations": spoken}).train[0].answer == "add(1)"


def test_a_record_in_a_column_is_mapped_by_its_path(tmp_path: Path) -> None:
    record = {"id": "1", "translation": {"en": "Hello", "de": "Hallo"}}
    with pytest.raises(DataError, match=r"Try --map translation\.en=prompt --map translation\.de=answer"):
        listed(tmp_path, record)
    found = listed(tmp_path, record, columns={"translation.en": "prompt", "translation.de": "answer"})
    assert pairs(found) == [("Hello", "Hallo")]
    with pytest.raises(DataError, match=r"^d\.jsonl:1: no column 'translation\.fr' to map"):
        listed(tmp_path, record, columns={"translation.fr": "prompt"})


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("Class Index,Title,Note\n" + "3,Rain,It rains a lot in autumn\n4,Sun,It is sunny in the south\n" * 2, "3"),
        ("v1,v2\n" + "ham,see you soon\nspam,win a prize now\n" * 2, "--map v2=text --map v1=label"),
        ("question,label\n" + "why,so\n" * 3, "--map question=prompt --map label=answer"),
    ],
)
def test_a_guess_takes_texts_for_texts_and_what_recurs_for_labels(tmp_path: Path, text: str, advice: str) -> None:
    wanted = "--map Note=text --map 'Class Index=label'" if advice == "3" else advice
    with pytest.raises(DataError, match=rf"Try {wanted}$"):
        of_csv(tmp_path, text)
