"""The README's commands, as written there."""

import csv
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import Cli, make_images, picture
from tiny_lm import save_model
from treelora_backends.vit.loading import EMBEDDED
from typer.main import get_command

from treelora_cli.app import app, hoist_globals
from treelora_cli.locations import lasting

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in re.findall(r"\]\(([^)#:]+\.md)\)", README)]
RESULTS = ROOT / "recipes/RESULTS.md"
MODEL_NAME = "vit_small_patch14_dinov2.lvd142m"


def walk(heading: str) -> list[str]:
    """The commands of the transcript under a heading, without the time behind them."""
    block = re.search(rf"## {re.escape(heading)}\n.*?```console\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return [line[2:].partition("   #")[0] for line in block.group(1).splitlines() if line.startswith("$ ")]


def every_command() -> Iterator[str]:
    """Every ``treelora ...`` in the README and its pages that is more than a name, inline or on a line of its own."""
    for text in (README, *(page.read_text(encoding="utf-8") for page in PAGES if page != RESULTS)):
        inline = re.findall(r"`(treelora [a-z][^`]*)`", text.replace("\n", " "))
        own_line = re.findall(r"^(?:\$ )?(treelora [a-z][^#\n]*)", text, re.MULTILINE)
        yield from (one.strip() for one in (*inline, *own_line))


def take(cli: Cli, monkeypatch: pytest.MonkeyPatch, commands: list[str]) -> list[tuple[str, str]]:
    """Run the commands of a walk; return name and output of each."""
    ran = []
    for command in commands:
        first, *rest = shlex.split(command)
        if first == "cd":
            monkeypatch.chdir(rest[0])
            continue
        assert first == "treelora"
        done = cli(*rest)
        assert done.code == 0, f"{command}: {done.err}"
        ran.append((rest[0], done.out))
    return ran


def test_the_walk_through_images_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local model stands for the model's name and its weights."""
    shutil.copytree(EMBEDDED, tmp_path / MODEL_NAME)
    make_images(tmp_path / "animals", ["red", "yellow"])
    make_images(tmp_path / "things", ["blue", "green"])
    (tmp_path / "new").mkdir()
    picture("red", 1).save(tmp_path / "new/photo.jpg")
    monkeypatch.chdir(tmp_path)
    commands = walk("Five minutes with your own images")
    its_own = " --model-arg img_size=112 --weights vit_small_dinov2.safetensors"
    assert its_own in commands[0]
    ran = take(cli, monkeypatch, [one.replace(its_own, "") for one in commands])
    assert [name for name, _ in ran] == ["init", "train-task", "train-task", "predict", "report", "export"]
    assert (tmp_path / "zoo/treelora-report/index.html").is_file()
    import timm

    loader = re.search(r"Load with: (.*)", ran[-1][1])
    assert loader is not None
    merged = eval(loader.group(1), {"timm": timm})
    assert merged.pretrained_cfg["label_names"] == ["red", "yellow", "blue", "green"]


def test_the_walk_through_texts_runs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", "llama")
    for name, labels in (("reviews", ("Good", "Bad")), ("news", ("Sports", "World"))):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            rows = [(f"{name} {index} {labels[index % 2]}", labels[index % 2]) for index in range(40)]
            csv.writer(file).writerows([("sentence", "label"), *rows])
    monkeypatch.chdir(tmp_path)
    commands = walk("Five minutes with your own texts")
    assert "--model SmolLM2-135M-Instruct.Q4_1.gguf" in commands[0]
    ran = take(cli, monkeypatch, [one.replace("SmolLM2-135M-Instruct.Q4_1.gguf", "model") for one in commands])
    assert [name for name, _ in ran] == ["init", "train-task", "train-task", "predict"]
    assert "Oil prices fell" in ran[-1][1]


def test_every_page_and_picture_that_is_linked_is_there() -> None:
    for page in (ROOT / "README.md", *PAGES):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert Path(os.path.normpath(page.parent / target)).is_file(), f"{page.name}: {target}"


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("command", sorted(set(every_command())))
def test_every_command_that_is_shown_is_one_there_is(command: str) -> None:
    """Its options and arguments are taken; nothing is run."""
    words = hoist_globals(shlex.split(command)[1:])
    parser = get_command(app)
    assert isinstance(parser, click.Group) or hasattr(parser, "commands")
    name, *rest = words
    shown = [one for one in rest if one != "..."]
    found = parser.commands[name]  # type: ignore[union-attr]
    found.make_context(name, shown, resilient_parsing=False) if shown else found.make_context(
        name, [], resilient_parsing=True
    )


@pytest.mark.parametrize("out", ["../out", "../p/../out", "sub/../../out", "../link/../out"])
def test_an_export_beside_the_project_is_allowed_from_inside(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (project / "sub").mkdir()
    (tmp_path / "link").symlink_to(project)
    monkeypatch.chdir(project)
    assert cli("export", out, "--no-verify", "--device", "cpu").code == 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_an_export_into_the_project_is_refused_by_any_way(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(project)
    monkeypatch.chdir(tmp_path)
    for out in ("p/out", "link/out", "p/../p/out", "."):
        done = cli("-C", "p", "export", out, "--no-verify", "--device", "cpu")
        assert (done.code, "overlaps the project" in done.err) == (2, True), out


def test_a_renamed_project_still_finds_data_that_was_named_from_inside(
    cli: Cli, empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "data", ["red", "yellow"])
    monkeypatch.chdir(empty_project)
    assert cli("train-task", "../data", "--device", "cpu").code == 0
    monkeypatch.chdir(tmp_path)
    empty_project.rename(tmp_path / "renamed")
    found = cli("-C", "renamed", "--json", "eval", "--device", "cpu").json
    assert (set(found["tasks"]), found["not_scored"]) == ({"data"}, {})


def test_lasting_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a/b")
    monkeypatch.chdir(tmp_path / "a")
    real = Path(tmp_path.resolve())
    assert lasting(Path("../x")) == real / "x"
    assert lasting(Path("b/../../x/y")) == real / "x/y"
    assert lasting(tmp_path / "link/../c") == real / "a/c", "above what the link leads to, as the system reads it"
    assert lasting(tmp_path / "link/c") == tmp_path / "link/c"
