"""Running something in the foreground until it is told to stop: drain at the first signal, leave at once at the second."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import typer

from crucible.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from crucible.cli.session import Session


class Drainable(Protocol):
    """What can be stopped in good order."""

    async def drain(self) -> None:
        """Take nothing new, and finish what is under way."""

    async def aclose(self) -> None:
        """Stop every part."""


async def run(
    session: Session,
    process: Drainable,
    *,
    start: Coroutine[None, None, None],
    started: Callable[[], None],
    ended: Callable[[], Coroutine[None, None, None]] | None = None,
    at_once: str,
) -> None:
    """Start a process, and see it through to its end.

    Args:
        session: where to tell people what goes on.
        process: what is drained and closed.
        start: starts it.
        started: called once it has started.
        ended: returns if it ends by itself.
        at_once: said at a second signal.

    Raises:
        typer.Exit: it was stopped while it started, or ended by itself.
    """
    stop = asyncio.Event()
    _on_signals(session, stop, at_once)
    starting = asyncio.create_task(start)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await starting
        raise typer.Exit(ExitCode.INTERRUPTED)
    await starting
    try:
        started()
        ending = asyncio.create_task(ended()) if ended else stopping
        await asyncio.wait({stopping, ending}, return_when=asyncio.FIRST_COMPLETED)
        failed = not stop.is_set()
        session.note("draining: nothing new is taken, what runs may finish; Ctrl-C again stops at once")
        await process.drain()
    finally:
        await process.aclose()
    if failed:
        raise typer.Exit(ExitCode.INTERNAL)
    session.note("stopped")


def _on_signals(session: Session, stop: asyncio.Event, at_once: str) -> None:
    def stopped() -> None:
        if stop.is_set():
            session.note(at_once)
            sys.stdout.flush()
            os._exit(ExitCode.INTERRUPTED)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped)
