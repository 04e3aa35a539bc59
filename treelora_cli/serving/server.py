"""A socket, and uvicorn on it, until a signal comes."""

from __future__ import annotations

import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING

from treelora_cli.errors import UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names of a server that only this machine reaches."""
_BACKLOG = 2048
_PATIENCE = 10
"""Seconds that open requests get to be answered once the server is to end."""


def check_installed() -> None:
    """Raise ``UsageError`` where the packages of the extra ``serve`` are missing."""
    try:
        for name in ("uvicorn", "starlette.applications", "python_multipart"):
            import_module(name)
    except ImportError as error:
        raise UsageError(f"serve needs {error.name}. Run: pip install 'treelora[serve]'") from error


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address; who connects before the server answers has to wait.

    Raises:
        UsageError: It is in use, not allowed, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such address.") from error
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        told = error.strerror or str(error)
        raise UsageError(f"{host} port {port}: {told}. Choose another with --port N; 0 takes a free one.") from error
    return found


def address_of(bound_to: socket.socket, host: str) -> str:
    """Return the URL under which the socket answers."""
    return f"http://{_in_url(host)}:{bound_to.getsockname()[1]}"


def hosts_of(bound_to: socket.socket, host: str, more: list[str]) -> set[str] | None:
    """Return the names that a server answers to; ``None`` for all where others reach it and no name was given."""
    loopback = ipaddress.ip_address(bound_to.getsockname()[0]).is_loopback
    if not (loopback or more):
        return None
    return {*LOOPBACK, _in_url(host), *more}


def _in_url(host: str) -> str:
    """Return a host as URLs and Host headers have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def server_for(application: ASGIApp) -> uvicorn.Server:
    """Return the server; it writes nothing by itself."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """End by SIGINT and SIGTERM, and do not raise them again: ending is what was asked for."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def _end(self, _number: int, _frame: FrameType | None) -> None:
            self.force_exit = self.should_exit  # a second signal waits for nobody
            self.should_exit = True

    config = uvicorn.Config(
        application,
        http="h11",
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_PATIENCE,
    )
    return Server(config)


def allow_many_connections() -> None:
    """Let this process have as many open files as the system allows: each connection is one."""
    try:
        import resource
    except ImportError:
        return  # not a system with such limits
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))
