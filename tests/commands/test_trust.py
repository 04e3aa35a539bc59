"""What a project refuses although every hash in it is right, and what it keeps to around one command."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Cli, check_error, make_images, run_python, tree_hash
from faults import everything
from interrupting import OPTIONS, stop_after
from safetensors.torch import load, save

from treelora_cli.project import Project
from treelora_cli.project.state import seal
from treelora_cli.project.store import record_of

STATISTICS = "head.safetensors"
OWN_HEAD = "tasks/001-warm/head.safetensors"
ADAPTER = "tasks/001-warm/adapter_model.safetensors"


def craft(root: Path, name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change one tensor of a file, with the hash to match."""
    tensors = load((root / name).read_bytes())
    changed = change(tensors.pop(key))
    data = save(tensors if changed is None else {**tensors, key: changed.contiguous()})
    (root / name).write_bytes(data)
    state = json.loads((root / "state.json").read_text())
    state["files"][name] = dataclasses.asdict(record_of(data))
    (root / "state.json").write_bytes(seal(state))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[0] = float("nan")
    return tensor


# -- crafted files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (STATISTICS, "anchor.half_gram"),
        (STATISTICS, "latest.means"),
        (OWN_HEAD, "head.weight"),
        (OWN_HEAD, "head.bias"),
        (ADAPTER, "base_model.model.blocks.0.attn.qkv.lora_B.weight"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    cli: Cli, project: Path, data: Path, tmp_path: Path, name: str, key: str
) -> None:
    craft(project, name, key, with_nan)
    before = tree_hash(project)
    image = next(data.glob("warm/test/*/*.png"))
    commands = [["eval"], ["predict", image]]
    if name == STATISTICS:
        commands += [["export", tmp_path / "out"], ["train-task", data / "cold", "--name", "x"]]
    for command in commands:
        check_error(cli("-C", project, *command, "--device", "cpu"), 3, rf"{name}: .*not finite")
    assert tree_hash(project) == before
    assert not (tmp_path / "out").exists()


def stretched(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor], dim=-1)


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        (STATISTICS, "anchor.half_gram", stretched),
        (STATISTICS, "anchor.half_gram", lambda _tensor: None),
        (STATISTICS, "feature.mean", stretched),
        (OWN_HEAD, "head.weight", stretched),
        (OWN_HEAD, "head.bias", stretched),
        (OWN_HEAD, "anchor.sums", lambda _tensor: None),
    ],
)
def test_statistics_that_do_not_fit_the_model_are_refused(
    cli: Cli, project: Path, data: Path, name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> None:
    craft(project, name, key, change)
    before = tree_hash(project)
    was = r"(missing|float\d\d \[[\d, ]+\]), was float\d\d \[[\d, ]+\] when committed\. Restore its files from a copy\."
    part = "the shared statistics" if name == STATISTICS else "task 'warm'"
    line = rf"What this project stores does not fit its model: {part}: '{key}' is {was}$"
    check_error(cli("-C", project, "eval", "--device", "cpu"), 3, line)
    check_error(cli("-C", project, "predict", next(data.glob("warm/test/*/*.png")), "--device", "cpu"), 3, line)
    if name == STATISTICS:
        check_error(cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu"), 3, line)
    assert tree_hash(project) == before


@pytest.mark.parametrize(
    ("part", "dim", "line"),
    [
        ("AB", 0, r"shapes of layer 'blocks\.[01]\.attn\.qkv' do not fit"),
        ("rank", 0, r"rank 8, this project's is 4"),
        (
            "A",
            1,
            r"An adapter's layer 'blocks\.0\.attn\.qkv' does not fit the model|lora_A\.weight' is .*, was .* when",
        ),
        (
            "B",
            0,
            r"An adapter's layer 'blocks\.0\.attn\.qkv' does not fit the model|lora_B\.weight' is .*, was .* when",
        ),
    ],
)
def test_adapters_whose_shapes_do_not_match_the_settings_are_refused(
    cli: Cli, project: Path, data: Path, part: str, dim: int, line: str
) -> None:
    key = "base_model.model.blocks.{block}.attn.qkv.lora_{part}.weight"
    if part == "AB":
        craft(project, ADAPTER, key.format(block=0, part="A"), lambda tensor: torch.cat([tensor] * 2, dim))
    elif part == "rank":
        for block in (0, 1):
            craft(project, ADAPTER, key.format(block=block, part="A"), lambda tensor: torch.cat([tensor] * 2, 0))
            craft(project, ADAPTER, key.format(block=block, part="B"), lambda tensor: torch.cat([tensor] * 2, 1))
    else:
        craft(project, ADAPTER, key.format(block=0, part=part), lambda tensor: torch.cat([tensor] * 2, dim))
    before = tree_hash(project)
    check_error(cli("-C", project, "eval", "--device", "cpu"), 3, line)
    options = ["--warm-start", "nearest", "--device", "cpu"]
    check_error(cli("-C", project, "train-task", data / "warm", "--name", "x", *options), 3, line)
    after = {name: one for name, one in tree_hash(project).items() if "/run/" not in name}
    assert after == before, "a checkpoint may be left: the training itself went well"


@pytest.mark.parametrize("where", ["weights", "directory"])
def test_a_base_with_values_that_are_not_finite_makes_no_project(
    cli: Cli, weights: Path, init_options: list[str], tmp_path: Path, where: str
) -> None:
    import timm
    from safetensors.torch import load_file, save_file

    if where == "weights":
        tensors = load_file(weights)
        with_nan(tensors["blocks.1.attn.qkv.weight"])
        save_file(tensors, tmp_path / "bad.safetensors")
        options = [str(tmp_path / "bad.safetensors") if one == str(weights) else one for one in init_options]
        name = "bad.safetensors"
    else:
        from conftest import MODEL, MODEL_ARGS

        model = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS)
        with torch.no_grad():
            with_nan(model.blocks[1].attn.qkv.weight)
        timm.models.save_for_hf(model, tmp_path / "bad", model_args=MODEL_ARGS, safe_serialization=True)
        options, name = ["--model", str(tmp_path / "bad"), "--device", "cpu"], "bad"
    check_error(cli("init", tmp_path / "p", *options), 5, rf"{name} holds weights that are not finite\.")
    assert not (tmp_path / "p").exists()


def test_a_crafted_checkpoint_is_refused(cli: Cli, project: Path, tmp_path: Path) -> None:
    stop_after(cli, project, make_images(tmp_path / "more", ["pink", "brown"]), 3)
    checkpoint, kept = Project.open(project).checkpoint, project / ".treelora/run"
    facts = checkpoint.facts()
    assert facts is not None
    tensors = checkpoint.tensors(facts)
    resume = ["-C", project, "train-task", "--resume", *OPTIONS]
    for changed in ({**tensors, "parameter.0": torch.zeros(3)}, {"parameter.0": tensors["parameter.0"]}):
        checkpoint.save(facts, changed)
        before = tree_hash(project)
        check_error(
            cli(*resume), 3, r"step-00000003\.safetensors does not fit this task\. Train it anew: train-task DATA --ab"
        )
        assert tree_hash(project) == before
    (kept / "checkpoint.json").write_bytes(seal({**facts, "request": {"path": 3}}))
    check_error(cli(*resume), 3, r"checkpoint\.json is malformed\. Train the task anew\.")


# -- damage beside the current state ----------------------------------------------------------------------


def test_one_flipped_bit_in_any_file_of_the_bookkeeping_is_noticed(cli: Cli, project: Path, tmp_path: Path) -> None:
    """History, objects, trash and checkpoint: doctor names the file, and what was learned stays usable."""
    assert cli("-C", project, "rollback", "grey").code == 0
    stop_after(cli, project, make_images(tmp_path / "more", ["pink", "brown"]), 3)
    unchecked = (
        "lock",
        "steps.jsonl",
    )  # the log of a task in training grows with every step and is read by people only
    inside = [
        path for path in sorted((project / ".treelora").rglob("*")) if path.is_file() and path.name not in unchecked
    ]
    kinds = {path.parent.name for path in inside}
    assert kinds == {"history", "objects", "trash", "run"}
    whole = everything(Project.open(project))
    for path in inside:
        data = path.read_bytes()
        for place in (0, len(data) // 3, len(data) - 3):
            changed = bytearray(data)
            changed[place] ^= 2
            path.write_bytes(changed)
            document = cli("-C", project, "doctor", "--json").json
            assert list(document["damaged_past"]) == [str(path.relative_to(project))], f"byte {place}"
            assert document["damaged"] == {}
            assert everything(Project.open(project)) == whole
        if path.parent.name == "run":
            assert cli("-C", project, "train-task", "--resume", *OPTIONS).code == 3
            assert cli("-C", project, "status").code == 0
        path.unlink()
        document = cli("-C", project, "doctor", "--json").json
        if path.parent.name == "objects" or path.suffix == ".safetensors":
            assert list(document["damaged_past"]) == [str(path.relative_to(project))]
        path.write_bytes(data)
    assert cli("-C", project, "doctor", "--json").json["damaged_past"] == {}
    path.write_bytes(b"{}")
    assert "needed only to undo or to resume" in cli("-C", project, "doctor").out


# -- another base, nothing unpickled ----------------------------------------------------------------------


def test_no_command_goes_on_with_another_base(
    cli: Cli, tmp_path: Path, weights: Path, init_options: list[str], data: Path
) -> None:
    from safetensors.torch import load_file, save_file

    own = Path(shutil.copy(weights, tmp_path / "own.safetensors"))
    root = tmp_path / "p"
    assert cli("init", root, *[str(own) if one == str(weights) else one for one in init_options]).code == 0
    assert cli("-C", root, "train-task", data / "warm", "--device", "cpu").code == 0
    tensors = load_file(own)
    tensors["blocks.0.attn.qkv.weight"][0, 0] += 1e-3
    save_file(tensors, own)
    before = tree_hash(root)
    image = next(data.glob("warm/test/*/*.png"))
    line = r"The base model is not the one this project was made with: weights hash [0-9a-f]{12}, expected [0-9a-f]{12}"
    for command in (["eval"], ["predict", image], ["export", tmp_path / "out"], ["train-task", data / "cold"]):
        check_error(cli("-C", root, *command, "--device", "cpu"), 3, line)
    assert tree_hash(root) == before
    assert not (tmp_path / "out").exists()


_AUDITED = """
import sys
from treelora_cli.app import run_command
seen = []
sys.addaudithook(lambda event, arguments: seen.append(arguments) if event == "pickle.find_class" else None)
root, image, data = sys.argv[1:]
commands = (["status"], ["predict", image], ["train-task", "--resume", "--epochs", "4", "--precision", "fp32"],
            ["rollback", "more"], ["rollback", "--undo"], ["doctor", "--repair"], ["doctor", "--empty-trash", "--yes"])
for command in commands:
    options = ["--device", "cpu"] if command[0] in ("predict", "train-task") else []
    assert run_command(["-C", root, *command, *options]) == 0, command
print("UNPICKLED", seen)
"""


def test_nothing_is_unpickled_by_the_other_commands_either(cli: Cli, project: Path, data: Path, tmp_path: Path) -> None:
    stop_after(cli, project, make_images(tmp_path / "more", ["pink", "brown"]), 3)
    done = run_python(_AUDITED, str(project), str(next(data.glob("warm/test/*/*.png"))), str(data))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "UNPICKLED []"


def test_the_source_neither_unpickles_nor_runs_a_models_code() -> None:
    root = Path(__file__).parents[2]
    sources = [*(root / "treelora_cli").rglob("*.py"), *(root / "backends").rglob("*.py")]
    assert len(sources) > 60
    for path in sources:
        text = path.read_text()
        assert "import pickle" not in text and "torch.load(" not in text and "trust_remote_code=True" not in text, path


# -- space ------------------------------------------------------------------------------------------------


def test_status_says_what_each_task_takes(cli: Cli, project: Path) -> None:
    tasks = cli("-C", project, "status", "--json").json["tasks"]
    for entry, task in zip(Project.open(project).state.tasks, tasks, strict=True):
        assert task["bytes"] == sum(path.stat().st_size for path in (project / entry.directory).iterdir())
    assert "KiB" in cli("-C", project, "status").out


def test_doctor_says_what_the_machine_has_left(cli: Cli, project: Path) -> None:
    machine = cli("-C", project, "doctor", "--json").json["machine"]
    assert 0 < machine["free memory GiB"] <= machine["memory GiB"]
    assert machine["free disk GiB"] > 0
