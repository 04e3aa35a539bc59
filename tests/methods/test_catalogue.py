"""Methods by entry point: found, checked, and one of somebody else's, in one file, through the whole product."""

from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import STREAM, Cli, check_error, learned_hashes, make_images
from interrupting import OPTIONS, stop_after
from treelora_backends.causal_lm.backend import CausalLmBackend
from treelora_backends.vit.backend import VitBackend

from treelora_cli.errors import ModelError, UsageError
from treelora_cli.methods import catalogue
from treelora_cli.methods.catalogue import check_method, choose_head, load_method, method_names
from treelora_cli.methods.treelora import TreeLora
from treelora_cli.project import Project

BUILT_IN = ["treelora", "dualprompt", "ewc", "gem", "hidelora", "inflora", "joint", "l2p", "ncm", "ogd", "olora"]
BUILT_IN += ["ranpac", "seqlora", "slca"]
NOT_AN_ENTRY = TreeLora


def register(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, str]) -> None:
    """Add methods to what is installed."""
    found = [metadata.EntryPoint(name, value, catalogue.GROUP) for name, value in pairs]
    real = metadata.entry_points
    monkeypatch.setattr(
        metadata, "entry_points", lambda group: [*real(group=group), *(found if group == catalogue.GROUP else [])]
    )


@pytest.fixture
def anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a package with ``examples/anchor`` in it were installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "anchor")
    register(monkeypatch, ("anchor", "anchor:ANCHOR"))


def test_ours_and_every_contender_register_alike_and_load() -> None:
    assert catalogue.method_names() == BUILT_IN
    in_project = [name for name in BUILT_IN if catalogue.load_method(name).in_project]
    assert in_project == ["treelora"]
    made = catalogue.load_method("treelora").make()
    assert isinstance(made, TreeLora) and made.bandit is None, "nothing is searched before a task begins"


def test_names_are_listed_without_importing_a_method() -> None:
    code = (
        "import sys; from treelora_cli.methods import catalogue as c; c.method_names(); print('torch' in sys.modules)"
    )
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("value", "kind", "line"),
    [
        (
            f"{__name__}:NOT_AN_ENTRY",
            UsageError,
            r"^Method 'mine' \(.*\) is not a treelora_cli\.methods\.base\.Entry\.$",
        ),
        ("no_such_package:X", ModelError, r"^Method 'mine' cannot be imported: No module named 'no_such_package'\.$"),
    ],
)
def test_what_is_no_method_is_named(monkeypatch: pytest.MonkeyPatch, value: str, kind: Any, line: str) -> None:
    register(monkeypatch, ("mine", value))
    with pytest.raises(kind, match=line):
        catalogue.load_method("mine")


def test_a_name_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, ("seqlora", "mine:MINE"))
    with pytest.raises(UsageError, match=r"^Method 'seqlora' is registered twice \(.* and mine:MINE\)\. Uninstall one"):
        catalogue.method_names()


# -- in a project ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "line"),
    [
        (
            "seqlora",
            r"Method 'seqlora' runs in treelora compare only: it keeps nothing in a project\. Choose --method tree",
        ),
        ("treelroa", r"Unknown method 'treelroa' \(did you mean 'treelora'\?\)\. Known: treelora, "),
    ],
)
def test_init_takes_methods_that_run_in_a_project(
    cli: Cli, init_options: list[str], tmp_path: Path, method: str, line: str
) -> None:
    check_error(cli("init", tmp_path / "p", *init_options, "--method", method), 2, line)
    assert not (tmp_path / "p").exists()


def test_a_project_says_its_method_and_keeps_to_it(cli: Cli, empty_project: Path, data: Path) -> None:
    assert Project.open(empty_project).state.fixed["method"] == "treelora"
    written = empty_project / "treelora.yaml"
    written.write_text(written.read_text().replace("method: treelora", "method: anchor"))
    line = r"treelora\.yaml: 'method' is anchor but this project was made with treelora\. Set it back"
    check_error(cli("-C", empty_project, "train-task", data / STREAM[0][0], *OPTIONS), 2, line)


@pytest.mark.usefixtures("anchor")
def test_a_method_of_ones_own_runs_through_the_whole_product(
    cli: Cli, init_options: list[str], tmp_path: Path, data: Path
) -> None:
    root, again = tmp_path / "p", tmp_path / "again"
    assert cli("init", root, *init_options, "--method", "anchor").code == 0
    for before, (name, _) in zip([None, *(name for name, _ in STREAM)], STREAM, strict=False):
        done = cli("-C", root, "train-task", data / name, *OPTIONS, "--json")
        assert done.code == 0, done.err
        assert (done.json["nearest"], done.json["warm_start_from"]) == (None, before)
    project = Project.open(root)
    assert project.task_record(STREAM[0][0])["settings"]["method"] == "anchor"
    assert project.bandit() is None and len(project.tree().signatures) == len(STREAM)

    more = make_images(tmp_path / "more", ["pink", "brown"])
    shutil.copytree(root, again)
    stop_after(cli, root, more, 3)
    assert cli("-C", root, "train-task", "--resume", *OPTIONS).code == 0
    assert cli("-C", again, "train-task", more, *OPTIONS).code == 0
    assert learned_hashes(root) == learned_hashes(again), "resumed as if never interrupted"

    scores = cli("-C", root, "eval", "--json", "--device", "cpu").json["tasks"]
    assert list(scores) == [*(name for name, _ in STREAM), "more"]
    assert cli("-C", root, "inspect-tree", "--bandit", "--json").json["bandit"] is None
    out = cli("-C", root, "export", tmp_path / "out", "--json")
    assert out.code == 0, out.err


@pytest.mark.usefixtures("anchor")
def test_the_pull_of_a_method_of_ones_own_acts(cli: Cli, init_options: list[str], tmp_path: Path, data: Path) -> None:
    moved = {}
    for reg in ("0", "1e6"):
        root = tmp_path / reg
        cli("init", root, *init_options, "--method", "anchor", "--reg", reg)
        for name, _ in STREAM[:2]:
            assert cli("-C", root, "train-task", data / name, *OPTIONS, "--no-eval").code == 0
        first, second = (Project.open(root).adapter(name) for name, _ in STREAM[:2])
        moved[reg] = max(float((a - b).abs().max()) for a, b in zip(first.up, second.up, strict=True))
    assert 0 < moved["1e6"] < moved["0"]


def test_without_the_package_the_project_can_be_read_but_not_taught(
    cli: Cli, init_options: list[str], tmp_path: Path, data: Path
) -> None:
    root, name = tmp_path / "p", STREAM[0][0]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "examples" / "anchor")
        register(patch, ("anchor", "anchor:ANCHOR"))
        assert cli("init", root, *init_options, "--method", "anchor").code == 0
        assert cli("-C", root, "train-task", data / name, *OPTIONS).code == 0
    assert cli("-C", root, "eval", "--device", "cpu").code == 0
    line = r"Unknown method 'anchor'\. Known: treelora, "
    check_error(cli("-C", root, "train-task", data / STREAM[1][0], *OPTIONS), 2, line)


def test_every_contender_makes_a_strategy_and_has_a_head_somewhere() -> None:
    offered = {*VitBackend.contender_heads, *CausalLmBackend.contender_heads}
    for entry in (load_method(name) for name in method_names() if name != "treelora"):
        assert entry.make().kept_bytes() == 0
        assert set(entry.heads) <= offered


def test_unknown_methods_and_unfit_backends_are_usage_errors() -> None:
    with pytest.raises(UsageError, match=r"Unknown method 'seqlor' \(did you mean 'seqlora'\?\)"):
        check_method("seqlor")
    with pytest.raises(UsageError, match=r"'ranpac' does not work with the causal-lm backend\. These do: treelora"):
        choose_head("ranpac", CausalLmBackend.contender_heads, "causal-lm")
