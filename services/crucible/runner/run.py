"""Runs one piece of untrusted code and says truly how it ended: the only part of the platform that lives inside a sandbox.

Standalone and standard library alone: it is executed by path (`python -I -S -u run.py key=value ...`) by whatever makes sandboxes,
where nothing of the project is installed. It is the sandbox's PID 1, which nothing inside can kill, stop, trace or imitate: it
installs no signal handler, is not dumpable (so `/proc/1/fd`, `/proc/1/mem` and ptrace are closed), and the code's process holds none of
its file descriptors. gVisor's kernel does not protect PID 1 (any signal kills it, and prlimit(2) reaches it), so there the code gets a
PID namespace of its own (`pid_namespace=1`), in which the runner does not exist. It must never trust what comes from the code's side, and never guess: a number that it does not know is null.

Every import costs each evaluation time (`json` alone 6 ms, half of what a whole sandbox costs), so only built-in and tiny modules are used.

The code runs in a forked child as a real `__main__` module that ends as CPython ends: its exit codes, its tracebacks, its atexit.
What the two streams of output carried, and then the report, leave in the format of `crucible.frames`, in the order in which they
were read: as they are, or with `encoding=lines` each as a line of base64, for a container's log, which keeps lines and not bytes.
Two pipes alone would lose the order of writes a few microseconds apart, so the code's own `sys.stdout` and `sys.stderr` let the
runner catch up when the code turns from one to the other; for other programs' output it is as exact as two pipes allow.
"""

import _signal  # type: ignore[import-not-found]
import _sitebuiltins
import errno
import fcntl
import gc
import io
import os
import resource
import select
import sys
from _frozen_importlib_external import SourceFileLoader
from time import monotonic

try:
    import _ctypes
except ImportError:  # an interpreter built without libffi
    _ctypes = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType, TracebackType
    from typing import TextIO

    from _typeshed import ReadableBuffer as Buffer

STDOUT, STDERR, STARTED, REPORT = 1, 2, 3, 4
STOP = b"S"
# As much as a pipe holds by default.
READ_BYTES = 64 * 1024
# A frame grows to this while it waits to be sent; well below the 1 MiB that a reader accepts.
FRAME_BYTES = 256 * 1024
# What a container runtime puts before each entry of its log, and how long an entry may be (containerd's defaults).
LOG_PREFIX_BYTES = 45
LOG_ENTRY_BYTES = 16 * 1024
# Gathered output above which it is sent at once.
BACKLOG_BYTES = 256 * 1024
# How long output may be gathered before it is sent: short for a person who follows, long enough to spare the reader a wake-up per line.
GATHER_SECONDS = 0.005
# Longest wait for the runner to catch up when the code turns from one stream to the other.
CATCH_UP_SECONDS = 0.05
CATCH_UP_POLL_SECONDS = 0.00002
WATCH_SECONDS = 0.02
# The watch may use at most a twentieth of a processor, however many processes there are to look at.
WATCH_SHARE = 20
# What the kernel keeps for each file in memory, empty ones too, roughly.
INODE_BYTES = 1024
REPORT_TEXT = 300
SETUP_FAILED = 125
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
# struct __user_cap_header_struct of capset(2): version 3, this thread.
CAPABILITY_HEADER = (0x20080522).to_bytes(4, "little") + bytes(4)
NO_CAPABILITIES = bytes(24)
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
PR_SET_CHILD_SUBREAPER = 36
LINUX = sys.platform == "linux"
FIONREAD = 0x541B if LINUX else 0x4004667F


class ReaderGoneError(Exception):
    """No one reads the frames any more: the platform has let go of this run, and nothing of it may stay."""


class Plan:
    """What to run and under which limits, from `key=value` arguments. A limit of 0 is no limit."""

    def __init__(self, arguments: "Iterable[str]") -> None:
        given = dict(argument.split("=", 1) for argument in arguments)

        def number(name: str) -> int:
            return int(given.get(name, "0"))

        self.frames = int(given["frames"])  # descriptor for frames
        self.commands = int(given.get("commands", "-1"))  # descriptor for commands; its end of file ends the run
        self.report = given.get(
            "report", ""
        )  # file for the report besides its frame (a container's termination message)
        self.lines = given.get("encoding") == "lines"
        self.code = given["code"]
        self.stdin = given.get("stdin", "")  # file that becomes the code's standard input; else the runner's own does
        self.pid_namespace = given.get("pid_namespace") == "1"
        # System calls that the code may not make: a BPF program in base64. One for each architecture that may turn out to be ours.
        self.seccomp = given.get(f"seccomp_{os.uname().machine}", "")
        self.packages = given.get("packages", "")
        self.timeout_seconds = number("timeout_ms") / 1000
        self.output_bytes = number("output_bytes")
        # What the container's log may take on its node's disk: many small pieces of output take much more than their own bytes.
        self.log_bytes = number("log_bytes")
        self.processes = number("processes")
        self.open_files = number("open_files")
        self.file_bytes = number("file_bytes")
        self.cpu_seconds = number("cpu_seconds")
        self.address_space = number("address_space")
        # Only where no control group bounds the memory.
        self.memory_bytes = number("memory_bytes")
        self.memory_folders = [folder for folder in given.get("memory_folders", "").split(":") if folder]


def call_kernel(name: str, *arguments: "int | bytes | None") -> None:
    """Make a system call that Python does not offer, without the 3 ms that importing `ctypes` takes.

    Raises:
        OSError: the kernel refused, or this interpreter cannot call C.
    """
    if _ctypes is None:
        raise OSError(errno.ENOSYS, "this Python was built without ctypes, which the runner needs")
    function = _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]
    if _ctypes.call_function(function, arguments) != 0:
        raise OSError(f"{name}{arguments} was refused")


def prctl(option: int, value: int, pointed_at: "bytes | None" = None) -> None:
    """Ask something of the kernel about this process.

    Raises:
        OSError: as `call_kernel`.
    """
    call_kernel("prctl", option, value, pointed_at, 0, 0)


def filter_system_calls(encoded: str) -> None:
    """Have this process and its children make no system call that a BPF program in base64 refuses.

    Raises:
        OSError: as `call_kernel`.
    """
    from array import array  # noqa: PLC0415 - only where a filter is given
    from binascii import a2b_base64  # noqa: PLC0415

    program = array("B", a2b_base64(encoded))
    address, size = program.buffer_info()
    # struct sock_fprog: the number of instructions, which have eight bytes each, and where they are.
    where = (size // 8).to_bytes(8, "little") + address.to_bytes(8, "little")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, where)


# --- the report -----------------------------------------------------------------------------------------------------------


def json_text(value: str) -> str:
    """Write a JSON string. Only what JSON demands becomes an escape, so that the report stays short."""
    out = []
    for char in value[:REPORT_TEXT]:
        if char in '"\\':
            out.append("\\" + char)
        else:
            out.append(char if char >= " " else f"\\u{ord(char):04x}")
    return '"' + "".join(out) + '"'


def json_object(fields: "dict[str, str | int | float | None]") -> bytes:
    """Write a flat JSON object, leaving out what is not known."""
    parts = [
        f'"{name}":{json_text(value) if isinstance(value, str) else value}'
        for name, value in fields.items()
        if value is not None
    ]
    return ("{" + ",".join(parts) + "}").encode("utf-8", "replace")


def class_name(told: bytes) -> "str | None":
    """Return the exception class that the code's process told, if it looks like one; the code itself may have written it."""
    name = told[:REPORT_TEXT].decode("utf-8", "replace")
    usual = all(char in ".<>" or ("a" + char).isidentifier() for char in name)
    return name if 0 < len(name) <= 200 and usual else None


# --- frames on their way out ----------------------------------------------------------------------------------------------


class Outbox:
    """Frames not yet sent, sealed as bytes or as lines. Pieces of one stream that arrive together travel as one frame."""

    def __init__(self, descriptor: int, *, lines: bool = False) -> None:
        self._descriptor = descriptor
        self._seal_with: Callable[[bytes], bytes] = bytes
        if lines:
            from binascii import b2a_base64  # noqa: PLC0415 - costs a third of a millisecond, so only where it is used

            self._seal_with = b2a_base64
        self._encoded = bytearray()
        self._kind = 0
        self._at_ms = 0
        self._piece = bytearray()
        self.logged = 0
        self.due: float | None = None
        os.set_blocking(descriptor, False)

    @property
    def size(self) -> int:
        """Bytes not yet sent."""
        return len(self._encoded) + len(self._piece)

    def add(self, kind: int, now: float, at_ms: int, data: bytes) -> None:
        """Put a piece of a stream, or a message, behind what is there."""
        if kind != self._kind or len(self._piece) + len(data) > FRAME_BYTES:
            self._seal()
            self._kind, self._at_ms = kind, at_ms
        self._piece += data
        if self.due is None:
            self.due = now + GATHER_SECONDS

    def _seal(self) -> None:
        if self._kind:
            header = bytes((self._kind,)) + self._at_ms.to_bytes(8, "big") + len(self._piece).to_bytes(4, "big")
            sealed = self._seal_with(header + self._piece)
            self._encoded += sealed
            self.logged += len(sealed) + LOG_PREFIX_BYTES * (1 + len(sealed) // LOG_ENTRY_BYTES)
            self._kind = 0
            self._piece.clear()

    def send(self) -> bool:
        """Send what the reader takes now; whether that was all."""
        self._seal()
        self.due = None
        while self._encoded:
            try:
                sent = os.write(self._descriptor, self._encoded)
            except BlockingIOError:
                return False
            except OSError as error:
                raise ReaderGoneError from error
            del self._encoded[:sent]
        return True

    def send_all(self) -> None:
        """Send everything, for as long as someone reads."""
        poller = select.poll()
        poller.register(self._descriptor, select.POLLOUT)
        while not self.send():
            poller.poll()


# --- what the code used ---------------------------------------------------------------------------------------------------


def read_file(path: str) -> bytes:
    """Read a small file of /proc."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 8192)
    finally:
        os.close(descriptor)


def descendants() -> "list[int]":
    """Return every process below this one: the whole namespace for PID 1, else whatever descends from it."""
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - pathlib is a slow import
    except OSError:
        return []
    own = os.getpid()
    if own == 1:
        return [pid for pid in pids if pid != 1]
    parents = {}
    for pid in pids:
        try:
            # The name in parentheses may hold anything; the parent is the second field after the last one.
            parents[pid] = int(read_file(f"/proc/{pid}/stat").rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
    found = {own}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {own})


class MemoryWatch:
    """Looks at the memory of all processes every few milliseconds, where no control group does.

    It sums resident pages, which is cheap; only when that is too much it asks for proportional shares, so that pages which forked
    processes share count once. Files in the in-memory folders count too.
    """

    def __init__(self, limit: int, folders: "list[str]") -> None:
        self._limit = limit
        self._folders = folders
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.peak = 0
        self.next_look = 0.0

    def exceeded(self, now: float) -> bool:
        """Whether the processes together use more than the limit."""
        used = self._look()
        self.peak = max(self.peak, used)
        # Hostile code can make looking slow, but not make it the runner's main occupation.
        self.next_look = now + max(WATCH_SECONDS, WATCH_SHARE * (monotonic() - now))
        return used > self._limit

    def _look(self) -> int:
        files = sum(self._folder(folder) for folder in self._folders)
        resident = {pid: self._resident(pid) for pid in descendants()}
        total = files + sum(resident.values())
        if total <= self._limit:
            return total
        return files + sum(self._proportional(pid, size) for pid, size in resident.items())

    def _folder(self, path: str) -> int:
        try:
            found = os.statvfs(path)
        except OSError:
            return 0
        return (found.f_blocks - found.f_bfree) * found.f_frsize + (found.f_files - found.f_ffree) * INODE_BYTES

    def _resident(self, pid: int) -> int:
        try:
            return int(read_file(f"/proc/{pid}/statm").split()[1]) * self._page
        except (OSError, ValueError, IndexError):
            return 0

    def _proportional(self, pid: int, resident: int) -> int:
        try:
            for line in read_file(f"/proc/{pid}/smaps_rollup").splitlines():
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
        except (OSError, ValueError, IndexError):
            pass
        return resident  # ended, or hidden from us by the code: then all of it counts


# --- the code's side of the fork ------------------------------------------------------------------------------------------


class OrderedOutput(io.FileIO):
    """The file below `sys.stdout` or `sys.stderr`: before it is written to, the other one's pipe must have been read."""

    last: "OrderedOutput | None" = None
    exact = True

    def write(self, data: "Buffer") -> int:
        """Write at once, after what the other stream was given earlier has been read."""
        last = OrderedOutput.last
        if last is not self:
            OrderedOutput.last = self
            if last is not None and OrderedOutput.exact:
                last.settle()
        return super().write(data)

    def settle(self) -> None:
        """Wait until the pipe is empty. One that does not empty in time is never waited for again."""
        give_up = monotonic() + CATCH_UP_SECONDS
        try:
            while fcntl.ioctl(self.fileno(), FIONREAD, b"\0\0\0\0") != b"\0\0\0\0":
                if monotonic() > give_up:
                    OrderedOutput.exact = False
                    return
                select.select((), (), (), CATCH_UP_POLL_SECONDS)
        except (OSError, ValueError):
            return


def open_output(descriptor: int, like: "TextIO") -> io.TextIOWrapper:
    """Return a text stream for the code, unbuffered: what was written before a kill has been written."""
    file = OrderedOutput(descriptor, "wb", closefd=False)
    text = io.TextIOWrapper(file, like.encoding, like.errors, "\n", write_through=True)
    text.mode = like.mode  # type: ignore[misc]
    return text


def set_limit(kind: int, value: int) -> None:
    """Lower a resource limit of this process, never raise it."""
    _, hard = resource.getrlimit(kind)
    if value:
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def apply_limits(plan: Plan) -> None:
    """Bound what the code's processes may use each."""
    set_limit(resource.RLIMIT_NOFILE, plan.open_files)
    set_limit(resource.RLIMIT_FSIZE, plan.file_bytes)
    set_limit(resource.RLIMIT_CPU, plan.cpu_seconds)
    set_limit(resource.RLIMIT_NPROC, plan.processes)
    if LINUX:
        set_limit(resource.RLIMIT_AS, plan.address_space)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def volunteer_for_memory_killer() -> None:
    """Have the kernel's memory killer take the code and not the runner, whose report would be lost. It may be forbidden here."""
    try:
        with open("/proc/self/oom_score_adj", "w") as score:  # noqa: PTH123 - pathlib is a slow import
            score.write("1000")
    except OSError:
        pass


def prepare_interpreter(plan: Plan) -> "dict[str, object]":
    """Make this interpreter look as if it had been started as `python /code/main.py`; return the namespace of `__main__`."""
    main: ModuleType = type(sys)("__main__")
    main.__dict__.update(
        __file__=plan.code,
        __cached__=None,
        __builtins__=sys.modules["builtins"],
        __annotations__={},
        __loader__=SourceFileLoader("__main__", plan.code),
    )
    sys.modules["__main__"] = main
    sys.argv = [plan.code]
    sys.orig_argv = [sys.executable, plan.code]
    sys.stdout = sys.__stdout__ = open_output(1, sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open_output(2, sys.stderr)  # type: ignore[misc]
    sys.path.insert(0, os.path.dirname(plan.code))  # noqa: PTH120, TID251 - a script's own folder, as CPython does
    if plan.packages:
        sys.path.append(plan.packages)  # noqa: TID251 - the sandbox's packages, not the platform's
    builtins = sys.modules["builtins"].__dict__
    builtins["exit"] = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")
    builtins["quit"] = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    builtins["help"] = _sitebuiltins._Helper()  # noqa: SLF001 - the interpreter's own, as `site` uses it
    return main.__dict__


class Teller:
    """The code's process tells the runner that set-up is done, and later the class of an uncaught exception."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pid = os.getpid()
        self._inode = os.fstat(descriptor).st_ino

    def tell(self, text: bytes) -> None:
        """Write, unless this is a process that the code forked, or the code put something else in the descriptor's place."""
        try:
            if os.getpid() == self._pid and os.fstat(self._descriptor).st_ino == self._inode:
                os.write(self._descriptor, text)
        except OSError:
            pass


def become_code(
    plan: Plan, stdout: int, stderr: int, told: int, runners: "Iterable[int]"
) -> "tuple[dict[str, object], Teller]":
    """In the forked child: take the code's place, holding nothing of the runner's. Ends the process if that fails."""
    voice = told
    try:
        os.setsid()
        if plan.stdin:
            source = os.open(plan.stdin, os.O_RDONLY)
            os.dup2(source, 0)
            os.close(source)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        # The highest number that the code may use, so that its own files count from 3 as they do everywhere.
        place = min(plan.open_files or 256, resource.getrlimit(resource.RLIMIT_NOFILE)[0]) - 1
        voice = os.dup2(told, place, inheritable=False)
        teller = Teller(voice)
        for descriptor in {*runners, stdout, stderr, told} - {0, 1, 2, place}:
            os.close(descriptor)
        if plan.pid_namespace:
            settle_in_namespace()
        if LINUX:
            prctl(PR_SET_DUMPABLE, 1)
            volunteer_for_memory_killer()
        apply_limits(plan)
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
        namespace = prepare_interpreter(plan)
        if plan.seccomp:
            filter_system_calls(plan.seccomp)
    except BaseException as error:
        os.write(voice, f"!{type(error).__name__}: {error}".encode("utf-8", "replace")[:REPORT_TEXT])
        os._exit(SETUP_FAILED)
    teller.tell(b"+")
    return namespace, teller


def without_runner(trace: "TracebackType | None") -> "TracebackType | None":
    """Drop the runner's own frames from the top of a traceback."""
    while trace and trace.tb_frame.f_code.co_filename == execute.__code__.co_filename:
        trace = trace.tb_next
    return trace


def show(failure: BaseException) -> None:
    """Print an uncaught exception as CPython does, `sys.excepthook` and its own failure included."""
    hook = getattr(sys, "excepthook", sys.__excepthook__)
    try:
        hook(type(failure), failure, failure.__traceback__)
    except SystemExit:
        raise
    except BaseException as second:
        sys.stderr.write("Error in sys.excepthook:\n")
        second.__context__ = None
        second.with_traceback(without_runner(second.__traceback__))
        sys.__excepthook__(type(second), second, second.__traceback__)
        sys.stderr.write("\nOriginal exception was:\n")
        sys.__excepthook__(type(failure), failure, failure.__traceback__)


def full_name(kind: "type[BaseException]") -> str:
    """Return a class's name as a traceback prints it."""
    module = kind.__module__
    return kind.__qualname__ if module in ("builtins", "__main__") else f"{module}.{kind.__qualname__}"


def execute(plan: Plan, namespace: "dict[str, object]", teller: Teller) -> None:
    """Run the code in this process, which then ends through the interpreter's own finalisation.

    Raises:
        SystemExit: the exit code that CPython would give.
        KeyboardInterrupt: uncaught by the code; the interpreter turns it into SIGINT.
    """
    try:
        with open(plan.code, "rb") as file:  # noqa: PTH123 - pathlib is a slow import
            source = file.read()
        exec(compile(source, plan.code, "exec", dont_inherit=True), namespace)
    except SystemExit:
        raise
    except BaseException as error:
        failure = error
    else:
        return
    # Outside the handler, so that what the hook raises does not show the code's exception as its context.
    failure.with_traceback(without_runner(failure.__traceback__))
    try:
        teller.tell(full_name(type(failure)).encode("utf-8", "replace")[:REPORT_TEXT])
    except BaseException:
        teller.tell(b"Exception")  # a class whose own name raises
    show(failure)
    if isinstance(failure, KeyboardInterrupt):
        sys.excepthook = lambda *_: None
        raise failure
    raise SystemExit(1)


# --- the runner's side ----------------------------------------------------------------------------------------------------


class Run:
    """One run of the code, from the fork to the report."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._outbox = Outbox(plan.frames, lines=plan.lines)
        self._watch = MemoryWatch(plan.memory_bytes, plan.memory_folders) if plan.memory_bytes else None
        self._poller = select.poll()
        self._streams: dict[int, int] = {}
        self._behind = False
        self._counts = {STDOUT: 0, STDERR: 0}
        self._main = 0
        self._main_status: int | None = None
        self._child_ended = -1
        self._told = -1
        self._killed = 0
        self._status = ""
        self._detail: str | None = None
        self._stopped = False
        self._started = self._ended = monotonic()

    # -- start

    def fork(self) -> "tuple[dict[str, object], Teller] | None":
        """Start the code. Returns None in the runner, and in the child what `execute` needs.

        Raises:
            OSError: no pipe or no process could be made.
        """
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        told_read, told_write = os.pipe()
        # What exists now is not garbage. Unfrozen, the child's end would copy all of it to look at it: 1 ms.
        gc.freeze()
        self._main = os.fork()
        if self._main == 0:
            runners = {out_read, err_read, told_read, self._plan.frames, self._plan.commands} - {-1}
            return become_code(self._plan, out_write, err_write, told_write, runners)
        self._started = monotonic()
        for descriptor in (out_write, err_write, told_write):
            os.close(descriptor)
        self._told = told_read
        self._streams = {out_read: STDOUT, err_read: STDERR}
        for descriptor in (out_read, err_read, told_read):
            os.set_blocking(descriptor, False)
        self._listen()
        return None

    def _listen(self) -> None:
        for descriptor in self._streams:
            self._poller.register(descriptor, select.POLLIN)
        if self._plan.commands >= 0:
            self._poller.register(self._plan.commands, select.POLLIN)
        # The end of any child wakes the poll. A process descriptor would tell of the code's end alone, and gVisor has none: there the
        # runner of an idle evaluation asked so often that it took a twentieth of a processor.
        self._child_ended, wakes = os.pipe()
        for descriptor in (self._child_ended, wakes):
            os.set_blocking(descriptor, False)
        _signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, lambda *_: None)
        self._poller.register(self._child_ended, select.POLLIN)

    # -- while it runs

    def supervise(self) -> None:
        """Carry output until the run is over for one reason or another; then leave nothing of it alive.

        Raises:
            ReaderGoneError: the platform has let go.
        """
        self._outbox.add(STARTED, self._started, 0, b"")
        self._outbox.send()
        # What ended before we listened announces nothing.
        self._look_after(monotonic())
        while not self._status:
            for descriptor, _ in self._poller.poll(self._patience_ms()):
                self._attend(descriptor)
            self._look_after(monotonic())
        self.end_everything()
        self._ended = monotonic()
        self._drain()

    def _patience_ms(self) -> int:
        now = monotonic()
        until = self._started + self._plan.timeout_seconds
        if self._watch:
            until = min(until, self._watch.next_look)
        if self._outbox.due is not None:
            until = min(until, self._outbox.due)
        return max(0, int((until - now) * 1000) + 1)

    def _attend(self, descriptor: int) -> None:
        if descriptor in self._streams:
            self._read(descriptor)
        elif descriptor == self._plan.commands:
            self._obey()
        elif descriptor == self._child_ended:
            os.read(descriptor, READ_BYTES)
        # The code's end, and room in the outbox, are seen to on every turn.

    def _read(self, descriptor: int) -> bool:
        """Take one piece of output. False if there is none now or will never be more."""
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        kind = self._streams[descriptor]
        if not data:
            if not self._behind:
                self._poller.unregister(descriptor)
            del self._streams[descriptor]
            os.close(descriptor)
            return False
        room = self._plan.output_bytes - sum(self._counts.values())
        if self._plan.output_bytes and len(data) > room:
            data = data[:room]
            self._finish("output_limit", f"wrote more than the {self._plan.output_bytes} bytes of output that are kept")
            self._forget_streams()
        if data:
            now = monotonic()
            self._counts[kind] += len(data)
            self._outbox.add(kind, now, self._since_start(now), data)
        if self._plan.log_bytes and self._outbox.logged > self._plan.log_bytes:
            self._finish(
                "output_limit", "wrote its output in so many small pieces that they take more room than is kept"
            )
            self._forget_streams()
        return True

    def _since_start(self, now: float) -> int:
        return int((now - self._started) * 1000)

    def _forget_streams(self) -> None:
        for descriptor in self._streams:
            os.close(descriptor)
        self._streams.clear()

    def _obey(self) -> None:
        try:
            command = os.read(self._plan.commands, 1)
        except BlockingIOError:
            return
        except OSError as error:  # reset, where something was still unread
            raise ReaderGoneError from error
        if not command:
            raise ReaderGoneError
        if command == STOP and not self._status:
            self._stopped = True
            self._finish("signalled", "stopped on request")

    def _finish(self, status: str, detail: "str | None" = None) -> None:
        # The limit on output holds to the very end, since what is kept is cut short; otherwise the first cause stays.
        if not self._status or status == "output_limit":
            self._status, self._detail = status, detail

    def _look_after(self, now: float) -> None:
        due = self._outbox.due is not None and now >= self._outbox.due
        if due or self._behind or self._outbox.size > BACKLOG_BYTES:
            self._pace(behind=not self._outbox.send())
        self._reap()
        if self._main_status is not None:
            self._finish("exited" if os.WIFEXITED(self._main_status) else "signalled")
        elif now >= self._started + self._plan.timeout_seconds:
            self._finish("wall_clock")
        elif self._watch and now >= self._watch.next_look and self._watch.exceeded(now):
            self._finish("memory_limit")

    def _pace(self, *, behind: bool) -> None:
        """While the reader is behind, let the code's output wait in its pipes: nothing here or there grows without bound."""
        if behind == self._behind:
            return
        self._behind = behind
        for descriptor in self._streams:
            if behind:
                self._poller.unregister(descriptor)
            else:
                self._poller.register(descriptor, select.POLLIN)
        commands = select.POLLIN if self._plan.frames == self._plan.commands else 0
        if behind or commands:
            self._poller.register(self._plan.frames, commands | (select.POLLOUT if behind else 0))
        else:
            self._poller.unregister(self._plan.frames)

    def _reap(self) -> None:
        """Collect ended processes, which the code's own would otherwise leave as zombies."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._note_end(pid, status)

    def _note_end(self, pid: int, status: int) -> None:
        if pid == self._main:
            self._main_status = status

    # -- the end

    def end_everything(self) -> None:
        """Kill every process that is left, and wait until the last is gone."""
        self._reap()
        while True:
            self._kill()
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            self._note_end(pid, status)
            self._killed += pid != self._main

    def _kill(self) -> None:
        if os.getpid() == 1:
            # Everything in this PID namespace but ourselves. Anywhere else this would be every process of the user's!
            targets: Iterator[int] = iter((-1,))
        else:
            targets = iter((-self._main, *descendants()))
        for target in targets:
            try:
                os.kill(target, _signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

    def _drain(self) -> None:
        """Read what the pipes still hold. All writers are gone, except where processes could escape (the process runtime)."""
        for descriptor in list(self._streams):
            while descriptor in self._streams and self._read(descriptor):
                if self._outbox.size > BACKLOG_BYTES:
                    self._outbox.send_all()
        self._forget_streams()

    def report(self) -> bytes:
        """Return the report as JSON, and remember nothing that the code could have forged except its exception's name."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = used.ru_maxrss * (1024 if LINUX else 1)
        fields: dict[str, str | int | float | None] = {"status": self._status, "detail": self._detail}
        if self._status == "exited" and self._main_status is not None:
            fields["exit_code"] = os.WEXITSTATUS(self._main_status)
        # Not the runner's own SIGKILL on request: that says nothing about the code.
        if self._status == "signalled" and not self._stopped and self._main_status is not None:
            fields["signal"] = os.WTERMSIG(self._main_status)
        self._add_told(fields)
        return json_object(
            {
                **fields,
                "peak_memory_bytes": max(peak, self._watch.peak if self._watch else 0),
                "cpu_seconds": round(used.ru_utime + used.ru_stime, 6),
                "run_seconds": round(self._ended - self._started, 6),
                "stdout_bytes": self._counts[STDOUT],
                "stderr_bytes": self._counts[STDERR],
                "processes_killed": self._killed,
            }
        )

    def _add_told(self, fields: "dict[str, str | int | float | None]") -> None:
        try:
            told = os.read(self._told, 4096)
        except OSError:
            told = b""
        if told[:1] == b"!" or not told:
            # Written before the code had its first instruction, so this cannot be the code's word.
            if self._status == "exited":
                fields.clear()
                fields["status"] = "runner_error"
                fields["detail"] = told[1:].decode("utf-8", "replace") or "the code's process ended before it was ready"
        elif fields.get("exit_code") == 1:
            fields["exception_type"] = class_name(told[1:])

    def deliver(self, report: bytes) -> None:
        """Send the report after all output, and write it to its file if there is one."""
        now = monotonic()
        self._outbox.add(REPORT, now, self._since_start(now), report)
        self._outbox.send_all()
        if self._plan.report:
            with open(self._plan.report, "wb") as file:  # noqa: PTH123 - pathlib is a slow import
                file.write(report)


def close_others(keep: "set[int]") -> None:
    """Close every descriptor that was inherited by accident."""
    folder = "/proc/self/fd" if LINUX else "/dev/fd"
    for name in os.listdir(folder):  # noqa: PTH208 - pathlib is a slow import
        if int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue


def prepare_namespace() -> None:
    """Have the next child of this process be PID 1 of a PID namespace of its own. The user namespace with it allows that to anyone."""
    user, group = os.getuid(), os.getgid()
    call_kernel("unshare", CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS)
    # A group may be mapped only by who can never change groups again; gVisor before June 2026 neither asked for that nor had the file.
    if os.access("/proc/self/setgroups", os.F_OK):
        write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"{user} {user} 1")
    write_file("/proc/self/gid_map", f"{group} {group} 1")


def write_file(path: str, text: str) -> None:
    """Write a small file of /proc, in one piece."""
    with open(path, "w") as file:  # noqa: PTH123 - pathlib is a slow import
        file.write(text)


def settle_in_namespace() -> None:
    """In that child: see its own processes in /proc, and keep none of the powers that a new user namespace comes with."""
    call_kernel("mount", b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    call_kernel("capset", CAPABILITY_HEADER, NO_CAPABILITIES)


def protect() -> None:
    """Close this process to everything that runs under the same user."""
    # Python's own handler for Ctrl-C would let the code interrupt its init.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
    if LINUX:
        prctl(PR_SET_DUMPABLE, 0)
        if os.getpid() != 1:
            prctl(PR_SET_CHILD_SUBREAPER, 1)


def main(plan: Plan) -> "tuple[dict[str, object], Teller]":
    """Run the code and end this process. Returns in the forked child only, with what `execute` needs there."""
    try:
        close_others({0, 1, 2, plan.frames, plan.commands})
        if plan.pid_namespace:
            prepare_namespace()
        protect()
        run = Run(plan)
        child = run.fork()
    except Exception as error:
        outbox = Outbox(plan.frames, lines=plan.lines)
        text = f"{type(error).__name__}: {error}"
        outbox.add(REPORT, 0.0, 0, json_object({"status": "runner_error", "detail": text}))
        outbox.send_all()
        os._exit(1)
    if child is not None:
        return child
    try:
        run.supervise()
        run.deliver(run.report())
    except ReaderGoneError:
        run.end_everything()
        os._exit(1)
    except BaseException:
        run.end_everything()
        raise
    os._exit(0)


if __name__ == "__main__":
    _plan = Plan(sys.argv[1:])
    execute(_plan, *main(_plan))
