"""From examples to token ids and batches."""

import pytest
from tiny_lm import (
    TEMPLATE,
    small_tokenizer,
)
from treelora_backends.causal_lm.batches import collate, shuffled_batches
from treelora_backends.causal_lm.render import Encoder, cut_middle

from treelora_cli.data.examples import TextExample


@pytest.fixture
def encoder():
    tokenizer = small_tokenizer(TEMPLATE)
    return Encoder(tokenizer, 64, [tokenizer.eos_token_id])


@pytest.mark.parametrize(
    ("style", "labels", "prompt", "answer"),
    [
        ("plain", (), "Is it red?", " green<|end|>"),
        ("labels", ("red", "green"), "Is it red?\nOptions: red, green\nAnswer:", " green<|end|>"),
        ("chat", (), "<|user|>Is it red?<|end|><|assistant|>", "green<|end|>"),
    ],
)
def test_what_the_model_sees(encoder, style, labels, prompt, answer):
    encoded = encoder.encode(TextExample("", "Is it red?", "green"), style, labels)
    assert encoder.tokenizer.decode(encoded.prompt.tolist()) == prompt
    assert encoder.tokenizer.decode(encoded.answer.tolist()) == answer


def test_free_text_is_learned_from_its_second_token_on(encoder):
    encoded = encoder.encode(TextExample("", "", "red green red"), "text", ())
    assert len(encoded.prompt) == 1
    assert encoder.tokenizer.decode([*encoded.prompt, *encoded.answer]) == "red green red<|end|>"


def test_a_text_that_the_tokenizer_closes_has_one_end():
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    encoder = Encoder(tokenizer, 64, [0])
    for style, one in (("text", TextExample("", "", "red green")), ("plain", TextExample("", "red", "green"))):
        encoded = encoder.encode(one, style, ())
        assert tokenizer.decode([*encoded.prompt, *encoded.answer]) == "red green<|end|>"


def test_a_chat_without_template_is_written_out():
    tokenizer = small_tokenizer()
    text = Encoder(tokenizer, 64, [0]).prompt_text(TextExample("", "Hi", ""), "chat", ())
    assert text == "User: Hi\nAssistant:"


def test_truncation_keeps_the_answer_and_both_ends_of_the_prompt(encoder):
    encoded = encoder.encode(TextExample("", "start " + "red " * 200 + "end?", "green"), "plain", ())
    assert len(encoded) == 64
    assert encoded.cut == "prompt"
    text = encoder.tokenizer.decode(encoded.prompt.tolist())
    assert text.startswith("start")
    assert text.endswith("end?")
    assert encoder.tokenizer.decode(encoded.answer.tolist()) == " green<|end|>"


def test_an_answer_that_is_too_long_is_cut_and_counted(encoder):
    encoded = encoder.encode(TextExample("", "Why?", "red " * 200), "plain", ())
    assert encoded.cut == "answer"
    assert len(encoded) == 64
    assert encoder.tokenizer.decode(encoded.prompt.tolist()) == "Why?"


def test_cut_middle():
    assert cut_middle(range(10), 8) == [0, 1, 4, 5, 6, 7, 8, 9]
    assert cut_middle(range(3), 8) == [0, 1, 2]


def test_only_answers_are_labelled(encoder):
    examples = [encoder.encode(TextExample("", p, a), "plain", ()) for p, a in (("What is it?", "red"), ("It?", "bad"))]
    labelled = collate(examples, 0)
    for row, column, target in zip(labelled.rows, labelled.columns, labelled.targets, strict=True):
        one = examples[int(row)]
        assert int(column) >= len(one.prompt) - 1
        assert int(labelled.batch.ids[row, column + 1]) == int(target)
    assert len(labelled.targets) == sum(len(one.answer) for one in examples)


def test_batches_hold_every_example_once_and_similar_lengths():
    lengths = [(n * 37) % 101 + 1 for n in range(200)]
    batches = list(shuffled_batches(lengths, 25, seed=3))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert batches == list(shuffled_batches(lengths, 25, seed=3))
    assert batches != list(shuffled_batches(lengths, 25, seed=4))
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches) / len(batches)
    assert spread < 20
