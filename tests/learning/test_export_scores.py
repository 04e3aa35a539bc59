"""What an export scores stands beside what the project scores, and only like is compared with like."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error
from safetensors import SafetensorError

from treelora_cli.backend.values import ExportCheck
from treelora_cli.learning.export import ExportReport


def evaluated(cli: Cli, root: Path, *options: object) -> dict[str, object]:
    done = cli("-C", root, "--json", "eval", "--device", "cpu", *options)
    assert done.code == 0, done.err
    return done.json


def test_a_merged_export_shows_both_scores_and_its_card_too(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    routed, merged = (evaluated(cli, learned_project, "--inference", one)["tasks"] for one in ("routed", "merged"))
    done = cli("-C", learned_project, "--json", "export", tmp_path / "out", "--device", "cpu").json
    card = (tmp_path / "out/README.md").read_text()
    assert done["project_inference"] == "routed"
    assert set(done["scores"]) == {"warm", "cold", "grey"}
    for name, found in done["scores"].items():
        assert found["project"] == routed[name]["score"]  # type: ignore[index]
        assert found["here"] == found["reloaded"] == pytest.approx(merged[name]["score"])  # type: ignore[index]
        assert f"| {name} | {100 * found['project']:.1f} | {100 * found['reloaded']:.1f} |" in card
    gap = sum(one["project"] - one["reloaded"] for one in done["scores"].values()) / 3
    assert done["gap"] == pytest.approx(gap)
    assert (done["advice"] != "") == (gap > 0.05) == ("treelora export OUT --format routed" in card)
    shown = cli("-C", learned_project, "export", tmp_path / "again", "--device", "cpu").out
    assert "warm: project (routed) " in shown and ", this export " in shown
    assert "the base with the mean of the tasks' 3 adapters merged into its weights" in card


def test_an_adapters_card_says_what_it_answers(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    adapter = ["--format", "adapter", "--device", "cpu"]
    done = cli("-C", learned_project, "export", tmp_path / "a", *adapter, "--task", "cold")
    assert done.code == 0, done.err
    card = " ".join((tmp_path / "a/README.md").read_text().split())
    assert "3 classes, those of its own task alone: blue, cyan, green;" in card
    assert "num_classes=3" in card and "| cold |" in card
    cli("-C", learned_project, "export", tmp_path / "b", *adapter, "--no-verify")
    card = " ".join((tmp_path / "b/README.md").read_text().split())
    assert "7 classes, those of all tasks:" in card
    assert "Its scores were not measured when it was written." in card


def test_a_card_of_solved_blocks_does_not_speak_of_adapters(
    cli: Cli, init_options: list[str], data: Path, tmp_path: Path
) -> None:
    options = [one for one in init_options if one != "--recipe" and not one.endswith("quick.yaml")]
    assert cli("init", tmp_path / "p", *options).code == 0
    assert cli("-C", tmp_path / "p", "train-task", data / "warm", "--device", "cpu").code == 0
    assert cli("-C", tmp_path / "p", "export", tmp_path / "out", "--device", "cpu").code == 0
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert "blocks of its kind whose MLPs are solved, not trained" in card
    assert "mean of" not in card


def test_the_advice_names_what_keeps_the_score() -> None:
    def report(task: str | None, there: float) -> ExportReport:
        check = ExportCheck(0.0, 1.0, {"a": (there, there), "b": (there, there)})
        return ExportReport("merged", task, [], check, "", "routed", {"a": 0.9, "b": 0.8})

    assert report(None, 0.82).advice == ""
    assert report(None, 0.5).gap == pytest.approx(0.35)
    assert report(None, 0.5).advice.startswith("This model scores 35.0 points below the project ('routed'), which")
    assert report(None, 0.5).advice.endswith("treelora export OUT --format routed.")
    assert report("a", 0.5).advice.endswith("treelora export OUT --format routed.")
    assert report("a", 0.5).advice.startswith("This adapter alone scores 35.0 points below the project")
    assert ExportReport("merged", None, [], None, "", "routed", {}).gap is None


def test_only_like_is_compared_with_like(cli: Cli, learned_project: Path) -> None:
    whole = evaluated(cli, learned_project)
    assert isinstance(whole["forgetting"], float) and isinstance(whole["bwt"], float)
    for options in (["--inference", "latest"], ["--inference", "merged"], ["--limit", "2"]):
        found = evaluated(cli, learned_project, *options)
        assert isinstance(found["op"], float)
        assert (found["forgetting"], found["bwt"]) == (None, None)
    assert evaluated(cli, learned_project, "--limit", "1000")["forgetting"] == whole["forgetting"]
    assert evaluated(cli, learned_project, "--inference", "routed")["forgetting"] == whole["forgetting"]
    shown = cli("-C", learned_project, "eval", "--inference", "merged", "--device", "cpu")
    assert "forgetting -" in shown.out
    assert "'-': other examples, or answered in another way, than when it was learned." in shown.err + shown.out
    done = cli("-C", learned_project, "eval", "--limit", "2", "--max-forgetting", "100", "--device", "cpu")
    assert (done.code, "Forgetting - is above --max-forgetting" in done.err) == (7, True)


def test_a_language_models_card_says_how_each_task_is_asked(cli: Cli, tmp_path: Path) -> None:
    import json

    from tiny_lm import TEMPLATE, save_model

    model, root = save_model(tmp_path / "llama", "llama", TEMPLATE), tmp_path / "p"
    rows = {
        "moods": [{"sentence": f"Tom is {n}", "label": ("good", "bad")[n % 2]} for n in range(20)],
        "chats": [
            {"messages": [{"role": "user", "content": f"I am {n}"}, {"role": "assistant", "content": f"Hi {n}"}]}
            for n in range(20)
        ],
        "texts": [{"text": f"Once there was a {n}."} for n in range(20)],
    }
    assert cli("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu").code == 0
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        assert cli("-C", root, "train-task", tmp_path / f"{name}.jsonl", "--device", "cpu").code == 0
    assert cli("-C", root, "export", tmp_path / "out", "--device", "cpu").code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "      YOUR TEXT\n      Options: bad, good\n      Answer:\n" in card
    assert "Answers: bad, good." in card
    assert "      <|user|>YOUR TEXT<|end|><|assistant|>\n" in card
    assert "**texts**: free text that it goes on with" in card
    assert "| moods | " in card


# -- the card ---------------------------------------------------------------------------------------------


def hub_card(folder: Path) -> Any:
    """The card as huggingface_hub reads it."""
    from huggingface_hub import ModelCard

    return ModelCard.load(str(folder / "README.md"))


@pytest.mark.parametrize("kind", ["merged", "adapter", "routed"])
def test_the_hub_reads_the_scores_of_a_card(cli: Cli, learned_project: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "birds"
    done = cli("-C", learned_project, "--json", "export", out, "--format", kind, "--device", "cpu").json
    card = hub_card(out)
    assert card.data.model_name == "birds"
    found = {one.dataset_name: (one.task_type, one.metric_type, one.metric_value) for one in card.data.eval_results}
    assert found == {
        name: ("image-classification", "accuracy", round(100 * one["reloaded"], 2))
        for name, one in done["scores"].items()
    }
    assert card.data.to_dict()["pipeline_tag"] == "image-classification"
    assert {"treelora", "image-classification"} <= set(card.data.tags)
    assert card.data.library_name == ("peft" if kind == "adapter" else "timm")
    for heading in ("## Scores", "## Tasks and data", "## Method", "## Limits"):
        assert card.text.count(heading) == 1
    tasks = ["grey"] if kind == "adapter" else ["warm", "cold", "grey"]
    for name in tasks:
        record = json.loads(next(learned_project.glob(f"tasks/*-{name}/task.json")).read_text())
        assert f"| {name} | {record['train_examples']} | {record['test_examples']} | accuracy | `" in card.text
    assert "epochs 2, learning rate 0.01, batch size 8, rank 4" in card.text
    assert str(learned_project) not in card.text and "/data" not in card.text, "where data lay is nobody's business"


def test_a_card_without_measured_scores_claims_none(cli: Cli, learned_project: Path, tmp_path: Path) -> None:
    assert cli("-C", learned_project, "export", tmp_path / "out", "--no-verify", "--device", "cpu").code == 0
    card = hub_card(tmp_path / "out")
    assert card.data.eval_results is None
    assert "Its scores were not measured when it was written." in card.text and "## Limits" in card.text


def test_a_merged_model_of_one_task_is_no_mean(cli: Cli, empty_project: Path, data: Path, tmp_path: Path) -> None:
    assert cli("-C", empty_project, "train-task", data / "warm", "--device", "cpu", "--no-eval").code == 0
    assert cli("-C", empty_project, "export", tmp_path / "out", "--no-verify", "--device", "cpu").code == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "the base with its one task's adapter merged into its weights" in text and "mean of" not in text


def test_a_language_models_card_names_its_metric(cli: Cli, tmp_path: Path) -> None:
    from tiny_lm import TEMPLATE, save_model

    model, root = save_model(tmp_path / "llama", "llama", TEMPLATE), tmp_path / "p"
    assert cli("init", root, "--backend", "causal-lm", "--model", model, "--epochs", "1", "--device", "cpu").code == 0
    rows = [{"prompt": f"Sum up {n}", "answer": f"it is {n}"} for n in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    learn = ["train-task", tmp_path / "sums.jsonl", "--metric", "rouge_l", "--device", "cpu", "--no-eval"]
    assert cli("-C", root, *learn).code == 0
    assert cli("-C", root, "export", tmp_path / "out", "--device", "cpu").code == 0
    card = hub_card(tmp_path / "out")
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type, result.dataset_name) == ("text-generation", "rouge_l", "sums")
    assert card.data.base_model == "llama" and card.data.library_name == "transformers"
    assert "the base with the adapter of task sums merged into its weights" in card.text
    assert "## How each task is asked" in card.text


def test_a_disk_that_fills_in_an_export_is_no_surprise(
    cli: Cli, learned_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = cli("-C", learned_project, "export", tmp_path / "out")
    check_error(done, 6, r"Disk full; nothing was committed\. Free space and retry\.")
    assert not (tmp_path / "out").exists()
