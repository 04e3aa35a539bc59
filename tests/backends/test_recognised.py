"""A language model named without its backend, and answers that have no end."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MODEL_ARGS, Cli
from tiny_lm import TEMPLATE, save_model
from treelora_backends.vit.loading import EMBEDDED

from treelora_cli.backend.registry import backend_for
from treelora_cli.project import Project


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE)


def test_a_directory_is_recognised_by_its_configuration(cli: Cli, llama: Path, tmp_path: Path) -> None:
    done = cli("init", tmp_path / "p", "--model", llama, "--device", "cpu")
    assert done.code == 0, done.err
    assert Project.open(tmp_path / "p").state.backend == "causal-lm"


def test_what_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def directory(name: str, config: object) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(tmp_path / name)

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.gguf").write_bytes(b"GGUF")
    lm = [
        directory("gpt2", {"architectures": ["GPT2LMHeadModel"]}),
        directory("llama", {"architectures": ["LlamaForCausalLM"]}),
        str(tmp_path / "model.gguf"),
        str(tmp_path / "packed"),
    ]
    other = [
        None,
        str(EMBEDDED),
        "vit_tiny_patch16_224",
        "nobody/nothing",
        directory("bert", {"architectures": ["BertForMaskedLM"]}),
        directory("timm", {"architecture": "vit_tiny_patch16_224", "model_args": MODEL_ARGS}),
        directory("list", []),
        directory("broken", "{"),
        directory("odd", {"architectures": 3}),
    ]
    assert [backend_for(model) for model in lm] == ["causal-lm"] * 4
    assert [backend_for(model) for model in other] == ["vit"] * 9
    cached = str(Path(lm[1]) / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _id, _name: cached)
    assert backend_for("somebody/llama") == "causal-lm"


@pytest.mark.parametrize("endless", [False, True])
def test_answers_without_an_end_are_said_before_anything_is_learned(
    cli: Cli, llama: Path, tmp_path: Path, endless: bool
) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    if endless:
        for file, key in (
            ("tokenizer_config.json", "eos_token"),
            ("config.json", "eos_token_id"),
            ("generation_config.json", "eos_token_id"),
        ):
            settings = json.loads((model / file).read_text())
            (model / file).write_text(json.dumps({**settings, key: None}))
    rows = [{"prompt": f"How is {n}?", "answer": f"As {n} is"} for n in range(20)]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert cli("init", tmp_path / "p", "--model", model, "--device", "cpu").code == 0
    done = cli("-C", tmp_path / "p", "--json", "train-task", tmp_path / "d.jsonl", "--dry-run", "--device", "cpu")
    assert done.code == 0, done.err
    said = [note for note in done.json["notes"] if "answers have no end" in note]
    line = (
        "18 of 18 training answers have no end (the tokenizer names no end token): what is generated runs to its limit."
    )
    assert said == ([line] if endless else [])
