"""The HTTP side: three paths, one line of JSON for every answer, also for a refusal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Future
from contextlib import asynccontextmanager
from time import perf_counter
from typing import Any

from anyio import fail_after
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from treelora_cli.learning.answering import shown
from treelora_cli.serving.limits import Limits, Refusal
from treelora_cli.serving.reading import inputs_of, kind_of
from treelora_cli.serving.worker import Answered, Worker
from treelora_cli.views.predictions import Shape

_MOST_NAMED = 10


class Service:
    """Answers requests with a worker.

    Args:
        worker: Owns the model.
        limits: What is taken.
        log: Shows a line for each request to those who ask for details.
    """

    def __init__(self, worker: Worker, limits: Limits, log: Callable[[str], None]) -> None:
        self.worker = worker
        self.limits = limits
        self.log = log
        self._held = 0  # bytes of all bodies in memory

    def application(self, hosts: Collection[str] | None) -> ASGIApp:
        """Return the application; ``hosts`` are the names it answers to, all when ``None``."""
        routes = [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/healthz", self.health),
            Route("/tasks", self.tasks),
        ]
        handlers: dict[Any, Any] = {Refusal: _refused, HTTPException: _not_found, Exception: _failed}
        return _Guard(Starlette(routes=routes, exception_handlers=handlers), hosts)

    # -- paths ----------------------------------------------------------------------------------------

    async def predict(self, request: Request) -> Response:
        """Answer the inputs of one request."""
        started = perf_counter()
        images = self.worker.serving.project.takes_images
        kind = kind_of(request.headers, images=images)
        top = _top(request)
        self.worker.check_room()
        async with self._body(request) as body:
            inputs = await inputs_of(kind, request.headers, body, self.limits, images=images)
            done = await _answered(request, self.worker.submit(inputs))
        project, answerer = done.serving.project, done.serving.answerer
        assert answerer is not None
        shape = Shape(top, known=answerer.threshold is not None)
        records = [shape.record(shown(one), answer) for one, answer in zip(inputs, done.predictions, strict=True)]
        self.log(f"POST /predict: {len(inputs)} in {1000 * (perf_counter() - started):.0f} ms")
        return _line({"commit": project.digest[:12], "inference": answerer.inference, "predictions": records})

    async def health(self, _request: Request) -> Response:
        """Say whether answers can be had, and from which commit."""
        serving, problem = self.worker.serving, self.worker.problem
        able = serving.answerer is not None
        found = {
            "status": "ok" if able and problem is None else "stale" if able else "nothing learned",
            "commit": serving.project.digest[:12],
            "tasks": len(serving.project.tasks),
            "waiting": self.worker.waiting,
            "answered": self.worker.answered,
            **({} if problem is None else {"problem": problem}),
        }
        return _line(found, 200 if able else 503)

    async def tasks(self, _request: Request) -> Response:
        """List what was learned: each task's labels and its score when all were last scored."""
        serving = self.worker.serving
        learned = () if serving.answerer is None else serving.answerer.memory.tasks
        found = [
            {"name": one.name, "labels": list(one.labels), "metric": one.metric, "score": score}
            for one, score in zip(learned, serving.scores, strict=True)
        ]
        return _line({"commit": serving.project.digest[:12], "tasks": found})

    # -- bodies ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, never more of it than is allowed; its room is free again when the request is done."""
        parts, held = bytearray(), 0
        claimed = request.headers.get("content-length", "")
        try:
            if claimed.isdecimal() and (len(claimed) > 18 or int(claimed) > self.limits.body):
                raise self._too_large()
            with fail_after(self.limits.seconds):
                async for part in request.stream():
                    held += len(part)
                    self._held += len(part)
                    if held > self.limits.body:
                        raise self._too_large()
                    if self._held > self.limits.bodies:
                        raise Refusal(429, "Too many large requests at once. Try again later.")
                    parts += part
            yield bytes(parts)
        except TimeoutError as error:
            raise Refusal(408, f"The body did not arrive within {self.limits.seconds:g} seconds.") from error
        finally:
            self._held -= held

    def _too_large(self) -> Refusal:
        return Refusal(413, f"The body is larger than {self.limits.body:,} bytes. Send less at once.")


async def _answered(request: Request, future: Future[Answered]) -> Answered:
    """Wait for answers; where the client goes away first, its place in the queue is given up.

    Raises:
        ClientDisconnect: It did.
    """
    answer = asyncio.wrap_future(future)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        both: set[asyncio.Future[Any]] = {answer, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _top(request: Request) -> int:
    given = request.query_params.get("top", "1")
    if not (given.isascii() and given.isdecimal() and len(given) < 4 and 1 <= int(given) <= _MOST_NAMED):
        raise Refusal(422, f"?top= is a number from 1 to {_MOST_NAMED}.")
    return int(given)


# -- answers -----------------------------------------------------------------------------------------


def _line(found: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(found) + "\n"  # ASCII: names from requests may be no text
    return Response(text, status, headers, media_type="application/json")


def _refusal(status: int, message: str) -> Response:
    # the rest of a refused body is not read, so the connection cannot be used again
    headers = {"Connection": "close", **({"Retry-After": "1"} if status in (429, 503) else {})}
    return _line({"error": message, "status": status}, status, headers)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refusal(error.status, str(error))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = "There are POST /predict, GET /healthz and GET /tasks."
    response = _refusal(error.status_code, f"{request.method} here: {error.detail}. {told}")
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _failed(_request: Request, error: Exception) -> Response:
    return _refusal(500, f"Unexpected {type(error).__name__}.")


class _Guard:
    """Refuses what a page in somebody's browser may send: another Host (DNS rebinding), or an Origin of its own."""

    def __init__(self, application: ASGIApp, hosts: Collection[str] | None) -> None:
        self._application = application
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
            problem = self._problem(headers.get(b"host"), headers.get(b"origin"))
            if problem:
                await _refusal(403, problem)(scope, receive, send)
                return
        try:
            await self._application(scope, receive, send)
        except ClientDisconnect:
            return

    def _problem(self, host: str | None, origin: str | None) -> str | None:
        if host is not None and self._hosts is not None and _name_of(host) not in self._hosts:
            return "This Host is not served here. Ask by the address, or start with --allow-host NAME."
        if origin is not None and origin.partition("://")[2] != host:
            return "Requests of other web pages are not answered."
        return None


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
