"""``treelora doctor`` names every damaged file and what is still whole."""

import shutil
from pathlib import Path


def test_a_whole_project(cli, learned_project: Path):
    done = cli("-C", learned_project, "doctor", "--json")
    assert done.code == 0, done.err
    assert done.json["damaged"] == {}
    assert done.json["machine"]["lock"] == "free"
    assert len(done.json["tasks_whole"]) == 3


def test_damage_is_listed_and_the_rest_named_whole(cli, learned_project: Path, tmp_path: Path):
    root = tmp_path / "copy"
    shutil.copytree(learned_project, root)
    first, second = sorted((root / "tasks").iterdir())[:2]
    (first / "task.json").unlink()
    adapter = second / "adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-1] ^= 1
    adapter.write_bytes(data)
    done = cli("-C", root, "doctor", "--json")
    assert done.code == 3
    assert "2 of" in done.err
    assert done.json["damaged"] == {
        f"tasks/{first.name}/task.json": "missing",
        f"tasks/{second.name}/adapter_model.safetensors": "hash mismatch",
    }
    assert done.json["tasks_whole"] == [sorted((root / "tasks").iterdir())[2].name[4:]]


def test_outside_a_project_it_speaks_of_the_machine(cli, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("doctor", "--json")
    assert done.code == 0
    assert done.json["project"] is None
    assert "torch" in done.json["machine"]
