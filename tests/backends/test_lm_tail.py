import json

import pytest
import torch
from tiny_lm import assert_same, gradients, labelled_batch, load, opened, tiny_models
from treelora_backends.causal_lm import session as session_module
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.network.tail import chosen_states, divide

from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import TrainConfig

__all__ = ["models"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("narrow"))


def test_the_end_of_a_text_is_its_answer_and_the_prompts_last_tokens():
    """Texts of 9, 7 and 5 tokens whose prompts have 7, 6 and 2: with a tail of 2 the ends begin at 5, 4 and 0."""
    batch = labelled_batch()
    ids = batch.batch.ids
    parts = divide(batch, 2)
    assert parts.first.mask.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert parts.first.ids[0].tolist() == ids[0, :5].tolist() and parts.first.ids[1, 1:].tolist() == ids[1, :4].tolist()
    assert parts.end.batch.mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert parts.end.batch.ids[0, :4].tolist() == ids[0, 5:].tolist()
    assert parts.end.batch.ids[1, :3].tolist() == ids[1, 4:7].tolist()
    assert parts.end.batch.ids[2].tolist() == ids[2, :5].tolist()
    assert parts.end.columns.tolist() == [1, 2, 1, 1, 2, 3]
    assert torch.equal(parts.end.targets, batch.targets) and torch.equal(parts.end.rows, batch.rows)
    states = torch.arange(27.0).reshape(3, 9, 1)
    assert chosen_states(states, parts.end_places)[1, :3, 0].tolist() == [13.0, 14.0, 15.0]
    assert chosen_states(states, parts.first_places)[1, 1:, 0].tolist() == [9.0, 10.0, 11.0, 12.0]


def test_a_tail_as_long_as_every_prompt_leaves_no_first_part():
    parts = divide(labelled_batch(), 9)
    assert parts.first.ids.shape == (3, 0)
    assert torch.equal(parts.end.batch.mask, labelled_batch().batch.mask)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_pass_through_the_end_alone(models, family, skipped):
    """The same loss; its gradient is that of the plain network with keys and values of the first parts held fixed."""
    base = opened(models[family])
    batch = labelled_batch()
    assert base.lm.divides and base.lm.cut == 1
    entering = base.lm.entering(batch.batch) if skipped else None
    starts = torch.tensor([5, 4, 0])
    first = (torch.arange(9) < starts[:, None])[:, :, None]

    def held(_module, _inputs, out):
        if family == "llama":
            return torch.where(first, out.detach(), out)
        width = out.shape[-1] // 3  # queries, keys and values in one
        both = torch.where(first, out[..., width:].detach(), out[..., width:])
        return torch.cat([out[..., :width], both], dim=-1)

    blocks = base.lm.blocks[1:]
    if family == "llama":
        layers = [layer for block in blocks for layer in (block.self_attn.k_proj, block.self_attn.v_proj)]
    else:
        layers = [block.attn.c_attn for block in blocks]
    plain = base.lm.loss(batch)
    whole = gradients(base, plain)
    hooks = [layer.register_forward_hook(held) for layer in layers]
    wanted = gradients(base, base.lm.loss(batch))
    for hook in hooks:
        hook.remove()
    ours = base.lm.loss(batch, 2, entering)
    torch.testing.assert_close(ours, plain)
    found = gradients(base, ours)
    assert_same(found, wanted)
    assert any(not torch.allclose(one, other, rtol=1e-3) for one, other in zip(found, whole, strict=True))


def test_a_tail_that_holds_every_prompt_gives_the_whole_gradient(models):
    base = opened(models["llama"])
    batch = labelled_batch()
    assert_same(gradients(base, base.lm.loss(batch, 9)), gradients(base, base.lm.loss(batch)))


def test_gradient_checkpointing_gives_the_whole_gradient(models):
    base = opened(models["llama"])
    batch = labelled_batch()
    wanted = gradients(base, base.lm.loss(batch))
    base.lm.model.gradient_checkpointing_enable({"use_reentrant": False})
    base.network.train()
    assert_same(gradients(base, base.lm.loss(batch, tail=2)), wanted)


def test_a_model_that_forgets_what_it_has_read_is_not_divided(models):
    base = opened(models["llama"])
    model = base.lm.model
    plain = model.model.forward

    def forgetful(*inputs, **options):
        options.pop("past_key_values", None)
        options.pop("cache", None)
        options.pop("position_ids", None)
        mask = options.pop("attention_mask")
        return plain(*inputs, attention_mask=mask[:, -options["input_ids"].shape[1] :], **options)

    model.model.forward = forgetful
    lm = LmNetwork(model, base.layers)
    assert not lm.divides
    batch = labelled_batch()
    assert_same(gradients(base, lm.loss(batch, 2)), gradients(base, lm.loss(batch)))


@pytest.mark.parametrize(("tail", "used"), [(0, [0, 0]), (3, [3, 3]), (None, [0, 8])])
def test_training_and_probing_use_the_tail_that_is_set_and_probes_a_short_one_otherwise(models, tail, used, tmp_path):
    base = load(models["llama"], blocks=3, train=TrainConfig(prompt_tail=tail, batch_size=2))
    rows = [{"prompt": f"What colour is the apple {number}?", "answer": "red"} for number in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    session = base.session(base.read_task(DataRequest(tmp_path / "t.jsonl")), Memory((), dict), base.config)
    asked = []
    plain = base.lm.loss
    base.lm.loss = lambda labelled, tail=0, *more: asked.append(tail) or plain(labelled, tail, *more)
    session.prepare()
    session.loss([0, 1])
    next(iter(session.probe_losses(1)))
    assert asked == used


def test_the_tail_is_short_where_a_head_answers_and_whole_where_the_adapter_does(models, tmp_path, monkeypatch):
    """A closed set that the words tell, one that nothing tells, and free answers; a given number holds for all.

    Where a device measures, only what a head answers is open to a choice.
    """
    words = ["apple", "rose", "leaf", "frog"]
    moods = [("happy happy", "red"), ("sad sad", "green")]
    told = [
        {"prompt": f"The {word} {n} is {mood}", "answer": answer}
        for n in range(6)
        for word in words
        for mood, answer in moods
    ]
    untold = [{"prompt": f"Say {n // 2}", "answer": "red" if n % 2 else "green"} for n in range(24)]
    free = [{"prompt": f"What colour is the {word}?", "answer": f"red {n} {word}"} for n, word in enumerate(words * 3)]
    tails = {}
    for name, rows in (("told", told), ("untold", untold), ("free", free)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        for given in (None, 3):
            base = opened(models["llama"], train=TrainConfig(prompt_tail=given))
            session = base.session(
                base.read_task(DataRequest(tmp_path / f"{name}.json")), Memory((), dict), base.config
            )
            session.prepare()
            tails[name, given] = session.tail, bool(session._closed)
            assert session.gradient_ways() == ()
            with monkeypatch.context() as patch:
                patch.setattr(session_module, "_MEASURED", ("cpu",))
                assert len(session.gradient_ways()) == (2 if (name, given) == ("told", None) else 0)
    assert {name: found for (name, given), found in tails.items() if given is None} == {
        "told": (8, True), "untold": (0, False), "free": (0, False)
    }  # fmt: skip
    assert {tail for (_, given), (tail, _) in tails.items() if given == 3} == {3}
