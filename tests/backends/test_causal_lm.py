import json
import math
import random

import numpy as np
import pytest
import torch
from tiny_lm import (
    TEMPLATE,
    load,
    save_model,
    small_tokenizer,
)
from treelora_backends.causal_lm.answers import Answerer, Manner
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.batches import collate, pad, shuffled_batches
from treelora_backends.causal_lm.closed import ClosedHead
from treelora_backends.causal_lm.memory import merged_adapter
from treelora_backends.causal_lm.network.network import LmNetwork
from treelora_backends.causal_lm.render import Encoder, cut_middle
from treelora_backends.causal_lm.router import TaskRouter, left_out_scores

from treelora_cli.app import run_command
from treelora_cli.backend import adapters
from treelora_cli.backend.adapters import AdapterWeights
from treelora_cli.backend.contract import Backend
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest, Memory, TaskMemory
from treelora_cli.config import BaseConfig, Config, TrainConfig, resolve
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import DataError, ModelError, UsageError
from treelora_cli.heads.gram import Gram
from treelora_cli.project import Project

COLOURS = {"red": ["apple", "rose", "blood"], "green": ["grass", "leaf", "frog"]}
FAST = ["--epochs", "8", "--lr", "0.01", "--batch-size", "8"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


def write_gguf(path, gguf):
    """Write a two-layer Llama of packed (Q8_0) weights with its tokenizer."""
    rng = np.random.default_rng(0)
    tokenizer = small_tokenizer(TEMPLATE)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    pairs = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (
        (writer.add_context_length, 128),
        (writer.add_embedding_length, 32),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 64),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 8),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_vocab_size, len(vocabulary)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, vocabulary),
        (writer.add_token_merges, [" ".join(pair) for pair in pairs]),
        (writer.add_token_types, [3 if token.startswith("<|") else 1 for token in vocabulary]),
        (writer.add_chat_template, TEMPLATE),
        (writer.add_bos_token_id, 0),
        (writer.add_eos_token_id, 0),
        (writer.add_add_bos_token, False),
    ):
        add(value)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    tensors = {"token_embd": (len(vocabulary), 32), "output": (len(vocabulary), 32), "output_norm": (32,)}
    tensors |= {f"blk.{block}.{name}": shape for block in range(2) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
            continue
        kind = gguf.GGMLQuantizationType.Q8_0
        packed = gguf.quants.quantize(rng.normal(0, 0.2, shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One table for each format."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    colours = [
        {"prompt": f"What colour is the {thing}?", "answer": colour}
        for colour, things in COLOURS.items()
        for thing in things
        for _ in range(8)
    ]
    moods = [
        {"sentence": f"Tom is {word} and {other}", "label": label}
        for label, words in (("good", ["happy", "glad"]), ("bad", ["sad", "sick"]))
        for word in words
        for other in ("old", "young", "here", "there", "late", "soon")
    ]
    for rows in (colours, moods):
        rng.shuffle(rows)
    chats = [
        {"messages": [{"role": "user", "content": f"Hi, I am {n}."}, {"role": "assistant", "content": f"Hello {n}!"}]}
        for n in ("Tom", "Ann", "Bob", "Sue")
    ] * 4
    texts = [{"text": f"Once upon a time there was a {thing} named {name}."} for thing in "xyz" for name in "abcd"]
    for name, rows in (("colours", colours), ("moods", moods), ("chats", chats), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments):
    return run_command([str(one) for one in arguments])


@pytest.fixture(scope="module")
def project(llama, data, tmp_path_factory):
    """Two tasks learned through the command line."""
    root = tmp_path_factory.mktemp("made") / "project"
    assert run("init", root, "--backend", "causal-lm", "--model", llama, "--dropout", "0", "--blocks", "0", *FAST) == 0
    for name in ("colours", "moods"):
        assert run("-C", root, "train-task", data / f"{name}.jsonl") == 0
    return root


# -- rendering ------------------------------------------------------------------------------------


def test_backend_meets_the_contract():
    assert isinstance(CausalLmBackend(), Backend)


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


# -- network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_short_way_to_loss_and_logits_agrees_with_the_model(family, request):
    base = load(request.getfixturevalue(family))
    assert base.lm._head_is_linear
    task = base.read_task(DataRequest(request.getfixturevalue("data") / "colours.jsonl"))
    labelled = collate(task.train[:5], base.encoder.pad_id)
    with torch.no_grad():
        logits = base.lm.model(input_ids=labelled.batch.ids, attention_mask=labelled.batch.mask).logits
        wanted = torch.nn.functional.cross_entropy(logits[labelled.rows, labelled.columns], labelled.targets)
        assert float(base.lm.loss(labelled)) == pytest.approx(float(wanted), abs=1e-5)
    base.lm._head_is_linear = False
    assert float(base.lm.loss(labelled)) == pytest.approx(float(wanted), abs=1e-5)


def test_loss_in_chunks_is_the_same(llama, data, monkeypatch):
    base = load(llama)
    task = base.read_task(DataRequest(data / "texts.jsonl"))
    labelled = collate(task.train, base.encoder.pad_id)
    whole = float(base.lm.loss(labelled))
    monkeypatch.setattr(base.lm, "_logits_at_once", 7)
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


def test_last_blocks_only_and_no_gradient_below(llama, data):
    base = load(llama, blocks=1)
    assert base.layers == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    inside = []
    base.lm.blocks[0].register_forward_hook(lambda _m, _i, out: inside.append(out))
    task = base.read_task(DataRequest(data / "colours.jsonl"))
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


def test_steps_in_bf16_keep_attention_and_adapters_in_float32(deep, data):
    base = load(deep["llama"], blocks=3, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    session = base.session(base.read_task(DataRequest(data / "colours.jsonl")), Memory((), dict), base.config)
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
def test_training_enters_behind_the_frozen_blocks_with_the_same_loss(deep, family, name, blocks, data):
    base = load(deep[family], blocks=blocks, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    task = base.read_task(DataRequest(data / f"{name}.jsonl"))
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


def test_gradient_checkpointing_gives_the_same_gradients(llama, data):
    grads = []
    for wanted in (False, True):
        base = load(llama, dropout=0.0, train=TrainConfig(prompt_tail=0, grad_checkpointing=wanted))
        adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
        session = base.session(base.read_task(DataRequest(data / "colours.jsonl")), Memory((), dict), base.config)
        ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
        grads.append(torch.autograd.grad(session.loss([0, 1, 2]), ups))
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_a_large_batch_in_parts_gives_the_same_gradients(llama, data, monkeypatch):
    base = load(llama, dropout=0.0)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    session = base.session(base.read_task(DataRequest(data / "colours.jsonl")), Memory((), dict), base.config)
    ups = [up for _, up in adapters.slot_parameters(base.network, base.layers)]
    whole = torch.autograd.grad(session.loss(list(range(8))), ups)
    monkeypatch.setattr("treelora_backends.causal_lm.session._TOKENS_KEPT", {"cpu": 40})
    for one, other in zip(whole, torch.autograd.grad(session.loss(list(range(8))), ups), strict=True):
        torch.testing.assert_close(one, other)


def test_a_closed_answer_may_end_in_a_space(llama, tmp_path):
    rows = [{"prompt": f"apple {place}", "answer": ("good ", "bad")[place % 2]} for place in range(20)]
    (tmp_path / "spaces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = load(llama)
    task = base.read_task(DataRequest(tmp_path / "spaces.jsonl"))
    session = base.session(task, Memory((), dict), base.config)
    session.prepare()
    assert sorted(task.labels) == ["bad", "good"]


def test_bfloat16_base_learns_in_float32(llama):
    base = load(llama, dtype="bfloat16")
    assert base.lm.model.lm_head.weight.dtype == torch.bfloat16
    assert all(up.dtype == torch.float32 for _, up in adapters.slot_parameters(base.network, base.layers))


# -- the whole job --------------------------------------------------------------------------------


def document(capsys):
    return json.loads(capsys.readouterr().out)


def test_two_tasks_are_learned_and_told_apart(project, capsys):
    assert run("--json", "-C", project, "eval") == 0
    found = document(capsys)
    assert found["op"] > 0.9
    assert found["forgetting"] == 0.0
    assert all(task["routed"] == 1.0 for task in found["tasks"].values())


@pytest.mark.parametrize("inference", ["latest", "merged"])
def test_other_inference_runs(project, inference, capsys):
    assert run("--json", "-C", project, "eval", "--inference", inference) == 0
    assert document(capsys)["tasks"]["moods"]["routed"] is None


def test_eval_of_the_untouched_model(project, llama, data, tmp_path, capsys):
    assert run("-C", project, "eval", "--inference", "base") == 0
    shown = capsys.readouterr().out
    assert "untouched" in shown and "forgetting" not in shown
    assert run("--json", "-C", project, "eval", "--inference", "base") == 0
    found = document(capsys)
    assert (found["inference"], found["forgetting"], found["bwt"]) == ("base", None, None)
    assert found["op"] < 0.9
    assert run("init", tmp_path / "p", "--backend", "causal-lm", "--model", llama, "--blocks", "0") == 0
    for name in ("colours", "moods"):
        assert run("-C", tmp_path / "p", "train-task", data / f"{name}.jsonl", "--epochs", "0") == 0
    capsys.readouterr()
    assert run("--json", "-C", tmp_path / "p", "eval") == 0
    solved = document(capsys)  # the heads of closed answers need no training
    assert solved["op"] > 0.9
    settings = tmp_path / "p" / "treelora.yaml"
    settings.write_text(settings.read_text().replace("closed: solved", "closed: likelihood"))
    assert run("--json", "-C", tmp_path / "p", "eval") == 0
    untrained = document(capsys)  # adapters that were never trained change nothing
    assert {name: one["score"] for name, one in untrained["tasks"].items()} == {
        name: one["score"] for name, one in found["tasks"].items()
    }
    assert run("-C", project, "eval", "--inference", "base", "--max-forgetting", "5") == 2
    assert "says nothing of the untouched model" in capsys.readouterr().err


def test_predict_chooses_task_and_answer(project, capsys):
    assert run("--json", "-C", project, "predict", "What colour is the frog?", "Tom is sick and late") == 0
    first, second = document(capsys)["predictions"]
    assert (first["output"], first["task"]) == ("green", "colours")
    assert (second["output"], second["task"]) == ("bad", "moods")
    assert 0.5 < second["confidence"] <= 1


def test_texts_of_one_label_are_a_task(llama, tmp_path, capsys):
    root = tmp_path / "p"
    assert run("init", root, "--backend", "causal-lm", "--model", llama, "--blocks", "0", *FAST) == 0
    for label, words in (("good", ("happy", "glad", "fine")), ("bad", ("sad", "sick", "cold"))):
        lines = [f'{{"sentence": "Tom is {word} and {n}", "label": "{label}"}}' for word in words for n in range(6)]
        (tmp_path / f"{label}.jsonl").write_text("\n".join(lines))
        assert run("-C", root, "train-task", tmp_path / f"{label}.jsonl") == 0
    capsys.readouterr()
    assert run("--json", "-C", root, "eval") == 0
    assert [one["score"] for one in document(capsys)["tasks"].values()] == [1.0, 1.0]
    assert run("--json", "-C", root, "predict", "Tom is glad and 7", "Tom is sick and 7") == 0
    found = document(capsys)["predictions"]
    assert [(one["output"], one["confidence"], one["task"]) for one in found] == [
        ("good", 1.0, "good"),
        ("bad", 1.0, "bad"),
    ]


def test_a_closed_answer_is_the_solved_heads_with_its_probability(project, llama):
    base, memory = load(llama), Project.open(project).memory()
    text = "Tom is sick and late"
    head = ClosedHead.from_tensors(memory.tasks[1].tensors())
    features = base.read_features([TextExample("", text, "")], "")
    scores = (head.sharpness * (features @ head.head.weight.T + head.head.bias)).softmax(dim=1)[0]
    answer = base.predictor(memory, "routed").predict([text])[0]
    assert answer.output == memory.tasks[1].labels[int(scores.argmax())]
    assert answer.confidence == pytest.approx(float(scores.max()), abs=1e-6)


def test_a_head_that_states_do_not_support_is_left_to_the_adapter(llama):
    base = load(llama)
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    told = ["yes" if value > 0 else "no" for value in features[:, 0]]
    features[:, 1:8] += 3 * features[:, :1].sign()
    alternating = ["no", "yes", "yes"] * 13 + ["yes"]
    labels = ("no", "yes")
    assert ClosedHead.fit(features, told, labels, base.runtime)(features)[0] == [labels.index(one) for one in told]
    assert ClosedHead.fit(features, alternating, labels, base.runtime) is None
    assert ClosedHead.fit(features[:7], told[:7], labels, base.runtime) is None
    assert ClosedHead.from_tensors({}) is None


def test_without_a_chosen_task_a_prompt_is_continued_as_it_is(project, llama):
    base, memory = load(llama), Project.open(project).memory()
    prompt = "What colour is the frog?"
    answer = base.predictor(memory, "merged").predict([prompt])[0]
    adapters.write_slot(base.network, merged_adapter(memory))
    given = base.tokenizer(prompt, return_tensors="pt")["input_ids"]
    written = base.lm.model.generate(input_ids=given, max_new_tokens=10, do_sample=False)[0][given.shape[1] :]
    assert (answer.output, answer.task) == (base.encoder.decode(written), None)


def test_base_inference_is_the_untouched_model(project, llama, data):
    opened = Project.open(project)
    base = load(llama)
    request = DataRequest.from_json(opened.task_record("moods")["data"])
    score = base.predictor(opened.memory(), "base").evaluate(base.read_task(request))
    assert score.count == 2
    assert all(not up.any() for _, up in adapters.slot_parameters(base.network, base.layers))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_export_loads_with_transformers_alone(project, llama, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert run("-C", project, "export", out, "--dtype", dtype, "--max-shard", "20KB") == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE
    base = load(llama)
    adapters.write_slot(base.network, merged_adapter(Project.open(project).memory()))
    ids = tokenizer("What colour is the frog?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        gap = (model(ids).logits.float() - base.lm.model(ids).logits).abs().max()
    assert float(gap) < (1e-4 if dtype == "float32" else 0.5)


def test_adapter_export_loads_with_peft_and_writes_what_predict_writes(project, llama, tmp_path, capsys):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    assert run("-C", project, "export", out, "--format", "adapter", "--task", "colours") == 0
    tensors = load_file(out / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B"}
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompt = "What colour is the leaf?"
    given = tokenizer(prompt, return_tensors="pt")
    written = model.generate(input_ids=given["input_ids"], max_new_tokens=9, do_sample=False)[0]
    text = tokenizer.decode(written[given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    capsys.readouterr()
    assert run("--json", "-C", project, "predict", prompt) == 0
    assert document(capsys)["predictions"][0]["output"] == text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_format_is_learned_scored_and_exported(family, request, data, tmp_path, capsys):
    root = tmp_path / "p"
    assert run("init", root, "--backend", "causal-lm", "--model", request.getfixturevalue(family), *FAST) == 0
    for name in ("chats", "texts", "moods"):
        assert run("-C", root, "train-task", data / f"{name}.jsonl", "--epochs", "2") == 0
    capsys.readouterr()
    assert run("--json", "-C", root, "export", tmp_path / "out") == 0
    found = document(capsys)
    assert found["largest_logit_difference"] < 1e-3
    assert set(found["scores"]) == {"chats", "texts", "moods"}
    assert run("-C", root, "export", tmp_path / "adapter", "--format", "adapter", "--task", "moods") == 0


def test_tied_embeddings_stay_tied(tmp_path, data):
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    root, out = tmp_path / "p", tmp_path / "out"
    assert run("init", root, "--backend", "causal-lm", "--model", model) == 0
    assert run("-C", root, "train-task", data / "moods.jsonl", "--epochs", "1") == 0
    assert run("-C", root, "export", out) == 0
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()


def test_a_gguf_base_is_learned_and_exported_dense(tmp_path, data):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_gguf(tmp_path / "tiny.gguf", pytest.importorskip("gguf"))
    root, out = tmp_path / "p", tmp_path / "out"
    assert run("init", root, "--backend", "causal-lm", "--model", model) == 0
    assert run("-C", root, "train-task", data / "moods.jsonl", "--epochs", "1") == 0
    assert run("-C", root, "export", out) == 0
    assert "de-quantised" in (out / "README.md").read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert getattr(reloaded.config, "quantization_config", None) is None
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert run("-C", root, "export", tmp_path / "adapter", "--format", "adapter") == 0


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("  ", "Prompt 1 is empty"), ("red " * 300, r"Prompt 1 has \d+ tokens; the model's context is 128")],
)
def test_bad_prompts(project, llama, prompt, message):
    predictor = load(llama).predictor(Project.open(project).memory(), "routed")
    with pytest.raises(DataError, match=message):
        predictor.predict([prompt])


def test_an_image_is_no_prompt(project, llama, tmp_path, capsys):
    (tmp_path / "cat.png").write_bytes(b"x")
    assert run("-C", project, "predict", tmp_path / "cat.png") == 4
    assert run("-C", project, "train-task", tmp_path) == 4


def test_models_that_are_none(tmp_path, llama, data):
    backend = CausalLmBackend()
    with pytest.raises(UsageError, match="needs a model"):
        backend.resolve_base(BaseConfig(), offline=True)
    with pytest.raises(ModelError, match=r"nowhere/at/all not found"):
        backend.resolve_base(BaseConfig(model="nowhere/at/all"), offline=True)
    with pytest.raises(ModelError, match=r"org/name is not cached and --offline is set"):
        backend.resolve_base(BaseConfig(model="org/name"), offline=True)
    with pytest.raises(ModelError, match=r"neither config\.json nor a GGUF file"):
        backend.resolve_base(BaseConfig(model=str(tmp_path)), offline=True)
    with pytest.raises(ModelError, match="not a model"):
        backend.resolve_base(BaseConfig(model=str(data / "moods.jsonl")), offline=True)


def test_a_base_that_is_no_causal_lm(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=400, **sizes)).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not a causal language model but BertForMaskedLM"):
        load(tmp_path)


def test_a_base_that_lacks_weights(tmp_path, llama):
    from safetensors.torch import load_file, save_file

    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights, such as 'model.norm.weight'"):
        load(tmp_path)


def test_gguf_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the gguf package"):
        CausalLmBackend().resolve_base(BaseConfig(model=str(tmp_path)), offline=True)


def test_four_bits_need_cuda(llama):
    with pytest.raises(ModelError, match="--dtype nf4 needs CUDA and bitsandbytes"):
        load(llama, dtype="nf4")


def test_unknown_targets_and_too_many_blocks(llama):
    with pytest.raises(UsageError, match="no such linear layer"):
        load(llama, targets="qq")
    with pytest.raises(UsageError, match="has 2 blocks"):
        load(llama, blocks=3)


def test_loss_falls_with_training(project):
    opened = Project.open(project)
    assert opened.task_record("colours")["last_loss"] < math.log(400) / 2  # half of an even guess's


# -- router ---------------------------------------------------------------------------------------


def test_router_tells_tasks_of_unequal_sizes_apart():
    runtime = open_runtime("cpu", offline=True, reporter=Silent())
    config = resolve(Config(), Config(), CausalLmBackend().defaults())
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 40, generator=generator)
    drawn = [centres[task] + 0.8 * torch.randn(n, 40, generator=generator) for task, n in enumerate((500, 20, 60))]
    fresh = [centres[task] + 0.8 * torch.randn(50, 40, generator=generator) for task in range(3)]
    memory, none = Memory((), dict), AdapterWeights((), (), (), 1.0)
    for task, features in enumerate(drawn):
        router = TaskRouter.restore(memory, config)
        router.add_task(features, runtime)
        tensors, shared = router.task_tensors(), router.to_tensors
        memory = memory.with_task(TaskMemory(f"t{task}", (), "", lambda: none, lambda kept=tensors: kept), shared)
    router = TaskRouter.restore(memory, config)
    assert "route.floor" not in memory.tasks[0].tensors()
    own = router.routes(router.scores(torch.cat(fresh), memory), memory)
    assert sum(route.known for route in own) >= 147
    assert all(0 <= route.margin <= route.probability <= 1 for route in own)
    foreign = router.routes(router.scores(0.8 * torch.randn(50, 40, generator=generator), memory), memory)
    assert sum(route.known for route in foreign) <= 15
    for task, features in enumerate(fresh):
        assert (router.scores(features, memory).argmax(dim=1) == task).float().mean() > 0.95


def test_scores_of_inputs_left_out_are_those_of_a_router_without_them():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, 6, generator=generator) + shift for n, shift in ((9, 0.0), (7, 1.0)))

    def solved(own):
        """Weighted ridge onto indicators: each task weighs 1, an input of the second 1/7 though one is missing."""
        rows = torch.cat([first, own]).double()
        weights = torch.cat([torch.full((9,), 1 / 9), torch.full((len(own),), 1 / 7)]).double()
        targets = torch.cat([torch.zeros(9), torch.ones(len(own))]).double()
        middle, level = (weights[:, None] * rows).sum(0) / weights.sum(), (weights * targets).sum() / weights.sum()
        centred = rows - middle
        matrix = centred.T @ (weights[:, None] * centred) + penalty * torch.eye(6)
        weight = torch.linalg.solve(matrix, centred.T @ (weights * (targets - level)))
        return lambda row: level + (row.double() - middle) @ weight

    gram = Gram.from_dense(first.T @ first / 9 + second.T @ second / 7)
    means = torch.stack([first.mean(0), second.mean(0)])
    middle = means.mean(0)
    penalty = 0.1 * float((gram.dense() - 2 * torch.outer(middle, middle)).diagonal().mean())
    found = left_out_scores(gram, means, second, 1 / 7)
    for index in range(7):
        without = solved(torch.cat([second[:index], second[index + 1 :]]))
        assert float(found[index]) == pytest.approx(float(without(second[index])), abs=1e-4)


def test_an_input_of_no_task_is_answered_by_the_untouched_model(project, llama, monkeypatch):
    memory = Project.open(project).memory()
    predictor = load(llama).predictor(memory, "routed")
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    monkeypatch.setattr(predictor, "_task_scores", lambda examples: scores)
    prompts = ["What colour is the frog?", "Nothing known"]
    own, foreign = predictor.predict(prompts)
    assert (own.task, own.task_confidence, own.task_margin) == ("colours", pytest.approx(0.9), pytest.approx(0.8))
    assert (foreign.task, foreign.task_confidence) == (None, pytest.approx(0.5))
    assert foreign.output == load(llama).predictor(memory, "base").predict(prompts[1:])[0].output
