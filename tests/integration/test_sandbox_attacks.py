"""Each thing that code in a sandbox must not be able to do, tried by code in a real sandbox: read, write, reach, see, become.

The code says what it managed to do; the test also looks from outside. Every test runs under both ways of limiting, since the filter
of system calls differs between them.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crucible.evaluation import Reason
from tests.support.capabilities import needs
from tests.support.sandboxes import Ran, Sandboxes, processes_of, running_sandboxes
from tests.support.waits import wait_until_async

pytestmark = [pytest.mark.integration, needs("sandbox")]

# Tries each attempt and prints what became of it; `ok` means that the attack worked.
TRY = """
import errno
def attempt(name, do):
    try:
        result = do()
    except OSError as error:
        print(name, errno.errorcode.get(error.errno, error.errno))
    except Exception as error:
        print(name, type(error).__name__, error)
    else:
        print(name, 'ok', result)
"""
SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def syscall(number, *arguments):
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


@pytest.fixture(
    params=[pytest.param("require", marks=needs("cgroups"), id="cgroups"), pytest.param("off", id="watched")]
)
async def sandboxes(request: pytest.FixtureRequest) -> AsyncIterator[Sandboxes]:
    async with running_sandboxes(cgroups=request.param) as started:
        yield started


def results(ran: Ran) -> dict[str, str]:
    """What each attempt came to, by its name."""
    assert ran.outcome.reason is Reason.EXIT_ZERO, ran
    return dict(line.split(" ", 1) for line in ran.out.splitlines())


# --- read outside -----------------------------------------------------------------------------------------------------------


async def test_the_hosts_files_cannot_be_read(sandboxes: Sandboxes, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's own")
    paths = [
        str(secret),
        str(Path.home() / ".bashrc"),
        str(Path(__file__)),
        "/etc/shadow",
        "/etc/hostname",
        "/etc/machine-id",
        "/var/log",
        "/home",
        "/sys/kernel",
        "/proc/1/root/etc/passwd",
        "/proc/1/cwd",
        "/proc/1/environ",
        "/proc/1/mem",
        "/proc/1/fd/0",
        "/proc/1/fd/3",
        "/proc/1/map_files",
        "/proc/kcore",
        "/proc/kmsg",
        "/dev/mem",
        "/dev/kmsg",
        "/dev/vda",
        "/dev/sda",
        "/run/systemd",
        "/run/docker.sock",
    ]
    ran = await sandboxes.run(
        TRY + f"import os\nfor path in {paths!r}:\n"
        "    attempt(path, lambda: os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(10))\n"
    )

    told = results(ran)
    assert set(told) == set(paths)
    assert {path: word for path, word in told.items() if word not in ("ENOENT", "EACCES", "EPERM")} == {}


async def test_what_can_be_read_is_what_was_meant(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nprint(sorted(os.listdir('/etc')))\nprint(sorted(os.listdir('/code')))\nprint(sorted(os.listdir('/run')))\n"
        "print(open('/etc/passwd').read().count(':x:'), sorted(os.environ))\nprint(os.uname().nodename)"
    )

    etc, code, run, passwd, node = ran.out.splitlines()
    assert etc == "['group', 'hosts', 'ld.so.cache', 'nsswitch.conf', 'passwd']"
    assert code == "['main.py']"
    assert run == "['crucible']"
    assert passwd.startswith("3 ")
    assert "CRUCIBLE" not in passwd
    assert node == "sandbox"


async def test_the_platforms_environment_is_not_passed_on(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_SECRET", "of the platform")
    async with running_sandboxes(cgroups="off") as later:
        ran = await later.run("import os\nprint(sorted(os.environ))\nprint(open('/proc/self/environ').read())")

    assert "SOME_SECRET" not in ran.out
    assert "of the platform" not in ran.out


async def test_no_descriptor_of_the_platform_is_inherited(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, stat\nfor name in os.listdir('/proc/self/fd'):\n"
        "    try: print(name, os.readlink(f'/proc/self/fd/{name}'))\n    except OSError: pass\n"
    )

    links = results(ran)
    # Standard streams, and the pipe on which it tells an exception's name.
    assert set(links) == {"0", "1", "2", "255"}
    assert links["0"] == "/dev/null"
    assert all(links[name].startswith("pipe:") for name in ("1", "2", "255"))


async def test_the_kernel_keyrings_of_the_host_are_out_of_reach(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        TRY + SYSCALL + "attempt('keyctl', lambda: syscall(250, 0, -3, 0))\n"
        "attempt('add_key', lambda: syscall(248, b'user', b'x', b'y', 1, -3))\n"
    )

    assert results(ran) == {"keyctl": "EPERM", "add_key": "EPERM"}


# --- write outside ----------------------------------------------------------------------------------------------------------


async def test_nothing_but_the_folders_in_memory_can_be_written(sandboxes: Sandboxes) -> None:
    places = [
        "/",
        "/usr",
        "/usr/bin",
        "/etc",
        "/code",
        "/dev",
        "/run",
        "/run/crucible",
        "/proc",
        "/proc/sys/kernel",
        "/lib",
    ]
    ran = await sandboxes.run(
        TRY + f"import os\nfor place in {places!r}:\n    attempt(place, lambda: open(os.path.join(place, 'x'), 'w'))\n"
        "for file in ('/code/main.py', '/run/crucible/run.pyc', '/etc/passwd', '/usr/bin/env', '/proc/sys/kernel/hostname',\n"
        "             '/proc/sysrq-trigger', '/proc/1/oom_score_adj', '/proc/1/comm', '/proc/1/clear_refs'):\n"
        "    attempt(file, lambda: open(file, 'w'))\n"
        "attempt('chmod', lambda: os.chmod('/code/main.py', 0o777))\n"
        "attempt('unlink', lambda: os.unlink('/code/main.py'))\n"
        "attempt('rename', lambda: os.rename('/code', '/edoc'))\n"
        "attempt('mknod', lambda: os.mknod('/tmp/sda', 0o60666, os.makedev(8, 0)))\n"
        "attempt('/tmp', lambda: open('/tmp/x', 'w').write('x'))\n"
        "attempt('/dev/shm', lambda: open('/dev/shm/x', 'w').write('x'))\n"
    )

    told = results(ran)
    assert told.pop("/tmp").startswith("ok")
    assert told.pop("/dev/shm").startswith("ok")
    assert {name: word for name, word in told.items() if word not in ("EROFS", "EACCES", "EPERM", "ENOENT")} == {}


async def test_what_one_sandbox_writes_is_not_there_in_the_next_nor_on_the_host(sandboxes: Sandboxes) -> None:
    first = await sandboxes.run(
        "import os\nfor folder in ('/tmp', '/dev/shm'):\n    open(f'{folder}/left-' + os.environ['EVAL_ID'], 'w').write('x')\n"
    )
    second = await sandboxes.run("import os\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'))")

    assert first.outcome.reason is Reason.EXIT_ZERO
    assert second.out == "[] []"
    for folder in ("/tmp", "/dev/shm"):
        assert not Path(folder, f"left-{first.evaluation_id}").exists()


async def test_no_mount_of_a_sandbox_appears_on_the_host(sandboxes: Sandboxes) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    evaluation_id = await sandboxes.begin("import time\nprint('up', flush=True)\ntime.sleep(30)")
    await sandboxes.until_output(evaluation_id, b"up")

    assert Path("/proc/self/mountinfo").read_text() == before
    await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)


# --- network ----------------------------------------------------------------------------------------------------------------


class Listener:
    """A real listener on the host, which keeps what reaches it."""

    def __init__(self, address: tuple[str, int] | str, family: int, kind: int) -> None:
        self._socket = socket.socket(family, kind)
        self._socket.bind(address)
        self._socket.settimeout(0.1)
        if kind == socket.SOCK_STREAM:
            self._socket.listen()
        self._family, self._kind = family, kind
        self.address = self._socket.getsockname()
        self.reached: list[bytes] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while not self._done.is_set():
            try:
                if self._kind == socket.SOCK_DGRAM:
                    self.reached.append(self._socket.recv(100))
                else:
                    with self._socket.accept()[0] as peer:
                        self.reached.append(peer.recv(100))
            except TimeoutError:
                continue

    async def proves_to_work(self, word: bytes) -> None:
        """Reach it from the host. What came before is there before this is."""
        with socket.socket(self._family, self._kind) as own:
            own.connect(self.address)
            own.send(word)
        await wait_until_async(
            lambda: word in self.reached, timeout=5, describe="the listener to be reached from the host"
        )

    def close(self) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()


@contextmanager
def listening(address: tuple[str, int] | str, family: int, kind: int) -> Iterator[Listener]:
    listener = Listener(address, family, kind)
    try:
        yield listener
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["ipv4", "ipv6"]
)
async def test_the_hosts_loopback_is_not_the_sandboxes(sandboxes: Sandboxes, family: int, host: str) -> None:
    with (
        listening((host, 0), family, socket.SOCK_STREAM) as tcp,
        listening((host, 0), family, socket.SOCK_DGRAM) as udp,
    ):
        for listener in (tcp, udp):
            await listener.proves_to_work(b"before")
        ran = await sandboxes.run(
            TRY + f"import socket\nfamily = {int(family)}\n"
            f"attempt('tcp', lambda: socket.socket(family).connect(({host!r}, {tcp.address[1]})))\n"
            "udp = socket.socket(family, socket.SOCK_DGRAM)\n"
            f"attempt('udp', lambda: udp.sendto(b'attack', ({host!r}, {udp.address[1]})))\n"
        )
        for listener in (tcp, udp):
            await listener.proves_to_work(b"after")

    assert results(ran)["tcp"] in ("ECONNREFUSED", "ENETUNREACH", "EADDRNOTAVAIL")
    assert tcp.reached == udp.reached == [b"before", b"after"]


async def test_there_is_no_way_out_to_any_network(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        TRY + "import socket\n"
        "def tcp(host, port):\n    s = socket.socket(); s.settimeout(3); s.connect((host, port))\n"
        "def udp(host, port):\n    socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', (host, port))\n"
        "attempt('tcp', lambda: tcp('192.0.2.1', 80))\n"
        "attempt('udp', lambda: udp('192.0.2.1', 53))\n"
        "attempt('metadata', lambda: tcp('169.254.169.254', 80))\n"
        "attempt('private', lambda: tcp('10.0.0.1', 443))\n"
        "attempt('ipv6', lambda: socket.create_connection(('2001:db8::1', 80), timeout=3))\n"
        "attempt('broadcast', lambda: udp('255.255.255.255', 67))\n"
        "attempt('interfaces', lambda: [name for _, name in socket.if_nameindex()])\n"
        "try: print('dns', socket.getaddrinfo('example.com', 80))\nexcept socket.gaierror: print('dns none')\n"
    )

    told = results(ran)
    assert told.pop("interfaces") == "ok ['lo']"
    assert told.pop("dns") == "none"
    assert told.pop("broadcast") in ("ENETUNREACH", "EACCES")
    assert set(told.values()) == {"ENETUNREACH"}, told


async def test_the_hosts_unix_sockets_cannot_be_reached(sandboxes: Sandboxes, tmp_path: Path) -> None:
    path, abstract = str(tmp_path / "socket"), f"\0crucible-test-{os.getpid()}"
    with (
        listening(path, socket.AF_UNIX, socket.SOCK_STREAM) as by_path,
        listening(abstract, socket.AF_UNIX, socket.SOCK_STREAM) as by_name,
    ):
        for listener in (by_path, by_name):
            await listener.proves_to_work(b"before")
        ran = await sandboxes.run(
            TRY + "import socket\n"
            f"attempt('path', lambda: socket.socket(socket.AF_UNIX).connect({path!r}))\n"
            f"attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect({abstract!r}))\n"
        )
        for listener in (by_path, by_name):
            await listener.proves_to_work(b"after")

    assert results(ran) == {"path": "ENOENT", "abstract": "ECONNREFUSED"}
    assert by_path.reached == by_name.reached == [b"before", b"after"]


async def test_sandboxes_cannot_reach_each_other(sandboxes: Sandboxes) -> None:
    server = await sandboxes.begin(
        "import socket\ns = socket.create_server(('0.0.0.0', 7000))\nu = socket.socket(socket.AF_UNIX); u.bind('\\0meet'); u.listen()\n"
        "print('listening', flush=True)\ns.accept(); print('REACHED', flush=True)\n"
    )
    await sandboxes.until_output(server, b"listening")
    client = await sandboxes.run(
        TRY + "import socket\nattempt('tcp', lambda: socket.create_connection(('127.0.0.1', 7000), timeout=2))\n"
        "attempt('abstract', lambda: socket.socket(socket.AF_UNIX).connect('\\0meet'))\n"
    )

    assert results(client) == {"tcp": "ECONNREFUSED", "abstract": "ECONNREFUSED"}
    await sandboxes.client.stop(server, Reason.CANCELLED_BY_USER)
    assert b"REACHED" not in (await sandboxes.end(server)).stdout


async def test_sockets_that_no_network_namespace_covers_cannot_be_made(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        TRY + "import socket\n"
        "attempt('vsock', lambda: socket.socket(40, socket.SOCK_STREAM))\n"
        "attempt('alg', lambda: socket.socket(38, socket.SOCK_SEQPACKET))\n"
        "attempt('packet', lambda: socket.socket(17, socket.SOCK_RAW))\n"
        "attempt('bluetooth', lambda: socket.socket(31, socket.SOCK_RAW))\n"
        "attempt('netfilter', lambda: socket.socket(16, socket.SOCK_RAW, 12))\n"
        "attempt('raw', lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))\n"
        "attempt('raw6', lambda: socket.socket(socket.AF_INET6, socket.SOCK_RAW, 58))\n"
    )

    told = results(ran)
    assert (told.pop("raw"), told.pop("raw6")) == ("EPERM", "EPERM")
    assert set(told.values()) == {"EAFNOSUPPORT"}


# --- see and touch others ---------------------------------------------------------------------------------------------------


async def test_other_processes_cannot_be_seen(sandboxes: Sandboxes) -> None:
    neighbour = await sandboxes.begin("import time\nprint('up', flush=True)\ntime.sleep(30)")
    await sandboxes.until_output(neighbour, b"up")
    ran = await sandboxes.run(
        "import os\nprint(sorted(int(n) for n in os.listdir('/proc') if n.isdigit()), os.getpid())"
    )

    assert ran.out == "[1, 2] 2"
    await sandboxes.client.stop(neighbour, Reason.CANCELLED_BY_USER)


async def test_no_signal_leaves_the_sandbox(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        TRY + "import os\n"
        f"attempt('platform', lambda: os.kill({os.getpid()}, 9))\n"
        "attempt('group', lambda: os.killpg(1, 9))\n"
        "attempt('all', lambda: os.kill(-1, 15))\n"
    )

    told = results(ran)
    assert told["platform"] == "ESRCH"
    assert told["all"] in ("ESRCH", "ok None")
    assert (await sandboxes.run("print('still here')")).out == "still here"


# --- become more -------------------------------------------------------------------------------------------------------------


async def test_there_is_no_privilege_to_be_had(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        TRY + "import os\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines())\n"
        "for name in ('CapInh', 'CapPrm', 'CapEff', 'CapBnd', 'CapAmb'): print(name, int(status[name], 16))\n"
        "print('NoNewPrivs', int(status['NoNewPrivs']))\nprint('Seccomp', int(status['Seccomp']))\n"
        "print('uid', os.getresuid())\nprint('groups', os.getgroups())\n"
        "attempt('setuid', lambda: os.setuid(0))\nattempt('setgroups', lambda: os.setgroups([0]))\n"
        "attempt('chroot', lambda: os.chroot('/tmp'))\nattempt('nice', lambda: os.nice(-5))\n"
        "attempt('chown', lambda: os.chown('/tmp', 0, 0))\n"
    )

    told = results(ran)
    assert {told.pop(name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0"}
    assert (told.pop("NoNewPrivs"), told.pop("Seccomp")) == ("1", "2")
    assert told.pop("uid") == "(65532, 65532, 65532)"
    assert "0" not in told.pop("groups").strip("[]").split(", ")
    # EINVAL: the sandbox's user namespace does not even have that user.
    assert {name: word for name, word in told.items() if word not in ("EPERM", "EACCES", "EINVAL")} == {}


async def test_setuid_programs_give_nothing(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, subprocess, stat\nfor name in ('su', 'sudo', 'mount', 'passwd', 'newgrp'):\n"
        "    path = f'/usr/bin/{name}'\n"
        "    if os.path.exists(path):\n"
        "        done = subprocess.run([path], stdin=-3, capture_output=True, timeout=10)\n"
        "print(subprocess.run(['id', '-u'], capture_output=True, text=True).stdout)"
    )

    assert ran.out == "65532", ran


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers in this test are x86_64's; run it there")
async def test_dangerous_system_calls_are_refused(sandboxes: Sandboxes) -> None:
    calls = {
        "unshare-user": (272, 0x10000000),
        "unshare-mount": (272, 0x00020000),
        "setns": (308, 0, 0),
        "clone-newuser": (56, 0x10000000 | 17, 0, 0, 0, 0),
        "clone-newpid": (56, 0x20000000 | 17, 0, 0, 0, 0),
        "mount": (165, 0, 0, 0, 0, 0),
        "umount": (166, 0, 0),
        "pivot_root": (155, 0, 0),
        "fsopen": (430, 0, 0),
        "open_tree": (428, -100, 0, 0),
        "move_mount": (429, -100, 0, -100, 0, 0),
        "ptrace": (101, 16, 1, 0, 0),
        "process_vm_readv": (310, 1, 0, 0, 0, 0, 0),
        "process_vm_writev": (311, 1, 0, 0, 0, 0, 0),
        "pidfd_getfd": (438, 0, 0, 0),
        "kcmp": (312, 1, 2, 0, 0, 0),
        "bpf": (321, 0, 0, 0),
        "perf_event_open": (298, 0, 0, -1, -1, 0),
        "userfaultfd": (323, 0),
        "io_uring_setup": (425, 8, 0),
        "kexec_load": (246, 0, 0, 0, 0),
        "init_module": (175, 0, 0, 0),
        "finit_module": (313, 0, 0, 0),
        "open_by_handle_at": (304, 0, 0, 0),
        "keyctl": (250, 0, -3, 0, 0, 0),
        "request_key": (249, 0, 0, 0, 0),
        "shmget": (29, 0, 4096, 0o1600),
        "memfd_secret": (447, 0),
        "reboot": (169, 0, 0, 0, 0),
        "swapon": (167, 0, 0),
        "settimeofday": (164, 0, 0),
        "syslog": (103, 3, 0, 0),
        "prlimit-runner": (302, 1, 0, 0, 0),
        "affinity-runner": (203, 1, 8, 0),
        "priority-runner": (141, 0, 1, 19),
        "priority-user": (141, 2, 0, 19),
        "ioprio-runner": (251, 1, 1, 0),
        "hugepages": (9, 0, 2 << 20, 3, 0x40022, -1, 0),
        "personality": (135, 0x0040000),
        "tiocsti": (16, 0, 0x5412, 0),
    }
    ran = await sandboxes.run(
        TRY + SYSCALL + f"for name, call in {calls!r}.items(): attempt(name, lambda: syscall(*call))\n"
        "attempt('clone3', lambda: syscall(435, 0, 0))\n"
    )

    told = results(ran)
    assert told.pop("clone3") == "ENOSYS"
    assert {name: word for name, word in told.items() if word != "EPERM"} == {}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="there are 32-bit calls on x86_64 only; run it there")
async def test_calls_in_another_architectures_numbering_kill(sandboxes: Sandboxes) -> None:
    # mov eax, 20 (getpid of i386); int 0x80; ret
    ran = await sandboxes.run(
        "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7, flags=0x22)\nm.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n"
        "address = ctypes.addressof(ctypes.c_char.from_buffer(m))\nprint('trying', flush=True)\n"
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(address)())"
    )
    # the same through x32's numbering: getpid with bit 30
    x32 = await sandboxes.run(SYSCALL + "print('trying', flush=True)\nprint(syscall(0x40000000 + 39))")

    assert (ran.outcome.reason, ran.outcome.signal, ran.out) == (Reason.SIGNAL, 31, "trying")
    assert (x32.outcome.reason, x32.outcome.signal, x32.out) == (Reason.SIGNAL, 31, "trying")


async def test_each_sandbox_is_another_user_of_the_host_and_none_is_root(sandboxes: Sandboxes) -> None:
    ids = [await sandboxes.begin("import time\nprint('up', flush=True)\ntime.sleep(30)") for _ in range(2)]
    for evaluation_id in ids:
        await sandboxes.until_output(evaluation_id, b"up")

    users = []
    for evaluation_id in ids:
        owners = {Path(f"/proc/{pid}").stat().st_uid for pid in processes_of(evaluation_id)}
        status = [Path(f"/proc/{pid}/status").read_text() for pid in processes_of(evaluation_id)]
        real = {line.split()[1] for text in status for line in text.splitlines() if line.startswith("Uid:")}
        users.append(real)
        assert owners
        assert len(real) == 1
    if os.geteuid() == 0:
        assert users[0] != users[1]
        assert {"0"} not in users
    else:
        assert users == [{str(os.getuid())}] * 2
    for evaluation_id in ids:
        await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)
