"""``treelora serve``: answer over HTTP with everything learned so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from treelora_cli.commands import options
from treelora_cli.commands.context import session_of
from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    from treelora_cli.api import Project
    from treelora_cli.learning.answering import Answerer


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine reach it only if told.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Also answer to this name in the Host header.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Inputs of several requests answered together.")] = 32,
    max_body: Annotated[float, typer.Option(min=0.001, max=1024, help="Largest body of a request, in MiB.")] = 16,
    max_items: Annotated[int, typer.Option(min=1, max=4096, help="Most inputs of a request.")] = 64,
    max_pixels: Annotated[float, typer.Option(min=0.001, max=1000, help="Largest image, in millions of pixels.")] = 50,
    max_queue: Annotated[int, typer.Option(min=1, max=100000, help="Most requests that wait.")] = 256,
    inference: options.Inference = None,
    threshold: options.Threshold = None,
    device: options.Device = None,
) -> None:
    """Answer over HTTP: POST /predict, GET /tasks, GET /healthz. A task that is committed meanwhile is taken in.

    Example: treelora serve --port 8000 & curl -F image=@photo.jpg http://127.0.0.1:8000/predict
    """
    from treelora_cli.serving.server import address_of, allow_many_connections, bound, check_installed, hosts_of

    check_installed()
    session = session_of(context)
    project = session.opened(device)
    if not project.tasks:
        raise UsageError("Nothing is learned yet. Run: treelora train-task DATA")
    listening = bound(host, port)
    with listening:
        from treelora_cli.serving.application import Service
        from treelora_cli.serving.limits import MIB, Limits
        from treelora_cli.serving.server import server_for
        from treelora_cli.serving.worker import Worker, counted, prepared

        body = int(max_body * MIB)
        limits = Limits(body, max(16 * body, Limits.bodies), max_items, int(max_pixels * 1e6), max_queue, batch)

        def prepare(at: Project) -> Answerer:
            return prepared(at, inference, threshold)

        allow_many_connections()
        worker = Worker(project, prepare, limits, session.output.note)
        hosts = hosts_of(listening, host, allow_host or [])
        server = server_for(Service(worker, limits, session.output.detail).application(hosts))
        url = address_of(listening, host)
        if hosts is None:
            session.output.note(f"Whoever reaches {url} may ask: there is no password.")
        session.output.line(url)
        session.output.note(f"Answering {counted(len(project.tasks), 'task')} of {project.root} at {url}. Ctrl-C ends.")
        try:
            server.run(sockets=[listening])
        finally:
            worker.stop()
        session.output.note(f"Ended after {counted(worker.answered, 'request')}.")
