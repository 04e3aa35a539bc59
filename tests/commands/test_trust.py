"""What a project refuses although every hash in it is right, and what it keeps to around one command."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Cli, check_error, child_environment, learned_hashes, make_images, run_python, tree_hash
from faults import commit_of, everything
from filelock import FileLock
from interrupting import OPTIONS, stop_after
from safetensors.torch import load, save

from treelora_cli.errors import DamagedError, Interrupted, ProjectError, ResourceError
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


# -- links and pipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [".treelora", ".treelora/objects", ".treelora/history", ".treelora/trash", "tasks", "tasks/001-warm", "metrics"],
)
def test_a_directory_that_is_a_link_is_refused_and_nothing_there_is_touched(
    cli: Cli, project: Path, data: Path, tmp_path: Path, name: str
) -> None:
    """An earlier ``objects`` that led to somebody's home would have been emptied by the next commit."""
    assert cli("-C", project, "rollback", "grey").code == 0
    outside = tmp_path / "outside"
    shutil.move(project / name, outside)
    (outside / "precious.json").write_text("{}")
    (project / name).symlink_to(outside)
    before, there = tree_hash(project), tree_hash(outside)
    line = rf"{name} is a symbolic link; nothing outside a project is read or written\."
    commands = (
        ["status"],
        ["eval", "--device", "cpu"],
        ["train-task", data / "warm", "--name", "x", "--device", "cpu"],
        ["rollback", "cold"],
        ["rollback", "--undo"],
        ["doctor"],
        ["doctor", "--repair"],
        ["doctor", "--empty-trash", "--yes"],
    )
    for command in commands:
        check_error(cli("-C", project, *command), 3, line)
    assert tree_hash(project) == before
    assert tree_hash(outside) == there


@pytest.mark.parametrize("name", ["state.json", ".treelora/lock", ".treelora/lock.json"])
def test_a_file_that_is_a_link_is_not_written_through(cli: Cli, project: Path, data: Path, name: str) -> None:
    outside = project.parent / "outside"
    shutil.move(project / name, outside) if (project / name).exists() else outside.write_text("mine")
    (project / name).symlink_to(outside)
    whole = outside.read_bytes()
    done = cli("-C", project, "train-task", data / "warm", "--name", "x", "--device", "cpu")
    check_error(done, 3, rf"{name} is a symbolic link; nothing outside a project is read or written\.")
    assert outside.read_bytes() == whole


def test_the_project_itself_may_be_reached_by_a_link(cli: Cli, project: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project)
    learn = ["train-task", data / "warm", "--name", "x", "--epochs", "1", "--device", "cpu"]
    assert cli("-C", tmp_path / "link", *learn).code == 0


def test_a_named_pipe_in_a_files_place_holds_nobody(project: Path) -> None:
    (project / ADAPTER).unlink()
    os.mkfifo(project / ADAPTER)
    with pytest.raises(DamagedError, match=rf"{ADAPTER}: hash mismatch"):
        Project.open(project).adapter("warm")


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


# -- interrupted at the wrong moment ----------------------------------------------------------------------


def test_status_speaks_of_resuming_only_where_it_can(cli: Cli, project: Path, tmp_path: Path) -> None:
    stop_after(cli, project, make_images(tmp_path / "more", ["pink", "brown"]), 3)
    assert "Next: treelora train-task --resume" in cli("-C", project, "status").out
    assert cli("-C", project, "rollback", "grey").code == 0
    shown = cli("-C", project, "status").out
    assert "--resume" not in shown
    assert "'more' was interrupted at another state of this project, to which it belongs." in shown
    assert "Next: treelora train-task DATA" in shown
    assert cli("-C", project, "status", "--json").json["interrupted"] == {"task": "more", "step": 3, "resumable": False}
    assert cli("-C", project, "rollback", "--undo").code == 0
    assert "Next: treelora train-task --resume" in cli("-C", project, "status").out
    assert cli("-C", project, "status", "--json").json["interrupted"]["resumable"] is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_signal_in_a_commit_is_answered_truly(
    project: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, place: str
) -> None:
    opened, replace = Project.open(project), os.replace

    def signalled(source: object, target: object) -> None:
        is_state = str(target) == str(project / "state.json")
        if is_state and place == "before":
            os.kill(os.getpid(), number)
        replace(source, target)  # type: ignore[arg-type]
        if is_state and place == "after":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "replace", signalled)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"^Interrupted, but task 'next' is committed\. See: treelora status$"):
        opened.commit(commit_of(opened))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    found = Project.open(project)
    assert found.state.tasks[-1].name == "next"
    everything(found)
    with pytest.raises(Interrupted, match=r"^Interrupted, but the change was made\. See: treelora status$"):
        found.rollback("next")
    assert Project.open(project).state == opened.state


_SLOW_READING = """
import sys, time
from treelora_backends.vit import images as vit_images
from treelora_cli.app import main
def slow(request):
    print("reading", flush=True)
    time.sleep(60)
vit_images.list_images = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_training_ends_with_130_and_leaves_no_lock(
    project: Path, data: Path, number: signal.Signals
) -> None:
    before = tree_hash(project)
    command = [sys.executable, "-c", _SLOW_READING, "-C", str(project), "train-task", str(data / "warm")]
    child = subprocess.Popen(
        [*command, "--name", "x", "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(),
        # a suite that a shell runs in the background ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "reading\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err == "Error: Interrupted; nothing was committed.\n"
    assert tree_hash(project) == before
    assert not (project / ".treelora/lock.json").exists()


@pytest.mark.slow
def test_stopped_after_any_step_a_task_resumes_to_the_same_hashes(cli: Cli, project: Path, tmp_path: Path) -> None:
    more = make_images(tmp_path / "more", ["pink", "brown"])
    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    assert cli("-C", whole, "train-task", more, *OPTIONS).code == 0
    for step in range(1, 8):
        root = Path(shutil.copytree(project, tmp_path / "q"))
        stop_after(cli, root, more, step)
        assert cli("-C", root, "train-task", "--resume", *OPTIONS).code == 0
        assert learned_hashes(root) == learned_hashes(whole), f"step {step}"
        shutil.rmtree(root)


def test_out_of_memory_while_training_changes_nothing_and_says_what_to_do(
    cli: Cli, project: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from treelora_cli.learning.trainer import Trainer

    def full(_trainer: Trainer, _batch: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(Trainer, "_take_step", full)
    before = tree_hash(project)
    done = cli("-C", project, "train-task", data / "cold", "--name", "x", "--device", "cpu")
    check_error(done, 6, r"Out of memory at step 1; nothing was committed\. Retry with --batch-size 4 --set tr")
    assert tree_hash(project) == before


# -- leaving nothing behind -------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", range(0, 16, 3))
def test_a_new_project_is_made_whole_or_not_at_all(tmp_path: Path, victim: int) -> None:
    from faults import hooked

    root, count = tmp_path / "a" / "b", 0

    def fail(name: str) -> None:
        nonlocal count
        count += 1
        if count > victim and name not in ("unlink", "rmdir"):  # removing needs no space
            raise OSError(28, "No space left on device")

    def make() -> Project:
        return Project.create(root, "seed: 0\n", backend="vit", base={"layers": [], "fingerprint": ""}, fixed={})

    with hooked(fail), pytest.raises(ResourceError, match="Disk full while writing"):
        make()
    assert list(tmp_path.iterdir()) == []
    assert make().state.generation == 0


@pytest.mark.parametrize("victim", range(0, 20, 2))
def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_alone(project: Path, victim: int) -> None:
    from faults import hooked

    checkpoint, count = Project.open(project).checkpoint, 0
    facts = {"task": "x", "state": "", "request": {}}
    checkpoint.save({**facts, "step": 3}, {"a": torch.zeros(2)})
    before = tree_hash(project / ".treelora")

    def fail(name: str) -> None:
        nonlocal count
        count += 1
        if count > victim and name != "unlink":
            raise OSError(28, "No space left on device")

    with hooked(fail):
        try:
            checkpoint.save({**facts, "step": 6}, {"a": torch.ones(2)})
        except ResourceError:
            found = checkpoint.facts()
            assert found is not None
            assert found["step"] == 6 or tree_hash(project / ".treelora") == before
    found = checkpoint.facts()
    assert found is not None
    assert checkpoint.tensors(found)["a"].tolist() == [float(found["step"] == 6)] * 2
    assert len(list((project / ".treelora/run").iterdir())) == 2


# -- the lock ---------------------------------------------------------------------------------------------


def test_who_asks_for_the_holder_does_not_turn_a_writer_away(project: Path) -> None:
    """``doctor`` looks who holds the lock by taking it for a moment."""
    asking = FileLock(project / ".treelora/lock", thread_local=False)
    asking.acquire()
    threading.Timer(0.1, asking.release).start()
    with Project.open(project).lock("train-task x"):
        pass


def test_a_shared_projects_lock_can_be_taken_by_the_group(project: Path) -> None:
    (project / ".treelora/lock").unlink()
    before = os.umask(0o002)
    try:
        with Project.open(project).lock("train-task x"):
            pass
    finally:
        os.umask(before)
    assert (project / ".treelora/lock").stat().st_mode & 0o777 == 0o664


def test_a_reader_sees_a_whole_state_at_every_operation_of_an_undo(project: Path) -> None:
    from faults import EVENTS, hooked

    originals = {name: getattr(os, name) for name in (*EVENTS, "fdopen")}
    generations: list[int] = []

    def look(_name: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(os, name, original)
            found = Project.open(project)
            everything(found)
            generations.append(found.state.generation)

    with hooked(look):
        after = Project.open(project).rollback("cold")
        after.undo_rollback(None)
    assert set(generations) == {1, 3}


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


def test_a_crafted_lock_file_is_described_as_well_as_it_can(project: Path) -> None:
    from treelora_cli.project.lock import _describe

    (project / "lock.json").write_text(json.dumps({"pid": 1, "host": "h", "command": "c", "since": 2**70}))
    assert _describe(project / "lock.json") == "another process"


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


def test_a_refused_link_is_an_error_of_the_project(project: Path) -> None:
    (project / "metrics").rename(project / "elsewhere")
    (project / "metrics").symlink_to("elsewhere")
    start = time.perf_counter()
    with pytest.raises(ProjectError, match="metrics is a symbolic link"):
        Project.open(project)
    assert time.perf_counter() - start < 1
