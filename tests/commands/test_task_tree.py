"""The drawn tree and the distances beside it, for few tasks and for many."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console, RenderableType

from treelora_cli.algorithm.distances import l1_distance
from treelora_cli.algorithm.tree import Tree, build_tree
from treelora_cli.views.task_tree import distance_table, distances, tree_view

LAYERS = ("first", "second")


def tree_of(tasks: int) -> tuple[Tree, list[str]]:
    rows = np.random.default_rng(0).standard_normal((tasks, 2, 16))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    return build_tree(rows.astype(np.float32), 2), [f"t{index:03d}" for index in range(tasks)]


def shown(view: RenderableType) -> str:
    canvas = Console(file=io.StringIO(), width=4000, record=True)
    canvas.print(view)
    return canvas.export_text()


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_distances_are_those_of_all_pairs(layer: int | None) -> None:
    tree, _ = tree_of(7)
    found = distances(tree, layer)
    rows = tree.signatures
    for one in range(7):
        for other in range(7):
            pair = l1_distance(rows[one], rows[other])
            assert found[one, other] == pytest.approx(pair.mean() if layer is None else pair[layer])


def test_few_tasks_have_a_table_of_all_pairs() -> None:
    tree, names = tree_of(30)
    text = shown(distance_table(tree, names, None, LAYERS))
    assert "L1 distance of gradient signatures, mean over layers" in text
    assert text.count("t029") == 2, "a column and a row"
    assert f"{distances(tree, None)[3, 17]:.3f}" in text
    drawn = shown(tree_view(tree, names, LAYERS, None))
    assert f"30 tasks: {names[0]}, {names[1]}, {names[2]}, ..." in drawn
    assert all(name in drawn for name in names), "the leaves name them all"


@pytest.mark.parametrize("layer", [None, 1])
def test_many_tasks_have_a_table_of_the_nearest(layer: int | None) -> None:
    tree, names = tree_of(40)
    text = shown(distance_table(tree, names, layer, LAYERS))
    assert ("mean over layers" if layer is None else "second") in " ".join(text.split())
    rows = tree.signatures if layer is None else tree.signatures[:, layer : layer + 1]
    pairs = l1_distance(rows[:, None], rows[None]).mean(axis=2)
    np.fill_diagonal(pairs, np.inf)
    cells = [line.split("│")[1:4] for line in text.splitlines() if "│ t" in line]
    assert len(cells) == 40
    for task, (name, nearest, distance) in enumerate(cells):
        assert name.strip() == names[task]
        assert nearest.strip() == names[int(pairs[task].argmin())]
        assert float(distance) == pytest.approx(pairs[task].min(), abs=5e-4)


def test_a_node_of_many_tasks_names_a_few_and_its_leaves_all() -> None:
    tree, names = tree_of(40)
    text = shown(tree_view(tree, names, LAYERS, None))
    assert "40 tasks: t000, t001, t002, ...\n" in text
    assert text.count("●") == len(tree.leaves())
    beside_leaves = " ".join(line for line in text.splitlines() if "tasks:" not in line).split()
    named = [word.strip(",") for word in beside_leaves]
    assert all(name in named for name in names)


def test_a_hundred_tasks_can_be_read_at_80_columns() -> None:
    tree, names = tree_of(100)
    canvas = Console(width=80, file=io.StringIO(), soft_wrap=True)
    canvas.print(tree_view(tree, names, LAYERS, None))
    lines = canvas.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert all(name in " ".join(lines) for name in names), "nothing is cut off"


def test_long_names_are_wrapped_in_every_line() -> None:
    """Of a node with many tasks the first are named, on as many lines as they take."""
    tree, _ = tree_of(12)
    names = [f"task-{index:02d}-with-a-name-that-is-rather-long" for index in range(12)]
    lines = shown(tree_view(tree, names, LAYERS, None)).splitlines()
    assert [line.rstrip() for line in lines[:3]] == [f"12 tasks: {names[0]},", f"{names[1]},", f"{names[2]}, ..."]
    assert lines[3].startswith("split on ")
    assert max(map(len, map(str.rstrip, lines))) <= 80
