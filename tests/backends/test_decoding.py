"""Answers that are written side by side are those that are written one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import TEMPLATE, load, save_model
from treelora_backends.causal_lm.answers import Answerer, Manner
from treelora_backends.causal_lm.batches import Batch, pad
from treelora_backends.causal_lm.network.decoding import Length, decoded, generated, is_plain, numbers_of_token

from treelora_cli.backend import adapters
from treelora_cli.data.examples import TextExample

WORDS = ["what", "colour", "is", "the", "apple", "red", "green", "good", "bad", "happy", "sad"]
MOST_NEW = 12
LENGTH = Length(0, MOST_NEW)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    """A tiny model in fp32 with an adapter that changes its answers."""
    found = load(save_model(tmp_path_factory.mktemp("lm") / request.param, request.param, TEMPLATE))
    adapters.write_slot(found.network, adapters.reference_point(found.network, found.layers, 4.0, 0))
    with torch.no_grad():
        for _, up in adapters.slot_parameters(found.network, found.layers):
            up.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return found


def prompts_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    return [torch.randint(4, 250, (n,), generator=generator).numpy().astype("int32") for n in lengths]


def alone(base, prompt, ends) -> list[int]:
    """What transformers' own ``generate`` writes after one prompt."""
    ids = torch.tensor([prompt.tolist()])
    return generated(base.lm.model, Batch(ids, torch.ones_like(ids)), LENGTH, ends, 0)[0]


def test_side_by_side_equals_one_by_one_whenever_each_ends(base):
    prompts = prompts_of(16)
    free = [alone(base, prompt, ()) for prompt in prompts]
    assert len({tuple(one) for one in free}) > 4
    ends = tuple({one[place] for place, one in enumerate(free) if 0 < place < MOST_NEW and place % 3})
    wanted = [alone(base, prompt, ends) for prompt in prompts]
    assert len({len(one) for one in wanted}) > 2  # some end early, some late
    assert base.lm.divides
    assert base.lm.generate(pad(prompts, 0, left=True), LENGTH, ends, 0) == wanted


def test_a_learned_end_may_not_come_before_the_first_word(base):
    prompts = prompts_of(8)
    first = [alone(base, prompt, ())[0] for prompt in prompts]
    ends = (first[0],)
    batch = pad(prompts, 0, left=True)
    assert base.lm.generate(batch, LENGTH, ends, 0)[0] == []
    found = base.lm.generate(batch, Length(1, MOST_NEW), ends, 0)
    assert all(found)
    assert not set(ends) & {one[0] for one in found}
    assert found == generated(base.lm.model, batch, Length(1, MOST_NEW), ends, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 8), st.integers(0, 3))
def test_ended_texts_leave_and_nobody_elses_words_are_taken(lengths, most_new, least):
    """A model that says row * 100 + step until a text's length, then 0; it is asked for those that go on alone."""
    shapes = []

    class Cache:
        layers = ()
        rows = torch.arange(len(lengths))

        def batch_select_indices(self, places):
            self.rows = self.rows[places]

    def step(ids, mask, cache, barred):
        assert barred == ((0,) if mask.shape[1] < 3 + least else ())
        cache = cache or Cache()
        assert len(ids) == len(mask) == len(cache.rows)
        done = mask.shape[1] - 3
        shapes.append(len(ids))
        ended = [done >= lengths[row] and not barred for row in cache.rows]
        words = [row * 100 + done + 1 for row in cache.rows]
        return torch.tensor([0 if end else word for end, word in zip(ended, words, strict=True)]), cache

    batch = pad([torch.ones(3).numpy()] * len(lengths), 0, left=True)
    found = decoded(step, batch, Length(least, most_new), (0,))
    assert found == [
        [row * 100 + n + 1 for n in range(min(max(own, least), most_new))] for row, own in enumerate(lengths)
    ]
    steps = min(most_new, max(*lengths, least) + 1)
    assert len(shapes) == steps
    for count, rows in enumerate(shapes):
        going = sum(max(own, least) >= count for own in lengths)
        assert going <= rows
        assert count == 0 or rows == going or going > 0.75 * rows


def test_settings_of_a_model_that_change_the_next_token_are_followed(base):
    assert is_plain(base.lm.model.generation_config)
    prompts = prompts_of(5)
    plain = base.lm.generate(pad(prompts, 0, left=True), LENGTH, (), 0)
    base.lm.model.generation_config.repetition_penalty = 5.0
    try:
        assert not is_plain(base.lm.model.generation_config)
        found = base.lm.generate(pad(prompts, 0, left=True), LENGTH, (), 0)
        assert found == [alone(base, prompt, ()) for prompt in prompts] != plain
    finally:
        base.lm.model.generation_config.repetition_penalty = None


def test_many_short_prompts_are_one_batch_on_a_cpu_and_keys_and_values_bound_it(base, monkeypatch):
    heads = {"llama": 2, "gpt2": 4}[base.lm.model.config.model_type]
    assert numbers_of_token(base.lm.model) == 2 * 2 * heads * 8  # keys and values, blocks, heads, width
    assert base.lm.decoded_at_once(4) == 2**28 // (32 * heads * 4)
    examples = [TextExample("", " ".join(WORDS[: 1 + n % 9]) + str(n), "") for n in range(40)]
    manner = Manner("plain", (), False, 6)
    written = []
    generate = base.lm.generate

    def counted(batch, *arguments):
        written.append(batch.ids.shape)
        return generate(batch, *arguments)

    monkeypatch.setattr(base.lm, "generate", counted)
    together = Answerer(base.lm, base.encoder, base.runtime).answers(examples, manner, 64)
    assert len(written) == 1
    monkeypatch.setattr(base.lm, "decoded_at_once", lambda _bytes: 100)
    written.clear()
    assert Answerer(base.lm, base.encoder, base.runtime).answers(examples, manner, 64) == together
    assert len(written) > 5
    assert all(rows == 1 or rows * (width + 6) <= 100 for rows, width in written)


def test_answers_in_bf16_multiply_with_weights_that_are_cast_once(base, monkeypatch):
    examples = [TextExample("", " ".join(WORDS[:n]), "") for n in range(1, 6)]
    monkeypatch.setattr(base.runtime, "forward_precision", "bf16")
    layer = base.lm.blocks[0].self_attn.o_proj if hasattr(base.lm.blocks[0], "self_attn") else None
    if layer is None:
        pytest.skip("gpt2's layers are Conv1D, which autocast casts")
    layer = layer.base_layer
    seen = []
    layer.register_forward_hook(lambda module, _i, out: seen.append(("forward" in vars(module), out.dtype)))
    Answerer(base.lm, base.encoder, base.runtime).answers(examples, Manner("plain", (), False, 6), 64)
    assert set(seen) == {(True, torch.bfloat16)}
    assert "forward" not in vars(layer)
