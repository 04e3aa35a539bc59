import json
from pathlib import Path

import pytest

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.text import list_texts
from treelora_cli.errors import DataError


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def labelled(count: int):
    return [{"sentence": f"text {n}", "label": "Good" if n % 2 else "Bad"} for n in range(count)]


@pytest.fixture
def olora(tmp_path):
    for name, count in (("train", 20), ("test", 6)):
        (tmp_path / f"{name}.json").write_text(json.dumps(labelled(count)))
    (tmp_path / "labels.json").write_text('["Good", "Bad"]')
    return tmp_path


def test_olora_folder(olora):
    found = list_texts(DataRequest(olora))
    assert (found.style, found.labels, found.metric) == ("labels", ("Good", "Bad"), "accuracy")
    assert (len(found.train), len(found.test)) == (20, 6)
    assert found.train[1].prompt == "text 1"
    assert found.train[1].answer == "Good"


def test_a_label_outside_labels_json_is_named_with_its_place(olora):
    (olora / "train.json").write_text(json.dumps([*labelled(3), {"sentence": "x", "label": "Godo"}]))
    message = r"train.json record 4: label 'Godo' is not in labels.json \(Good, Bad\) \(did you mean 'Good'\?\)"
    with pytest.raises(DataError, match=message):
        list_texts(DataRequest(olora))
    found = list_texts(DataRequest(olora, skip_bad=True))
    assert len(found.train) == 3
    assert "1 bad examples were skipped" in found.notes[0]


def test_test_file_alone_is_split(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps(labelled(40)))
    found = list_texts(DataRequest(tmp_path, held_out=0.25))
    assert (len(found.train), len(found.test)) == (30, 10)
    assert sum(one.answer == "Good" for one in found.test) == 5


def test_split_and_limits_depend_on_the_seed_only(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{n}?", "answer": f"value {n}"} for n in range(50)])
    first, again = (list_texts(DataRequest(path, train_limit=10, test_limit=3)) for _ in range(2))
    other = list_texts(DataRequest(path, train_limit=10, test_limit=3, seed=1))
    assert first.train == again.train
    assert first.digest == again.digest
    assert first.train != other.train
    assert (len(first.train), len(first.test)) == (10, 3)
    assert not {one.prompt for one in first.train} & {one.prompt for one in first.test}


def test_recorded_request_finds_the_same_held_out_examples(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{n}?", "answer": "ab"[n % 2]} for n in range(50)])
    request = DataRequest(path, test_limit=3)
    assert list_texts(DataRequest.from_json(request.to_json())).test == list_texts(request).test


def test_prompt_and_answer_with_a_closed_set_of_answers(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": f"{n}?", "answer": " ABC"[1 + n % 3]} for n in range(30)])
    found = list_texts(DataRequest(path))
    assert (found.style, found.labels, found.metric) == ("plain", ("A", "B", "C"), "accuracy")


@pytest.mark.parametrize(
    ("answer", "metric"),
    [("{n} apples", "exact_match"), ("a long story about {n} apples in a tree", "rouge_l")],
)
def test_open_answers_choose_their_metric_by_length(tmp_path, answer, metric):
    rows = [{"prompt": f"{n}?", "answer": answer.format(n=n)} for n in range(30)]
    found = list_texts(DataRequest(write_jsonl(tmp_path / "d.jsonl", rows)))
    assert (found.labels, found.metric) == ((), metric)


def test_metric_can_be_set(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "p", "answer": f"{n} x"} for n in range(30)])
    assert list_texts(DataRequest(path, metric="sari")).metric == "sari"
    with pytest.raises(DataError, match=r"Unknown metric 'rouge' \(did you mean 'rouge_l'\?\)"):
        list_texts(DataRequest(path, metric="rouge"))
    with pytest.raises(DataError, match="token_accuracy"):
        list_texts(DataRequest(path, metric="token_accuracy"))


def test_chat_keeps_the_turns_before_the_last_answer(tmp_path):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": turns}] * 3)
    found = list_texts(DataRequest(path, held_out=0.0))
    assert found.style == "chat"
    assert [turn.role for turn in found.train[0].turns] == ["system", "user"]
    assert (found.train[0].prompt, found.train[0].system) == ("Hi", "Be kind.")
    assert found.train[0].answer == "Hello!"


def test_csv_parquet_and_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "d.csv").write_text("text\n" + "".join(f'"story {n}, told"\n' for n in range(20)))
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"] * 10, "answer": [1, 2] * 10}), tmp_path / "d.parquet")
    assert list_texts(DataRequest(tmp_path / "d.csv")).metric == "token_accuracy"
    assert list_texts(DataRequest(tmp_path / "d.parquet")).labels == ("1", "2")


def test_columns_are_mapped(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "q", "label": "l"}] * 3)
    with pytest.raises(DataError, match="Try --map question=prompt --map label=answer"):
        list_texts(DataRequest(path))
    found = list_texts(DataRequest(path, columns={"question": "prompt", "label": "answer"}, held_out=0.0))
    assert found.train[0].prompt == "q"


def test_val_replaces_the_held_out_part(olora, tmp_path_factory):
    other = tmp_path_factory.mktemp("val") / "v.json"
    other.write_text(json.dumps(labelled(4)))
    assert len(list_texts(DataRequest(olora, val=other)).test) == 4


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a"'], "d.jsonl:2: invalid JSON"),
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a", "answer": " "}'], "d.jsonl:2: empty answer"),
        (['{"prompt": "a", "answer": "b"}', '{"prompt": null, "answer": "b"}'], "d.jsonl:2: empty prompt"),
        (['{"prompt": "a", "answer": "b"}', '{"prompt": "a"}'], "d.jsonl:2: no 'answer'"),
        (['{"prompt": ["a"], "answer": "b"}'], "d.jsonl:1: 'prompt' is not text but list"),
        (['{"x": 1}'], r"Found x. Need messages, prompt\+answer, sentence\+label or text. Try --map x=text"),
        (['{"messages": []}'], "d.jsonl:1: 'messages' is a list of two or more"),
        (
            ['{"messages": [{"role": "narrator", "content": "a"}, {"role": "user", "content": "a"}]}'],
            "role 'narrator' is not one",
        ),
        (
            ['{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}]}'],
            "by 'user' and not by",
        ),
        (['{"messages": [{"role": "user", "content": ""}, {"role": "user", "content": "a"}]}'], "empty content"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        list_texts(DataRequest(path))


def test_images_are_refused(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds images. This project's backend is causal-lm"):
        list_texts(DataRequest(tmp_path))
    with pytest.raises(DataError, match=r"a.png: an image"):
        list_texts(DataRequest(tmp_path / "cats" / "a.png"))


def test_labels_json_must_be_a_list_of_names(olora):
    (olora / "labels.json").write_text('["Good", "Good"]')
    with pytest.raises(DataError, match="expected distinct names in their order, one a line or as a JSON list"):
        list_texts(DataRequest(olora))


def test_a_missing_file_is_met_with_the_nearest_name(tmp_path):
    write_jsonl(tmp_path / "fomc.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"Did you mean .*fomc.jsonl"):
        list_texts(DataRequest(tmp_path / "fmoc.jsonl"))
