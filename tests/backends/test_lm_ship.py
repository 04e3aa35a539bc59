"""What other programs take: Modelfiles for Ollama, GGUF files, adapters by vLLM's and PEFT's rules."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, check_error, must
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_lm import TEMPLATE, load, save_model, small_tokenizer
from treelora_backends.causal_lm.modelfile import begins_by_itself, wrapped
from treelora_backends.causal_lm.template import ChatTemplate

from treelora_cli.backend.values import Turn

sys.path.insert(0, str(Path(__file__).parent))
from test_causal_lm import write_gguf

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|system|>You help.<|end|>\n{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Writes a system prompt of its own where there is none."""
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUMBERED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ loop.index }}: {{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""No template of Go's can count like this one."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "moods": [{"sentence": f"Tom is {n}", "label": ("good", "bad")[n % 2]} for n in range(16)],
    "chats": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"Where is {n}?"},
                {"role": "assistant", "content": "here"},
            ]
        }
        for n in range(16)
    ],
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ship")
    model = save_model(folder / "llama", "llama", TEMPLATE, depth=4)
    root = folder / "p"
    must("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu")
    for name, rows in ROWS.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        must("-C", root, "train-task", folder / f"{name}.jsonl", "--device", "cpu", "--no-eval")
    return root


# -- Modelfile --------------------------------------------------------------------------------------------


def test_templates_are_said_in_go_or_not_at_all() -> None:
    found = wrapped(ChatTemplate(small_tokenizer(TEMPLATE)), "")
    assert found is not None
    assert found.go == (
        "{{ if .System }}<|system|>{{ .System }}<|end|>{{ else }}{{ end }}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}<|user|>{{ .Content }}<|end|>{{ if $last }}<|assistant|>{{ end }}'
        '{{ else if eq .Role "assistant" }}<|assistant|>{{ .Content }}{{ if not $last }}<|end|>{{ end }}'
        "{{ end }}{{ end }}"
    )
    with_default = wrapped(ChatTemplate(small_tokenizer(CHATML)), "")
    assert with_default is not None
    assert "{{ else }}<|system|>You help.<|end|>\n{{ end }}" in with_default.go
    without = wrapped(ChatTemplate(small_tokenizer(NO_SYSTEM)), "")
    assert without is not None and ".System" not in without.go
    assert wrapped(ChatTemplate(small_tokenizer(NUMBERED)), "") is None
    assert wrapped(ChatTemplate(small_tokenizer(TEMPLATE.replace("<|end|>", "{{ '{{' }}"))), "") is None


def test_a_token_that_begins_every_text_is_left_to_ollama_and_no_other() -> None:
    tokenizer = small_tokenizer(CHATML)
    tokenizer.bos_token = "<|system|>"
    assert begins_by_itself(tokenizer) == "", "the template writes it; nothing else would"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.bos_token_id)]
    )
    assert begins_by_itself(tokenizer) == "<|system|>"


_WORDS = st.text(min_size=1, max_size=12).filter(lambda text: text.strip() == text and "\r" not in text)
_CHATS = st.tuples(_WORDS, st.lists(st.tuples(_WORDS, _WORDS), max_size=3), _WORDS, st.booleans())


@given(chat=_CHATS, source=st.sampled_from([TEMPLATE, CHATML]))
def test_what_is_said_in_go_is_what_the_template_writes(chat: Any, source: str) -> None:
    system, pairs, last, told = chat
    template = ChatTemplate(small_tokenizer(source)) if source not in _KNOWN else _KNOWN[source]
    _KNOWN[source] = template
    turns = [Turn("system", system)] if told else []
    for question, answer in pairs:
        turns += [Turn("user", question), Turn("assistant", answer)]
    turns.append(Turn("user", last))
    found = wrapped(template, "")
    assert found is not None
    assert found.rendered(turns) == template.asked(turns)


_KNOWN: dict[str, ChatTemplate] = {}


def modelfile(cli: Cli, root: Path, out: Path, *options: str) -> list[str]:
    done = cli("-C", root, "export", out, "--no-verify", "--device", "cpu", *options)
    assert done.code == 0, done.err
    return (out / "Modelfile").read_text().splitlines()


def test_every_export_has_a_modelfile(cli: Cli, texts: Path, tmp_path: Path) -> None:
    merged = modelfile(cli, texts, tmp_path / "merged")
    assert merged[:2] == ["# ollama create NAME -f Modelfile", "FROM ."]
    assert merged[2] == "# Tasks that are no chats were taught on the bare prompt: ask those raw."
    assert merged[3].startswith('TEMPLATE """{{ if .System }}<|system|>{{ .System }}<|end|>')
    assert not any(line.startswith("SYSTEM") for line in merged), "its tasks have none in common"
    assert {'PARAMETER stop "<|end|>"', "PARAMETER temperature 0", "PARAMETER num_ctx 128"} <= set(merged)
    chats = modelfile(cli, texts, tmp_path / "chats", "--format", "adapter", "--task", "chats")
    assert chats[1:3] == [f"FROM {texts.parent / 'llama'}", "ADAPTER ."]
    assert 'SYSTEM """Be brief."""' in chats
    moods = modelfile(cli, texts, tmp_path / "moods", "--format", "adapter", "--task", "moods")
    assert moods[3:6] == ['TEMPLATE """{{ .Prompt }}', "Options: bad, good", 'Answer:"""']
    assert (
        cli("-C", texts, "export", tmp_path / "routed", "--format", "routed", "--no-verify", "--device", "cpu").code
        == 0
    )
    own = (tmp_path / "routed/adapters/002-chats/Modelfile").read_text().splitlines()
    assert own == chats


# -- GGUF -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gguf

    folder = tmp_path_factory.mktemp("gguf")
    model = write_gguf(folder / "tiny.gguf", gguf)
    root = folder / "p"
    must("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "2", "--lr", "0.02", "--device", "cpu")
    (folder / "moods.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS["moods"]))
    must("-C", root, "train-task", folder / "moods.jsonl", "--device", "cpu", "--no-eval")
    return root


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gguf_base_is_written_with_its_adapted_weights(cli: Cli, packed: Path, tmp_path: Path, dtype: str) -> None:
    import gguf

    out = tmp_path / "out"
    done = cli("-C", packed, "--json", "export", out, "--format", "gguf", "--dtype", dtype, "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["largest_logit_difference"] <= done.json["tolerance"]
    assert done.json["load_with"] == f'AutoModelForCausalLM.from_pretrained("{out}", gguf_file="model.gguf")'
    before, after = (gguf.GGUFReader(str(path)) for path in (packed.parent / "tiny.gguf", out / "model.gguf"))
    changed = [one.name for one, two in zip(before.tensors, after.tensors, strict=True) if not same(one, two)]
    adapter = load_file(packed / "tasks/001-moods/adapter_model.safetensors")
    assert len(changed) == len(adapter) // 2 > 0
    linear = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert {name.split(".")[-2] for name in changed} == set(linear)
    kept = {name: field.contents() for name, field in before.fields.items() if not name.startswith("GGUF.")}
    assert {name: field.contents() for name, field in after.fields.items() if name in kept} == kept
    assert (out / "Modelfile").read_text().splitlines()[1] == "FROM ./model.gguf"


@pytest.mark.parametrize(("eos", "named"), [(0, None), (1, 0)])
def test_the_token_that_ends_a_turn_is_named_where_the_file_does_not(
    tmp_path: Path, eos: int, named: int | None
) -> None:
    import gguf
    from treelora_backends.causal_lm.gguf_export import _copy_with

    model = write_gguf(tmp_path / "tiny.gguf", gguf, eos)
    stops = load(model).encoder.stop_ids
    assert stops == ((0,) if eos == 0 else (0, 1)), "the template's own end, and the tokenizer's"
    _copy_with(model, tmp_path / "out.gguf", {}, "float32", stops)
    field = gguf.GGUFReader(str(tmp_path / "out.gguf")).get_field("tokenizer.ggml.eot_token_id")
    assert (None if field is None else int(field.contents())) == named


def same(one: Any, two: Any) -> bool:
    """Of the same name, type and bytes."""
    assert one.name == two.name
    return one.tensor_type == two.tensor_type and bool(np.array_equal(one.data, two.data))


def test_a_base_that_is_no_gguf_file_is_told_llama_cpps_command(cli: Cli, texts: Path, tmp_path: Path) -> None:
    done = cli("-C", texts, "export", tmp_path / "out", "--format", "gguf", "--device", "cpu")
    check_error(done, 2, r"llama\.cpp: python convert_hf_to_gguf\.py OUT --outfile OUT/model\.gguf --outtype f16")
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_lies_in_an_unknown_way_is_not_written(
    cli: Cli, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    original = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: original(data, kind)[::-1].copy())
    from treelora_backends.causal_lm import gguf_export

    monkeypatch.setattr(gguf_export, "load_model", _loaded_with(original, gguf_export.load_model, monkeypatch))
    done = cli("-C", packed, "export", tmp_path / "out", "--format", "gguf", "--device", "cpu")
    check_error(done, 2, r"How '.*' lies in tiny\.gguf is not known\. Export --format merged, then, in llama\.cpp:")


def _loaded_with(original: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load the model with gguf as it is, then have it read weights in another order again."""
    import gguf

    def loaded(*arguments: Any, **keywords: Any) -> Any:
        changed = gguf.quants.dequantize
        with monkeypatch.context() as patched:
            patched.setattr(gguf.quants, "dequantize", original)
            model = load(*arguments, **keywords)
        monkeypatch.setattr(gguf.quants, "dequantize", changed)
        return model

    return loaded


def test_a_file_that_holds_something_else_fails_the_check(
    cli: Cli, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_backends.causal_lm import gguf_export

    monkeypatch.setattr(gguf_export, "_changed", lambda *_: {})
    done = cli("-C", packed, "export", tmp_path / "out", "--format", "gguf", "--device", "cpu")
    check_error(done, 7, "differs from the model in memory")


# -- adapters by others' rules ----------------------------------------------------------------------------

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""What vLLM takes an adapter for in a Llama: each of them, or the fused layer that it becomes a part of."""
"""vLLM's choices of ``--max-lora-rank``."""


def test_adapters_meet_vllms_rules(cli: Cli, texts: Path, tmp_path: Path) -> None:
    """As vllm/lora/peft_helper.py and lora_model.py check a directory."""
    out = tmp_path / "out"
    assert cli("-C", texts, "export", out, "--format", "adapter", "--task", "moods", "--device", "cpu").code == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    assert isinstance(config["r"], int) and config["r"] <= max(_VLLM_RANKS)
    assert config["modules_to_save"] is None and config.get("use_dora") in (None, False)
    assert config["bias"] == "none" and not config.get("rank_pattern") and not config.get("alpha_pattern")
    assert isinstance(config["target_modules"], list)
    assert {name.split(".")[-1] for name in config["target_modules"]} == _VLLM_MODULES
    tensors = load_file(out / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"], name
        assert parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"), name
        assert parts[-3] in {one.split(".")[-1] for one in config["target_modules"]}
        assert tensor.shape[0 if parts[-2] == "lora_A" else 1] == config["r"]
    pairs = {name.replace("lora_A", "*").replace("lora_B", "*") for name in tensors}
    assert len(tensors) == 2 * len(pairs)
    files = {path.name for path in out.iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", "Modelfile"}


def test_adapters_of_every_task_load_side_by_side_in_peft(cli: Cli, texts: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert (
        cli("-C", texts, "export", tmp_path / "out", "--format", "routed", "--no-verify", "--device", "cpu").code == 0
    )
    base = AutoModelForCausalLM.from_pretrained(texts.parent / "llama")
    network = PeftModel.from_pretrained(base, str(tmp_path / "out/adapters/001-moods"), adapter_name="moods")
    report = network.load_adapter(str(tmp_path / "out/adapters/002-chats"), adapter_name="chats")
    assert not report.unexpected_keys
    ids = torch.tensor([[5, 6, 7]])
    network.eval()
    with torch.no_grad():
        network.set_adapter("moods")
        one = network(ids).logits
        network.set_adapter("chats")
        assert not torch.equal(one, network(ids).logits)
