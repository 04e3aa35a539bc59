"""Directories, files and settings that make no language model."""

import pytest
from tiny_lm import (
    load,
    small_tokenizer,
)
from treelora_backends.causal_lm.backend import CausalLmBackend

from treelora_cli.config import BaseConfig
from treelora_cli.errors import ModelError, UsageError


def test_models_that_are_none(tmp_path, llama, lm_tables):
    backend = CausalLmBackend()
    with pytest.raises(UsageError, match="needs a model"):
        backend.resolve_base(BaseConfig(), offline=True)
    with pytest.raises(ModelError, match=r"nowhere/at/all not found"):
        backend.resolve_base(BaseConfig(model="nowhere/at/all"), offline=True)
    with pytest.raises(ModelError, match=r"org/name is not cached and --offline is set"):
        backend.resolve_base(BaseConfig(model="org/name"), offline=True)
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        backend.resolve_base(BaseConfig(model=str(tmp_path)), offline=True)
    with pytest.raises(ModelError, match="not a model"):
        backend.resolve_base(BaseConfig(model=str(lm_tables / "moods.jsonl")), offline=True)


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
