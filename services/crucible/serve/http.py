"""Serving an ASGI app on a socket, as every process of the platform does it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_READY_POLL_S = 0.005
# How long requests under way may take once the server is told to stop; streams have been told to end before.
_GRACE_S = 5
# Longer than the usual 60 s of proxies, so that none of them sends a request into a connection that is just being closed.
_KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """uvicorn without signal handlers: whoever runs the process decides when to drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """One listening socket. `start` it with an app; `aclose` is harmless when it was never started."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._server: uvicorn.Server | None = None
        self._task: asyncio.Task[None] | None = None
        self.url = ""

    async def start(self, app: Callable[..., object]) -> None:
        """Listen, and return once requests are answered; `url` says where.

        Raises:
            OSError: the address cannot be had.
        """
        listener = socket.create_server(self._address, backlog=1024)
        # Accepted connections inherit it. asyncio sets it only on sockets that it made itself, and without it each answer
        # waits 40 ms for the peer's delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, port = listener.getsockname()[:2]
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(_READY_POLL_S)
        self.url = f"http://{host}:{port}"

    async def aclose(self) -> None:
        """Answer what is under way, and stop."""
        if self._server and self._task:
            self._server.should_exit = True
            await self._task
