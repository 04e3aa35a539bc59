"""No code of a model runs, whoever loads it and whatever stands on standard input."""

import ast
import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import Cli, check_error, tree_hash
from tiny_lm import TEMPLATE, save_model
from treelora_backends.own_code import refuse_own_code

from treelora_cli.errors import ModelError

SOURCES = Path(__file__).parents[2]
_CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import LlamaConfig as OwnConfig, LlamaForCausalLM as OwnModel
from transformers import PreTrainedTokenizerFast as OwnTokenizer
def generate(*_arguments, **_keywords):
    raise AssertionError
"""
CONFIG = {"AutoConfig": "own.OwnConfig"}
MODEL = {"AutoModelForCausalLM": "own.OwnModel"}
TOKENIZER = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
PLANTS = {
    "config": ("config.json", {"auto_map": CONFIG, "model_type": "own"}),
    "config of a known family": ("config.json", {"auto_map": CONFIG}),
    "model": ("config.json", {"auto_map": MODEL}),
    "model of an unknown family": ("config.json", {"auto_map": {**CONFIG, **MODEL}, "model_type": "own"}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": TOKENIZER, "tokenizer_class": "OwnTokenizer"}),
    "tokenizer named in the configuration": ("config.json", {"auto_map": TOKENIZER}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "own.OwnTokenizer"}}),
    "image processor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "own.OwnTokenizer"}}),
    "nested": ("config.json", {"text_config": {"auto_map": MODEL}}),
    "another repository's": ("config.json", {"auto_map": {"AutoModelForCausalLM": "somebody/else--own.OwnModel"}}),
    "generation settings": ("generation_config.json", {"auto_map": CONFIG}),
    "feature extractor": ("feature_extractor_config.json", {"auto_map": MODEL}),
    "video processor": ("video_preprocessor_config.json", {"auto_map": {"AutoVideoProcessor": "own.OwnModel"}}),
    "a list": ("config.json", {"auto_map": ["own.OwnModel"]}),
    "kernel": ("config.json", {"attn_implementation": "somebody/kernel"}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama", TEMPLATE)


@pytest.fixture
def asked(monkeypatch):
    """Everything says yes to whoever asks; returns what was asked."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    return questions


def plant(model, marker, file, change):
    """Add code that leaves ``marker``, and name it in one of the model's files."""
    (model / "own.py").write_text(_CODE.format(marker=str(marker)))
    path = model / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **change}))


@pytest.mark.parametrize("kind", PLANTS)
def test_a_model_that_names_code_is_refused_and_nothing_runs(
    cli: Cli, llama: Path, tmp_path: Path, asked: list[str], kind: str
) -> None:
    model, marker = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "marker"
    file, change = PLANTS[kind]
    plant(model, marker, file, change)
    done = cli("init", tmp_path / "p", "--backend", "causal-lm", "--model", model, "--device", "cpu")
    check_error(done, 5, rf"model: {file} names code of the model's own \('.*'\), which is never run\. Use a model")
    assert (marker.exists(), asked, (tmp_path / "p").exists()) == (False, [], False)


def test_every_command_refuses_a_model_to_which_code_was_added_later(
    cli: Cli, llama: Path, tmp_path: Path, asked: list[str]
) -> None:
    model, marker, root = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "marker", tmp_path / "p"
    data = tmp_path / "moods.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"apple {i}", "answer": "red"}) for i in range(20)))
    quick = ["--epochs", "1", "--device", "cpu"]
    assert cli("init", root, "--backend", "causal-lm", "--model", model, *quick).code == 0
    assert cli("-C", root, "train-task", data, *quick).code == 0
    plain = tree_hash(model)
    for file, change in (PLANTS["config"], PLANTS["model"], PLANTS["tokenizer"]):
        plant(model, marker, file, change)
        for command in (
            ["eval"],
            ["predict", "apple"],
            ["export", tmp_path / "out"],
            ["export", tmp_path / "out", "--format", "adapter"],
            ["train-task", data, "--name", "again"],
        ):
            check_error(cli("-C", root, *command, "--device", "cpu"), 5, rf"{file} names code of the model's own")
        assert (marker.exists(), asked, (tmp_path / "out").exists()) == (False, [], False)
        shutil.rmtree(model)
        shutil.copytree(llama, model)
    assert tree_hash(model) == plain


def test_an_export_to_which_code_was_added_is_not_loaded_by_the_check(
    cli: Cli, llama: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reloads what was just written; whoever writes there meanwhile gets no code run either."""
    from treelora_backends.causal_lm import backend

    marker, root, data = tmp_path / "marker", tmp_path / "p", tmp_path / "moods.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"apple {i}", "answer": "red"}) for i in range(20)))
    quick = ["--epochs", "1", "--device", "cpu"]
    assert cli("init", root, "--backend", "causal-lm", "--model", llama, *quick).code == 0
    assert cli("-C", root, "train-task", data, *quick).code == 0
    original = backend.write_merged

    def planting(base, memory, out, options):
        original(base, memory, out, options)
        plant(out, marker, "config.json", {"auto_map": {**CONFIG, **MODEL}, "model_type": "own"})

    monkeypatch.setattr(backend, "write_merged", planting)
    check_error(cli("-C", root, "export", tmp_path / "out", "--device", "cpu"), 5, "names code of the model's own")
    assert (marker.exists(), asked, (tmp_path / "out").exists()) == (False, [], False)


def test_generation_code_beside_a_model_is_passed_by(cli: Cli, llama: Path, tmp_path: Path, asked: list[str]) -> None:
    """``custom_generate/generate.py`` needs no mention in any configuration."""
    model, marker = Path(shutil.copytree(llama, tmp_path / "model")), tmp_path / "marker"
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(_CODE.format(marker=str(marker)))
    assert cli("init", tmp_path / "p", "--backend", "causal-lm", "--model", model, "--device", "cpu").code == 0
    assert (marker.exists(), asked) == (False, [])


@pytest.mark.parametrize(
    ("argument", "code", "line"),
    [
        ("attn_implementation=somebody/kernel", 5, "'somebody/kernel': code that is fetched for a model is never run"),
        ("use_kernels=true", 2, "model argument 'use_kernels' is not allowed"),
        ("trust_remote_code=true", 2, "model argument 'trust_remote_code' is not allowed"),
    ],
)
def test_arguments_that_fetch_code_are_refused(
    cli: Cli, llama: Path, tmp_path: Path, argument: str, code: int, line: str
) -> None:
    options = ["--backend", "causal-lm", "--model", llama, "--model-arg", argument, "--device", "cpu"]
    check_error(cli("init", tmp_path / "p", *options), code, line)


def test_a_model_without_code_of_its_own_is_let_through(llama: Path, tmp_path: Path) -> None:
    refuse_own_code(str(llama), offline=True)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {}, "attn_implementation": "sdpa"}))
    refuse_own_code(str(tmp_path), offline=True)
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"": "a.B"}}))
    with pytest.raises(ModelError, match=r"config\.json names code of the model's own \('a\.B'\)"):
        refuse_own_code(str(tmp_path), offline=True)


def test_every_loader_says_no_to_a_models_code() -> None:
    """PEFT's ``PeftModel.from_pretrained`` knows no such argument and reads weights only."""
    told, untold = 0, []
    for path in [*(SOURCES / "treelora_cli").rglob("*.py"), *(SOURCES / "backends").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if not isinstance(called, ast.Attribute) or called.attr not in ("from_pretrained", "from_config"):
                continue
            if ast.unparse(called.value) == "PeftModel":
                continue
            said = [one.value for one in node.keywords if one.arg == "trust_remote_code"]
            if len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False:
                told += 1
            else:
                untold.append(f"{path}:{node.lineno}")
    assert (told, untold) == (7, [])
