"""``treelora inspect-tree``: how the tasks relate, and what the bandit pulled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from treelora_cli.commands.context import session_of
from treelora_cli.errors import DamagedError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from treelora_cli.project import Project


def inspect_tree(
    context: typer.Context,
    layer: Annotated[int | None, typer.Option(min=0, help="Distances of this adapted layer, from 0.")] = None,
    depth: Annotated[int | None, typer.Option(min=0, help="Draw the tree down to this depth.")] = None,
    bandit: Annotated[bool, typer.Option("--bandit", help="What the last task's search pulled.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the drawing to this file too.")] = None,
) -> None:
    """Show the learned tree: members, splits, distances.

    Example: treelora inspect-tree --bandit --svg tree.svg
    """
    from treelora_cli.views import task_tree

    session = session_of(context)
    project = session.project()
    tree = project.tree()
    if tree is None:
        session.output.result({"tasks": [], "nodes": []}, "No task is learned yet. Run: treelora train-task DATA")
        return
    layers = project.state.base["layers"]
    if layer is not None and layer >= len(layers):
        raise UsageError(f"--layer {layer}: this project adapts {len(layers)} layers, 0 to {len(layers) - 1}.")
    names = [task.name for task in project.state.tasks]
    # Of 1,000 tasks either takes seconds, so that only what is shown is made.
    as_json = session.output.as_json
    document = task_tree.tree_document(tree, names, layers) if as_json else {}
    views: list[RenderableType] = []
    if not as_json or svg is not None:
        views.append(task_tree.tree_view(tree, names, layers, depth))
        if len(names) > 1:
            views.append(task_tree.distance_table(tree, names, layer, layers))
    if as_json and layer is not None:
        document["layer"] = {"name": layers[layer], "distances": task_tree.distances(tree, layer).tolist()}
    _add_shared(project, names, document, views)
    if bandit:
        facts, view = _bandit(project)
        document["bandit"] = facts
        views.append(view)
    session.output.result(document, *views)
    if svg is not None:
        _write_svg(svg, views)


def _add_shared(project: Project, names: list[str], document: dict[str, Any], views: list[RenderableType]) -> None:
    """Add which tasks share an adapter: those that the budget merged, or the branches."""
    from treelora_cli.views import task_tree

    if project.fixed["tree.branch"] == "never":
        shared = [f"{task.name} uses {task.adapter}" for task in project.state.tasks if task.adapter != task.directory]
        if shared:
            views.append("Merged adapters: " + "; ".join(shared))
        return
    branches = _branches(project, names)
    if branches is not None:
        document["branches"] = branches
        views.insert(0, task_tree.branch_view(branches))
        kinds = task_tree.kind_table(branches)
        views += [*([] if kinds is None else [kinds]), branches["reason"]]


def _branches(project: Project, names: list[str]) -> dict[str, Any] | None:
    """Return the branches; ``None`` where a task's record is damaged, which the tree does not need."""
    from treelora_cli.views.task_tree import branch_document

    try:
        return branch_document([project.task_record(name) for name in names])
    except DamagedError:
        return None


def _bandit(project: Project) -> tuple[dict[str, Any] | None, RenderableType]:
    from treelora_cli.algorithm.bandit import pull_summary
    from treelora_cli.views.task_tree import bandit_table

    saved = project.bandit()
    if saved is None:
        return None, "The bandit has searched nothing yet: it starts with the second task."
    arrays, facts = saved
    try:
        pulls, means = pull_summary(arrays)
        names, task, state = list(facts["tasks"]), str(facts["task"]), facts["state"]
        title = f"Search for '{task}': {state['search']}, {state['step_count']} steps, width {state['width']}"
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedError("bandit.safetensors does not fit bandit.json. Run treelora doctor.") from error
    document = {
        "task": task,
        "arms": names,
        "steps": state["step_count"],
        "search": state["search"],
        "width": state["width"],
        "distance_computations": state["distance_computations"],
        "pulls": pulls.tolist(),
        "mean_distances": [[None if value != value else value for value in row] for row in means.tolist()],
    }
    return document, bandit_table(names, pulls, means, title)


def _write_svg(path: Path, views: list[RenderableType]) -> None:
    import io

    from rich.console import Console

    canvas = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    for view in views:
        canvas.print(view)
    try:
        path.write_text(canvas.export_svg(title="treelora inspect-tree"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--svg {path}: {error.strerror}.") from error
