"""Texts that tokenizer or template refuse, and of other kinds that are learned or refused."""

import json
import shutil

import pytest
from tiny_chat import chat, encoder_of, run, tokenizer_of, written
from tiny_lm import TEMPLATE, load, save_model, small_tokenizer
from treelora_backends.causal_lm.render import Encoder
from treelora_backends.causal_lm.task import read_lm_task

from treelora_cli.backend.runtime import Silent
from treelora_cli.backend.values import DataRequest
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import DataError, ModelError


def narrow_encoder():
    """An encoder for a model that does not embed the tokenizer's last token, ``<|call|>``."""
    tokenizer = tokenizer_of(None)
    embedded = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    return Encoder(tokenizer, 64, [tokenizer.eos_token_id], vocabulary=embedded)


def test_text_that_the_tokenizer_refuses_is_named():
    with pytest.raises(DataError, match=r"d.jsonl:2: the tokenizer refuses this text \(TypeError"):
        encoder_of(None).encode(TextExample("d.jsonl:2", "a\ud800b", "x"), "plain", ())


def test_a_token_that_the_model_does_not_embed_is_named(tmp_path):
    rows = [{"prompt": "a <|call|>" if n == 1 else "hi", "answer": f"word {n}"} for n in range(3)]
    path = written(tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError, match=r"d.jsonl:2: holds '<\|call\|>', token \d+; the model embeds \d+"):
        read_lm_task(DataRequest(path, held_out=0.0), narrow_encoder(), Silent())
    task = read_lm_task(DataRequest(path, held_out=0.0, skip_bad=True), narrow_encoder(), Silent())
    assert (len(task.train), len(task.listing.train)) == (2, 2)
    assert task.notes[0].startswith("1 bad examples were skipped")


def test_a_held_out_text_that_is_refused_is_named_before_training(tmp_path):
    good = written(tmp_path / "train.jsonl", *[{"prompt": "hi", "answer": f"word {n}"} for n in range(3)])
    bad = written(tmp_path / "val.jsonl", {"prompt": "<|call|>", "answer": "word"})
    with pytest.raises(DataError, match=r"val.jsonl:1: holds '<\|call\|>'"):
        read_lm_task(DataRequest(good, val=bad), narrow_encoder(), Silent())


def test_messages_that_the_template_refuses_are_named(tmp_path):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('Begin with the user') }}{% endif %}" + TEMPLATE
    rows = [
        {"messages": [{"role": r, "content": "x"} for r in roles]}
        for roles in (("user", "assistant"), ("assistant",) * 2)
    ]
    with pytest.raises(
        DataError,
        match=r"d.jsonl:2: the model's chat template refuses .* \(Begin with the user\)\. Mend it, or pass --skip",
    ):
        read_lm_task(DataRequest(written(tmp_path / "d.jsonl", *rows), held_out=0.0), encoder_of(strict), Silent())


@pytest.mark.parametrize(
    ("template", "added", "message"),
    [
        (None, {"tokens": ["colourful"]}, r"writes token \d+ \('colourful'\), the model embeds \d+"),
        (TEMPLATE + "<|more|>", {"special": ["<|more|>"]}, r"writes token \d+ \('<\|more\|>'\)"),
    ],
)
def test_a_tokenizer_beyond_the_embedding_is_found_at_once(tmp_path, template, added, message):
    folder = save_model(tmp_path / "m", "llama", template)
    tokenizer = small_tokenizer(template)
    tokenizer.add_tokens(added.get("tokens", []))
    tokenizer.add_special_tokens({"additional_special_tokens": added.get("special", [])})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_special_tokens_beyond_the_embedding_that_nothing_uses_are_harmless(tmp_path):
    folder = save_model(tmp_path / "m", "llama", TEMPLATE)
    tokenizer = small_tokenizer(TEMPLATE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(DataError, match=r"c:1: holds '<image>'"):
        load(folder).encoder.encode(chat("Hi <image>", "Ho"), "chat", ())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A project of one task: a colour for each of four prompts."""
    root = tmp_path_factory.mktemp("plain")
    model = save_model(root / "m", "llama")
    rows = [{"prompt": f"What colour is {word}?", "answer": f"it is red {n}"} for n, word in enumerate("abcd")]
    written(root / "first.jsonl", *rows)
    assert run("init", root / "p", "--backend", "causal-lm", "--model", model, "--epochs", "1", "--blocks", "0") == 0
    assert run("-C", root / "p", "train-task", root / "first.jsonl", "--no-eval") == 0
    return root


def test_the_same_prompts_with_other_answers_are_reported(plain, tmp_path, capsys):
    rows = [{"prompt": f"What colour is {word}?", "answer": f"it is green {n}"} for n, word in enumerate("abx")]
    same = [{"prompt": f"What colour is {word}?", "answer": f"it is red {n}"} for n, word in enumerate("ab")]
    for name, records, told in (("other", rows, True), ("same", same, False)):
        project = tmp_path / name
        shutil.copytree(plain / "p", project)
        capsys.readouterr()
        path = written(tmp_path / f"{name}.jsonl", *records)
        assert run("-C", project, "train-task", path, "--no-eval", "--val", path) == 0
        shown = capsys.readouterr().err
        assert ("2 inputs are those of task 'first', with other answers" in shown) is told


def test_a_task_of_one_example_is_learned(plain, tmp_path, capsys):
    project = shutil.copytree(plain / "p", tmp_path / "p")
    path = written(tmp_path / "one.jsonl", {"prompt": "Who?", "answer": "Ann was it"})
    assert run("-C", project, "train-task", path) == 0
    capsys.readouterr()
    assert run("--json", "-C", project, "predict", "Who?") == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["task"] in ("one", "first", None)


def test_an_empty_answer_is_refused_with_its_line(plain, tmp_path, capsys):
    path = written(tmp_path / "d.jsonl", {"prompt": "Who?", "answer": "Ann"}, {"prompt": "Who?", "answer": ""})
    assert run("-C", plain / "p", "train-task", path) == 4
    assert "d.jsonl:2: empty answer" in capsys.readouterr().err


def test_an_answer_longer_than_the_context_is_cut_without_an_end_and_counted(plain):
    base = load(plain / "m")
    path = written(plain / "long.jsonl", *[{"prompt": "Why?", "answer": f"{n} red" * 300} for n in range(2)])
    task = base.read_task(DataRequest(path, held_out=0.0))
    assert all(len(one) == base.context for one in task.train)
    assert not any(one.answer[-1] in base.encoder.end_ids for one in task.train)
    assert "2 of 2 training examples: answer cut to fit 128 tokens" in task.notes[-1]


def test_a_prompt_that_is_split_into_bytes_is_read_and_written_whole():
    encoder = encoder_of(None)
    one = encoder.encode(TextExample("", "今天怎么样 🐝", "很好 🐝"), "plain", ())
    assert len(one.prompt) > len("今天怎么样 🐝")
    assert encoder.decode(one.answer.tolist()) == "很好 🐝"


def test_a_base_without_an_end_token_is_said(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.eos_token = None
    encoder = Encoder(tokenizer, 64, [])
    path = written(tmp_path / "d.jsonl", *[{"prompt": "Why?", "answer": f"word {n}"} for n in range(3)])
    task = read_lm_task(DataRequest(path, held_out=0.0), encoder, Silent())
    assert "have no end (the tokenizer names no end token)" in task.notes[-1]
    assert encoder.tokenizer.decode(task.train[0].answer.tolist()) == f" {task.listing.train[0].answer}"


def test_an_end_inside_an_answer_is_said(tmp_path):
    rows = [{"prompt": "a", "answer": "red </s> green"}, {"prompt": "b", "answer": "red</s>\n"}]
    notes = read_lm_task(
        DataRequest(written(tmp_path / "d.jsonl", *rows), held_out=0.0), encoder_of(None), Silent()
    ).notes
    assert notes == ("1 training examples hold '</s>' inside an answer: what is generated stops there.",)
    turns = [{"role": "user", "content": "a </s> b"}, {"role": "assistant", "content": "red"}]
    chats = written(tmp_path / "c.jsonl", {"messages": turns * 2})
    assert read_lm_task(DataRequest(chats, held_out=0.0), encoder_of(TEMPLATE), Silent()).notes == ()


def of_words(*words):
    """Return a tokenizer that knows some words alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = {word: place for place, word in enumerate([*words, "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="?" if "?" in words else None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown = {"unk_token": "?"} if "?" in words else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **unknown)


def test_what_the_tokenizer_does_not_know_is_said(tmp_path):
    rows = [
        {"prompt": "A A", "answer": "A C"},
        {"prompt": "A zebra", "answer": "C"},
        {"prompt": "A", "answer": "zebra"},
    ]
    encoder = Encoder(of_words("?", "A", "C"), 16, [3])
    notes = read_lm_task(DataRequest(written(tmp_path / "d.jsonl", *rows), held_out=0.0), encoder, Silent()).notes
    assert notes == ("1 training examples hold what the tokenizer does not know: '?' is learned for it.",)


def test_a_tokenizer_of_few_signs_and_a_template_that_writes_no_chat(tmp_path, capsys):
    model = save_model(tmp_path / "m", "llama")
    tokenizer = of_words("A", "C", "G", "T")
    tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    tokenizer.save_pretrained(model)
    path = written(tmp_path / "d.jsonl", *[{"prompt": f"A {w}", "answer": f"{w} A"} for w in "ACGT"])
    assert run("init", tmp_path / "p", "--model", model, "--epochs", "1", "--blocks", "0") == 0
    assert run("-C", tmp_path / "p", "train-task", path) == 0
    assert run("-C", tmp_path / "p", "predict", "A C") == 0
    assert run("-C", tmp_path / "p", "predict", "zebra") == 4
    assert "prompt 1: the tokenizer refuses this text" in capsys.readouterr().err
    for form in ("merged", "routed"):
        assert run("-C", tmp_path / "p", "export", tmp_path / form, "--format", form) == 0
