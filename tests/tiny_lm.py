"""A tiny language model made in the test."""

import json
import random

import torch
from transformers.utils import logging
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.causal_lm.batches import Batch, LabelledBatch

from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.config import AdapterConfig, BaseConfig, Config, TrainConfig, resolve

logging.get_logger()  # its handler keeps the standard error of this moment, which outlives that of a single test

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

COLOURS = {"red": ["apple", "rose", "blood"], "green": ["grass", "leaf", "frog"]}


def write_tables(folder):
    """Write one table for each format: colours, moods, chats and texts."""
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


def small_tokenizer(template=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["What colour is the apple? red green Options: good, bad\nAnswer: happy sad"] * 50, trainer
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    wrapped.chat_template = template
    return wrapped


def save_model(folder, family, template=None, depth=2, **settings):
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = small_tokenizer(template)
    ends = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": depth, "num_attention_heads": 4}
        config = LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=128, **ends, **settings)
        model = LlamaForCausalLM(config)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=depth, n_head=4, n_positions=128, **ends, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)  # wider than usual, so that the untrained model has opinions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(model, dtype=None, train=None, **adapter):
    backend = CausalLmBackend()
    flags = Config(
        base=BaseConfig(model=str(model), dtype=dtype),
        adapter=AdapterConfig(**{"blocks": 0, **adapter}),
        train=train or TrainConfig(),
    )
    config = resolve(flags, Config(), backend.defaults())
    return backend.load(config, open_runtime("cpu", offline=True, reporter=Silent()))


NO_DROPOUT = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}


def tiny_models(root):
    """Save a llama and a gpt2 of four layers below ``root``; return their directories by family."""
    settings = {"llama": {}, "gpt2": NO_DROPOUT}
    return {family: save_model(root / family, family, depth=4, **extra) for family, extra in settings.items()}


def opened(path, **adapter):
    base = load(path, blocks=3, dropout=0.0, **adapter)
    adapters.write_slot(base.network, adapters.reference_point(base.network, base.layers, 4.0, 0))
    torch.manual_seed(1)
    with torch.no_grad():
        for _, up in adapters.slot_parameters(base.network, base.layers):
            up.normal_(0, 0.1)
    return base


def labelled_batch():
    """Three texts of 9, 7 and 5 tokens; the last two, one and three of them are the answer."""
    torch.manual_seed(2)
    ids = torch.randint(4, 200, (3, 9))
    mask = (torch.arange(9) < torch.tensor([9, 7, 5])[:, None]).long()
    rows = torch.tensor([0, 0, 1, 2, 2, 2])
    columns = torch.tensor([6, 7, 5, 1, 2, 3])
    return LabelledBatch(Batch(ids, mask), rows, columns, ids[rows, columns + 1])


def gradients(base, loss):
    slot = adapters.slot_parameters(base.network, base.layers)
    return torch.autograd.grad(loss, [part for pair in slot for part in pair])


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
