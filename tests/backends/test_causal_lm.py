"""The whole job of a language model: learned, scored, asked, exported."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_lm import (
    TEMPLATE,
    load,
    save_model,
    small_tokenizer,
)
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.closed import ClosedHead
from treelora_backends.causal_lm.memory import common_manner, manner_of, merged_adapter

from treelora_cli.app import run_command
from treelora_cli.backend import adapters
from treelora_cli.backend.contract import Backend
from treelora_cli.backend.values import DataRequest, Memory
from treelora_cli.data.examples import TextExample
from treelora_cli.errors import DataError
from treelora_cli.project import Project

FAST = ["--epochs", "8", "--lr", "0.01", "--batch-size", "8"]


def write_gguf(path, gguf, eos=0):
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
        (writer.add_eos_token_id, eos),
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


def run(*arguments):
    return run_command([str(one) for one in arguments])


@pytest.fixture(scope="module")
def project(llama, lm_tables, tmp_path_factory):
    """Two tasks learned through the command line."""
    root = tmp_path_factory.mktemp("made") / "project"
    assert run("init", root, "--backend", "causal-lm", "--model", llama, "--dropout", "0", "--blocks", "0", *FAST) == 0
    for name in ("colours", "moods"):
        assert run("-C", root, "train-task", lm_tables / f"{name}.jsonl") == 0
    return root


def test_backend_meets_the_contract():
    assert isinstance(CausalLmBackend(), Backend)


def test_a_closed_answer_may_end_in_a_space(llama, tmp_path):
    rows = [{"prompt": f"apple {place}", "answer": ("good ", "bad")[place % 2]} for place in range(20)]
    (tmp_path / "spaces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = load(llama)
    task = base.read_task(DataRequest(tmp_path / "spaces.jsonl"))
    session = base.session(task, Memory((), dict), base.config)
    session.prepare()
    assert sorted(task.labels) == ["bad", "good"]


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


def test_eval_of_the_untouched_model(project, llama, lm_tables, tmp_path, capsys):
    assert run("-C", project, "eval", "--inference", "base") == 0
    shown = capsys.readouterr().out
    assert "untouched" in shown and "forgetting" not in shown
    assert run("--json", "-C", project, "eval", "--inference", "base") == 0
    found = document(capsys)
    assert (found["inference"], found["forgetting"], found["bwt"]) == ("base", None, None)
    assert found["op"] < 0.9
    assert run("init", tmp_path / "p", "--backend", "causal-lm", "--model", llama, "--blocks", "0") == 0
    for name in ("colours", "moods"):
        assert run("-C", tmp_path / "p", "train-task", lm_tables / f"{name}.jsonl", "--epochs", "0") == 0
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
    written = base.lm.model.generate(input_ids=given, min_new_tokens=1, max_new_tokens=10, do_sample=False)[0]
    written = written[given.shape[1] :]
    assert (answer.output, answer.task) == (base.encoder.decode(written), None)


def test_a_task_that_taught_no_empty_answer_gives_none(project):
    memory = Project.open(project).memory()
    assert [manner_of(task).least_new for task in memory.tasks] == [1] * len(memory.tasks)
    assert common_manner(memory).least_new == 1


def test_base_inference_is_the_untouched_model(project, llama, lm_tables):
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
    assert model.generation_config.min_new_tokens == 1
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
    modules = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"] == modules
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
def test_every_format_is_learned_scored_and_exported(family, request, lm_tables, tmp_path, capsys):
    root = tmp_path / "p"
    assert run("init", root, "--backend", "causal-lm", "--model", request.getfixturevalue(family), *FAST) == 0
    for name in ("chats", "texts", "moods"):
        assert run("-C", root, "train-task", lm_tables / f"{name}.jsonl", "--epochs", "2") == 0
    capsys.readouterr()
    assert run("--json", "-C", root, "export", tmp_path / "out") == 0
    found = document(capsys)
    assert found["largest_logit_difference"] < 1e-3
    assert set(found["scores"]) == {"chats", "texts", "moods"}
    assert run("-C", root, "export", tmp_path / "adapter", "--format", "adapter", "--task", "moods") == 0


def test_tied_embeddings_stay_tied(tmp_path, lm_tables):
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    root, out = tmp_path / "p", tmp_path / "out"
    assert run("init", root, "--backend", "causal-lm", "--model", model) == 0
    assert run("-C", root, "train-task", lm_tables / "moods.jsonl", "--epochs", "1") == 0
    assert run("-C", root, "export", out) == 0
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()


def test_a_gguf_base_is_learned_and_exported_dense(tmp_path, lm_tables):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = write_gguf(tmp_path / "tiny.gguf", pytest.importorskip("gguf"))
    root, out = tmp_path / "p", tmp_path / "out"
    assert run("init", root, "--backend", "causal-lm", "--model", model) == 0
    assert run("-C", root, "train-task", lm_tables / "moods.jsonl", "--epochs", "1") == 0
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


def test_loss_falls_with_training(project):
    opened = Project.open(project)
    assert opened.task_record("colours")["last_loss"] < math.log(400) / 2  # half of an even guess's


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
