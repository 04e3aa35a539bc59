"""Data as people have it, on the command line: the right thing is learned, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli, check_error, make_images, picture, tree_hash
from PIL import Image

from treelora_cli.backend.values import DataRequest
from treelora_cli.data.text import list_texts


def manifest(folder: Path, classes: dict[str, str]) -> Path:
    """Write a CSV of four images of each colour under the label given."""
    folder.mkdir()
    lines = ["path,label"]
    for colour, label in classes.items():
        for index in range(4):
            picture(colour, index).save(folder / f"{colour}{index}.png")
            lines.append(f"{colour}{index}.png,{label}")
    (folder / "m.csv").write_text("\n".join(lines))
    return folder / "m.csv"


def test_numbers_of_two_files_are_not_taken_for_the_same_classes(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    first = manifest(tmp_path / "a", {"red": "0", "blue": "1"})
    second = manifest(tmp_path / "b", {"green": "0", "black": "1"})
    assert cli("-C", empty_project, "train-task", first, "--name", "a", "--device", "cpu").code == 0
    before = tree_hash(empty_project)
    train_second = ("-C", empty_project, "train-task", second, "--name", "b", "--device", "cpu")
    line = (
        r"Labels 0, 1 are bare numbers, and task 'a' has the same ones: do they mean the same classes\?"
        r" Pass --label-names FILE, --label-prefix NAME, or --map SOURCE=label"
    )
    check_error(cli(*train_second), 4, line)
    check_error(cli(*train_second, "--dry-run"), 4, line)
    assert tree_hash(empty_project) == before
    (tmp_path / "names.txt").write_text("green\nblack\n")
    assert cli(*train_second, "--label-names", tmp_path / "names.txt").code == 0
    labels = json.loads((empty_project / "tasks/002-b/labels.json").read_text())
    assert labels == ["black", "green"]
    same = cli("-C", empty_project, "train-task", first, "--name", "c", "--label-prefix", "", "--device", "cpu")
    assert same.code == 0
    assert json.loads((empty_project / "tasks/003-c/labels.json").read_text()) == ["0", "1"]


def test_a_task_of_one_class_is_a_task(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "one", ["red"])
    make_images(tmp_path / "two", ["blue"])
    for name in ("one", "two"):
        assert cli("-C", empty_project, "train-task", tmp_path / name, "--device", "cpu").code == 0
    scores = cli("-C", empty_project, "eval", "--json", "--device", "cpu").json["tasks"]
    assert [scores[name]["score"] for name in ("one", "two")] == [1.0, 1.0]
    image = tmp_path / "two" / "test" / "blue" / "00.png"
    answers = cli("-C", empty_project, "predict", image, "--json", "--device", "cpu").json["predictions"]
    assert answers[0]["output"] == "blue"


@pytest.mark.parametrize("brightest", [0, 16, 17])
def test_pictures_that_hold_numbers_of_classes_are_refused(
    cli: Cli, empty_project: Path, tmp_path: Path, brightest: int
) -> None:
    for name, value in (("a", 0), ("b", brightest)):
        for index in range(2):
            path = tmp_path / "masks" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (16, 16), value).save(path)
    done = cli("-C", empty_project, "train-task", tmp_path / "masks", "--dry-run", "--device", "cpu")
    if brightest > 16:
        assert done.code == 0, done.err
        return
    line = rf"masks: the brightest pixel of all 2 images is {brightest} of 255; such numbers are no brightness"
    check_error(done, 4, line)


def test_a_class_comes_back_in_another_spelling(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "a", ["red", "blue"])
    folder = make_images(tmp_path / "b", ["red", "black"], seed=5)
    for part in ("train", "test"):
        (folder / part / "red").rename(folder / part / "RED ")
    for name in ("a", "b"):
        assert cli("-C", empty_project, "train-task", tmp_path / name, "--device", "cpu").code == 0
    image = tmp_path / "b" / "test" / "RED " / "00.png"
    for inference in ("routed", "latest", "merged"):
        done = cli("-C", empty_project, "predict", image, "--json", "--inference", inference, "--device", "cpu")
        assert done.json["predictions"][0]["output"] in {"red", "blue", "black"}


def test_missing_data_is_reported_before_the_model_is_loaded(
    cli: Cli, empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_arguments: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("treelora_cli.learning.opening.load_base", load)
    make_images(tmp_path / "birds", ["red", "blue"])
    for arguments, line in (
        ([tmp_path / "brids"], r"brids not found\. Did you mean .*birds\?"),
        ([tmp_path / "birds", tmp_path / "zz"], r"zz not found\."),
        ([tmp_path / "*.csv"], r"\*\.csv: nothing fits this pattern\."),
        ([tmp_path / "birds", "--val", tmp_path / "zz"], r"zz not found\."),
        (
            ["https://example.org/birds.zip"],
            r"https://example\.org/birds\.zip is not a local file; download it first\.",
        ),
    ):
        check_error(cli("-C", empty_project, "train-task", *arguments, "--device", "cpu"), 4, line)


def test_a_folder_and_a_list_are_answered_image_by_image(cli: Cli, project: Path, data: Path, tmp_path: Path) -> None:
    folder = data / "warm" / "test" / "red"
    done = cli("-C", project, "predict", folder, "--json", "--device", "cpu")
    assert done.code == 0, done.err
    names = [Path(answer["input"]).name for answer in done.json["predictions"]]
    assert names == sorted(path.name for path in folder.iterdir())
    (tmp_path / "list.jsonl").write_text(json.dumps({"path": str(folder / "03.png")}))
    listed = cli("-C", project, "predict", tmp_path / "list.jsonl", "--json", "--device", "cpu")
    assert listed.json["predictions"] == done.json["predictions"][3:4]


def test_a_task_name_keeps_its_capitals_and_is_compared_without(cli: Cli, empty_project: Path, data: Path) -> None:
    train = ("-C", empty_project, "train-task", data / "warm", "--device", "cpu", "--name")
    assert cli(*train, "Warm-Colours").code == 0
    assert (empty_project / "tasks" / "001-Warm-Colours").is_dir()
    check_error(cli(*train, "warm-colours"), 2, r"Task 'Warm-Colours' exists \(001\)\. Choose another --name")
    scored = cli("-C", empty_project, "eval", "--tasks", "WARM-colours", "--json", "--device", "cpu")
    assert list(scored.json["tasks"]) == ["Warm-Colours"]
    assert cli("-C", empty_project, "rollback", "warm-COLOURS").code == 0
    assert cli("-C", empty_project, "status", "--json").json["tasks"] == []


def test_status_counts_all_that_is_on_disk(cli: Cli, project: Path) -> None:
    found = cli("-C", project, "status", "--json").json
    on_disk = sum(path.stat().st_size for path in project.rglob("*") if path.is_file())
    assert found["project_bytes"] + found["history_bytes"] <= found["disk_bytes"] <= on_disk
    text = cli("-C", project, "status").out
    assert "earlier states" in text.splitlines()[-1]


def test_the_sample_shows_the_path_as_it_is_said_from_here(
    cli: Cli, empty_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "data" / "birds", ["red", "blue"])
    monkeypatch.chdir(tmp_path)
    done = cli("-C", empty_project, "train-task", "p/../data/../data/birds", "--dry-run", "--json", "--device", "cpu")
    assert "memory_estimate_mib" not in done.json, "nobody measured it"
    assert done.json["sample"].startswith("data/birds/train/blue/00.png -> 3x16x16, label 'blue'")


def test_one_picture_in_two_classes_or_in_both_parts_is_said(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], test=2)
    first = folder / "train" / "red" / "00.png"
    for place in ("train/blue/same.png", "test/red/same.png"):
        (folder / place).write_bytes(first.read_bytes())
    done = cli("-C", empty_project, "train-task", folder, "--dry-run", "--json", "--device", "cpu")
    assert done.code == 0
    told = "\n".join(done.json["notes"])
    assert "1 images are in two classes, such as " in told
    assert "1 of 5 held-out images are training images, too: what they score says little." in told


def test_held_out_texts_that_are_learned_are_said(tmp_path: Path) -> None:
    for part, texts in (("train", "ab"), ("test", "bc")):
        lines = [json.dumps({"prompt": text, "answer": text}) for text in texts]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    told = list_texts(DataRequest(tmp_path)).notes
    assert told == ("1 of 2 held-out examples are training examples, too: what they score says little.",)


def test_animations_are_said_and_links_that_lead_nowhere_are_unreadable(
    cli: Cli, empty_project: Path, tmp_path: Path
) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], test=1)
    frames = [picture("red", index) for index in range(2)]
    frames[0].save(folder / "train/red/turn.gif", save_all=True, append_images=frames[1:])
    (folder / "train/red/gone.png").symlink_to("elsewhere.png")
    train = ("-C", empty_project, "train-task", folder, "--dry-run", "--json", "--device", "cpu")
    check_error(
        cli(*train), 4, r".*train/red/gone\.png cannot be read: No such file or directory\. Mend it, or pass --sk"
    )
    told = "\n".join(cli(*train, "--skip-bad").json["notes"])
    assert "1 unreadable images were skipped, such as " in told
    assert "turn.gif; the first is taken." in told


def test_folders_called_by_numbers_are_not_taken_for_an_earlier_tasks(
    cli: Cli, empty_project: Path, tmp_path: Path
) -> None:
    for name, colours in (("a", ("red", "blue")), ("b", ("green", "black"))):
        for number, colour in enumerate(colours):
            make_images(tmp_path / name, [colour], test=1)
            for part in ("train", "test"):
                (tmp_path / name / part / colour).rename(tmp_path / name / part / str(number))
    train = ("-C", empty_project, "train-task", "--device", "cpu", "--no-eval")
    assert cli(*train, tmp_path / "a").code == 0
    check_error(
        cli(*train, tmp_path / "b"), 4, r"Labels 0, 1 are bare numbers, and task 'a' has the same ones: do they"
    )
    (tmp_path / "names.txt").write_text("green\nblack\n")
    assert cli(*train, tmp_path / "b", "--label-names", tmp_path / "names.txt").code == 0
    assert json.loads((empty_project / "tasks/002-b/labels.json").read_text()) == ["black", "green"]
    assert cli(*train, tmp_path / "b", "--name", "c", "--label-prefix", "").code == 0
