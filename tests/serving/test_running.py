"""The server in a crowd, while its project changes, and as a process."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, check_error, child_environment, make_images, must
from serving_client import GOOD, HEAD, SMALL, Server, serving

from treelora_cli.project import Project as Stored
from treelora_cli.serving.server import bound, check_installed

# -- crowds ------------------------------------------------------------------------------------------


def test_one_bad_image_in_a_batch_harms_no_other_request(served: Server, images: list[Path]) -> None:
    good = images[0].read_bytes()
    bad = [number % 3 == 0 for number in range(30)]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda one: served.image(GOOD[:-30] if one else good, 422 if one else 200), bad))
    assert [("error" in one) for one in found] == bad


def test_a_full_queue_is_said(project: Path) -> None:
    with serving(project, replace(SMALL, waiting=1)) as server:
        release, started = threading.Event(), threading.Event()
        answer = server.worker._asked

        def slow(inputs: Any) -> Any:
            started.set()
            release.wait(30)
            return answer(inputs)

        server.worker._asked = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(server.image, GOOD)
            assert started.wait(30)
            second = pool.submit(server.image, GOOD)
            while not server.worker.waiting:
                time.sleep(0.01)
            assert server.image(GOOD, 429)["error"] == "1 requests wait already. Try again later."
            release.set()
            assert first.result()["predictions"] and second.result()["predictions"]


def test_clients_that_go_away_cost_nothing(project: Path) -> None:
    with serving(project) as server:
        release, started = threading.Event(), threading.Event()
        seen: list[int] = []
        answer = server.worker._asked

        def slow(inputs: Any) -> Any:
            started.set()
            release.wait(30)
            seen.append(len(inputs))
            return answer(inputs)

        server.worker._asked = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.image, GOOD)
            assert started.wait(30)
            head = HEAD.format(len(GOOD))
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as client:
                    client.sendall(head.encode() + GOOD)
            deadline = time.monotonic() + 30
            while any(not job.future.cancelled() for job in list(server.worker._waiting)) or server.worker.waiting < 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            release.set()
            assert first.result()["predictions"]
        assert server.image(GOOD)["predictions"]
        assert seen == [1, 1], "the five were not computed"


def test_a_thousand_connections(served: Server) -> None:
    from treelora_cli.serving.server import allow_many_connections

    allow_many_connections()
    clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(1000)]
    try:
        assert served.image(GOOD)["predictions"], "idle ones are in nobody's way"
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answers = [client.makefile("rb").read() for client in clients]
    finally:
        for client in clients:
            client.close()
    assert all(b'"status": "ok"' in answer for answer in answers)


# -- the project changes -----------------------------------------------------------------------------


def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_commits_and_rollbacks_are_taken_in_without_dropping_a_request(project: Path, tmp_path: Path) -> None:
    must("-C", project, "rollback", "grey")
    more = make_images(tmp_path / "more", ("pink", "brown"))
    with serving(project) as server:
        stop, found = threading.Event(), []

        def client() -> None:
            while not stop.is_set():
                found.append(server.image(GOOD)["commit"])

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client) for _ in range(4)]
            must("-C", project, "train-task", more, "--device", "cpu", "--precision", "fp32")
            until(lambda: server.ask("GET", "/healthz")["tasks"] == 3)
            must("-C", project, "rollback", "more")
            until(lambda: server.ask("GET", "/healthz")["tasks"] == 2)
            stop.set()
            for one in clients:
                one.result()  # no request failed
        assert len(set(found)) == 2, "answers of both commits"
        with Stored.open(project).lock("test"):
            assert server.image(GOOD)["predictions"], "a writer is in no reader's way"


def test_a_damaged_commit_is_said_and_the_one_before_goes_on(project: Path, tmp_path: Path) -> None:
    with serving(project) as server:
        before = server.ask("GET", "/healthz")["commit"]
        whole = (project / "state.json").read_bytes()
        (project / "state.json").write_bytes(whole[:-20])
        until(lambda: server.ask("GET", "/healthz")["status"] == "stale")
        health = server.ask("GET", "/healthz")
        assert health["commit"] == before and "state.json" in health["problem"]
        assert server.image(GOOD)["commit"] == before
        (project / "state.json").unlink()
        assert server.image(GOOD)["commit"] == before
        (project / "state.json").write_bytes(whole)
        until(lambda: server.ask("GET", "/healthz")["status"] == "ok")
        must("-C", project, "rollback", "cold", "--yes")
        until(lambda: server.ask("GET", "/healthz")["tasks"] == 1)
        adapter = project / "tasks" / "001-warm" / "head.safetensors"
        content = adapter.read_bytes()
        must("-C", project, "rollback", "--undo")
        adapter.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        until(lambda: server.ask("GET", "/healthz")["status"] == "stale")
        assert "head.safetensors: hash mismatch" in server.ask("GET", "/healthz")["problem"]
        assert server.image(GOOD)["predictions"][0]["task"] == "warm"


def test_a_project_that_forgets_everything(project: Path) -> None:
    with serving(project) as server:
        must("-C", project, "rollback", "warm", "--yes")
        until(lambda: server.ask("GET", "/tasks")["tasks"] == [])
        assert server.ask("GET", "/healthz", status=503)["status"] == "nothing learned"
        assert "Nothing is learned yet" in server.image(GOOD, 503)["error"]
        must("-C", project, "rollback", "--undo")
        until(lambda: len(server.ask("GET", "/tasks")["tasks"]) == 3)
        assert server.image(GOOD)["predictions"]


# -- the command -------------------------------------------------------------------------------------


def test_what_the_command_refuses(cli: Cli, learned_project: Path, empty_project: Path, monkeypatch: Any) -> None:
    with bound("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = cli("-C", learned_project, "serve", "--port", port, "--device", "cpu")
    check_error(done, 2, rf"127\.0\.0\.1 port {port}: Address already in use\. Choose another with --port N")
    check_error(cli("-C", learned_project, "serve", "--host", "no.such.host.invalid"), 2, "--host .*: no such address")
    check_error(cli("-C", empty_project, "serve", "--port", "0"), 2, "Nothing is learned yet. Run: treelora train-task")
    check_error(cli("-C", learned_project, "serve", "--port", "70000"), 2, "Invalid value for '--port'")
    check_error(cli("-C", learned_project, "serve", "--port", "0", "--inference", "best"), 2, "inference")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = cli("-C", learned_project, "serve")
    check_error(done, 2, r"serve needs uvicorn\. Run: pip install 'treelora\[serve\]'")


def test_the_packages_are_there() -> None:
    check_installed()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_with_0(learned_project: Path, number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-m",
        "treelora_cli",
        "-C",
        str(learned_project),
        "serve",
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    ) as one:
        assert one.stdout is not None and one.stderr is not None
        address = one.stdout.readline().strip().removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", "/predict", GOOD, {"Content-Type": "image/png"})
        assert connection.getresponse().status == 200
        one.send_signal(number)
        assert one.wait(60) == 0
        assert one.stderr.read().splitlines()[-1] == "Ended after 1 request."
