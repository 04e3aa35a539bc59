"""What the server answers and what it refuses, over a socket on loopback."""

from __future__ import annotations

import base64
import http.client
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, must
from serving_client import GOOD, HEAD, Server, picture, serving
from tiny_lm import save_model

from treelora_cli.project import Project as Stored
from treelora_cli.serving.server import bound, hosts_of


def form(parts: list[tuple[str, bytes]], *, field: str = "image") -> tuple[bytes, dict[str, str]]:
    body = b"".join(
        f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    )
    return body + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether an answer is that of ``predict``; the sum of a batch may be rounded otherwise."""
    keys = ("output", "task")
    close = abs(mine["confidence"] - theirs["confidence"]) < 1e-5
    return close and [mine[key] for key in keys] == [theirs[key] for key in keys]


# -- answers -----------------------------------------------------------------------------------------


def test_answers_are_those_of_predict_in_every_form(
    served: Server, cli: Cli, learned_project: Path, images: list[Path]
) -> None:
    told = cli("--json", "-C", learned_project, "predict", *images, "--top", "3", "--device", "cpu").json["predictions"]
    for start in range(0, len(images), 5):
        some = images[start : start + 5]
        body, headers = form([(path.name, path.read_bytes()) for path in some])
        as_form = served.ask("POST", "/predict?top=3", body, headers)["predictions"]
        texts = [base64.b64encode(path.read_bytes()).decode() for path in some]
        as_json = served.json({"images": [texts[0], *(f"data:image/png;base64,{one}" for one in texts[1:])]})
        for path, mine, other, right in zip(some, as_form, as_json["predictions"], told[start:], strict=False):
            assert (
                same(mine, right)
                and same(other, right)
                and same(served.image(path.read_bytes())["predictions"][0], right)
            )
            assert mine["input"] == path.name
            assert [one["output"] for one in mine["others"]] == [one["output"] for one in right["others"]]


def test_many_at_once_are_answered_together_and_each_with_its_own(
    served: Server, images: list[Path], cli: Cli, learned_project: Path
) -> None:
    told = cli("--json", "-C", learned_project, "predict", *images, "--device", "cpu").json["predictions"]
    right = dict(zip(images, told, strict=True))
    asked = random.Random(0).choices(images, k=100)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda path: served.image(path.read_bytes())["predictions"], asked))
    assert all(same(mine, right[path]) for path, (mine,) in zip(asked, found, strict=True))


def test_health_and_tasks(served: Server, learned_project: Path) -> None:
    project = Stored.open(learned_project)
    health = served.ask("GET", "/healthz")
    assert (health["status"], health["tasks"], health["commit"]) == ("ok", 3, project.state.digest()[:12])
    tasks = served.ask("GET", "/tasks")["tasks"]
    assert [one["name"] for one in tasks] == ["warm", "cold", "grey"]
    assert [tuple(one["labels"]) for one in tasks] == [project.labels(one["name"]) for one in tasks]
    assert [one["score"] for one in tasks] == list(project.matrix().rows[-1])


# -- what is refused ---------------------------------------------------------------------------------


def test_a_body_that_is_too_large_is_refused_without_being_read(served: Server) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(HEAD.format(2**30).encode())  # and not one byte of the gigabyte
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 413")
    assert "The body is larger than 100,000 bytes. Send less at once." in answer


def test_a_body_of_unknown_length_is_read_up_to_the_limit(served: Server) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield b"0" * 10_000

    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    with pytest.raises(OSError):  # noqa: PT011 - the server hangs up, in one way or another
        connection.request("POST", "/predict", endless(), {"Content-Type": "image/png"}, encode_chunked=True)
    connection.close()
    assert sent < 50_000_000
    assert served.ask("GET", "/healthz")["status"] == "ok"


def test_a_body_that_does_not_come(served: Server) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(HEAD.format(9).encode() + b"x")
        answer = client.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 408") and "did not arrive within 1 seconds" in answer


DEEP = b'{"images": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"


@pytest.mark.parametrize(
    ("content", "status", "line"),
    [
        (GOOD[:-30], 422, "image: unreadable or truncated image"),
        (b"", 422, "it is empty"),
        (b"GIF89a", 422, "image: unreadable or truncated image"),
        (b"/etc/passwd", 422, "no known format"),
        (picture(200, 100), 413, "image: more than 10,000 pixels. Send it smaller."),
        (picture(20_000, 1), 413, "more than 10,000 pixels"),
    ],
)
def test_bad_images(served: Server, content: bytes, status: int, line: str) -> None:
    found = served.image(content, status)
    assert line in found["error"] and found["status"] == status
    assert "--skip-bad" not in found["error"], "an option of train-task"


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (b"{", 422, "Invalid JSON"),
        (b"\xff\xfe\xfa", 422, "not UTF-8"),
        (DEEP, 422, "JSON nested too deeply."),
        (b"[]", 422, "Expected a JSON object."),
        (b"{}", 422, "'images' alone; it is missing"),
        (b'{"inputs": ["photo.png"]}', 422, "'images' alone; got inputs"),
        (b'{"images": []}', 422, "a list of one or more"),
        (b'{"images": "x"}', 422, "a list of one or more"),
        (b'{"images": [3]}', 422, "image 1: expected base64 text."),
        (b'{"images": ["/etc/passwd"]}', 422, "image 1: "),
        (b'{"images": ["\\ud800"]}', 422, "image 1: not base64"),
        (json.dumps({"images": ["aaaa"] * 6}).encode(), 413, "More than 5 inputs in one request."),
    ],
)
def test_bad_json(served: Server, body: bytes, status: int, line: str) -> None:
    assert line in served.json(body, status)["error"]


def test_bad_forms(served: Server) -> None:
    body, headers = form([(f"{number}.png", GOOD) for number in range(6)])
    assert "More than 5 inputs" in served.ask("POST", "/predict", body, headers, 413)["error"]
    body, headers = form([])
    assert "holds no file" in served.ask("POST", "/predict", body, headers, 422)["error"]
    field = b'--x\r\nContent-Disposition: form-data; name="path"\r\n\r\n/etc/passwd\r\n--x--\r\n'
    assert "Field path is no file." in served.ask("POST", "/predict", field, headers, 422)["error"]
    assert "cannot be read" in served.ask("POST", "/predict", b"--y", headers, 422)["error"]
    assert (
        "cannot be read" in served.ask("POST", "/predict", GOOD, {"Content-Type": "multipart/form-data"}, 422)["error"]
    )
    body, headers = form([("../../etc/\udcff\n.png".encode(errors="surrogateescape").decode("latin-1"), GOOD)])
    assert served.ask("POST", "/predict", body, headers)["predictions"][0]["input"].isascii()


def test_other_content_types_paths_and_methods(served: Server) -> None:
    for kind in ("text/plain", "", "application/x-www-form-urlencoded"):
        found = served.ask("POST", "/predict", GOOD, {"Content-Type": kind}, 415)
        assert "this project takes multipart/form-data (files), image/*" in found["error"]
    packed = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
    assert "without Content-Encoding" in served.ask("POST", "/predict", GOOD, packed, 415)["error"]
    assert "There are POST /predict" in served.ask("GET", "/", status=404)["error"]
    assert "Method Not Allowed" in served.ask("GET", "/predict", status=405)["error"]
    for top in ("0", "11", "x", "%D9%A1", "9" * 5000):
        assert "1 to 10" in served.ask("POST", f"/predict?top={top}", GOOD, {"Content-Type": "image/png"}, 422)["error"]


def test_pages_of_other_sites_are_not_answered(served: Server) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "[::2]"):
        assert "Host" in served.ask("GET", "/tasks", headers={"Host": host}, status=403)["error"]
    for host in ("localhost", f"LOCALHOST:{served.port}", "127.0.0.1", "[::1]:1"):
        assert served.ask("GET", "/healthz", headers={"Host": host})["status"] == "ok"
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        assert "web pages" in served.ask("GET", "/tasks", headers={"Origin": origin}, status=403)["error"]
    own = f"127.0.0.1:{served.port}"
    assert served.ask("GET", "/healthz", headers={"Host": own, "Origin": f"http://{own}"})["status"] == "ok"


def test_hosts_are_checked_on_loopback_and_where_names_are_given() -> None:
    with bound("127.0.0.1", 0) as here, bound("0.0.0.0", 0) as everywhere:
        assert hosts_of(here, "127.0.0.1", []) == {"localhost", "127.0.0.1", "[::1]"}
        assert hosts_of(everywhere, "0.0.0.0", []) is None
        assert "birds.example" in (hosts_of(everywhere, "0.0.0.0", ["birds.example"]) or set())


# -- texts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm")
    model = save_model(root / "model", "llama")
    rows = [
        {"prompt": f"What colour is the {one}?", "answer": colour}
        for one, colour in (("apple", "red"), ("leaf", "green"))
    ]
    (root / "colours.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows * 4))
    must("init", root / "p", "--backend", "causal-lm", "--model", model, "--rank", "2", "--device", "cpu")
    train = ["train-task", root / "colours.jsonl", "--epochs", "1", "--device", "cpu", "--precision", "fp32"]
    must("-C", root / "p", *train)
    return root / "p"


def test_prompts_and_chats(texts: Path, cli: Cli, tmp_path: Path) -> None:
    asked = ["What colour is the apple?", "What colour is the leaf?"]
    told = cli("--json", "-C", texts, "predict", *asked, "--device", "cpu").json["predictions"]
    with serving(texts) as server:
        found = server.json({"inputs": asked})["predictions"]
        assert [(one["input"], one["output"], one["task"]) for one in found] == [
            (one["input"], one["output"], one["task"]) for one in told
        ]
        chat = [{"role": "user", "content": asked[0]}]
        assert server.json({"inputs": [chat]})["predictions"][0]["input"] == asked[0]
        for body, line in (
            (b'{"inputs": ["\\ud83d"]}', "input 1: half of a surrogate pair"),
            (b'{"inputs": [[{"role": "user", "content": "\\udc00"}]]}', "input 1: half of a surrogate pair"),
            (b'{"inputs": ["x", " "]}', "input 2 is empty."),
            (b'{"inputs": [7]}', "input 1: expected a text"),
            (b'{"inputs": [[{"role": "boss", "content": "x"}]]}', "role 'boss'"),
            (b'{"inputs": [[]]}', "expected a list of messages"),
            (json.dumps({"inputs": ["red " * 2000]}).encode(), "the model's context"),
            (b'{"images": ["aaaa"]}', "'inputs' alone; got images"),
        ):
            assert line in server.json(body, 422)["error"]
        assert "this project takes application/json" in server.image(GOOD, 415)["error"]
        path = tmp_path / "secret.txt"
        path.write_text("a secret")
        assert server.json({"inputs": [str(path)]})["predictions"][0]["input"] == str(path), "a text, not a file"
