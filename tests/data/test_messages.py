"""Messages that are no columns: chats that are records themselves, a message a record, and what only shows beside."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.text import TextListing, list_texts
from treelora_cli.errors import DataError

CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def read(path: Path, text: str, **options: Any) -> TextListing:
    path.write_text(text)
    return list_texts(DataRequest(path, held_out=0.0, **options))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", [CHAT, CHAT]),
        ("d.json", CHAT),
        ("d.json", {"messages": CHAT, "id": 7}),
        ("d.json", {"conversations": [CHAT, CHAT]}),
        ("d.json", {"data": [{"messages": CHAT}]}),
        ("d.jsonl", CHAT),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_messages_is_a_chat(tmp_path: Path, name: str, content: Any, indent: int | None) -> None:
    found = read(tmp_path / name, json.dumps(content, indent=indent))
    assert found.style == "chat"
    assert {tuple((turn.role, turn.content) for turn in one.messages) for one in found.train} == {
        (("user", "x"), ("assistant", "y"))
    }


def test_a_document_of_plain_values_is_one_record(tmp_path: Path) -> None:
    (one,) = read(tmp_path / "d.json", '{"prompt": "x", "answer": "y"}').train
    assert (one.prompt, one.answer) == ("x", "y")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.jsonl", "".join(json.dumps(one) + "\n" for one in CHAT)),
        ("d.json", json.dumps([{"chat": 1, **one} for one in CHAT])),
        ("d.csv", "conversation_id,role,text\n1,user,Hi\n1,assistant,Ho\n"),
        ("d.csv", "id,from,value\n1,human,Hi\n1,gpt,Ho\n"),
        ("d.jsonl", json.dumps({"prompt": {"text": "x", "replies": [{"text": "y", "replies": []}]}})),
    ],
)
def test_a_message_a_record_is_no_example(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"each record holds single messages and not a chat\. Write one record for"):
        read(tmp_path / name, text)


def test_messages_are_texts_where_that_is_said(tmp_path: Path) -> None:
    table = "role,text\nuser,Hi\nassistant,Ho\n"
    assert read(tmp_path / "d.csv", table, columns={"text": "text"}).style == "text"
    labelled = read(tmp_path / "d.csv", "speaker,text,label\nuser,Hi,a\nbot,Ho,b\n")
    assert (labelled.style, labelled.labels) == ("labels", ("a", "b"))


@pytest.mark.parametrize("beside", [{"image": "1.jpg"}, {"images": ["1.jpg"]}, {"audio_path": "1.wav"}])
def test_a_text_about_what_is_not_read_is_refused(tmp_path: Path, beside: dict[str, Any]) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    seen, plain = {**beside, "conversations": turns}, {"conversations": [{"from": "human", "value": "Hi"}, turns[1]]}
    text = "".join(json.dumps(one) + "\n" for one in (seen, plain))
    with pytest.raises(DataError, match=r"d\.jsonl:1: the text is about what '\w+' shows; only text can be read"):
        read(tmp_path / "d.jsonl", text)
    assert [one.prompt for one in read(tmp_path / "d.jsonl", text, skip_bad=True).train] == ["Hi"]
    (one,) = read(tmp_path / "d.jsonl", '{"prompt": "Write a tag.", "answer": "<image>"}').train
    assert one.answer == "<image>"


def test_pictures_beside_a_question_are_said_not_to_be_read(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    table = pyarrow.table({"image": [{"bytes": b"1", "path": None}], "question": ["x"], "answer": ["y"]})
    parquet.write_table(table, path)
    notes = list_texts(DataRequest(path, held_out=0.0)).notes
    assert "Not used: image. There are pictures or sounds in it; only text is read." in notes


def test_a_call_without_arguments_is_a_call(tmp_path: Path) -> None:
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    (one,) = read(tmp_path / "d.jsonl", json.dumps({"messages": [CHAT[0], called]})).train
    assert one.answer == '{"name": "f", "arguments": {}}'


def test_a_message_without_a_role_is_told_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: a message names no role\. Found Role, Content\. Mend it, or pass"
    ):
        read(tmp_path / "d.jsonl", json.dumps({"messages": [{"Role": "User", "Content": "x"}, *CHAT]}))


def test_a_bad_message_can_be_skipped(tmp_path: Path) -> None:
    empty = [CHAT[0], {"role": "assistant", "content": None}]
    text = "".join(json.dumps({"messages": one}) + "\n" for one in (empty, CHAT))
    with pytest.raises(DataError, match=r"d\.jsonl:1: empty content of a message\. Mend it, or pass --skip-bad\.$"):
        read(tmp_path / "d.jsonl", text)
    assert len(read(tmp_path / "d.jsonl", text, skip_bad=True).train) == 1
