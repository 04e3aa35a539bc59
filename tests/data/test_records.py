"""Records by the names that people give their columns."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treelora_cli.backend.values import DataRequest, Turn
from treelora_cli.data.chats import read_chats
from treelora_cli.data.examples import shared_system
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError


@pytest.fixture
def read(tmp_path):
    """Return the first example, the style and the notes of records."""

    def listing(*records, **request):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        found = list_texts(DataRequest(path, held_out=0.0, **request))
        return found.train[0], found.style, found.notes

    return listing


CHAT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
WORDS = [
    *("messages", "role", "content", "user", "assistant", "from", "value", "tool_calls", "function", "arguments"),
    *("function_call", "tools", "weight", "prompt", "answer", "instruction", "input", "output", "system", "history"),
    *("question", "context", "choices", "options", "text", "label", "answers", "paragraphs", "qas", "labels", "name"),
]

SQUAD = {"text": ["Rome", "the city of Rome", "Rome"], "answer_start": [0, 4, 9]}


@pytest.mark.parametrize(
    ("record", "style", "prompt", "answer"),
    [
        ({"instruction": "Sum up.", "input": "A b c.", "output": "Abc."}, "plain", "Sum up.\n\nA b c.", "Abc."),
        ({"instruction": "Say hi.", "input": "", "output": "Hi."}, "plain", "Say hi.", "Hi."),
        ({"instruction": "Who?", "context": "It was Ann.", "response": "Ann"}, "plain", "Who?\n\nIt was Ann.", "Ann"),
        ({"question": "Two?", "answer": "2"}, "plain", "Two?", "2"),
        ({"context": "In Rome.", "question": "Where?", "answers": SQUAD}, "plain", "In Rome.\n\nWhere?", "Rome"),
        ({"passage": "It is.", "question": "Is it?", "answer": True}, "plain", "It is.\n\nIs it?", "True"),
        (
            {"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"},
            "plain",
            "Sky?\nA. red\nB. blue",
            "B",
        ),
        ({"question": "Sky?", "choices": ["red", "blue"], "answer": 1}, "plain", "Sky?\nA. red\nB. blue", "B"),
        ({"question_stem": "Sky?", "choices": ["red", "blue"], "answer": 1}, "plain", "Sky?\nA. red\nB. blue", "B"),
        (
            {"premise": "It fell.", "question": "cause", "choices": ["wind", "sun"], "answer": 0},
            "plain",
            "It fell.\n\ncause\nA. wind\nB. sun",
            "A",
        ),
        ({"question": "Sky?", "choices": ["red", "blue"], "answer": "1"}, "plain", "Sky?\nA. red\nB. blue", "B"),
        ({"question": "Sky?", "choices": "['red', 'blue']", "answer": 1}, "plain", "Sky?\nA. red\nB. blue", "B"),
        (
            {"question": "Sky?", "choices": [{"label": c, "text": c * 3} for c in "AB"], "answerKey": "B"},
            "plain",
            "Sky?\nA. AAA\nB. BBB",
            "B",
        ),
        ({"text": "A long bill.", "summary": "Short."}, "plain", "A long bill.", "Short."),
        ({"prompt": "Hi", "completion": "Ho"}, "plain", "Hi", "Ho"),
        ({"question": "Hi", "chosen": "Ho", "rejected": "Na"}, "plain", "Hi", "Ho"),
        ({"instruction": "Hi", "input": "you", "chosen": "Ho", "rejected": "Na"}, "plain", "Hi\n\nyou", "Ho"),
        (
            {"article": "It is blue.", "question": "Sky?", "options": ["red", "blue"], "answer": "B"},
            "plain",
            "It is blue.\n\nSky?\nA. red\nB. blue",
            "B",
        ),
        (
            {"context": "It is.", "question": "Sky?", "choices": ["red", "blue"], "answer": 1},
            "plain",
            "It is.\n\nSky?\nA. red\nB. blue",
            "B",
        ),
        (
            {"question": "Sky?", "options": {"A": "red", "B": "blue"}, "answer": "blue"},
            "plain",
            "Sky?\nA. red\nB. blue",
            "B",
        ),
    ],
)
def test_prompts_and_answers_by_name(read, record, style, prompt, answer):
    one, found, notes = read(record)
    assert (found, one.prompt, one.answer) == (style, prompt, answer)
    assert notes == ()


@pytest.mark.parametrize("gap", ["nan", "NaN", "<NA>", "#N/A", " #REF! "])
def test_what_spreadsheets_write_for_nothing_is_no_text(read, gap):
    with pytest.raises(DataError, match=r"d\.jsonl:1: empty answer"):
        read({"prompt": "a", "answer": gap})
    assert read({"prompt": "a", "answer": f"{gap}s"})[0].answer == f"{gap}s"
    assert read({"prompt": "a", "answer": "null"})[0].answer == "null"  # what some code prints


@pytest.mark.parametrize(
    "turns",
    [
        [{"human": "a", "assistant": "b"}, {"human": "c", "assistant": "d"}],
        [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}],
        ["a", "b", "c", "d"],
    ],
)
def test_pairs_and_texts_by_turns_are_chats(read, turns):
    one, style, _ = read({"conversations": turns})
    assert style == "chat"
    assert one.turns == (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    assert one.answer == "d"


def test_an_odd_number_of_texts_is_no_chat(read):
    with pytest.raises(DataError, match="'conversations' is a list of two or more records with role and content"):
        read({"conversations": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("column", "answer"),
    [
        ("chosen", {"from": "gpt", "value": "good"}),
        ("completion", "good"),
        ("response", [CHAT[1] | {"content": "good"}]),
    ],
)
def test_an_answer_apart_from_its_chat_is_the_last_turn(read, column, answer):
    one, style, _ = read({"conversations": [{"from": "human", "value": "Q"}], column: answer, "rejected": "bad"})
    assert (style, one.turns, one.answer) == ("chat", (Turn("user", "Q"),), "good")


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"messages": CHAT}, "x"),
        ({"instruction": "x", "output": "y"}, "x"),
        ({"question": "x", "answer": "y"}, "x"),
    ],
)
@pytest.mark.parametrize(
    ("mark", "good", "bad"), [("label", True, False), ("kto_tag", 1, 0), ("label", "true", "False")]
)
def test_answers_marked_as_unwanted_are_not_learned(read, record, asked, mark, good, bad):
    bad_one = json.loads(json.dumps(record).replace('"y"', '"bad"'))
    found, _, notes = read(bad_one | {mark: bad}, record | {mark: good}, bad_one | {mark: bad})
    assert (found.prompt or found.turns[0].content, found.answer) == (asked, "y")
    assert f"2 answers with {mark} false are unwanted ones and were left out." in notes


def test_a_label_of_0_and_1_beside_answers_is_asked_about(read):
    rows = [{"question": "x", "answer": answer, "label": label} for answer, label in (("y", 1), ("bad", 0))]
    with pytest.raises(DataError, match=r"'label' is 0 or 1 beside answers.*--map label=kto_tag; .* --map label=other"):
        read(*rows)
    assert read(*rows[::-1], columns={"label": "kto_tag"})[0].answer == "y"
    assert read(*rows[::-1], columns={"label": "other"})[0].answer == "bad"


def test_several_answers_are_as_right_as_the_first(read):
    one, _, _ = read({"question": "Where?", "context": "In Rome.", "answers": SQUAD})
    assert one.others == ("the city of Rome",)


def test_pairs_of_sentences_have_labels(read):
    one, style, _ = read(
        {"premise": "A dog runs.", "hypothesis": "It moves.", "label": "yes"},
        {"premise": "A dog runs.", "hypothesis": "It sits.", "label": "no"},
    )
    assert (style, one.prompt, one.answer) == ("labels", "premise: A dog runs.\nhypothesis: It moves.", "yes")
    one, style, notes = read(
        {"question": "Who?", "sentence": "Tom.", "label": "yes"},
        {"question": "Who?", "sentence": "Rain.", "label": "no"},
    )
    assert (style, one.prompt, notes) == ("labels", "question: Who?\nsentence: Tom.", ())
    one, style, notes = read(*({"text": "a", "text_pair": f"b{n}", "label": n} for n in range(2)))
    assert (style, one.prompt, notes) == ("labels", "text: a\ntext_pair: b0", ())


def test_conversations_of_from_and_value(read):
    one, style, _ = read(
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Bye"},
                {"from": "gpt", "value": "Farewell"},
            ]
        }
    )
    assert style == "chat"
    assert [turn.role for turn in one.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (one.prompt, one.answer, one.system) == ("Hi\nHello\nBye", "Farewell", "Be kind.")


def test_prompt_and_completion_as_messages(read):
    one, style, _ = read(
        {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Ho"}]}
    )
    assert (style, one.turns, one.answer) == ("chat", (Turn("user", "Hi"),), "Ho")


def test_instructions_with_system_and_history_are_chats(read):
    record = {"instruction": "And 3?", "input": "", "output": "9", "system": "Square.", "history": [["2?", "4"]]}
    one, style, _ = read(record)
    assert style == "chat"
    assert [(turn.role, turn.content) for turn in one.messages] == [
        ("system", "Square."),
        ("user", "2?"),
        ("assistant", "4"),
        ("user", "And 3?"),
        ("assistant", "9"),
    ]


def test_what_only_later_records_have_is_read(read):
    first = {"instruction": "Two?", "input": "", "output": "4", "system": "", "history": []}
    for more in ({"system": "Square."}, {"history": [["1?", "1"]]}):
        one, style, _ = read(first, {**first, **more})
        assert (style, [turn.content for turn in one.messages]) == ("chat", ["Two?", "4"])
    with pytest.raises(DataError, match=r"d\.jsonl:1: empty label"):
        read({"text": "a"}, {"text": "b", "label": "x"}, {"text": "c", "label": "y"})


@pytest.mark.parametrize(("column", "read_as"), [("target", "labels"), ("sentiment", "labels"), ("topic", "text")])
def test_labels_by_other_names(read, column, read_as):
    rows = [{"text": f"t{n}", column: ("good", "bad")[n % 2]} for n in range(4)]
    one, style, notes = read(*rows)
    assert (style, one.answer) == (read_as, "good" if read_as == "labels" else "t0")
    unused = f"Read: text. Not used, though there is text in it: {column}."
    assert notes == (() if read_as == "labels" else (unused,))


def test_a_target_that_is_no_label_is_none(read):
    rows = [{"text": f"t{n}", "target": f"a long sentence of its own, number {n} " * 3} for n in range(4)]
    with pytest.raises(DataError, match="pass --map text=prompt --map target=answer; to learn the texts alone, --map"):
        read(*rows)
    _, style, notes = read(*rows, columns={"text": "text"})
    assert (style, notes) == ("text", ("Read: text. Not used, though there is text in it: target.",))


@pytest.mark.parametrize(
    ("column", "typed"),
    [("code", "--map text=prompt --map code=answer;"), ("answer", "--map text=prompt;"), ("output", "output=answer;")],
)
def test_an_answer_beside_a_text_is_asked_about(read, column, typed):
    with pytest.raises(DataError, match=f"d.jsonl:1: 'text' beside '{column}': to learn the one .* {typed} to learn"):
        read({"text": "Add them.", column: "    a + b"})


def test_many_labels_are_labels_where_they_come_back(read):
    one, style, _ = read(*({"text": f"t{n}", "intent": f"i{n % 77}"} for n in range(77 * 4)))
    assert (style, one.answer) == ("labels", "i0")
    assert read(*({"text": f"t{n}", "intent": f"i{n % 77}"} for n in range(77 * 3)))[1] == "text"
    assert read({"text": "a", "stars": 5}, {"text": "b", "stars": 1})[1] == "labels"


def test_labels_of_minus_one_alone_are_none(read):
    with pytest.raises(DataError, match=r"d\.jsonl:1: every label is -1, which says that none is known"):
        read({"sentence": "a", "label": -1}, {"sentence": "b", "label": -1})


def test_answers_that_recur_keep_their_indentation(tmp_path):
    def listed(*answers):
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"p{n}", "answer": answers[n % 2]}) + "\n" for n in range(20)))
        return list_texts(DataRequest(path, held_out=0.0)).labels

    assert listed("    pass", "    return") == ()
    assert listed(" yes\n", " no\n") == ("no", "yes")


def test_a_letter_without_choices_is_no_answer(read):
    with pytest.raises(DataError, match="Found question, answerKey"):
        read({"question": "Sky?", "answerKey": "B"})


def test_numbers_beside_free_text_are_named(read):
    _, _, notes = read({"text": "a", "score": 1}, {"text": "b", "score": 0})
    assert notes == ("Read: text. Not used, though there is text in it: score.",)


def test_names_of_labels_beside_their_numbers(read):
    rows = [{"text": f"t{n}", "label": n % 2, "label_text": ("bad", "good")[n % 2]} for n in range(4)]
    one, style, notes = read(*rows)
    assert (style, one.answer, notes) == ("labels", "bad", ())


def test_squads_documents_are_questions(tmp_path):
    questions = [{"id": "q1", "question": "Where?", "answers": [{"text": "Rome"}, {"text": "in Rome"}]}]
    missing = {"id": "q2", "question": "Who?", "answers": [], "is_impossible": True}
    document = {"title": "T", "paragraphs": [{"context": "We are in Rome.", "qas": [*questions, missing]}]}
    path = tmp_path / "train-v2.0.json"
    path.write_text(json.dumps({"version": "v2.0", "data": [document, document]}))
    with pytest.raises(DataError, match=r"train-v2\.0\.json record 1 question q2: 'answers' holds no answer\."):
        list_texts(DataRequest(path))
    found = list_texts(DataRequest(path, held_out=0.0, skip_bad=True)).train
    assert [(one.prompt, one.answer, one.others) for one in found] == [
        ("We are in Rome.\n\nWhere?", "Rome", ("in Rome",))
    ] * 2


@pytest.mark.parametrize(
    ("user", "assistant"),
    [
        ({"role": "User"}, {"role": "Assistant "}),
        ({"from": "human"}, {"from": "chatgpt"}),
        ({"from": "prompter"}, {"from": "bot"}),
        ({"role": "human"}, {"role": "AI"}),
    ],
)
@pytest.mark.parametrize("key", ["content", "value"])
def test_roles_by_other_names(read, user, assistant, key):
    one, style, _ = read({"conversations": [{**user, key: "Hi"}, {**assistant, key: "Ho"}]})
    assert (style, one.turns, one.answer) == ("chat", (Turn("user", "Hi"),), "Ho")


@pytest.mark.parametrize(
    "silent",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"weight": "0.0"},
        {"train": False},
        {"train": "false"},
        {"loss": False},
        {"loss": 0},
    ],
)
def test_messages_that_are_not_to_be_learned(read, silent):
    turns = [("user", "a", {}), ("assistant", "b", silent), ("user", "c", {}), ("assistant", "d", {})]
    one, _, _ = read({"messages": [{"role": role, "content": text, **more} for role, text, more in turns]})
    assert [turn.learned for turn in one.messages] == [True, False, True, True]
    turns[1], turns[3] = ("assistant", "b", {}), ("assistant", "d", silent)
    one, _, _ = read({"messages": [{"role": role, "content": text, **more} for role, text, more in turns]})
    assert (one.answer, [turn.content for turn in one.messages]) == ("b", ["a", "b"])
    with pytest.raises(DataError, match=r"d\.jsonl:1: every answer of the assistant has weight 0; there is noth"):
        read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **silent}]})


def test_openais_older_calls_and_refusals(read):
    called = {"role": "assistant", "content": None, "function_call": {"name": "sum", "arguments": '{"a": 1}'}}
    one, _, _ = read({"messages": [{"role": "user", "content": "1?"}, called], "functions": [{"name": "sum"}]})
    assert one.answer == '{"name": "sum", "arguments": {"a": 1}}'
    assert json.loads(one.tools) == [{"type": "function", "function": {"name": "sum"}}]
    for refused in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        one, _, _ = read({"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", **refused}]})
        assert one.answer == "No."


CALL = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}


def test_calls_of_tools_with_empty_content(read):
    one, _, _ = read(
        {
            "messages": [
                {"role": "user", "content": "1?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "It is 1."},
            ],
            "tools": [{"type": "function", "function": {"name": "sum"}}],
        }
    )
    called = one.turns[1].fields()
    assert called["tool_calls"][0]["function"] == {"name": "sum", "arguments": {"a": 1}}
    assert called["content"] == ""
    assert json.loads(one.tools)[0]["function"]["name"] == "sum"
    assert one.answer == "It is 1."


def test_parts_of_a_message_and_weights(read):
    one, _, _ = read(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
                {"role": "assistant", "content": "No", "weight": 0},
                {"role": "user", "content": "Well?"},
                {"role": "assistant", "content": "Yes", "weight": 1},
            ]
        }
    )
    assert one.turns[0].content == "Hi you"
    assert [turn.learned for turn in one.messages] == [True, False, True, True]


def test_text_that_is_not_used_is_named(read):
    record = {"instruction": "Sum up.", "input": "A b c.", "output": "Abc.", "id": 7, "topic": "abc"}
    _, _, notes = read(record, columns={"instruction": "prompt", "output": "answer"})
    assert notes == (
        "Read: prompt, answer. Not used, though there is text in it: input, topic. Without --map these are read:"
        " instruction, input, output.",
    )
    _, _, notes = read(record)
    assert notes == ("Read: instruction, input, output. Not used, though there is text in it: topic.",)
    turns = [{"role": "user", "content": "a", "context": "b"}, {"role": "assistant", "content": "c", "id": "x"}]
    assert read({"messages": turns})[2] == ("Read: messages. Not used, though there is text in it: messages.context.",)


def test_a_system_prompt_that_says_nothing_is_none(read):
    empty, turns = {"role": "system", "content": " "}, [("user", "a"), ("assistant", "b")]
    one, _, _ = read({"messages": [empty, *({"role": role, "content": said} for role, said in turns)]})
    assert [(turn.role, turn.content) for turn in one.messages] == turns
    with pytest.raises(DataError, match=r"d\.jsonl:1: no message but an empty system prompt\."):
        read({"messages": [empty, empty]})


def test_the_hash_of_a_chat_with_its_systems_words_is_that_of_before(tmp_path):
    turns = [{"role": r, "content": c} for r, c in (("system", "Be kind."), ("user", "Hi"), ("assistant", "Ho"))]
    path = tmp_path / "d.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 2)
    found = list_texts(DataRequest(path, held_out=0.0))
    assert found.digest == "442e70a2719527ce692210e34ed6665e65336586f88f729f476bd7059c19b8b7"
    assert shared_system(found.train) == "Be kind."


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "Who?", "answers": []}, "'answers' holds no answer"),
        ({"question": "Who?", "choices": ["a", "b"], "answer": 2}, "answer 2 is none of the choices A, B"),
        ({"instruction": "Do.", "input": 3, "output": "x"}, "'input' is not text but int"),
        ({"conversations": [{"from": "robot", "value": "x"}] * 2}, "role 'robot' is not one of"),
        ({"messages": "[{"}, "'messages' is invalid JSON"),
        ({"question": "Q?", "options": ["a"], "answer": "A"}, "'options' is a list of two or more texts"),
        ({"prompt": "p", "answer": float("inf")}, "empty answer"),
        ({"instruction": "a", "output": "b", "history": 5}, "'history' is a list of pairs of texts"),
        ({"question": "a", "choices": [["x"], ["y"]], "answer": 0}, "'choices' is a list of two or more texts"),
        ({"text": "a", "label": float("inf")}, "empty label"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]},
            "a message holds image_url; only text can be read",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "x"},
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]},
                ]
            },
            "the arguments of a call are invalid JSON",
        ),
    ],
)
def test_records_that_fit_no_shape_are_refused_with_their_line(read, record, message):
    with pytest.raises(DataError, match=f"d.jsonl:1: {message}"):
        read(record)


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"dialog": CHAT, "other": CHAT}, "Try --map dialog=messages$"),
        ({"input": CHAT[:1], "ideal": "y"}, "Try --map input=prompt --map ideal=completion$"),
        ({"input": {"messages": CHAT[:1]}, "better": CHAT[1:]}, r"label or text\.$"),
        ({"query": "x", "tools": '[{"name": "f"}]', "answers": "[]"}, "Try --map query=prompt --map answers=answer$"),
        ({"my prompt": "x", "answer": "y"}, "Try --map 'my prompt=prompt'$"),
        (
            {"system": "SYSTEM: Be kind.", "chat": "USER: Hi\n\nASSISTANT: Ho <|endoftext|>"},
            "'chat' holds whole dialogues; learn them as they stand with --map chat=text$",
        ),
        ({"topic": "x", "input": "[|Human|] Hi [|AI|] Ho"}, "with --map input=text$"),
        ({"id": "7", "data": ["Hi", "Ho"]}, r"label or text\.$"),
        ({"content": "def f(): pass", "path": "a.py"}, "Try --map content=text$"),
        ({"ID": 1, "Joke": "Ha."}, "Try --map Joke=text$"),
        ({"tokens": ["A", "b"], "ner_tags": [0, 1]}, r"label or text\.$"),
        (
            {"question": "Q", "distractor1": "a", "distractor2": "b", "correct_answer": "c"},
            "Try --map question=prompt --map correct_answer=answer$",
        ),
        (
            {"question": "Q", "best_answer": "a", "incorrect_answers": ["b", "c"]},
            "Try --map question=prompt --map best_answer=answer$",
        ),
        (
            {"question": "Q", "options": ["a", "b"], "rationale": "r", "correct": "A"},
            "Try --map options=choices --map correct=answer$",
        ),
        ({"question": "Q", "answer": {"aliases": ["a"], "value": "A"}}, "with --map answer.value=answer$"),
        ({"context": {"title": ["a"]}, "question": "Q", "answer": "A"}, "Leave it out with --map context=other$"),
        (
            {"ind": 4, "activity_label": "Roof", "ctx_a": "A", "ctx": "A b", "endings": ["c", "d"], "label": "1"},
            "Try --map ctx=question --map endings=choices --map label=answer$",
        ),
        ({"qid": 1, "question": "Q", "response_j": "a", "response_k": "b"}, "--map question=prompt --map response_j=a"),
        (
            {"ind": 4, "ctx": "A b", "endings": ["c", "d"], "label": "1"},
            "Try --map ctx=question --map endings=choices --map label=answer$",
        ),
        (
            {"input": {"messages": CHAT[:1]}, "preferred_output": CHAT[1:], "non_preferred_output": CHAT[1:]},
            "Try --map input.messages=prompt --map preferred_output=completion$",
        ),
    ],
)
def test_the_hint_for_unknown_columns_can_be_typed(read, record, hint):
    with pytest.raises(DataError, match=hint):
        read(record)


def test_weights_of_examples_are_named_as_not_used(read):
    _, _, notes = read({"prompt": "a", "answer": "b", "weight": 0}, {"prompt": "a", "answer": "b", "weight": 1})
    assert notes == ("Column 'weight' is not used: every example counts alike.",)


def test_a_record_nested_deeply_beside_a_chat_is_read(read):
    one, _, notes = read({"messages": CHAT, "more": json.loads("[" * 900 + '"t"' + "]" * 900)})
    assert (one.answer, notes) == ("y", ("Read: messages. Not used, though there is text in it: more.",))


@pytest.mark.parametrize("called", ["f", None, 3, ["f"]])
def test_calls_that_are_none_are_refused(read, called):
    record = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}
    with pytest.raises(DataError, match=r"d\.jsonl:1: a call of a tool is a record with name and arguments"):
        read({"messages": [{"role": "user", "content": "a"}, record]})


_anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.dictionaries(st.sampled_from(WORDS), _anything, min_size=1, max_size=6), min_size=1, max_size=3))
def test_any_records_with_known_names_are_examples_or_a_data_error(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    try:
        found = list_texts(DataRequest(path, held_out=0.0))
    except DataError as error:
        message = str(error)
    else:
        assert found.train
        return
    assert "any.jsonl" in message or message.startswith("Found ")
    assert "cannot be read" not in message, "each is told what is wrong"


def test_chats_that_wait_for_an_answer(tmp_path):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    turns = [Turn("system", "Be kind."), Turn("user", "Hi")]
    one, several, lines = (tmp_path / name for name in ("one.json", "several.json", "lines.jsonl"))
    one.write_text(json.dumps({"messages": chat}))
    several.write_text(json.dumps([chat, chat]))
    lines.write_text(f"{json.dumps(chat)}\n\n{json.dumps({'messages': chat})}\n")
    assert read_chats(one) == [turns]
    assert read_chats(several) == read_chats(lines) == [turns, turns]
    one.write_text(json.dumps(chat))
    assert read_chats(one) == [turns]


@pytest.mark.parametrize(
    "record",
    [
        {"system": "Be kind.", "messages": [{"role": "user", "content": "Hi"}]},
        {"system_prompt": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}]},
        {
            "systemInstruction": {"parts": [{"text": "Be kind."}]},
            "contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        },
        {"Messages": json.dumps([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])},
    ],
)
def test_a_system_prompt_beside_messages_is_asked_with(tmp_path, record):
    for name, content in (("c.json", json.dumps(record)), ("c.jsonl", json.dumps(record) + "\n" + json.dumps(record))):
        (tmp_path / name).write_text(content)
        chats = read_chats(tmp_path / name)
        assert chats == [[Turn("system", "Be kind."), Turn("user", "Hi")]] * len(chats)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "c.json: expected a list of messages"),
        ('[{"role": "assistant", "content": "x"}]', "c.json: the last message is by 'assistant'"),
        ("x", "c.json:1: invalid JSON"),
        ("", "holds no messages"),
    ],
)
def test_files_without_a_chat_to_answer(tmp_path, text, message):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_chats(path)
