"""The held-out examples of a task are those of when it was learned, whatever happens to its data."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import MODEL, MODEL_ARGS, Cli, check_error, make_images, tree_hash
from hypothesis import given
from hypothesis import strategies as st
from interrupting import stop_after

from treelora_cli.backend.values import DataRequest, Recorded
from treelora_cli.data.held_out import content_hash, find_recorded, set_aside, set_aside_by_position
from treelora_cli.data.images import list_images
from treelora_cli.data.text import hash_of_text, list_texts
from treelora_cli.project.state import seal
from treelora_cli.project.store import record_of


def own(text: str) -> str:
    return content_hash(text)


# -- the split --------------------------------------------------------------------------------------------


@given(st.sets(st.text(max_size=8), max_size=60), st.sets(st.text(max_size=8), max_size=20), st.integers(0, 9))
def test_a_draw_depends_on_the_example_alone(before: set[str], more: set[str], seed: int) -> None:
    """An example leaves its part only for one that is drawn before it, or because the share has grown."""
    kept, aside = set_aside(sorted(before), 0.3, str(seed), own)
    assert sorted([*kept, *aside]) == sorted(before)
    assert len(before) < 2 or len(aside) == min(len(before) - 1, max(1, round(0.3 * len(before))))
    assert set(set_aside(sorted(before, reverse=True), 0.3, str(seed), own)[1]) == set(aside)
    _, after = set_aside(sorted(before | more), 0.3, str(seed), own)
    came = set(after) - before
    assert len(set(aside) - set(after)) <= len(came)
    assert len(set(after) & set(kept)) <= max(0, len(after) - len(aside))


def test_texts_are_split_by_content_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "answer": f"value {n}"} for n in range(100)]
    path = tmp_path / "d.jsonl"

    def listed(chosen: list[dict[str, str]]) -> set[str]:
        path.write_text("\n".join(json.dumps(row) for row in chosen))
        return {one.prompt for one in list_texts(DataRequest(path)).test}

    first = listed(rows)
    assert len(first) == 10
    assert listed(rows[::-1]) == first
    rest = [row for row in rows if row["prompt"] in first or row["prompt"] in {f"{n}?" for n in range(50)}]
    assert listed(rest) <= first, "of the rest, the lowest draws are among the same"


def test_an_older_projects_split_is_by_position_still(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", ["red", "blue"], train=20, test=0) / "train"
    record = DataRequest(folder).to_json()
    del record["split"]
    listing = list_images(DataRequest.from_json(record))
    names = [str(path) for path in sorted((folder / "red").iterdir())]
    assert [one.name for one in listing.test if one.label == "red"] == set_aside_by_position(names, 0.1, "0/red")[1]
    assert len(listing.test) == 4


def test_recorded_examples_are_found_wherever_they_are() -> None:
    hashes = [own(one) for one in ("a", "b", "b", "c")]
    assert find_recorded(["c", "b", "a", "b"], ["x"], hashes, own) == (["c", "b", "a", "b"], None)
    assert find_recorded([], ["x", "b", "a", "b", "c"], hashes, own) == (["b", "a", "b", "c"], None)
    found, change = find_recorded(["a", "b", "new"], [], hashes, own)
    assert (found, change is not None and change.scorable) == (["a", "b"], False)
    assert change is not None
    assert change.text == "2 of 4 held-out examples are gone or different since it was learned, 1 are new"
    found, change = find_recorded(["a", "b", "b", "c", "new"], [], hashes, own)
    assert (found, change is not None and change.scorable) == (["a", "b", "b", "c"], True)


@pytest.mark.parametrize("held_out", [3, "0" * 15, "X" * 16])
def test_malformed_hashes_are_refused(held_out: object) -> None:
    with pytest.raises(ValueError, match="held_out is no list of hashes"):
        Recorded.from_task({"held_out": held_out})


# -- eval -------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(cli: Cli, empty_project: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A project of two tasks, the first from a folder that is split, the second with its own test part."""
    data = tmp_path / "data"
    make_images(data / "warm", ["red", "yellow"], train=20, test=0)
    make_images(data / "cold", ["blue", "green"])
    for name, folder in (("warm", data / "warm/train"), ("cold", data / "cold")):
        done = cli("-C", empty_project, "train-task", folder, "--name", name, "--device", "cpu", "--precision", "fp32")
        assert done.code == 0, done.err
    return empty_project, data


def evaluated(cli: Cli, root: Path, *options: object, code: int = 0) -> dict[str, object]:
    done = cli("-C", root, "--json", "eval", "--device", "cpu", *options)
    assert done.code == code, done.err
    return done.json


def refill(folder: Path, classes: list[str], seed: int) -> None:
    for name in classes:
        shutil.rmtree(folder / name)
    made = make_images(folder.parent / "made", classes, train=20, test=0, seed=seed)
    for name in classes:
        shutil.move(made / "train" / name, folder / name)


def test_a_refilled_folder_is_said_and_not_scored(cli: Cli, stream: tuple[Path, Path]) -> None:
    root, data = stream
    before, files = evaluated(cli, root), tree_hash(root)
    assert before["not_scored"] == {} and before["changed_data"] == {}
    refill(data / "warm/train", ["red", "yellow"], seed=7000)
    found = evaluated(cli, root)
    total = len(Recorded.from_task(json.loads((root / "tasks/001-warm/task.json").read_text())).held_out or ())
    said = f"{total} of {total} held-out examples are gone or different since it was learned"
    assert found["changed_data"] == {"warm": said}
    assert found["not_scored"] == {"warm": f"{said}. Score what is there now with: treelora eval --changed-data"}
    assert found["tasks"] == {"cold": before["tasks"]["cold"]}  # type: ignore[index]
    assert tree_hash(root) == files
    asked = evaluated(cli, root, "--changed-data")
    assert set(asked["tasks"]) == {"warm", "cold"}  # type: ignore[call-overload]
    assert (asked["not_scored"], asked["changed_data"]) == ({}, {"warm": said})
    shown = cli("-C", root, "eval", "--device", "cpu", "--changed-data")
    row = next(line for line in shown.out.splitlines() if "warm" in line)
    assert row.count("-") >= 2, "a score on other pictures is not compared with the recorded ones"


def test_more_images_leave_the_scores_alone(cli: Cli, stream: tuple[Path, Path], tmp_path: Path) -> None:
    root, data = stream
    before = evaluated(cli, root)
    more = make_images(tmp_path / "more", ["red", "yellow", "blue", "green"], train=5, test=5, seed=900)
    for part, target in (("warm/train", "train"), ("cold/train", "train"), ("cold/test", "test")):
        for path in sorted((more / target).rglob("*.png")):
            if (data / part / path.parent.name).is_dir():
                shutil.copy(path, data / part / path.parent.name / f"0-{path.name}")
    after = evaluated(cli, root)
    assert after["tasks"] == before["tasks"]
    assert after["changed_data"] == {"cold": "10 held-out examples are new since it was learned and are not scored"}


def test_what_a_limit_leaves_out_is_not_new(cli: Cli, stream: tuple[Path, Path], tmp_path: Path) -> None:
    root, data = stream
    learn = ("-C", root, "train-task", data / "cold", "--device", "cpu", "--no-eval", "--epochs", 0)
    held_out = len(list((data / "cold/test").rglob("*.png")))
    assert cli(*learn, "--name", "two", "--test-limit", 2).code == 0
    assert cli(*learn, "--name", "many", "--test-limit", 100).code == 0
    before = evaluated(cli, root)
    assert before["changed_data"] == {}
    assert before["tasks"]["two"]["examples"] == 4  # type: ignore[index]
    more = make_images(tmp_path / "more", ["blue", "green"], train=0, test=5, seed=900) / "test"
    for path in sorted(more.rglob("*.png")):
        shutil.copy(path, data / "cold/test" / path.parent.name / f"0-{path.name}")
    after = evaluated(cli, root)
    assert after["tasks"] == before["tasks"]
    said = "held-out examples are new since it was learned and are not scored"
    assert after["changed_data"] == {"cold": f"10 {said}", "two": f"some {said}", "many": f"10 {said}"}
    assert before["tasks"]["many"]["examples"] == held_out  # type: ignore[index]


def test_each_example_is_hashed_once() -> None:
    asked: list[str] = []

    def hashed(text: str) -> str:
        asked.append(text)
        return own(text)

    test = [f"{n}" for n in range(9)]
    found, change = find_recorded(test, ["10"], [own(one) for one in test[:4]], hashed, drawn=test[:4])
    assert (found, change) == (test[:4], None)
    assert asked == test


@pytest.mark.parametrize("own_part", [True, False])
def test_what_a_limit_leaves_out_of_texts_is_not_new(own_part: bool, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{n}?", "answer": f"value {n}"}) for n in range(200)]
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(rows[:100]))
    if own_part:
        (folder / "test.jsonl").write_text("\n".join(rows[100:]))
    request = DataRequest(folder, test_limit=5)
    hashes = tuple(hash_of_text(one) for one in list_texts(request).test)
    again = dataclasses.replace(request, recorded=Recorded(hashes, ""))
    found = list_texts(again)
    assert len(found.test) == 5 and found.change is None


def test_one_weeks_task_is_not_scored_on_another_weeks_pictures(
    cli: Cli, stream: tuple[Path, Path], tmp_path: Path
) -> None:
    """Folders that are emptied and filled again every week carry the same name and the same classes."""
    root, data = stream
    shutil.rmtree(data / "cold")
    shutil.copytree(data / "warm/train", data / "cold")
    assert set(evaluated(cli, root)["not_scored"]) == {"cold"}  # type: ignore[call-overload]
    shutil.rmtree(data / "warm")
    check_error(cli("-C", root, "eval", "--device", "cpu"), 4, r"No task can be scored\. warm: ")
    assert cli("-C", root, "train-task", data / "cold", "--name", "week2", "--device", "cpu").code == 0
    assert cli("-C", root, "status", "--json").code == 0


def test_renamed_and_reordered_files_are_the_same_examples(cli: Cli, stream: tuple[Path, Path]) -> None:
    root, data = stream
    before = evaluated(cli, root)
    for number, path in enumerate(sorted(data.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"x{number:04d}.png"))
    after = evaluated(cli, root)
    assert (after["tasks"], after["changed_data"]) == (before["tasks"], {})


def test_a_changed_label_is_a_changed_example(cli: Cli, stream: tuple[Path, Path]) -> None:
    root, data = stream
    shutil.move(data / "cold/test/blue/00.png", data / "cold/test/green/99.png")
    said = evaluated(cli, root)["changed_data"]
    assert said == {"cold": "1 of 16 held-out examples are gone or different since it was learned, 1 are new"}


def test_data_that_moved_is_found_where_the_user_says(cli: Cli, stream: tuple[Path, Path], tmp_path: Path) -> None:
    root, data = stream
    before = evaluated(cli, root)
    shutil.move(data / "cold", tmp_path / "elsewhere")
    assert "not found" in evaluated(cli, root)["not_scored"]["cold"]  # type: ignore[index]
    assert evaluated(cli, root, "--data", f"cold={tmp_path / 'elsewhere'}") == before
    wrong = evaluated(cli, root, "--data", f"cold={data / 'warm/train'}")
    assert "held-out examples are gone or different" in wrong["not_scored"]["cold"]  # type: ignore[index]
    check_error(cli("-C", root, "eval", "--data", f"nothing={data}"), 2, "No task 'nothing' in this project")


def test_a_limit_takes_some_of_the_recorded_examples(cli: Cli, stream: tuple[Path, Path]) -> None:
    root, _ = stream
    found = evaluated(cli, root, "--limit", "3")
    assert found["tasks"]["cold"]["examples"] == 6  # type: ignore[index]
    assert found["changed_data"] == {}


def test_a_task_of_before_the_hashes_is_compared_as_a_whole(cli: Cli, stream: tuple[Path, Path]) -> None:
    """Its recorded SHA-256 is over all examples, trained on or held out."""
    root, data = stream
    name = "tasks/002-cold/task.json"
    record = json.loads((root / name).read_text())
    record.pop("held_out", None)
    del record["data"]["split"]
    content = json.dumps(record).encode()
    (root / name).write_bytes(content)
    state = json.loads((root / "state.json").read_text())
    state["files"][name] = dataclasses.asdict(record_of(content))
    (root / "state.json").write_bytes(seal(state))
    before = evaluated(cli, root)
    assert (set(before["tasks"]), before["changed_data"]) == ({"warm", "cold"}, {})  # type: ignore[call-overload]
    shutil.copy(data / "cold/train/blue/00.png", data / "cold/train/blue/99.png")
    said = "its data is not what it was learned from (the SHA-256 over all examples differs)"
    assert evaluated(cli, root)["changed_data"] == {"cold": said}
    assert evaluated(cli, root, "--changed-data")["tasks"] == before["tasks"]


def test_texts_that_changed_are_told_example_by_example(cli: Cli, tmp_path: Path) -> None:
    from tiny_lm import TEMPLATE, save_model

    model, root, path = save_model(tmp_path / "llama", "llama", TEMPLATE), tmp_path / "p", tmp_path / "moods.jsonl"
    rows = [{"sentence": f"Tom is {n}", "label": ("good", "bad")[n % 2]} for n in range(40)]

    def write(chosen: list[dict[str, str]], where: Path) -> None:
        where.write_text("\n".join(json.dumps(row) for row in chosen))

    write(rows, path)
    assert cli("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu").code == 0
    assert cli("-C", root, "train-task", path, "--device", "cpu").code == 0
    before = evaluated(cli, root)
    held_out = list_texts(DataRequest(path)).test
    write([*rows[::-1], *({**row, "sentence": f"Ann is {n}"} for n, row in enumerate(rows))], path)
    assert evaluated(cli, root)["tasks"] == before["tasks"], "more and reordered lines change nothing"
    path.rename(tmp_path / "elsewhere.jsonl")
    assert evaluated(cli, root, "--data", f"moods={tmp_path / 'elsewhere.jsonl'}")["tasks"] == before["tasks"]
    flipped = {"good": "bad", "bad": "good"}
    first = held_out[0].prompt
    write([{**row, "label": flipped[row["label"]]} if row["sentence"] == first else row for row in rows], path)
    done = cli("-C", root, "eval", "--device", "cpu")
    assert done.code == 4
    assert f"1 of {len(held_out)} held-out examples are gone or different since it was learned." in done.err


def test_data_that_moved_for_good(cli: Cli, stream: tuple[Path, Path], tmp_path: Path) -> None:
    root, data = stream
    before, elsewhere = evaluated(cli, root), tmp_path / "elsewhere"
    shutil.move(data / "cold", elsewhere)
    said = evaluated(cli, root)["not_scored"]["cold"]  # type: ignore[index]
    assert said.endswith("If it lies elsewhere now: treelora data cold PATH")
    files = tree_hash(root)
    for wrong, line in (
        (data / "warm/train", "is not the data of task 'cold': 16 of 16 held-out examples are gone or different"),
        (tmp_path / "nowhere", "nowhere not found"),
    ):
        check_error(cli("-C", root, "data", "cold", wrong, "--device", "cpu"), 4, line)
    check_error(cli("-C", root, "data", "hot", elsewhere, "--device", "cpu"), 2, "No task 'hot' in this project")
    assert tree_hash(root) == files
    done = cli("-C", root, "data", "cold", elsewhere, "--device", "cpu")
    assert (done.code, "The data of 'cold' lies in" in done.out) == (0, True), done.err
    assert evaluated(cli, root) == before
    assert cli("-C", root, "doctor").code == 0
    record = json.loads((root / "tasks/002-cold/task.json").read_text())
    assert (record["data"]["path"], record["data"]["known_as"]) == (str(elsewhere), str(data / "cold"))
    assert cli("-C", root, "rollback", "cold").code == 0
    assert cli("-C", root, "rollback", "--undo").code == 0
    assert evaluated(cli, root) == before


def test_held_out_data_apart_moves_along(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    """What lay beside the data is found beside its new place; what went elsewhere is said with ``--val``."""
    old = make_images(tmp_path / "old", ["red", "blue"])
    (tmp_path / "all").mkdir()
    for part in ("train", "test"):
        (old / part).rename(tmp_path / "all" / f"{part}ed")
    data, val = tmp_path / "all/trained", tmp_path / "all/tested"
    root = ("-C", empty_project)
    assert cli(*root, "train-task", data, "--val", val, "--name", "one", "--device", "cpu").code == 0
    scores = evaluated(cli, empty_project)
    (tmp_path / "all").rename(tmp_path / "moved")
    gone = cli(*root, "eval", "--device", "cpu")
    check_error(gone, 4, r"trained not found\. If it lies elsewhere now: treelora data one PATH")
    here = tmp_path / "moved/trained"
    assert evaluated(cli, empty_project, "--data", f"one={here}") == scores
    assert cli(*root, "data", "one", here, "--device", "cpu").code == 0
    assert evaluated(cli, empty_project) == scores
    apart = (tmp_path / "moved/tested").rename(tmp_path / "apart")
    line = r"moved/tested, the held-out data of 'one', not found\. Say where it is now: --val PATH"
    check_error(cli(*root, "data", "one", here, "--device", "cpu"), 4, line)
    assert cli(*root, "data", "one", here, "--val", apart, "--device", "cpu").code == 0
    assert evaluated(cli, empty_project) == scores


def test_a_task_of_several_files_that_moved_into_one_folder(cli: Cli, empty_project: Path, tmp_path: Path) -> None:
    one, two = (make_images(tmp_path / name, [name], test=0) / "train" for name in ("red", "blue"))
    assert cli("-C", empty_project, "train-task", one, two, "--name", "both", "--device", "cpu").code == 0
    scores = evaluated(cli, empty_project)
    (tmp_path / "new").mkdir()
    for folder in (one / "red", two / "blue"):
        folder.rename(tmp_path / "new" / folder.name)
    assert evaluated(cli, empty_project, "--data", f"both={tmp_path / 'new'}") == scores


def test_a_base_that_moved_is_named_in_the_settings(
    cli: Cli, stream: tuple[Path, Path], weights: Path, tmp_path: Path
) -> None:
    root, _ = stream
    scores = evaluated(cli, root)
    settings = root / "treelora.yaml"
    here, gone = Path(shutil.copy(weights, tmp_path / "here.safetensors")), tmp_path / "gone.safetensors"
    settings.write_text(settings.read_text().replace(str(weights), str(gone)))
    line = rf"{gone}, this project's base, not found\. Put it back, or write where it lies now into {settings} \("
    for command in (["eval"], ["predict", here], ["export", tmp_path / "out"]):
        check_error(cli("-C", root, *command, "--device", "cpu"), 5, line)
    settings.write_text(settings.read_text().replace(str(gone), str(here)))
    assert evaluated(cli, root) == scores


def test_a_project_that_moved_together_with_its_data_and_base(
    cli: Cli, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    for name, classes, seed in (
        ("one", ["red", "blue"], 0),
        ("seen", ["red", "blue"], 50),
        ("two", ["pink", "brown"], 0),
    ):
        make_images(work / name, classes, seed=seed)
    (work / "one/test").rename(work / "held")
    shutil.copy(weights, work / "w.safetensors")
    monkeypatch.chdir(work)
    arguments = [part for pair in MODEL_ARGS.items() for part in ("--model-arg", "=".join(map(str, pair)))]
    options = ["--head-width", "64", "--rank", "4", "--targets", "qkv", "--blocks", "0"]
    made = cli("init", "p", "--model", MODEL, "--weights", "w.safetensors", *arguments, *options, "--device", "cpu")
    assert made.code == 0, made.err
    assert cli("-C", "p", "train-task", "one/train", "--val", "held", "--name", "one", "--device", "cpu").code == 0
    assert cli("-C", "p", "watch", "add", "seen", "seen/test", "--device", "cpu").code == 0
    scores, watched = evaluated(cli, Path("p")), cli("-C", "p", "watch", "list").out
    stop_after(cli, Path("p"), Path("two"), 3, of=4)
    monkeypatch.chdir(tmp_path)
    work.rename(tmp_path / "moved")
    root = tmp_path / "moved/p"
    assert evaluated(cli, root) == scores
    assert cli("-C", root, "watch", "list").out == watched
    assert cli("-C", root, "train-task", "--resume", "--device", "cpu").code == 0
    record = json.loads((root / "tasks/002-two/task.json").read_text())["data"]
    assert (record["path"], record["kept_in"]) == (str(tmp_path / "moved/two"), str(root))
    assert cli("-C", root, "doctor").code == 0


def test_other_data_at_the_place_that_moved_along_is_not_scored(
    cli: Cli, stream: tuple[Path, Path], tmp_path: Path
) -> None:
    root, data = stream
    away = tmp_path / "away"
    away.mkdir()
    shutil.copytree(root, away / root.name)
    shutil.copytree(data / "warm", away / os.path.relpath(data / "cold", root.parent))
    shutil.rmtree(data / "cold")
    said = evaluated(cli, away / root.name)["not_scored"]["cold"]  # type: ignore[index]
    assert said.startswith("16 of 16 held-out examples are gone or different since it was learned")
