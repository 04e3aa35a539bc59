"""A server of this process, and those who ask it."""

from __future__ import annotations

import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from treelora_cli import Project
from treelora_cli.serving.application import Service
from treelora_cli.serving.limits import Limits
from treelora_cli.serving.server import bound, hosts_of, server_for
from treelora_cli.serving.worker import Worker, prepared

SMALL = Limits(body=100_000, items=5, pixels=10_000, waiting=64, batch=8, seconds=1.0)
HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n"


def picture(width: int, height: int) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (width, height)).save(sink, "PNG")
    return sink.getvalue()


GOOD = picture(16, 16)


class Server:
    """A server of this process, and its clients."""

    def __init__(self, root: Path, limits: Limits = SMALL, threshold: str | None = None) -> None:
        self.notes: list[str] = []
        self.socket = bound("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        opened = Project.open(root, device="cpu")
        self.worker = Worker(opened, lambda at: prepared(at, None, threshold), limits, self.notes.append)
        hosts = hosts_of(self.socket, "127.0.0.1", [])
        self.server = server_for(Service(self.worker, limits, self.notes.append).application(hosts))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, status: int = 200
    ) -> dict[str, Any]:
        """Send one request; its answer is one line of JSON with the status expected."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        assert answer.status == status, text
        assert (answer.headers["content-type"], text.count("\n")) == ("application/json", 1), text
        found = json.loads(text)
        assert isinstance(found, dict)
        return found

    def image(self, data: bytes, status: int = 200) -> dict[str, Any]:
        return self.ask("POST", "/predict", data, {"Content-Type": "image/png"}, status)

    def json(self, document: Any, status: int = 200) -> dict[str, Any]:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return self.ask("POST", "/predict", body, {"Content-Type": "application/json"}, status)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.worker.stop()
        self.socket.close()


@contextmanager
def serving(root: Path, limits: Limits = SMALL, threshold: str | None = None) -> Iterator[Server]:
    server = Server(root, limits, threshold)
    try:
        yield server
    finally:
        server.stop()
