"""The rooms of CONTRIBUTING.md: no file imports itself round a circle, and rooms import one way only.

Every import counts, those inside functions and those for type checkers too: who reads a type has to read its file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE, BACKENDS = "treelora_cli", "treelora_backends"
ROOMS: dict[str, str] = {
    # room: the rooms, or single files of a room, that it may import beside itself; the lowest first
    "errors": "",
    "version": "",
    "seeds": "",
    "locations": "",
    "score_matrix": "",
    "algorithm": "seeds",
    "config": "algorithm errors",
    "backend": "algorithm.kinds config errors seeds",
    "heads": "backend.runtime seeds",
    "data": "backend errors",
    "methods": "algorithm backend config errors",
    "project": "algorithm backend config errors locations score_matrix version",
    "learning": "algorithm backend config data errors locations methods project score_matrix seeds version",
    "compare": "backend config errors learning methods score_matrix seeds version",
    "views": "algorithm backend compare errors project.metrics score_matrix",
    "serving": "api backend data errors learning views",
    "report": "algorithm errors project score_matrix views",
    "api": "algorithm backend config data errors learning project score_matrix",
    "__init__": "api version",
    "commands": "algorithm api backend compare config data errors learning locations methods project report"
    " score_matrix serving views",
    "app": "backend commands errors project version views",
    "__main__": "app",
    "backends": "backend errors",
    "vit": "algorithm.kinds backend backends config data errors heads locations seeds",
    "causal_lm": "backend backends config data errors heads locations seeds",
}
_FAMILIES = "vit", "causal_lm"
Imports = Mapping[str, frozenset[str]]


def files_in(root: Path) -> dict[str, Path]:
    """Every module of the two packages by its import name; a package is its ``__init__``."""
    found = {}
    for package, folder in (("treelora_cli", root), ("treelora_backends", root / "backends")):
        for path in sorted((folder / package).rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, tree: ast.AST, known: Iterable[str], *, package: bool = False) -> set[str]:
    """The known modules that a module imports, by any statement anywhere in it."""
    known, found = set(known), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                above = name.split(".")[: len(name.split(".")) - node.level + package]
                stem = ".".join([*above, *([stem] if stem else [])])
            found |= {full if (full := f"{stem}.{alias.name}") in known else stem for alias in node.names}
    return (found & known) - {name}


def all_imports(root: Path) -> dict[str, frozenset[str]]:
    """What every module imports."""
    files = files_in(root)
    return {
        name: frozenset(imports_of(name, ast.parse(path.read_text("utf-8")), files, package=path.name == "__init__.py"))
        for name, path in files.items()
    }


def circles(imports: Imports) -> list[list[str]]:
    """Sets of modules that reach one another, largest first (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(imports.get(name, ())):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                found.append(sorted(members))

    for name in sorted(imports):
        if name not in order:
            visit(name)
    return sorted(found, key=len, reverse=True)


def room_of(name: str) -> str:
    """The room of a module: the first part of its name below the package."""
    package, *parts = name.split(".")
    if package == BACKENDS:
        return parts[0] if parts and parts[0] in _FAMILIES else "backends"
    return parts[0] if parts else "__init__"


def trespasses(imports: Imports, rooms: Mapping[str, str]) -> list[str]:
    """Imports that the table does not allow, and modules whose room it does not name."""
    found = []
    for name, others in imports.items():
        room = room_of(name)
        if room not in rooms:
            found.append(f"{name}: no room '{room}'")
            continue
        allowed = rooms[room].split()
        for other in sorted(others):
            place = other.partition(".")[2]
            if room_of(other) not in (room, *allowed) and place not in allowed:
                found.append(f"{name} imports {other}")
    return found


# -- the project -----------------------------------------------------------------------------------


def test_no_import_circle_between_files_types_included() -> None:
    assert circles(all_imports(ROOT)) == []


def test_rooms_import_in_the_allowed_direction_only() -> None:
    assert trespasses(all_imports(ROOT), ROOMS) == []


def test_the_table_itself_allows_no_circle() -> None:
    table = {room: frozenset(part.partition(".")[0] for part in text.split()) for room, text in ROOMS.items()}
    assert circles(table) == []


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = set(re.findall(r'^  "(treelora[a-z_.]*)",$', text, re.MULTILINE)) - {"treelora_recipes"}
    files = files_in(ROOT)
    assert packages == {name for name, path in files.items() if path.name == "__init__.py"}


def test_contributing_names_every_room() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = {part.strip("` /").removesuffix(".py").split("/")[-1] for place in places for part in place.split(",")}
    assert {room for room in ROOMS if {"backends": "treelora_backends"}.get(room, room) not in named} == set()


# -- the checker -----------------------------------------------------------------------------------

PLANTED = {
    "treelora_cli/algorithm/tree.py": "from treelora_cli.algorithm import nodes\nimport torch\n",
    "treelora_cli/algorithm/nodes.py": "X = 1\n",
    "treelora_cli/backend/adapters.py": "from treelora_cli.errors import E\n",
    "treelora_cli/errors.py": "class E(Exception): ...\n",
    "treelora_cli/commands/show.py": "def show():\n    from treelora_cli.algorithm.tree import Tree\n",
    "backends/treelora_backends/vit/backend.py": "import treelora_cli.backend.adapters\n",
}
TABLE = {"algorithm": "backend.adapters", "backend": "errors", "errors": "", "commands": "algorithm", "vit": "backend"}


def planted(tmp_path: Path, **more: str) -> dict[str, frozenset[str]]:
    """The imports of a small project that is in order, but for what ``more`` says of a file."""
    for name, text in {**PLANTED, **{key.replace("__", "/") + ".py": text for key, text in more.items()}}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return all_imports(tmp_path)


def test_a_project_in_order_passes(tmp_path: Path) -> None:
    imports = planted(tmp_path)
    assert imports["treelora_cli.algorithm.tree"] == {"treelora_cli.algorithm.nodes"}
    assert imports["treelora_cli.commands.show"] == {"treelora_cli.algorithm.tree"}
    assert (circles(imports), trespasses(imports, TABLE)) == ([], [])


@pytest.mark.parametrize(
    "text",
    [
        "from treelora_cli.commands.show import show",
        "import treelora_cli.commands.show as s",
        "from ..commands import show",
        "def late():\n    from treelora_cli.commands import show",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from treelora_cli.commands.show import show",
    ],
)
def test_a_planted_import_is_found_however_it_is_written(tmp_path: Path, text: str) -> None:
    imports = planted(tmp_path, treelora_cli__algorithm__tree=text)
    line = "treelora_cli.algorithm.tree imports treelora_cli.commands.show"
    assert trespasses(imports, TABLE) == [line]
    assert circles(imports) == [["treelora_cli.algorithm.tree", "treelora_cli.commands.show"]]


def test_one_file_of_a_room_may_be_allowed_and_the_others_not(tmp_path: Path) -> None:
    text = "from treelora_cli.backend import adapters, runtime"
    imports = planted(tmp_path, treelora_cli__algorithm__tree=text, treelora_cli__backend__runtime="")
    assert trespasses(imports, TABLE) == ["treelora_cli.algorithm.tree imports treelora_cli.backend.runtime"]


def test_a_file_in_no_room_is_found(tmp_path: Path) -> None:
    assert trespasses(planted(tmp_path, treelora_cli__utils=""), TABLE) == ["treelora_cli.utils: no room 'utils'"]


def test_a_longer_circle_is_found_whole(tmp_path: Path) -> None:
    more = {f"treelora_cli__algorithm__{a}": f"from treelora_cli.algorithm import {b}" for a, b in ("ab", "bc", "ca")}
    assert circles(planted(tmp_path, **more)) == [[f"treelora_cli.algorithm.{name}" for name in "abc"]]
