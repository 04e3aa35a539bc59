"""What a language model computes the short way is what it computes the long way."""

from dataclasses import replace

import pytest
import torch
from tiny_lm import (
    load,
    save_model,
)
from treelora_backends.causal_lm.answers import Answerer, Manner
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.batches import Batch, collate, pad
from treelora_backends.causal_lm.network.network import LmNetwork

from treelora_cli.backend import adapters
from treelora_cli.backend.registry import defaults_on
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.config import TrainConfig
from treelora_cli.data.examples import TextExample


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_short_way_to_loss_and_logits_agrees_with_the_model(family, request):
    base = load(request.getfixturevalue(family))
    assert base.lm._head_is_linear
    task = base.read_task(DataRequest(request.getfixturevalue("lm_tables") / "colours.jsonl"))
    labelled = collate(task.train[:5], base.encoder.pad_id)
    with torch.no_grad():
        logits = base.lm.model(input_ids=labelled.batch.ids, attention_mask=labelled.batch.mask).logits
        wanted = torch.nn.functional.cross_entropy(logits[labelled.rows, labelled.columns], labelled.targets)
        assert float(base.lm.loss(labelled)) == pytest.approx(float(wanted), abs=1e-5)
    base.lm._head_is_linear = False
    assert float(base.lm.loss(labelled)) == pytest.approx(float(wanted), abs=1e-5)


def test_loss_in_chunks_is_the_same(llama, lm_tables, monkeypatch):
    base = load(llama)
    task = base.read_task(DataRequest(lm_tables / "texts.jsonl"))
    labelled = collate(task.train, base.encoder.pad_id)
    whole = float(base.lm.loss(labelled))
    monkeypatch.setattr(base.lm._output, "at_once", 7)
    assert float(base.lm.loss(labelled)) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_label_likelihoods_equal_those_of_whole_texts(family, request):
    base = load(request.getfixturevalue(family))
    labels = [[5, 6, 7], [8], [9, 10]]
    prompts = [torch.arange(20, 20 + n).numpy().astype("int32") for n in (7, 3)]
    found = base.lm.label_log_likelihoods(pad(prompts, 0), labels)
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(labels):
            ids = torch.tensor([[*prompt.tolist(), *label]])
            scores = base.lm.model(input_ids=ids).logits[0].log_softmax(dim=1)
            start = len(prompt) - 1
            wanted = sum(float(scores[start + n, token]) for n, token in enumerate(label))
            assert float(found[row, column]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_in_a_padded_batch_equals_one_by_one(family, request):
    base = load(request.getfixturevalue(family))
    answerer = Answerer(base.lm, base.encoder, base.runtime)
    examples = [TextExample("", text, "") for text in ("What colour is the apple?", "Tom", "red green red")]
    manner = Manner("plain", (), False, 6)
    together = answerer.answers(examples, manner, 64)
    assert together == [answerer.answers([one], manner, 64)[0] for one in examples]


def test_last_blocks_only_and_no_gradient_below(llama, lm_tables):
    base = load(llama, blocks=1, targets="auto")
    assert base.layers == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    inside = []
    base.lm.blocks[0].register_forward_hook(lambda _m, _i, out: inside.append(out))
    task = base.read_task(DataRequest(lm_tables / "colours.jsonl"))
    session = base.session(task, Memory((), dict), base.config)
    loss = session.loss([0, 1])
    assert loss.requires_grad
    hidden = inside[0][0] if isinstance(inside[0], tuple) else inside[0]
    assert not hidden.requires_grad


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Models of four blocks by family."""
    root = tmp_path_factory.mktemp("deep")
    no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    settings = {"llama": {}, "gpt2": no_dropout}
    return {family: save_model(root / family, family, depth=4, **extra) for family, extra in settings.items()}


def test_steps_in_bf16_keep_attention_and_adapters_in_float32(deep, lm_tables):
    base = load(deep["llama"], blocks=3, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    session = base.session(base.read_task(DataRequest(lm_tables / "colours.jsonl")), Memory((), dict), base.config)
    session.prepare()
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    full = session.loss([0, 1, 2, 3])
    wanted = torch.cat([one.flatten() for one in torch.autograd.grad(full, ups)])
    seen = []
    attention = base.lm.blocks[-1].self_attn
    attention.register_forward_hook(lambda _m, _i, out: seen.append((torch.is_grad_enabled(), out[0].dtype)))
    base.runtime.compute_as({"precision": "bf16"})
    half = session.loss([0, 1, 2, 3])
    found = torch.cat([one.flatten() for one in torch.autograd.grad(half, ups)])
    assert seen == [(False, torch.bfloat16), (True, torch.float32)]  # the prompt's first tokens are only read
    assert half.dtype == found.dtype == torch.float32
    assert half.item() != full.item()
    torch.testing.assert_close(half, full, rtol=0.02, atol=0.02)
    assert torch.nn.functional.cosine_similarity(found, wanted, dim=0) > 0.99
    session.try_step(ups)
    session.try_forward()


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["colours", "moods", "chats", "texts"])
def test_training_enters_behind_the_frozen_blocks_with_the_same_loss(deep, family, name, blocks, lm_tables):
    base = load(deep[family], blocks=blocks, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    task = base.read_task(DataRequest(lm_tables / f"{name}.jsonl"))
    places = list(range(4))
    plain = base.session(task, Memory((), dict), base.config)
    cached = base.session(task, Memory((), dict), base.config)
    assert base.lm.cut == 4 - blocks
    cached.prepare()
    read = base.read_features([task.listing.train[i] for i in plain.own], "")
    plain.router.add_task(base.lm.routing(read), base.runtime)
    torch.testing.assert_close(cached.router.gram.values, plain.router.gram.values, rtol=1e-3, atol=1e-3)
    ran = []
    base.lm.blocks[0].register_forward_pre_hook(lambda _m, _i: ran.append(base.lm.blocks[0].forward))
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    ours, wanted = cached.loss(places), plain.loss(places)
    assert ran[0].__name__ == "forward" and ran[0].__qualname__.startswith("LmNetwork._stand_in")
    torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-2)  # kept in bfloat16
    for one, other in zip(torch.autograd.grad(ours, ups), torch.autograd.grad(wanted, ups), strict=True):
        assert torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


def test_a_model_whose_blocks_share_more_than_states_is_not_entered_in_the_middle(deep):
    base = load(deep["llama"], blocks=1)
    shared = {}
    base.lm.model.get_input_embeddings().register_forward_hook(lambda _m, _i, _o: shared.clear())
    base.lm.blocks[0].self_attn.register_forward_hook(lambda _m, _i, out: shared.update(keys=out[0]))
    base.lm.blocks[3].register_forward_pre_hook(lambda _m, inputs: (inputs[0] + shared.pop("keys"),))
    assert LmNetwork(base.lm.model, base.layers).cut == 0


@pytest.mark.parametrize(
    ("family", "targets", "count"),
    [
        ("llama", "auto", 4),
        ("llama", "q_proj", 2),
        ("llama", "all-linear", 14),
        ("gpt2", "auto", 2),
        ("gpt2", "all-linear", 8),
    ],
)
def test_targets(family, targets, count, request):
    assert len(load(request.getfixturevalue(family), targets=targets).layers) == count


def test_gradient_checkpointing_gives_the_same_gradients(llama, lm_tables):
    grads = []
    for wanted in (False, True):
        base = load(llama, dropout=0.0, train=TrainConfig(prompt_tail=0, grad_checkpointing=wanted))
        adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
        session = base.session(base.read_task(DataRequest(lm_tables / "colours.jsonl")), Memory((), dict), base.config)
        ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
        grads.append(torch.autograd.grad(session.loss([0, 1, 2]), ups))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_what_frozen_states_tell_asks_for_no_gradient_under_gradient_checkpointing(llama, lm_tables):
    base = load(llama, train=TrainConfig(grad_checkpointing=True))
    base.session(base.read_task(DataRequest(lm_tables / "colours.jsonl")), Memory((), dict), base.config)
    ids = torch.arange(6)[None]
    reading = base.lm.read(Batch(ids, torch.ones_like(ids)))
    assert not reading.embedded.requires_grad
    assert not reading.features(torch.tensor([6])).requires_grad


def test_a_large_batch_in_parts_gives_the_same_gradients(llama, lm_tables, monkeypatch):
    base = load(llama, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    session = base.session(base.read_task(DataRequest(lm_tables / "colours.jsonl")), Memory((), dict), base.config)
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    whole = torch.autograd.grad(session.loss(list(range(8))), ups)
    monkeypatch.setattr("treelora_backends.causal_lm.session._TOKENS_KEPT", {"cpu": 40})
    for one, other in zip(whole, torch.autograd.grad(session.loss(list(range(8))), ups), strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_base_learns_in_float32(llama):
    base = load(llama, dtype="bfloat16")
    assert base.lm.model.lm_head.weight.dtype == torch.bfloat16
    assert all(up.dtype == torch.float32 for _, up in adapters.slot_parameters(base.network, base.layers))


@pytest.mark.parametrize(("depth", "adapted"), [(1, 1), (4, 1), (5, 2)])
def test_unless_told_all_linear_layers_of_the_last_quarter_are_adapted(tmp_path, depth, adapted):
    model = save_model(tmp_path / "llama", "llama", depth=depth)
    base = load(model, blocks=None)
    inner = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    held = [".".join(layer.split(".")[2:]) for layer in base.layers]
    names = [f"self_attn.{name}" for name in inner[:4]] + [f"mlp.{name}" for name in inner[4:]]
    last = range(depth - adapted, depth)
    assert held == [f"{index}.{name}" for index in last for name in names]
    halves = load(model, blocks=None, targets="auto").layers
    assert {int(layer.split(".")[2]) for layer in halves} == set(range(depth - (depth + 1) // 2, depth))


@pytest.mark.parametrize(("width", "rate"), [(64, 5e-3), (576, 5e-3), (896, 3.6e-3), (2048, 1.9e-3), (4096, 1.1e-3)])
def test_a_wider_model_learns_at_a_lower_rate(width, rate):
    backend = CausalLmBackend()
    assert defaults_on(backend, {"width": width}).train.lr == pytest.approx(rate)
    assert replace(defaults_on(backend, {"width": width}), train=backend.defaults().train) == backend.defaults()
