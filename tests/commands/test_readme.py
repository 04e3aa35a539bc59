"""The README's commands, as written there."""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from conftest import Cli, make_images, picture
from treelora_backends.vit.loading import EMBEDDED
from typer.main import get_command

from treelora_cli.app import app, hoist_globals
from treelora_cli.locations import lasting

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MODEL_NAME = "vit_base_patch16_224.augreg_in21k"


def use_it() -> list[tuple[str, str]]:
    """The block under "Use it": (command, comment) of each line."""
    block = re.search(r"## Use it\n+```sh\n(.*?)```", README, re.DOTALL)
    assert block is not None
    lines = [line.partition("#") for line in block.group(1).splitlines()]
    return [(command.strip(), comment.strip()) for command, _, comment in lines]


def every_command() -> Iterator[str]:
    """Every ``treelora ...`` in the README that is more than a name, inline or on a line of its own."""
    inline = re.findall(r"`(treelora [a-z][^`]*)`", README.replace("\n", " "))
    own_line = re.findall(r"^(treelora [a-z][^#\n]*)", README, re.MULTILINE)
    yield from (one.strip() for one in (*inline, *own_line))


def test_the_block_under_use_it_runs(cli: Cli, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched: what the model's name stands for lies there as a directory, and such a path is local."""
    home = tmp_path / "home"
    shutil.copytree(EMBEDDED, tmp_path / MODEL_NAME)
    make_images(home / "data/gulls", ["red", "yellow"])
    make_images(home / "data/terns", ["blue", "green"])
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    ran, loaders = [], []
    for command, comment in use_it():
        first, *rest = shlex.split(command)
        if first == "cd":
            monkeypatch.chdir(rest[0])
            picture("red", 1).save("photo.jpg")
            continue
        if first == ".":
            continue  # the shell's own
        assert first == "treelora"
        done = cli(*(str(Path(one).expanduser()) if one.startswith("~") else one for one in rest))
        assert done.code == 0, f"{command}: {done.err}"
        ran.append(rest[0])
        if rest[0] == "export":
            loaders.append(comment)
    names = ["init", "train-task", "train-task", "eval", "inspect-tree", "predict", "export", "export", "export"]
    assert ran == names
    assert {path.name for path in tmp_path.iterdir()} == {
        "home",
        MODEL_NAME,
        "birds",
        "birds-merged",
        "terns",
        "birds-routed",
    }
    monkeypatch.chdir(tmp_path)
    import timm
    from peft import PeftModel

    base = timm.create_model(f"local-dir:{MODEL_NAME}", num_classes=4)
    merged, adapted = (eval(line, {"timm": timm, "PeftModel": PeftModel, "base": base}) for line in loaders[:2])
    assert merged.pretrained_cfg["label_names"] == ["red", "yellow", "blue", "green"]
    assert adapted.peft_config["default"].peft_type == "LORA"


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
