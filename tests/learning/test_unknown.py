"""``unknown`` below a threshold, in the command, in Python and over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, check_error, make_images, must
from serving_client import serving
from tiny_lm import save_model
from treelora_backends.causal_lm.router import TaskRouter

from treelora_cli import Project
from treelora_cli.backend.values import Prediction
from treelora_cli.errors import UsageError
from treelora_cli.learning.unknown import Threshold, Wanted, own_share, wanted
from treelora_cli.project.metrics import TaskAnswers, answers_document, parse_answers

SURE = Prediction("cat", "pets", 0.8, (("dog", 0.2),), familiarity=3.0)


def test_what_a_threshold_may_be() -> None:
    assert wanted(0.5) == wanted("0.5") == Wanted(probability=0.5)
    assert (wanted("auto"), wanted("AUTO:1"), wanted("0")) == (Wanted(own=5), Wanted(own=1), Wanted(probability=0))
    for given in ("50", "-0.1", "nan", "often", "auto:0", "auto:100", "auto:x", "0.5:1", ""):
        with pytest.raises(UsageError, match="expected a probability from 0 to 1, auto, or auto:PERCENT"):
            wanted(given)


def test_the_threshold_itself_is_known() -> None:
    assert Threshold(probability=0.8)(SURE) is SURE
    assert Threshold(familiarity=3.0)(SURE) is SURE
    for threshold in (Threshold(probability=0.81), Threshold(familiarity=3.1)):
        found = threshold(SURE)
        assert (found.output, found.task, found.confidence, found.known) == ("unknown", None, None, False)
        assert found.others == (("cat", 0.8), ("dog", 0.2))
    free = Prediction("a text", "chat", None)
    assert Threshold(probability=1.0)(free) is free, "nothing is known of how sure a free answer is"
    foreign = Prediction("a text", None, None, task_confidence=0.4)
    assert Threshold()(foreign).output == "unknown"


@pytest.mark.parametrize(("percent", "unknown"), [(1, 1), (5, 2), (10, 4), (50, 20), (99, 40)])
def test_at_most_that_share_of_further_own_examples_is_unknown(percent: float, unknown: int) -> None:
    values = [float(value) for value in range(41)]
    found = 0
    for further in values:  # each of 41 in turn is the one that was not held out
        limit = own_share([value for value in values if value != further], percent)
        assert limit is not None
        found += further < limit
    assert found == unknown, "the most of 41 that are no more than the share; one where that is none"
    assert own_share([], 5) is None


def test_familiarities_are_kept_and_bounded() -> None:
    many = TaskAnswers({}, {}, tuple(float(value) for value in range(1000, 0, -1)))
    kept = parse_answers(json.dumps(answers_document({"t": many})).encode())["t"].familiar
    assert (len(kept), kept[0], kept[-1]) == (200, 3.0, 998.0)
    assert list(kept) == sorted(kept)


def test_values_on_the_scale_of_older_versions_are_left_alone() -> None:
    stored = {"tasks": {"t": {"confusion": [], "routes": [], "familiar": [-3.0, 250.0]}}}
    assert parse_answers(json.dumps(stored).encode())["t"].familiar == ()


@pytest.fixture
def strange(tmp_path: Path) -> list[Path]:
    return sorted(make_images(tmp_path / "strange", ("pink", "brown"), train=0).glob("test/*/*.png"))


def test_auto_calls_as_many_own_images_unknown_as_it_says(learned_project: Path, data: Path) -> None:
    project = Project.open(learned_project, device="cpu")
    own = sorted(data.glob("*/test/*/*.png"))  # the very held-out examples
    plain = project.predict(own)
    assert all(one.known and one.familiarity is not None for one in plain)
    assert len(own) == 56
    for percent, rank in ((5, 2), (25, 14)):  # the rank of 57 that the limit has; it is stored to 6 digits
        found = project.predict(own, threshold=f"auto:{percent}")
        assert sum(not one.known for one in found) in (rank - 1, rank)
        assert [one.output if one.known else one.others[0][0] for one in found] == [one.output for one in plain]
    below = sum(one.confidence is not None and one.confidence < 0.6 for one in plain)
    assert 0 < below < len(own)
    assert sum(not one.known for one in project.predict(own, threshold=0.6)) == below


def test_command_and_server_say_the_same(cli: Cli, learned_project: Path, strange: list[Path]) -> None:
    options = ["predict", *strange, "--device", "cpu", "--threshold", "auto:50"]
    done = cli("--json", "-C", learned_project, *options, "--top", "2")
    told = done.json["predictions"]
    count = sum(not one["known"] for one in told)
    assert count > 0
    assert f"{count} of {len(strange)} inputs are unknown." in done.err
    lines = cli("-C", learned_project, *options, "--format", "csv").out.splitlines()[1:]
    assert [line.split(",")[1] for line in lines] == [one["output"] for one in told]
    with serving(learned_project, threshold="auto:50") as server:
        for path, one in zip(strange, told, strict=True):
            (found,) = server.image(path.read_bytes())["predictions"]
            assert (found["known"], found["output"], found["task"]) == (one["known"], one["output"], one["task"])


def test_where_nothing_is_stored_the_held_out_images_are_scored(cli: Cli, project: Path, strange: list[Path]) -> None:
    options = ["--json", "-C", project, "predict", *strange, "--device", "cpu", "--threshold", "auto:50"]
    stored = cli(*options)
    (project / "metrics" / "answers.json").write_text("x")
    assert cli("-C", project, "doctor", "--repair").code == 0
    again = cli(*options)
    assert "the held-out examples are scored first" in again.err
    assert again.json == stored.json


def test_what_cannot_be(cli: Cli, learned_project: Path, strange: list[Path]) -> None:
    start = ["-C", learned_project, "predict", strange[0], "--device", "cpu", "--threshold"]
    check_error(cli(*start, "often"), 2, "--threshold often: expected a probability")
    check_error(cli(*start, "auto", "--inference", "latest"), 2, "answered as latest, nothing says how familiar")
    assert cli(*start, "0.99", "--inference", "latest").code == 0


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model", "llama")
    must("init", tmp_path / "p", "--backend", "causal-lm", "--model", model, "--rank", "2", "--device", "cpu")
    for name, word in (("fruit", "apple"), ("leaves", "leaf")):
        rows = [{"prompt": f"{word} {number}", "answer": "red" if number % 2 else "green"} for number in range(8)]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train = ["train-task", file, "--epochs", "0", "--device", "cpu", "--precision", "fp32", "--no-eval"]
        must("-C", tmp_path / "p", *train)
    return tmp_path / "p"


def test_texts_of_no_task_are_unknown_instead_of_answered_by_the_untouched_model(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["apple red", "leaf green"]
    monkeypatch.setattr(TaskRouter, "thresholds", staticmethod(lambda memory: -100 * torch.ones(len(memory.tasks))))
    own = Project.open(texts, device="cpu").predict(asked, threshold="auto")
    assert all(one.known and one.task is not None for one in own)
    monkeypatch.setattr(TaskRouter, "thresholds", staticmethod(lambda memory: 100 * torch.ones(len(memory.tasks))))
    project = Project.open(texts, device="cpu")
    assert [one.output for one in project.predict(asked, threshold="auto")] == ["unknown", "unknown"]
    assert all(one.task is None and one.known for one in project.predict(asked)), "the untouched model answers"
