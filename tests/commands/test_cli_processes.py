"""Commands as processes of their own: state on disk only, exports under stock code, signals, recipes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    MODEL,
    MODEL_ARGS,
    STREAM,
    Cli,
    child_environment,
    learned_hashes,
    make_images,
    run_process,
    run_python,
    tree_hash,
)
from tiny_lm import save_model, write_tables

NAMES = [name for name, _ in STREAM]
_SCORE = """
import json, sys
from pathlib import Path
import timm, torch
from PIL import Image

def score(model, labels, folders, config):
    steps = timm.data.create_transform(**config, is_training=False)
    shares = {}
    for folder in folders:
        files = sorted(Path(folder).glob("test/*/*.png"))
        batch = torch.stack([steps(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            answers = model(batch).argmax(dim=1).tolist()
        right = [labels[answer] == file.parent.name for answer, file in zip(answers, files)]
        shares[Path(folder).name] = sum(right) / len(right)
    print(json.dumps(shares))
    assert not [name for name in sys.modules if name.startswith("treelora")]
"""
_MERGED = (
    _SCORE
    + """
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
score(model, model.pretrained_cfg["label_names"], sys.argv[2:], config)
"""
)
_ADAPTER = (
    _SCORE
    + """
from peft import PeftModel
from safetensors.torch import load_file
out, weights, name, arguments = sys.argv[1:5]
labels = json.loads((Path(out) / "labels.json").read_text())
base = timm.create_model(name, num_classes=len(labels), **json.loads(arguments))
missing, unexpected = base.load_state_dict(load_file(weights), strict=False)
assert sorted(missing) == ["head.bias", "head.weight"] and not unexpected
model = PeftModel.from_pretrained(base, out).eval()
config = timm.data.resolve_data_config({"input_size": (3, 16, 16)}, model=base)
score(model, labels, sys.argv[5:], config)
"""
)


def eval_scores(cli: Cli, root: Path, inference: str) -> dict[str, float]:
    done = cli("-C", root, "eval", "--inference", inference, "--json", "--device", "cpu").json
    return {name: one["score"] for name, one in done["tasks"].items()}


# -- one process for each command -------------------------------------------------------------------------


@pytest.mark.slow
def test_each_task_in_its_own_process_gives_the_same_hashes(
    process: Cli, learned_project: Path, tmp_path: Path, data: Path, init_options: list[str]
) -> None:
    root = tmp_path / "own processes ü"
    assert process("init", root, *init_options).code == 0
    for name in NAMES:
        done = process("train-task", data / name, "-C", root, "--device", "cpu", "--precision", "fp32")
        assert done.code == 0, done.err
    assert learned_hashes(root) == learned_hashes(learned_project)
    done = process("-C", root, "eval", "--json", "--device", "cpu")
    matrix = json.loads((learned_project / "metrics/matrix.json").read_text())
    assert [one["score"] for one in done.json["tasks"].values()] == pytest.approx(matrix["rows"][-1])


def test_usage_errors_set_the_process_exit_code(process: Cli, tmp_path: Path) -> None:
    assert process("train-task", "--nonsense").code == 2
    done = process("status", cwd=tmp_path)
    assert done.code == 3
    assert done.err == "Error: No treelora project here or above. Run: treelora init DIR --model ...\n"
    assert done.out == ""


# -- exports under stock code -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("mean", marks=pytest.mark.slow), "solved"])
def test_merged_export_predicts_under_stock_timm_as_eval_does(
    cli: Cli, learned_project: Path, init_options: list[str], data: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "merged"
    if kind == "solved":
        learned_project = tmp_path / "p"
        assert cli("init", learned_project, *init_options[2:]).code == 0
        for name in NAMES:
            assert cli("-C", learned_project, "train-task", data / name, "--device", "cpu").code == 0
    done = cli("-C", learned_project, "export", out, "--json", "--device", "cpu")
    assert done.code == 0
    assert done.json["largest_logit_difference"] <= done.json["tolerance"]
    assert sorted(done.json["files"]) == sorted(path.name for path in out.iterdir())
    alone = run_python(_MERGED, str(out), *(str(data / name) for name in NAMES))
    assert alone.code == 0, alone.err
    expected = eval_scores(cli, learned_project, "merged")
    assert json.loads(alone.out) == pytest.approx(expected)
    assert {name: one["reloaded"] for name, one in done.json["scores"].items()} == pytest.approx(expected)


def test_adapter_export_predicts_under_stock_peft_as_eval_does(
    cli: Cli, learned_project: Path, data: Path, tmp_path: Path, weights: Path
) -> None:
    out = tmp_path / "adapter"
    done = cli("-C", learned_project, "export", out, "--format", "adapter", "--json", "--device", "cpu")
    assert done.code == 0
    assert done.json["task"] == "grey"
    folders = [str(data / name) for name in NAMES]
    alone = run_python(_ADAPTER, str(out), str(weights), MODEL, json.dumps(MODEL_ARGS), *folders)
    assert alone.code == 0, alone.err
    assert json.loads(alone.out) == pytest.approx(eval_scores(cli, learned_project, "latest"))


@pytest.mark.slow
def test_earlier_adapter_export_answers_its_own_classes(
    cli: Cli, learned_project: Path, data: Path, tmp_path: Path, weights: Path
) -> None:
    out = tmp_path / "adapter"
    options = ["--format", "adapter", "--task", "cold", "--json", "--device", "cpu"]
    done = cli("-C", learned_project, "export", out, *options)
    assert json.loads((out / "labels.json").read_text()) == ["blue", "cyan", "green"]
    alone = run_python(_ADAPTER, str(out), str(weights), MODEL, json.dumps(MODEL_ARGS), str(data / "cold"))
    assert json.loads(alone.out) == pytest.approx({"cold": done.json["scores"]["cold"]["reloaded"]})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_in_half_precision_without_held_out_data(
    cli: Cli, empty_project: Path, data: Path, tmp_path: Path, dtype: str
) -> None:
    from safetensors import safe_open

    gone = Path(shutil.copytree(data / "cold", tmp_path / "gone"))
    assert cli("-C", empty_project, "train-task", gone, "--device", "cpu").code == 0
    shutil.rmtree(gone)
    done = cli("-C", empty_project, "export", tmp_path / "out", "--dtype", dtype, "--json", "--device", "cpu")
    assert done.code == 0
    assert done.json["scores"] == {}
    assert 0 < done.json["largest_logit_difference"] <= done.json["tolerance"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stored:
        assert {str(stored.get_tensor(key).dtype) for key in stored.keys()} == {f"torch.{dtype}"}  # noqa: SIM118


def test_export_over_an_earlier_one_needs_force(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("-C", learned_project, "export", out, "--no-verify", "--device", "cpu").code == 0
    (out / "mine.txt").write_text("kept")
    assert cli("-C", learned_project, "export", out, "--device", "cpu").code == 2
    assert cli("-C", learned_project, "export", out, "--force", "--device", "cpu").code == 0
    assert (out / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- interruption and resuming ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGTERM))]
)
def test_interrupted_training_resumes_to_the_same_hashes(
    cli: Cli, project: Path, tmp_path: Path, number: signal.Signals
) -> None:
    twin = Path(shutil.copytree(project, tmp_path / "twin"))
    more = make_images(tmp_path / "more", ["pink", "brown"])
    options = ["--epochs", "75", "--precision", "fp32", "--device", "cpu"]
    before = learned_hashes(project)
    command = [sys.executable, "-m", "treelora_cli", "-C", str(project), "train-task", str(more), *options]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    )
    checkpoint = project / ".treelora" / "run" / "checkpoint.json"
    while not checkpoint.exists() and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == (-9 if number == signal.SIGKILL else 130), err
    assert ("Continue with: treelora train-task --resume" in err) == (number != signal.SIGKILL)
    assert "Traceback" not in err
    assert learned_hashes(project) == before
    status = cli("-C", project, "status", "--json").json
    assert status["interrupted"]["task"] == "more"
    assert 0 < status["interrupted"]["step"] < 150
    assert "treelora train-task --resume" in cli("-C", project, "status").out
    resumed = cli("-C", project, "train-task", "--resume", *options)
    assert resumed.code == 0, resumed.err
    assert not checkpoint.exists()
    assert list((project / ".treelora" / "run").iterdir()) == []
    assert cli("-C", project, "status", "--json").json["interrupted"] is None
    assert cli("-C", twin, "train-task", more, *options).code == 0
    assert learned_hashes(project) == learned_hashes(twin)


def test_resume_without_an_interruption(cli: Cli, project: Path) -> None:
    done = cli("-C", project, "train-task", "--resume")
    assert done.code == 3
    assert done.err == "Error: No interrupted task to resume. Run: treelora train-task DATA\n"


# -- several processes, and the demo ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("train", [8, 7])
def test_two_processes_learn_one_task_together(cli: Cli, project: Path, tmp_path: Path, train: int) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown", "red"], train=train, test=5)
    # accelerate launch starts one process on a CPU unless there is MPI; torchrun starts two
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launch, "treelora_cli", "-C", str(project), "train-task", str(more), "--json", "--device", "cpu"]
    environment = child_environment(ACCELERATE_USE_CPU="true")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["scores"]["more"]["examples"] == 15
    record = json.loads((project / "tasks/004-more/task.json").read_text())
    assert record["processes"] == 2
    alone = cli("-C", project, "eval", "--json", "--device", "cpu")
    assert alone.code == 0
    assert [one["score"] for one in alone.json["tasks"].values()] == pytest.approx(
        [one["score"] for one in document["scores"].values()], abs=0.07
    )


@pytest.mark.slow
def test_two_processes_learn_texts_together_with_a_whole_base_or_one_that_is_divided(cli: Cli, tmp_path: Path) -> None:
    model, project = save_model(tmp_path / "llama", "llama", depth=4), tmp_path / "texts"
    write_tables(tmp_path)
    made = cli("init", project, "--backend", "causal-lm", "--model", model, "--device", "cpu")
    assert made.code == 0, made.err
    twin = Path(shutil.copytree(project, tmp_path / "twin"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]

    def learned(root: Path, *options: str, **more: str) -> tuple[Any, str]:
        options = ("train-task", str(tmp_path / "colours.jsonl"), "--precision", "fp32", "--json", *options)
        command = [*launch, "treelora_cli", "-C", str(root), *options]
        environment = child_environment(ACCELERATE_USE_CPU="true", **more)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    whole, _ = learned(project)
    divided, said = learned(twin, "-v", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    first = "tasks/001-colours/"
    for name in ("adapter_model.safetensors", "head.safetensors", "signature.safetensors"):
        assert (project / first / name).read_bytes() == (twin / first / name).read_bytes()
    records = [json.loads((root / first / "task.json").read_text()) for root in (project, twin)]
    assert [one["base_divided"] for one in records] == [False, True]
    assert [one["processes"] for one in records] == [2, 2]
    assert records[0]["last_loss"] == records[1]["last_loss"]
    assert whole["scores"] == divided["scores"]
    found = re.search(r"divided between processes: ([\d.]+) of ([\d.]+) MiB are held in each", said)
    assert found is not None
    assert float(found[2]) == pytest.approx(2 * float(found[1]), abs=0.02)
    alone = cli("-C", project, "eval", "--json", "--device", "cpu")
    assert alone.json["tasks"]["colours"]["score"] == whole["scores"]["colours"]["score"]


@pytest.mark.slow
def test_accelerate_launch_runs_a_command(project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
    command = [*launch, "treelora_cli", "-C", str(project), "train-task", str(more), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["task"] == "more"


@pytest.mark.slow
def test_demo_runs_offline_and_verifies_its_export(tmp_path: Path) -> None:
    done = run_process("demo", tmp_path / "demo", "--json", "--offline", "--device", "cpu")
    assert done.code == 0, done.err
    assert len(done.json["tasks"]) == 5
    assert done.json["op"] > 0.8
    assert done.json["export"]["passed"] is True
    again = run_process("demo", tmp_path / "demo")
    assert again.code == 2
    assert "is not empty" in again.err


_AUDITED = """
import sys
from treelora_cli.app import run_command
seen = []
sys.addaudithook(lambda event, arguments: seen.append(arguments) if event == "pickle.find_class" else None)
root, data, out = sys.argv[1:]
for command in (["train-task", data, "--name", "audited"], ["eval"], ["inspect-tree", "--bandit"], ["export", out]):
    assert run_command(["-C", root, *command]) == 0
print("UNPICKLED", seen)
"""


def test_nothing_is_ever_unpickled(project: Path, data: Path, tmp_path: Path) -> None:
    done = run_python(_AUDITED, str(project), str(data / "cold"), str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "UNPICKLED []"


_IMPORTED = """
import sys
from treelora_cli.app import run_command
root, image = sys.argv[1:]
for command in (["predict", image], ["eval", "--limit", "1"]):
    assert run_command(["-C", root, *command]) == 0
unused = {"transformers", "peft", "torch._dynamo", "sympy", "sklearn", "pandas", "pyarrow", "scipy.optimize"}
print("UNUSED", sorted(unused & set(sys.modules)))
import torch
from torch._dynamo.utils import is_compile_supported
asked = sys.modules["torchvision.ops.roi_align"].is_compile_supported
assert asked is not is_compile_supported and asked("cpu") == is_compile_supported("cpu")
assert torch.compiler.disable.__module__ == "torch.compiler"
"""


def test_predict_and_eval_of_images_import_nothing_that_they_do_not_use(project: Path, data: Path) -> None:
    done = run_python(_IMPORTED, str(project), str(next(data.glob("*/test/*/00.png"))))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "UNUSED []"


def test_readers_leave_no_trace(process: Cli, project: Path) -> None:
    before = tree_hash(project)
    for command in (["status"], ["inspect-tree", "--bandit"], ["eval", "--limit", "1"]):
        assert process("-C", project, *command).code == 0
    assert tree_hash(project) == before
