"""A Redis that tests may kill, stop, wipe and start again; it keeps an append-only file, as one that carries events should."""

from __future__ import annotations

import secrets
import shutil
from typing import TYPE_CHECKING, Self

from tests.servers.process import ServerProcess, ServerSpec, server_root
from tests.support.ports import free_port
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from tests.servers.certificates import Authority

HOST = "127.0.0.1"
START_SECONDS = 20
# Where the server sees its data and its certificate.
_DATA, _CERTIFICATES = "/run/data", "/run/certificates"


_TLS_FILES = {"ca-cert": "authority", "cert": "certificate", "key": "key"}


class RedisServer:
    """A server for as long as its `with` block lasts. All that it keeps is in its folder; it stays at one port."""

    def __init__(self, folder: Path, *, tls: Authority | None = None, port: int | None = None) -> None:
        """Describe a server; the block's beginning starts it. With `tls` it speaks nothing else."""
        self._folder = folder
        self._tls = tls is not None
        self._process: ServerProcess | None = None
        self.port = port or free_port()
        self.password = secrets.token_hex(8)
        folder.mkdir(parents=True, exist_ok=True)
        if tls is not None:
            tls.issue_into(folder / "certificates", HOST, "localhost")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """Where it is, with its password and without a database number."""
        return f"{'rediss' if self._tls else 'redis'}://:{self.password}@{HOST}:{self.port}"

    @property
    def log(self) -> str:
        """Everything that it wrote, of all its lives."""
        return (self._folder / "log").read_text(errors="replace")

    def alive(self) -> bool:
        """Tell whether it has a process."""
        return self._process is not None and self._process.alive()

    def start(self) -> None:
        """Start it with the data that it has, where it does not run, and wait until it has read them."""
        if self.alive():
            return
        data = self._folder / "data"
        data.mkdir(exist_ok=True)
        spec = ServerSpec(
            command=["/usr/bin/redis-server", *self._options()],
            root=server_root(),
            log=self._folder / "log",
            hostname="redis",
            binds={_CERTIFICATES: self._folder / "certificates"} if self._tls else {},
            writable={_DATA: data},
        )
        process = self._process = ServerProcess(spec)

        def serving() -> bool:
            assert process.alive(), f"Redis ended while starting; its log ends:\n{process.log_end()}"
            return process.run("redis-cli", *self._cli_options(), "ping").stdout.strip() == "PONG"

        wait_until(serving, timeout=START_SECONDS, describe="Redis to serve")

    def _options(self) -> list[str]:
        ports = ["--port", str(self.port)]
        if self._tls:
            files = [(f"--tls-{kind}-file", f"{_CERTIFICATES}/{name}.pem") for kind, name in _TLS_FILES.items()]
            ports = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "optional", *sum(files, ())]
        # Each write is on disk before it is answered: what a client was told is there after a power cut.
        return [
            *ports,
            "--bind",
            HOST,
            "--requirepass",
            self.password,
            "--dir",
            _DATA,
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
        ]

    def _cli_options(self) -> list[str]:
        tls = ["--tls", "--cacert", f"{_CERTIFICATES}/authority.pem"] if self._tls else []
        return ["-h", HOST, "-p", str(self.port), "--no-auth-warning", "-a", self.password, *tls]

    def stop(self) -> None:
        """Stop it as an operator does."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """Kill it and start it with the data that it had."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Kill it, lose all its data and start it."""
        self.kill()
        shutil.rmtree(self._folder / "data")
        self.start()
