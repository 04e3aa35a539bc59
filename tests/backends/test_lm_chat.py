"""Chats as models' templates write them: what is read, what is learned, where an answer ends."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_chat import chat, encoder_of, run, written
from tiny_lm import TEMPLATE, load, save_model, small_tokenizer
from treelora_backends.causal_lm.batches import collate
from treelora_backends.causal_lm.memory import system_of
from treelora_backends.causal_lm.task import read_lm_task

from treelora_cli.backend.runtime import Silent
from treelora_cli.backend.values import DataRequest, Turn
from treelora_cli.data.examples import TextExample, chat_example
from treelora_cli.errors import DataError
from treelora_cli.project import Project

IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
R1 = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
"""Writes the system prompt into the last message, if that is the user's."""
ZEPHYR_NO_END = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def parts(encoder, example):
    """Return the prompt and every learned part as text."""
    shown = encoder.show(example, "chat", ())
    prompt, *rest = shown.split("[[")
    return prompt, [part.split("]]")[0] for part in rest]


@pytest.mark.parametrize(
    ("template", "special", "prompt", "learned"),
    [
        (IM, ["<|im_start|>", "<|im_end|>"], "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Ho<|im_end|>"),
        (
            GEMMA,
            ["<start_of_turn>", "<end_of_turn>"],
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
            "Ho<end_of_turn>",
        ),
        (PHI, [], "<|user|>\nHi<|end|>\n<|assistant|>\n", "Ho<|end|>"),
        (LLAMA2, ["<s>"], "<s>[INST] Hi [/INST]", " Ho </s>"),
        (R1, ["<|User|>", "<|Assistant|>"], "<|User|>Hi<|Assistant|>", "Ho<|end|>"),
        (
            QWEN3,
            ["<|im_start|>", "<|im_end|>"],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "<think>\n\n</think>\n\nHo<|im_end|>",
        ),
        (ZEPHYR_NO_END, [], "### user:\nHi\n### assistant:\n", "Ho</s>"),
        (None, [], "User: Hi\nAssistant:", " Ho</s>"),
    ],
)
def test_what_the_template_writes_after_an_answer_is_learned(template, special, prompt, learned):
    assert parts(encoder_of(template, *special), chat("Hi", "Ho")) == (prompt, [learned])


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (IM, ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
        (GEMMA, ["<end_of_turn>"], "<end_of_turn>"),
        (PHI, [], "<|end|>"),
    ],
)
def test_generation_stops_at_the_templates_end_and_at_the_models(template, special, end):
    encoder = encoder_of(template, *special)
    assert encoder.stop_ids == tuple(encoder.tokenizer.convert_tokens_to_ids([end, "</s>"]))


def test_an_opened_think_is_not_opened_again():
    encoder = encoder_of(R1, "<|User|>", "<|Assistant|>")
    assert parts(encoder, chat("Hi", "<think>\nWell.</think>Ho")) == ("<|User|>Hi<|Assistant|>", ["Ho<|end|>"])
    keeps = R1.replace("m.content.split('</think>')[-1]", "m.content")
    encoder = encoder_of(keeps, "<|User|>", "<|Assistant|>")
    prompt, learned = parts(encoder, chat("Hi", "<think>\nWell.</think>Ho"))
    assert (prompt, learned) == ("<|User|>Hi<|Assistant|>", ["<think>\nWell.</think>Ho<|end|>"])
    assert encoder.prompt_text(chat("Hi", "Ho"), "chat", ()) == prompt


def test_every_turn_of_the_assistant_is_learned_or_the_last():
    example = chat("Hi", "Ho", "And?", "Yes", system="Be kind.")
    opening = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    assert parts(encoder_of(TEMPLATE), example) == (opening, ["Ho<|end|>", "Yes<|end|>"])
    before = f"{opening}Ho<|end|><|user|>And?<|end|><|assistant|>"
    assert parts(encoder_of(TEMPLATE, learn="last"), example) == (before, ["Yes<|end|>"])


def test_the_time_in_a_template_does_not_make_prompts_answers():
    clock = "{{ '[' + strftime_now('%H:%M:%S.%f') + ']' }}"
    prompt, learned = parts(encoder_of(clock + TEMPLATE), chat("Hi", "Ho", "And?", "Yes"))
    assert prompt.endswith("]<|user|>Hi<|end|><|assistant|>")
    assert learned == ["Ho<|end|>", "Yes<|end|>"]


def test_what_a_template_leaves_out_is_said(tmp_path):
    deaf = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    turns = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns], "tools": [{"name": "f"}]}
    path = written(tmp_path / "d.jsonl", record, record)
    notes = {t: read_lm_task(DataRequest(path, held_out=0.0), encoder_of(t), Silent()).notes for t in (deaf, TEMPLATE)}
    line = "The chat template leaves out what stands in {}: the model does not read it."
    assert line.format("tool, tools") in notes[deaf]
    assert line.format("tools") in notes[TEMPLATE]
    plain = written(tmp_path / "e.jsonl", {"messages": record["messages"][:2]})
    assert read_lm_task(DataRequest(plain, held_out=0.0), encoder_of(deaf), Silent()).notes == ()


@pytest.mark.parametrize(
    "said",
    [
        {"content": "<think>\nhm\n</think>\n\nyes"},
        {"content": "yes", "reasoning": "hm"},
        {"content": "yes", "thinking": "hm"},
    ],
)
def test_thoughts_that_a_template_leaves_out_are_said(tmp_path, said):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **said}]}
    path = written(tmp_path / "d.jsonl", record, record)
    deaf = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1].strip()")
    both = TEMPLATE.replace("m['content']", "m.reasoning_content ~ m.thinking ~ m['content']")
    notes = {t: read_lm_task(DataRequest(path, held_out=0.0), encoder_of(t), Silent()).notes for t in (deaf, both)}
    line = "The chat template leaves out the thoughts before an answer: they are not learned."
    assert (line in notes[deaf], line in notes[both]) == (True, False)


@pytest.mark.parametrize("question", ["Hi", "Ho"])
def test_a_system_prompt_in_the_last_message_is_read_and_the_message_not_learned(question):
    encoder = encoder_of(MISTRAL, "[INST]", "[/INST]")
    one = chat(question, "Ho", system="Be kind.")
    assert parts(encoder, one) == (f"[INST]Be kind.\n\n{question}[/INST]", ["Ho</s>"])
    assert encoder.prompt_text(one, "chat", ()) == f"[INST]Be kind.\n\n{question}[/INST]"
    assert encoder.template.left_out(one) == set()


def test_turns_behind_a_system_prompt_that_moves_are_examples_of_their_own():
    encoder = encoder_of(MISTRAL, "[INST]", "[/INST]")
    divided = encoder.template.divided(chat("Hi", "Ho", "And?", "Yes", system="Be kind."), "all")
    assert [parts(encoder, one) for one in divided] == [
        ("[INST]Be kind.\n\nHi[/INST]", ["Ho</s>"]),
        ("[INST]Hi[/INST]Ho</s>[INST]Be kind.\n\nAnd?[/INST]", ["Yes</s>"]),
    ]


def test_a_switch_in_the_last_message_is_read_and_the_message_not_learned():
    quiet = PHI.replace("{{ m.content }}", "{{ m.content }}{% if loop.last and m.role == 'user' %}/quiet{% endif %}")
    assert parts(encoder_of(quiet), chat("Hi", "Ho")) == ("<|user|>\nHi/quiet<|end|>\n<|assistant|>\n", ["Ho<|end|>"])


def test_a_template_that_shows_another_chat_when_it_is_finished_is_refused():
    other = "{% if messages[-1].role == 'user' %}ask{% else %}{{ messages[-1].content }}{% endif %}"
    with pytest.raises(DataError, match="c:1: the model's chat template writes a finished chat in another way"):
        encoder_of(f"{other}" + "{% if add_generation_prompt %}<|assistant|>{% endif %}").encode(
            chat("Hi", "Ho"), "chat", ()
        )


def test_only_learned_tokens_are_labelled():
    encoder = encoder_of(TEMPLATE)
    one = encoder.encode(chat("Hi", "Ho", "And?", "Yes"), "chat", ())
    labelled = collate([one], 0)
    ids = np.concatenate([one.prompt, one.answer])
    wanted = [token for token, learned in encoder.tokens(chat("Hi", "Ho", "And?", "Yes"), "chat", ()) if learned]
    assert "".join(wanted) == "Ho<|end|>Yes<|end|>"
    assert encoder.tokenizer.decode(labelled.targets.tolist()) == "Ho<|end|>Yes<|end|>"
    assert [int(ids[column + 1]) for column in labelled.columns] == labelled.targets.tolist()
    assert one.longest == max(len(encoder.tokenizer(text)["input_ids"]) for text in ("Ho<|end|>", "Yes<|end|>"))


def test_a_message_of_weight_zero_is_not_learned():
    example = chat("Hi", "Ho", "And?", "Yes")
    turns = (example.turns[0], Turn("assistant", "Ho", learned=False), example.turns[2])
    silent = TextExample("", "Hi", "Yes", turns, example.last)
    assert parts(encoder_of(TEMPLATE), silent)[1] == ["Yes<|end|>"]


def test_turns_that_are_rewritten_later_are_examples_of_their_own():
    encoder = encoder_of(QWEN3, "<|im_start|>", "<|im_end|>")
    example = chat("Hi", "Ho", "And?", "Yes")
    assert encoder.template.pieces(example, "all") is None
    first, second = encoder.template.divided(example, "all")
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(encoder, first) == (opening, ["<think>\n\n</think>\n\nHo<|im_end|>"])
    later = f"{opening}Ho<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert parts(encoder, second) == (later, ["<think>\n\n</think>\n\nYes<|im_end|>"])
    assert len(encoder_of(None).template.divided(example, "all")) == 2


def test_what_stands_before_every_answer_is_no_part_of_the_answer():
    encoder = encoder_of(QWEN3, "<|im_start|>", "<|im_end|>")
    written = encoder.tokenizer("<think>\n\n</think>\n\nParis")["input_ids"]
    assert encoder.decode(written, "chat") == "Paris"
    assert encoder.body(chat("Hi", "Paris")) == "Paris"


def test_a_channel_before_every_answer_is_no_part_of_the_answer():
    channel = TEMPLATE.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' %}<|to|>final{% endif %}<|:|>{{ m.content }}"
    )
    encoder = encoder_of(channel, "<|to|>", "<|:|>")
    prompt, learned = parts(encoder, chat("Hi", "Paris"))
    assert (prompt, learned) == ("<|user|><|:|>Hi<|end|><|assistant|>", ["<|to|>final<|:|>Paris<|end|>"])
    assert encoder.decode(encoder.encode(chat("Hi", "Paris"), "chat", ()).answer.tolist(), "chat") == "Paris"


@pytest.mark.parametrize("template", [GEMMA, R1.replace("{% else %}", "{% elif m.role == 'assistant' %}"), LLAMA2])
def test_a_system_prompt_that_is_not_taken_opens_the_first_message(template):
    encoder = encoder_of(template, "<start_of_turn>", "<end_of_turn>", "<s>", "<|User|>", "<|Assistant|>")
    assert not encoder.template.takes_system
    prompt, learned = parts(encoder, chat("Hi", "Ho", system="Be kind."))
    assert prompt == parts(encoder, chat("Be kind.\n\nHi", "Ho"))[0]
    assert "Be kind.\n\nHi" in prompt
    assert len(learned) == 1


def test_a_long_chat_loses_its_oldest_turns():
    encoder = encoder_of(TEMPLATE, max_length=64)
    one = encoder.encode(chat("What colour is it? " * 9, "red", "And?", "Yes", system="Be kind."), "chat", ())
    assert encoder.tokenizer.decode(one.prompt.tolist()) == (
        "<|system|>Be kind.<|end|><|user|>And?<|end|><|assistant|>"
    )
    assert (one.cut, encoder.tokenizer.decode(one.answer.tolist())) == ("turns", "Yes<|end|>")


TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_calls_of_tools_are_learned_with_or_without_the_templates_help():
    calls = json.dumps({"tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}]})
    example = chat_example("", [Turn("user", "1?")], Turn("assistant", "", calls))
    assert parts(encoder_of(TOOLS), example)[1] == ['<call>sum {"a": 1}</call><|end|>']
    assert encoder_of(TOOLS).body(example) == '<call>sum {"a": 1}</call>'
    plain = parts(encoder_of(TEMPLATE), example)
    assert plain == ("<|user|>1?<|end|><|assistant|>", ['{"name": "sum", "arguments": {"a": 1}}<|end|>'])
    later = replace(example, turns=(*example.messages, Turn("tool", "1")), last=Turn("assistant", "One."))
    assert parts(encoder_of(TOOLS), later)[1] == ['<call>sum {"a": 1}</call><|end|>', "One.<|end|>"]
    assert parts(encoder_of(TEMPLATE), later) == (plain[0], [*plain[1], "One.<|end|>"])
    asked = encoder_of(TEMPLATE).prompt_text(later, "chat", ())
    assert asked == f"{plain[0]}{plain[1][0]}<|tool|>1<|end|><|assistant|>"


def test_a_message_as_a_list_of_parts_is_what_some_templates_want():
    whole = "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    encoder = encoder_of(TEMPLATE.replace("{{ m['content'] }}", whole))
    example = chat("Hi", "Ho", "And?", "Yes", system="Be kind.")
    assert (encoder.template.takes_parts, encoder_of(TEMPLATE).template.takes_parts) == (True, False)
    assert parts(encoder, example) == parts(encoder_of(TEMPLATE), example)
    assert encoder.stop_ids == encoder_of(TEMPLATE).stop_ids


def test_what_a_template_does_to_answers_is_said(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    code = {"role": "assistant", "content": "    return 1"}
    record = {"messages": [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "1"}, code]}
    path = written(tmp_path / "d.jsonl", record)
    strips = TEMPLATE.replace("m['content']", "m['content'] | trim")
    notes = {t: read_lm_task(DataRequest(path, held_out=0.0), encoder_of(t), Silent()).notes for t in (strips, TOOLS)}
    assert notes[strips] == (
        "The chat template writes no calls of tools: they stand in the messages as JSON instead.",
        "The chat template strips white space around messages: indentation before an answer is not learned.",
    )
    assert notes[TOOLS] == ()


@pytest.mark.parametrize("template", [TEMPLATE, QWEN3])
def test_last_answers_that_recur_are_no_choice_where_earlier_ones_are_learned(tmp_path, template):
    turns = [[("a?", "red"), ("sure?", "yes")], [("b?", "green"), ("sure?", "no")]]
    records = [
        {
            "messages": [
                {"role": r, "content": c} for pair in one for r, c in zip(("user", "assistant"), pair, strict=True)
            ]
        }
        for one in turns
    ] * 6
    path = written(tmp_path / "d.jsonl", *records)
    found = {
        learn: read_lm_task(
            DataRequest(path, held_out=0.0), encoder_of(template, "<|im_start|>", "<|im_end|>", learn=learn), Silent()
        )
        for learn in ("all", "last")
    }
    assert (found["all"].labels, found["last"].labels) == ((), ("no", "yes"))
    assert sum(len(one.answer) > 0 for one in found["all"].train) == (12 if template == TEMPLATE else 24)


def test_an_answer_is_scored_without_the_thoughts_that_are_not_learned(tmp_path):
    said = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo"}
    path = written(tmp_path / "d.jsonl", {"messages": [{"role": "user", "content": "Hi"}, said]})
    encoder = encoder_of(R1, "<|User|>", "<|Assistant|>")
    (one,) = read_lm_task(DataRequest(path, val=path), encoder, Silent()).test
    assert one.answer == "Ho"


def test_code_keeps_its_indentation():
    encoder = encoder_of(None)
    one = encoder.encode(TextExample("", "def f():\n", "    return 1\n"), "plain", ())
    assert encoder.tokenizer.decode(one.answer.tolist()) == "    return 1\n</s>"
    assert encoder.decode(one.answer.tolist()) == "    return 1"
    assert encoder.decode(encoder.tokenizer(" green")["input_ids"]) == "green"


# -- the whole job --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two chats that differ in their system prompt alone, learned to the letter; a model with ends of its own."""
    root = tmp_path_factory.mktemp("chat")
    model = save_model(root / "m", "llama", TEMPLATE)
    tokenizer = small_tokenizer(TEMPLATE)
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    tokenizer.save_pretrained(model)
    for name, system, answers in (("kind", "Be kind.", "red green"), ("rude", "Be rude.", "sad bad")):
        rows = [
            {
                "messages": [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"{w}?"},
                    {"role": "assistant", "content": a},
                ]
            }
            for w, a in zip(("apple", "grass"), answers.split(), strict=True)
        ] * 12
        written(root / f"{name}.jsonl", *rows)
    fast = ["--epochs", "10", "--lr", "0.01", "--batch-size", "8", "--dropout", "0", "--blocks", "0"]
    assert run("init", root / "p", "--backend", "causal-lm", "--model", model, *fast) == 0
    settings = root / "p" / "treelora.yaml"
    settings.write_text(settings.read_text().replace("closed: solved", "closed: likelihood"))
    for name in ("kind", "rude"):
        assert run("-C", root / "p", "train-task", root / f"{name}.jsonl") == 0
    return root / "p"


def predictions(capsys, *arguments):
    capsys.readouterr()
    assert run("--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)["predictions"]


def test_a_system_prompt_tells_the_task(project, capsys):
    kind, rude = (
        predictions(capsys, "-C", project, "predict", "apple?", "--system", f"Be {w}.")[0] for w in ("kind", "rude")
    )
    assert (kind["output"], kind["task"]) == ("red", "kind")
    assert (rude["output"], rude["task"]) == ("sad", "rude")


def test_a_task_is_asked_with_its_own_system_prompt(project):
    memory = Project.open(project).memory()
    assert [system_of(task) for task in memory.tasks] == ["Be kind.", "Be rude."]
    base = load(project.parent / "m")
    predictor = base.predictor(memory, "routed")
    asked = predictor._with_system(TextExample("", "apple?", ""), 1)
    assert asked.turns == (Turn("system", "Be rude."), Turn("user", "apple?"))
    given = TextExample("", "apple?", "", (Turn("system", "Be kind."), Turn("user", "apple?")))
    assert predictor._with_system(given, 1) is given


def test_messages_are_answered(project, tmp_path, capsys):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([{"role": "system", "content": "Be rude."}, {"role": "user", "content": "grass?"}]))
    found = predictions(capsys, "-C", project, "predict", "--messages", path)
    assert [(one["input"], one["output"], one["task"]) for one in found] == [("grass?", "bad", "rude")]


def test_a_table_asks_with_the_system_prompts_in_it(project, tmp_path, capsys, monkeypatch):
    path = tmp_path / "d.csv"
    path.write_text("system,prompt\nBe kind.,apple?\nBe rude.,apple?\n")
    found = predictions(capsys, "-C", project, "predict", path)
    assert [(one["output"], one["task"]) for one in found] == [("red", "kind"), ("sad", "rude")]
    assert run("-C", project, "predict", path, "--system", "Be kind.") == 2
    assert "INPUT has system prompts of its own; leave out --system." in capsys.readouterr().err
    chat = json.dumps([{"role": "system", "content": "Be rude."}, {"role": "user", "content": "grass?"}])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(chat.encode())))
    assert [one["output"] for one in predictions(capsys, "-C", project, "predict", "--messages", "-")] == ["bad"]


def test_what_cannot_be_asked(project, tmp_path, capsys):
    path = written(tmp_path / "chat.jsonl", [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])
    assert run("-C", project, "predict") == 2
    assert run("-C", project, "predict", "x", "--system", " ") == 2
    assert run("-C", project, "predict", "--messages", path, "--system", "x") == 2
    assert run("-C", project, "predict", "--messages", tmp_path / "none.json") == 4
    assert run("-C", project, "predict", "--system", "x", "word " * 300) == 4
    assert "has system prompts of its own" in capsys.readouterr().err


def test_the_export_stops_where_answers_end(project, tmp_path):
    assert run("-C", project, "export", tmp_path / "out", "--no-verify") == 0
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 3]


def test_a_dry_run_shows_the_first_example_token_by_token(project, capsys):
    capsys.readouterr()
    data = project.parent / "kind.jsonl"
    assert run("--json", "-v", "-C", project, "train-task", data, "--name", "x", "--dry-run") == 0
    found = json.loads(capsys.readouterr().out)
    assert "".join(one["text"] for one in found["tokens"] if one["learned"]) in ("red<|end|>", "green<|end|>")
    assert found["sample"].startswith("<|system|>Be kind.<|end|><|user|>")
