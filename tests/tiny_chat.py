"""Chats and the tiny tokenizers that encode them."""

import json

from tiny_lm import small_tokenizer
from treelora_backends.causal_lm.render import Encoder

from treelora_cli.app import run_command
from treelora_cli.backend.values import Turn
from treelora_cli.data.examples import chat_example


def tokenizer_of(template, *special, end="</s>"):
    tokenizer = small_tokenizer(template)
    tokenizer.add_special_tokens({"eos_token": end, "additional_special_tokens": list(special)})
    return tokenizer


def encoder_of(template, *special, learn="all", max_length=256):
    tokenizer = tokenizer_of(template, *special)
    return Encoder(tokenizer, max_length, [tokenizer.eos_token_id], learn=learn)


def chat(*contents, system=None):
    roles = ("user", "assistant")
    turns = [Turn(roles[index % 2], content) for index, content in enumerate(contents)]
    return chat_example("c:1", [*([Turn("system", system)] if system else []), *turns[:-1]], turns[-1])


def run(*arguments):
    return run_command([str(one) for one in arguments])


def written(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
