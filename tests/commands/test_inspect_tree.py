"""``treelora inspect-tree``."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import STREAM, Cli

NAMES = [name for name, _ in STREAM]


def test_inspect_tree_before_the_first_task(cli: Cli, empty_project: Path) -> None:
    assert "No task is learned yet" in cli("-C", empty_project, "inspect-tree").out
    assert cli("-C", empty_project, "inspect-tree", "--json").json == {"tasks": [], "nodes": []}


def test_inspect_tree_draws_members_splits_and_distances(cli: Cli, learned_project: Path) -> None:
    shown = cli("-C", learned_project, "inspect-tree").out
    assert "3 tasks: warm, cold, grey" in shown
    assert "split on blocks." in shown
    document = cli("-C", learned_project, "inspect-tree", "--json").json
    assert document["tasks"] == NAMES
    leaves = [node["members"] for node in document["nodes"] if not node["children"]]
    assert sorted(member for leaf in leaves for member in leaf) == sorted(NAMES)
    distances = document["distances"]
    assert all(distances[i][i] == 0 and distances[i][j] == distances[j][i] for i in range(3) for j in range(3))


def test_inspect_tree_layer_and_depth(cli: Cli, learned_project: Path) -> None:
    whole = cli("-C", learned_project, "inspect-tree").out
    top = cli("-C", learned_project, "inspect-tree", "--depth", "0").out
    assert "●" in whole
    assert "●" not in top
    layers = [cli("-C", learned_project, "inspect-tree", "--layer", i, "--json").json["layer"] for i in range(2)]
    assert [layer["name"] for layer in layers] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    mean = cli("-C", learned_project, "inspect-tree", "--json").json["distances"]
    first, second = layers[0]["distances"], layers[1]["distances"]
    assert mean[0][1] == pytest.approx((first[0][1] + second[0][1]) / 2)
    assert cli("-C", learned_project, "inspect-tree", "--layer", "2").code == 2


def test_inspect_tree_bandit_counts_every_pull(cli: Cli, learned_project: Path) -> None:
    document = cli("-C", learned_project, "inspect-tree", "--bandit", "--json").json["bandit"]
    assert document["task"] == "grey"
    assert document["arms"] == ["warm", "cold"]
    first = 12 * 2  # the probe's mini-batches with every earlier task
    assert [sum(layer) for layer in document["pulls"]] == [first + document["steps"]] * 2
    assert "Search for 'grey': lcb" in cli("-C", learned_project, "inspect-tree", "--bandit").out


def test_inspect_tree_bandit_with_one_task(cli: Cli, empty_project: Path, data: Path) -> None:
    cli("-C", empty_project, "train-task", data / "warm", "--device", "cpu")
    done = cli("-C", empty_project, "inspect-tree", "--bandit")
    assert done.code == 0
    assert "starts with the second task" in done.out


def test_inspect_tree_svg(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "tree.svg"
    done = cli("-C", learned_project, "inspect-tree", "--svg", drawing, "--json")
    assert done.json["tasks"] == NAMES
    text = drawing.read_text()
    assert text.lstrip().startswith("<svg")
    assert all(name in text for name in NAMES)
    assert cli("-C", learned_project, "inspect-tree", "--svg", tmp_path / "no" / "tree.svg").code == 2
