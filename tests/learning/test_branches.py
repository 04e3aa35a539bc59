"""Tasks that share an adapter: who trains, what is stored, what is answered, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STREAM, Cli, check_error, learned_hashes, make_images, must, tree_hash
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupting import OPTIONS, stop_after

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from targets import targets
from treelora_backends.vit.branching import MomentSums

from treelora_cli.algorithm.kinds import KindSignature, kind_distance
from treelora_cli.backend import adapters
from treelora_cli.backend.runtime import Silent, open_runtime
from treelora_cli.backend.values import DataRequest
from treelora_cli.config import Config
from treelora_cli.learning.opening import open_base, project_config
from treelora_cli.project import Project


def branched(root: Path, init_options: list[str], data: Path, policy: str, *more: str) -> Path:
    """Make a project under a policy and learn every task of ``STREAM``."""
    must("init", root, *init_options, "--branch", policy, *more)
    for name, _ in STREAM:
        must("-C", root, "train-task", data / name, *OPTIONS)
    return root


@pytest.fixture(scope="session")
def shared_first(tmp_path_factory: pytest.TempPathFactory, init_options: list[str], data: Path) -> Path:
    return branched(tmp_path_factory.mktemp("first") / "p", init_options, data, "first")


@pytest.fixture
def first(shared_first: Path, tmp_path: Path) -> Path:
    """A copy of a project whose tasks all use the first one's adapter."""
    return Path(shutil.copytree(shared_first, tmp_path / "p"))


@pytest.fixture(scope="session")
def shared_opener(tmp_path_factory: pytest.TempPathFactory, init_options: list[str]) -> Path:
    """A project whose only task tried to open a branch, with its data beside it."""
    folder = tmp_path_factory.mktemp("opener")
    more = make_images(folder / "more", ["pink", "brown", "red", "blue"], train=10)
    must("init", folder / "p", *init_options, "--branch", "auto")
    must("-C", folder / "p", "train-task", more, *OPTIONS)
    return folder / "p"


def test_an_opener_is_judged_by_the_images_kept_out(shared_opener: Path) -> None:
    found = record(shared_opener, "more")
    assert found["steps"] == 20  # all images, from the second epoch on
    assert " it is the first task; with its adapter images kept out of the training are " in found["branch_reason"]
    assert found["branch"] == ("more" if " opened a branch: " in found["branch_reason"] else None)


def record(root: Path, name: str) -> dict[str, Any]:
    return Project.open(root).task_record(name)


def test_who_joins_trains_nothing_and_uses_the_opener_s_adapter(shared_first: Path) -> None:
    project = Project.open(shared_first)
    assert [record(shared_first, name)["branch"] for name, _ in STREAM] == ["warm"] * 3
    assert [record(shared_first, name)["steps"] for name, _ in STREAM] == [8, 0, 0]
    assert {task.adapter for task in project.state.tasks} == {"tasks/001-warm"}
    assert [name for name in project.state.files if name.endswith("adapter_model.safetensors")] == [
        "tasks/001-warm/adapter_model.safetensors"
    ]
    assert [name for name in project.state.files if name.startswith("branches/")] == ["branches/warm.safetensors"]
    assert (
        record(shared_first, "grey")["branch_reason"] == "'grey' joined branch 'warm': all tasks use the first one's."
    )
    assert project.damage() == {}


def test_how_far_the_kinds_of_data_lie_apart_is_kept_and_shown(shared_first: Path, cli: Cli) -> None:
    kinds = []
    for task in Project.open(shared_first).memory().tasks:
        own = task.tensors()
        kinds.append(KindSignature(own["kind.means"].numpy(), own["kind.variances"].numpy(), int(own["kind.classes"])))
    cold, grey = (record(shared_first, name)["kind_distances"] for name in ("cold", "grey"))
    assert record(shared_first, "warm")["kind_distances"] == {}
    assert cold == {"warm": pytest.approx(kind_distance(kinds[1], kinds[0]), abs=1e-3)}
    assert grey == {
        "warm": pytest.approx(kind_distance(kinds[2], kinds[0]), abs=1e-3),
        "cold": pytest.approx(kind_distance(kinds[2], kinds[1]), abs=1e-3),
    }
    shown = cli("-C", shared_first, "inspect-tree", "--json").json["branches"]
    assert shown["kind_distances"] == {"warm": {}, "cold": cold, "grey": grey} and shown["same_kind"] == 2.0
    table = cli("-C", shared_first, "inspect-tree").out
    assert "2 or less is one kind" in table and f"{grey['cold']:.2f}" in table


def test_the_branch_s_sums_are_those_of_all_its_tasks(shared_first: Path) -> None:
    memory = Project.open(shared_first).memory()
    counts = [task.tensors()["branch.counts"].tolist() for task in memory.tasks]
    assert counts == [[16.0] * 2, [16.0] * 3, [16.0] * 2]  # each image plain and mirrored
    stored = memory.branch("warm")
    width = memory.tasks[0].tensors()["branch.sums"].shape[1]
    assert stored["branch.half_gram"].shape == (width * (width + 1) // 2,)
    assert 4 * stored["branch.half_gram"].numel() < memory.shared()["anchor.half_gram"].numel() * 4


def test_the_newest_adapter_s_class_means_are_those_of_the_branch_s_network(shared_first: Path, data: Path) -> None:
    project = Project.open(shared_first)
    runtime = open_runtime("cpu", offline=True, reporter=Silent())
    base: Any = open_base(project, project_config(project, Config()), runtime)
    task = base.read_task(DataRequest(data / STREAM[2][0]))
    network, pixels = base.network, base.preprocessing.normalise(task.train.pixels[torch.arange(task.train_size)])
    pooled = []
    for adapter in (project.memory().tasks[0].adapter(), None):
        with torch.no_grad(), adapters.added(network, adapter) if adapter else adapters.base_only(network):
            pooled.append(base.trunk.pooled(base.trunk.before(pixels).tokens))
    adapted, frozen = ([one[task.train.labels == label].mean(dim=0) for label in range(2)] for one in pooled)
    means = project.memory().shared()["latest.means"]
    assert means.shape[0] == sum(len(classes) for _, classes in STREAM)
    assert torch.allclose(means[-2:], torch.stack(adapted), atol=0.01)  # tokens before the cut are kept in bf16
    assert not torch.allclose(means[-2:], torch.stack(frozen), atol=0.02)


def test_under_one_adapter_older_class_means_stay_bit_for_bit(
    init_options: list[str], data: Path, tmp_path: Path
) -> None:
    root, found = tmp_path / "p", []
    must("init", root, *init_options, "--branch", "first")
    for name, _ in STREAM[:2]:
        must("-C", root, "train-task", data / name, *OPTIONS)
        found.append(Project.open(root).memory().shared()["latest.means"])
    assert torch.equal(found[1][: len(found[0])], found[0]) and len(found[1]) > len(found[0])


def test_what_a_branch_stores_is_the_same_scored_or_not(
    cli: Cli, init_options: list[str], data: Path, tmp_path: Path
) -> None:
    stored = []
    for option in ("--eval", "--no-eval"):
        root = tmp_path / option.strip("-")
        must("init", root, *init_options, "--branch", "first")
        for name, _ in STREAM[:2]:
            must("-C", root, "train-task", data / name, *OPTIONS, option)
        stored.append(Project.open(root).memory().branch("warm"))
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        assert torch.equal(tensor, stored[1][name]), name


def test_always_opens_a_branch_for_each_and_a_bound_holds(
    init_options: list[str], data: Path, tmp_path: Path, cli: Cli
) -> None:
    root = branched(tmp_path / "p", init_options, data, "always", "--budget", "2")
    reasons = [record(root, name)["branch_reason"] for name, _ in STREAM]
    assert [record(root, name)["branch"] for name, _ in STREAM[:2]] == ["warm", "cold"]
    assert reasons[1].startswith("'cold' opened a branch: each task opens one (kind ")
    assert "no more branches may be opened, kind " in reasons[2]
    assert record(root, "grey")["branch"] in ("warm", "cold")
    assert sorted(path.name for path in (root / "branches").iterdir()) == ["cold.safetensors", "warm.safetensors"]
    shown = cli("-C", root, "inspect-tree", "--json").json["branches"]
    assert shown["reason"] == reasons[2] and list(shown["members"]) == ["warm", "cold"]
    assert cli("-C", root, "status", "--json").json["tasks"][2]["branch_reason"] == reasons[2]
    assert reasons[2] in cli("-C", root, "status").out.replace("\n", " ")
    assert "2 branches: tasks that share an adapter" in cli("-C", root, "inspect-tree").out


def test_auto_opens_nothing_where_too_few_images_can_be_kept_out(
    init_options: list[str], data: Path, tmp_path: Path, cli: Cli
) -> None:
    root = branched(tmp_path / "p", init_options, data, "auto")
    assert [record(root, name)["branch"] for name, _ in STREAM] == [None] * 3
    assert "too few images could be kept out" in record(root, "warm")["branch_reason"]
    assert not (root / "branches").exists()
    assert cli("-C", root, "eval", "--json", "--device", "cpu").code == 0
    assert cli("-C", root, "inspect-tree", "--json").json["branches"]["frozen"] == ["warm", "cold", "grey"]
    must("-C", root, "export", tmp_path / "out", "--format", "routed")
    written = json.loads((tmp_path / "out" / "routed.json").read_text())
    assert [task["asked"] for task in written["tasks"]] == [False] * 3  # an adapter that opened no branch is not asked


def test_one_class_and_two_images_a_class_are_learned(
    init_options: list[str], tmp_path: Path, cli: Cli, first: Path
) -> None:
    one, two = make_images(tmp_path / "one", ["pink"]), make_images(tmp_path / "two", ["brown", "white"], train=2)
    always = tmp_path / "always"
    must("init", always, *init_options, "--branch", "always")
    for folder in (two, one):
        done = cli("-C", first, "train-task", folder, *OPTIONS, "--json")
        assert (done.code, done.json["branch"]) == (0, "warm"), done.err
        done = cli("-C", always, "train-task", folder, *OPTIONS, "--json")
        assert (done.code, done.json["branch"]) == (0, folder.name), done.err


def test_a_class_in_two_branches_is_one_class(init_options: list[str], tmp_path: Path, cli: Cli) -> None:
    root = tmp_path / "p"
    must("init", root, *init_options, "--branch", "always")
    for name, classes in (("a", ["red", "blue"]), ("b", ["red", "green"])):
        must("-C", root, "train-task", make_images(tmp_path / name, classes), *OPTIONS)
    answers = cli("-C", root, "predict", tmp_path / "a" / "test" / "red" / "00.png", "--json", "--device", "cpu").json
    named = [answers["predictions"][0]["output"]] if "predictions" in answers else []
    assert set(named) <= {"red", "blue", "green"}
    assert cli("-C", root, "eval", "--json", "--device", "cpu").code == 0


@pytest.mark.parametrize("step", [2, 5, 8])
def test_an_interrupted_opener_is_resumed_exactly(
    step: int, cli: Cli, init_options: list[str], shared_opener: Path, tmp_path: Path
) -> None:
    # one image in five is kept out until the adapter is judged, after the first of four epochs of five steps
    root = tmp_path / "p"
    must("init", root, *init_options, "--branch", "auto")
    stop_after(cli, root, shared_opener.parent / "more", step, of=20)
    assert cli("-C", root, "train-task", "--resume", *OPTIONS).code == 0
    assert learned_hashes(root) == learned_hashes(shared_opener)
    assert record(root, "more")["branch_reason"] == record(shared_opener, "more")["branch_reason"]


def test_rollback_brings_the_branch_back_bit_for_bit(cli: Cli, first: Path) -> None:
    before = (first / "branches" / "warm.safetensors").read_bytes()
    assert cli("-C", first, "rollback", "grey").code == 0
    assert (first / "branches" / "warm.safetensors").read_bytes() != before
    assert cli("-C", first, "eval", "--json", "--device", "cpu").code == 0
    assert cli("-C", first, "rollback", "--undo").code == 0
    assert (first / "branches" / "warm.safetensors").read_bytes() == before


def test_a_damaged_branch_is_named_and_left(cli: Cli, first: Path) -> None:
    path = first / "branches" / "warm.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert "branches/warm.safetensors" in cli("-C", first, "doctor").out
    done = cli("-C", first, "eval", "--device", "cpu")
    assert done.code == 3 and "branches/warm.safetensors" in done.err
    before = tree_hash(first / "branches")
    cli("-C", first, "doctor", "--repair")
    assert tree_hash(first / "branches") == before


@pytest.mark.parametrize("made", ["first", "never"])
def test_a_project_stays_of_the_policy_it_was_made_with(
    made: str, cli: Cli, shared_first: Path, learned_project: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(shared_first if made == "first" else learned_project, tmp_path / "one"))
    (root / "treelora.yaml").write_text("tree: {branch: auto}\n")
    check_error(cli("-C", root, "eval"), 2, rf"'branch' is auto but this project was made with {made}\.")


def test_a_project_from_before_there_were_branches_has_none(learned_project: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(learned_project, tmp_path / "old"))
    state = Project.open(root).state
    fixed = {key: value for key, value in state.fixed.items() if not key.startswith("tree.branch")}
    old = dataclasses.replace(state, fixed=fixed)
    (root / "state.json").write_bytes(old.to_json())
    project = Project.open(root)
    assert project.state == old
    assert project_config(project, Config()).tree.branch == "never"
    assert [task.branch for task in project.memory().tasks] == [None] * 3


def test_exports_of_a_branched_project_are_checked(cli: Cli, first: Path, tmp_path: Path) -> None:
    merged = cli("-C", first, "export", tmp_path / "merged", "--json", "--device", "cpu")
    assert merged.code == 0, merged.err
    joined = cli(
        "-C", first, "export", tmp_path / "cold", "--format", "adapter", "--task", "cold", "--json", "--device", "cpu"
    )
    assert joined.code == 0, joined.err


@settings(max_examples=25)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_crafted_branch_file_is_read_or_refused(shared_first: Path, place: int, value: int) -> None:
    found, seeds = targets(shared_first)
    name = "branches/warm.safetensors"
    data = bytearray(seeds[name][0])
    data[place % len(data)] = value
    found[name](bytes(data))
    found[name](bytes(data[: place % len(data)]))


def test_moments_count_every_token_but_the_prefix(weights: Path) -> None:
    import timm
    from conftest import MODEL, MODEL_ARGS
    from treelora_backends.vit.trunk import Trunk

    vit = timm.create_model(MODEL, num_classes=0, **MODEL_ARGS).eval()
    trunk = Trunk(vit, 0, None)
    images = torch.randn(3, 3, 16, 16)
    trunk.before(images)
    sums = MomentSums(trunk, 2, torch.device("cpu"))
    with torch.no_grad(), sums.listening(torch.tensor([0, 1, 1])):
        trunk.after(trunk.before(images))
    seen: list[torch.Tensor] = []
    vit.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        vit(images)
    patches = seen[0][:, 1:].double()
    assert sums.counts.tolist() == [4.0, 8.0]
    assert torch.allclose(sums.sums[1, 0], patches[1:].sum(dim=(0, 1)), atol=1e-4)
    assert torch.allclose(sums.squares[0, 0], patches[0].square().sum(dim=0), atol=1e-4)
