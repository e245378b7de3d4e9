"""The platform as people run it: `crucible up` in a process of its own, which a test may kill at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import psutil

from tests.support.preloaded import PreloadedProcess, start_crucible
from tests.support.waits import wait_until_async

if TYPE_CHECKING:
    from pathlib import Path

_START_SECONDS = 60


class PlatformProcess:
    """One data folder, and the `crucible up` that serves it now."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.data_dir = folder / "data"
        self._log = folder / "up.log"
        self._environment = os.environ | {
            "CRUCIBLE_API__PORT": "0",
            "CRUCIBLE_WORKER__SLOTS": "4",
            "CRUCIBLE_LOG__LEVEL": "warning",
            **environment,
        }
        self._process: PreloadedProcess | None = None
        self.url = ""
        self.api_key = ""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def up(self) -> None:
        """Start the platform and wait until it serves."""
        server_file = self.data_dir / "server.json"
        server_file.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = start_crucible(
                "up", "--data-dir", str(self.data_dir), environment=self._environment, stdout=log, stderr=log
            )

        def ready() -> bool:
            assert self.alive(), f"the platform ended while starting:\n{self.log[-4000:]}"
            return server_file.exists()

        await wait_until_async(ready, timeout=_START_SECONDS, describe="crucible up to serve")
        server = json.loads(server_file.read_text())
        self.url, self.api_key = server["url"], server["api_key"]

    def tree(self) -> list[psutil.Process]:
        """Return every process of the platform, itself first."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def reap(self) -> None:
        """Wait for the platform's own process to be gone."""
        assert self._process is not None
        await asyncio.to_thread(self._process.wait, 30)

    async def stop(self) -> int:
        """Stop as Ctrl-C does; returns the exit code."""
        assert self._process is not None
        if self.alive():
            self._process.send_signal(signal.SIGINT)
        return await asyncio.to_thread(self._process.wait, 60)

    def kill(self) -> None:
        """End whatever still runs, at the end of a test."""
        for process in reversed(self.tree()):
            with contextlib.suppress(psutil.Error):
                process.kill()
