"""Evaluations as plain processes, for systems that have no bubblewrap: NO ISOLATION. The code can do whatever its user can do.

It exists so that the platform can be developed and tried on macOS. The same runner holds the same limits as well as a plain process can:
time and output exactly, memory and processes roughly, files and network not at all. On Linux, control groups help where they can be used.
If the platform is root, the code at least is not.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from crucible import logs
from crucible.dispatcher.interpreter import PYTHON_FLAGS, describe
from crucible.dispatcher.launch import Launch, Launcher
from crucible.dispatcher.runtimes import RuntimeUnavailableError, SandboxSpec, SandboxStartError
from crucible.dispatcher.runtimes.local import (
    HostIds,
    dispose,
    limits_by,
    make_group,
    open_groups,
    process_limit,
    runner_arguments,
)
from crucible.dispatcher.runtimes.probe import probe
from crucible.dispatcher.sandbox import Channel, LaunchedSandbox

if TYPE_CHECKING:
    from crucible.dispatcher.cgroups import ControlGroup, ControlGroups
    from crucible.limits import Limits
    from crucible.settings import DispatcherSettings

log = logs.get_logger("process")

_CHANNEL = 3
_HOME_PREFIX = "crucible-process-"
# The runner counts in the group too.
_OWN_PROCESSES = 1


def explain(said: str) -> RuntimeUnavailableError:
    """Turn what a failed first process said into advice."""
    return RuntimeUnavailableError(
        f"evaluations cannot be run: {said or 'the first one ended without a word'}",
        "the interpreter must be one that every user may execute: set CRUCIBLE_DISPATCHER__PYTHON, or do not run the platform as root",
    )


def _remove_folder(folder: Path) -> None:
    """Remove what the code left, also where it has locked us out of its own folders."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        return
    for place, folders, _ in os.walk(folder):
        for name in folders:
            if not (inner := Path(place, name)).is_symlink():
                inner.chmod(stat.S_IRWXU)
    shutil.rmtree(folder, onerror=_warn_of_file)


def _warn_of_file(_function: object, path: str, error: tuple[object, BaseException, object]) -> None:
    log.warning("a file of an evaluation could not be removed", path=path, error=str(error[1]))


def _make_home(runner: bytes) -> tuple[Path, int]:
    """Make this instance's folder with the runner in it, and lock it for as long as this process lives."""
    home = Path(tempfile.mkdtemp(prefix=_HOME_PREFIX))
    lock = _lock(home)
    if lock is None:
        raise OSError(f"{home} is locked by someone else")
    home.chmod(0o711)
    (home / "run.pyc").write_bytes(runner)
    (home / "run.pyc").chmod(0o444)
    return home, lock


def _lock(folder: Path) -> int | None:
    """Lock a folder; None if a living process holds it. The kernel lets go of the lock of one that was killed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftovers() -> None:
    """Remove the folders of instances that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_HOME_PREFIX}*"):
        own = folder.is_dir() and not folder.is_symlink() and folder.stat().st_uid == os.geteuid()
        if own and (lock := _lock(folder)) is not None:
            log.info("removing the folder of a dead instance", folder=str(folder))
            _remove_folder(folder)
            os.close(lock)


class ProcessRuntime:
    """Runs evaluations as plain processes."""

    name = "process"

    def __init__(self, settings: DispatcherSettings, limits: Limits) -> None:
        self._settings = settings
        self._limits = limits
        self._groups: ControlGroups | None = None
        self._launcher: Launcher | None = None
        self._ids = HostIds.here()
        self._python = ""
        self._home: Path | None = None
        self._lock = -1

    @property
    def launcher_pid(self) -> int | None:
        """Process id of the launcher."""
        return self._launcher.pid if self._launcher else None

    @property
    def limits_by(self) -> str:
        """What holds memory, CPU and process limits here, in words; known once started."""
        return limits_by(self._groups)

    async def start(self) -> None:
        """Get ready, and run one process.

        Raises:
            RuntimeUnavailableError: evaluations cannot be run here.
        """
        log.warning(
            "NO ISOLATION: evaluations run as plain processes and can read, write and reach whatever their user can; "
            "run only code that you trust"
        )
        interpreter = await describe(self._settings.python)
        self._python = str(interpreter.executable)
        self._groups = await open_groups(self._settings)
        await asyncio.to_thread(_remove_leftovers)
        self._home, self._lock = _make_home(interpreter.runner)
        self._launcher = Launcher({}, ())
        self._launcher.start()
        try:
            await probe(self, self._limits, explain)
        except BaseException:
            await self.aclose()
            raise

    def create(self, spec: SandboxSpec) -> LaunchedSandbox:
        """Start the code.

        Raises:
            SandboxStartError: the machine has no room for it.
        """
        assert self._launcher is not None, "the runtime has not been started"  # noqa: S101
        assert self._home is not None  # noqa: S101
        user = self._ids.take()
        folder: Path | None = None
        group: ControlGroup | None = None
        try:
            folder = self._make_folder(self._home, spec, user)
            group = make_group(self._groups, spec, self._limits, own_processes=_OWN_PROCESSES)
            return self._launch(self._launcher, spec, folder, group, user)
        except OSError as error:
            dispose(group)
            if folder:
                _remove_folder(folder)
            self._ids.give_back(user)
            raise SandboxStartError(f"the process could not be started: {error}") from error

    @staticmethod
    def _make_folder(home: Path, spec: SandboxSpec, user: int | None) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=home))
        (folder / "main.py").write_bytes(spec.code)
        (folder / "main.py").chmod(0o444)
        (folder / "tmp").mkdir(mode=0o700)
        if user is not None:
            os.chown(folder, user, user)
            os.chown(folder / "tmp", user, user)
        return folder

    def _launch(
        self, launcher: Launcher, spec: SandboxSpec, folder: Path, group: ControlGroup | None, user: int | None
    ) -> LaunchedSandbox:
        channel = Channel()
        try:
            with tempfile.TemporaryFile() as stdin:
                stdin.write(spec.stdin)
                stdin.seek(0)
                process = launcher.launch(
                    Launch(
                        program=self._python,
                        argv=[
                            self._python,
                            *PYTHON_FLAGS,
                            str(folder.parent / "run.pyc"),
                            *self._arguments(spec, folder, group),
                        ],
                        environment=self._environment(spec, folder),
                        sent={
                            0: stdin.fileno(),
                            1: channel.words_end,
                            2: channel.words_end,
                            _CHANNEL: channel.runner_end,
                        },
                        groups=group.join_files if group else (),
                        user=user,
                        folder=str(folder / "tmp"),
                    )
                )
        finally:
            channel.close_far_ends()
        return LaunchedSandbox(
            process,
            channel,
            group=group,
            cpu_millis=spec.resources.cpu_millis,
            release=lambda: self._release(folder, user),
        )

    def _arguments(self, spec: SandboxSpec, folder: Path, group: ControlGroup | None) -> list[str]:
        return runner_arguments(
            spec,
            self._limits,
            self._settings,
            channel=_CHANNEL,
            code=str(folder / "main.py"),
            packages=str(self._settings.packages or ""),
            processes=process_limit(self._limits, own_namespace=False),
            memory_folders=None if group else "",
        )

    def _environment(self, spec: SandboxSpec, folder: Path) -> dict[str, str]:
        environment = {
            "HOME": str(folder / "tmp"),
            "LANG": "C.UTF-8",
            "PATH": f"{Path(self._python).parent}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder / "tmp"),
            "EVALUATION_ID": spec.evaluation_id,
            "EVAL_ID": spec.evaluation_id,
        }
        if self._settings.packages:
            environment["PYTHONPATH"] = str(self._settings.packages)
        return environment

    async def _release(self, folder: Path, user: int | None) -> None:
        await asyncio.to_thread(_remove_folder, folder)
        self._ids.give_back(user)

    async def aclose(self) -> None:
        """End every process and leave nothing behind."""
        if self._launcher:
            await self._launcher.aclose()
        if self._groups:
            await self._groups.aclose()
        if self._home:
            await asyncio.to_thread(_remove_folder, self._home)
            os.close(self._lock)
