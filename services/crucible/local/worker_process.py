"""The broker's workers of the `local` profile: a `crucible serve worker` per broker as our child, started again whenever it dies.

Children because Celery allows one broker per process, and because its threads must not take turns with the API's event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

from pydantic import SecretStr

from crucible import logs
from crucible.local.process_tree import die_with_parent
from crucible.settings import env_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

    from crucible.settings import Settings

log = logs.get_logger("platform")

_PAUSE_FIRST_S = 0.5
_PAUSE_MOST_S = 10.0
# Beyond its own time to drain: to give the rest back, and to leave.
_LEAVE_S = 15.0


def worker_environment(
    settings: Settings, broker_url: str, token: str, storage: str, dispatcher: str
) -> dict[str, str]:
    """Return what makes a worker process of ours do as the settings say, whatever else the environment holds."""
    # Its health is ours to watch, and no one else's.
    own = {("worker", "host"): "127.0.0.1", ("worker", "port"): "0"}
    whole = {"broker_url": broker_url, "internal_token": token, "storage_url": storage, "dispatcher_url": dispatcher}
    return {
        **{env_name(name): value for name, value in whole.items()},
        **_section("worker", settings.worker),
        **_section("broker", settings.broker),
        **_section("log", settings.log),
        **_section("tracing", settings.tracing),
        **{env_name(*place): value for place, value in own.items()},
    }


def _section(name: str, section: BaseModel) -> dict[str, str]:
    return {env_name(name, field): _written(value) for field, value in section}


def _written(value: object) -> str:
    # An empty variable is an unset one.
    if value is None:
        return ""
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


class WorkerProcess:
    """One worker process, kept alive until it is drained.

    Args:
        environment: what it must find beside our own environment.
        drain_seconds: how long it may take to drain.
    """

    def __init__(self, environment: Mapping[str, str], drain_seconds: float) -> None:
        self._environment = {**os.environ, **environment}
        self._patience = drain_seconds + _LEAVE_S
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process else None

    def problem(self) -> str | None:
        """Return why nothing is consumed, or None as far as can be seen from outside."""
        return None if self._process else "the worker process does not run; it is being started again"

    async def start(self) -> None:
        """Start it, and start it again whenever it dies."""
        process = await self._launch()
        self._keeper = asyncio.create_task(self._keep(process), name="worker-process")

    async def drain(self) -> None:
        """Have it finish what it can and give the rest back, and wait until it is gone. Harmless when repeated."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._patience):
                await process.wait()
        except TimeoutError:
            log.warning("a worker process did not stop in time", pid=process.pid)
            process.kill()
            await process.wait()

    async def _launch(self) -> asyncio.subprocess.Process:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "crucible.cli.main",
            "serve",
            "worker",
            # Says nothing to people, who hear of it from us.
            "--json",
            stdin=asyncio.subprocess.DEVNULL,
            # What it announces is for people who start one themselves; its log goes where ours goes.
            stdout=asyncio.subprocess.DEVNULL,
            env=self._environment,
            # A Ctrl-C in our terminal is for us: we drain it in our order.
            start_new_session=True,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        return self._process

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        pause = _PAUSE_FIRST_S
        while True:
            started = asyncio.get_running_loop().time()
            code = await process.wait()
            self._process = None
            if asyncio.get_running_loop().time() - started > _PAUSE_MOST_S:
                pause = _PAUSE_FIRST_S
            log.warning("a worker process ended; starting another", exit_code=code, pause_seconds=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _PAUSE_MOST_S)
            process = await self._launch()
