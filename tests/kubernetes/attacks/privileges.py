"""Attacks on what holds a process in: become someone else, see and touch other processes, ask the kernel for what is the host's.

Where doing the thing would harm the machine on which the control runs, the attack asks for it in a way that the kernel refuses as
nonsense, but only after it has found that the caller may: then `EINVAL` is a success, and `EPERM` is not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from tests.kubernetes.attacks.trying import (
    CLONE_NEWUSER,
    Facts,
    RefusedError,
    also_as_root_of_a_user_namespace,
    attack,
    runner,
)

# System call numbers of x86_64 and, where they differ, of aarch64.
ARM = os.uname().machine == "aarch64"
NUMBERS = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "ptrace": (101, 117),
    "init_module": (175, 105),
    "kexec_load": (246, 104),
    "reboot": (169, 142),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
    "adjtimex": (159, 171),
    "syslog": (103, 116),
    "swapon": (167, 224),
    "process_vm_readv": (310, 270),
    "setns": (308, 268),
    "unshare": (272, 97),
    "fsopen": (430, 430),
}
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
MS_REC_PRIVATE = 0x4000 | 0x40000
PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
PR_GET_NO_NEW_PRIVS = 39
MNT_DETACH = 2
ETHERTYPE_ALL = 0x0003
RTM_NEWADDR, RTM_DELADDR = 20, 21
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call."""
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    result: int = _libc.syscall(ctypes.c_long(NUMBERS[name][ARM]), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def permitted(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None, nonsense: set[int]) -> str:
    """Make a call that makes no sense, and find out whether the kernel refused the caller or the nonsense."""
    try:
        call(name, *arguments)
    except OSError as error:
        if error.errno not in nonsense:
            raise
    return f"{name} is permitted"


def status(field: str, process: str = "self") -> str:
    """Return a field of a process' status."""
    found = re.search(rf"^{field}:\s*(.*)$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    if found is None:
        raise RefusedError(f"the status of a process has no {field}")
    return found[1]


# --- become someone -----------------------------------------------------------------------------------------------------------


@attack
def become_root(facts: Facts) -> str:
    """Become root."""
    os.setresuid(0, 0, 0)
    return f"is user {os.getuid()}"


@attack
@also_as_root_of_a_user_namespace
def join_groups(facts: Facts) -> str:
    """Join the groups of root and of the disks."""
    os.setgroups([0, 6])
    return f"is in groups {os.getgroups()}"


@attack
def capabilities(facts: Facts) -> str:
    """Hold a capability."""
    held = {name: status(name) for name in ("CapInh", "CapPrm", "CapEff")}
    found = {name: value for name, value in held.items() if int(value, 16)}
    if not found:
        raise RefusedError("holds none")
    return ", ".join(f"{name} {value}" for name, value in found.items())


@attack
def privileges_by_executing(facts: Facts) -> str:
    """Gain privileges by executing a program that has them, which `no_new_privs` forbids."""
    if _libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1:
        raise RefusedError("no_new_privs is set")
    return "a set-user-id program would gain its owner's privileges"


@attack
def own_a_file_of_another(facts: Facts) -> str:
    """Give a file to root."""
    path = f"/tmp/owned-{os.getpid()}"
    Path(path).touch()
    try:
        os.chown(path, 0, 0)
    finally:
        os.unlink(path)
    return "gave a file to root"


# --- other processes ------------------------------------------------------------------------------------------------------------


def victim(facts: Facts) -> int:
    """Return whom to attack: the runner; in the control, where nothing can end a container's PID 1, a process like any other."""
    if facts.get("victim") != "bystander":
        return runner(facts)
    child = os.fork()
    if child == 0:
        signal.pause()
    return child


@attack
@also_as_root_of_a_user_namespace
def trace_the_runner(facts: Facts) -> str:
    """Take the runner over with ptrace."""
    call("ptrace", PTRACE_SEIZE, runner(facts), 0, 0)
    return "the runner is traced"


@attack
@also_as_root_of_a_user_namespace
def read_the_runner(facts: Facts) -> str:
    """Read the memory of the runner with process_vm_readv."""
    process = runner(facts)
    with Path(f"/proc/{process}/maps").open() as maps:
        start = int(maps.readline().split("-")[0] or "0", 16)
    buffer = ctypes.create_string_buffer(8)
    local = (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 8)
    remote = (ctypes.c_size_t * 2)(start, 8)
    call("process_vm_readv", process, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)
    return f"read {buffer.raw!r}"


@attack
@also_as_root_of_a_user_namespace
def end_the_runner(facts: Facts) -> str:
    """End or stop the runner, the only witness of how the code ends."""
    target = victim(facts)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGSTOP, signal.SIGKILL):
        os.kill(target, number)
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        state = status("State", str(target))
        if state[0] in "TtZX":
            return f"process {target} is {state}"
    raise RefusedError("the runner lives on")


@attack
@also_as_root_of_a_user_namespace
def limits_of_the_runner(facts: Facts) -> str:
    """Lower the limits of the runner, so that it cannot tell how the code ends."""
    import resource

    target = victim(facts)
    resource.prlimit(target, resource.RLIMIT_CPU, resource.prlimit(target, resource.RLIMIT_CPU))
    return "may set the limits of the runner"


@attack
def uncover_the_runner(facts: Facts) -> str:
    """Take away what is mounted over /proc, in a namespace where that is allowed, and reach the runner in what is beneath."""
    if facts.get("cover"):
        call("unshare", CLONE_NEWNS)
        call("mount", b"none", b"/", None, MS_REC_PRIVATE, None)
        call("mount", b"tmpfs", b"/proc", b"tmpfs", 0, None)
    call("unshare", CLONE_NEWNS | (0 if facts.get("cover") else CLONE_NEWUSER))
    call("umount2", b"/proc", MNT_DETACH)
    for path in ("environ", "fd/1", "mem", "root/etc/passwd"):
        try:
            os.close(os.open(f"/proc/1/{path}", os.O_RDWR if path == "mem" else os.O_RDONLY))
        except OSError:
            continue
        return f"opened /proc/1/{path} of the runner"
    raise RefusedError("nothing of the runner can be opened")


@attack
def processes_of_others(facts: Facts) -> str:
    """See a process that is not the program's own."""
    return f"sees process {runner(facts)}"


# --- namespaces and mounts ------------------------------------------------------------------------------------------------------


@attack
@also_as_root_of_a_user_namespace
def enter_the_runners_namespaces(facts: Facts) -> str:
    """Enter the namespaces of the runner."""
    descriptor = os.open(f"/proc/{runner(facts)}/ns/net", os.O_RDONLY)
    call("setns", descriptor, CLONE_NEWNET)
    return "entered the network namespace of the runner"


def on_a_mount_point(mount: Callable[[str], str]) -> str:
    """Do something with a folder to mount on."""
    path = f"/tmp/mount-{os.getpid()}"
    os.mkdir(path)
    try:
        return mount(path)
    finally:
        os.rmdir(path)


@attack
@also_as_root_of_a_user_namespace
def mount_a_file_system(facts: Facts) -> str:
    """Mount a file system."""

    def mount(path: str) -> str:
        call("mount", b"none", path.encode(), b"tmpfs", 0, b"")
        call("umount2", path.encode(), 0)
        return "mounted a file system in memory"

    return on_a_mount_point(mount)


@attack
@also_as_root_of_a_user_namespace
def mount_by_the_new_calls(facts: Facts) -> str:
    """Make a file system with the newer system calls."""
    os.close(call("fsopen", b"tmpfs", 0))
    return "made a file system"


@attack
@also_as_root_of_a_user_namespace
def control_groups(facts: Facts) -> str:
    """Mount the control groups and make one, whose release agent the host's kernel would run as root."""

    def mount(path: str) -> str:
        failure: OSError | None = None
        for kind, options in ((b"cgroup", b"pids"), (b"cgroup", b"memory"), (b"cgroup2", b"")):
            try:
                call("mount", b"none", path.encode(), kind, 0, options)
            except OSError as error:
                failure = error
                continue
            try:
                own = os.path.join(path, "attack")
                os.mkdir(own)
                os.rmdir(own)
                return "mounted the control groups and made one"
            finally:
                call("umount2", path.encode(), 0)
        raise failure or OSError(errno.ENOENT, "no control groups")

    return on_a_mount_point(mount)


@attack
def change_root(facts: Facts) -> str:
    """Change the root folder."""
    os.chroot("/tmp")
    return "changed the root folder"


@attack
@also_as_root_of_a_user_namespace
def pivot_root(facts: Facts) -> str:
    """Exchange the root file system."""
    return permitted("pivot_root", b"/tmp", b"/tmp", nonsense={errno.EINVAL, errno.EBUSY})


@attack
@also_as_root_of_a_user_namespace
def file_by_its_handle(facts: Facts) -> str:
    """Open a file of the host by its number in the file system, past all mounts (as in the "shocker" exploit)."""
    handle = ctypes.create_string_buffer((8).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(8), 16)
    return permitted(
        "open_by_handle_at", os.open("/tmp", os.O_RDONLY), handle, 0, nonsense={errno.ESTALE, errno.EINVAL}
    )


# --- the kernel -------------------------------------------------------------------------------------------------------------------


@attack
@also_as_root_of_a_user_namespace
def code_in_the_kernel(facts: Facts) -> str:
    """Run code in the kernel: load a module, another kernel to be started next, or a BPF map for a program."""
    ways = (
        lambda: permitted("init_module", b"", 0, b"", nonsense={errno.ENOEXEC, errno.EINVAL, errno.EFAULT}),
        lambda: permitted("kexec_load", 0, 0, None, 0xFF, nonsense={errno.EINVAL}),
        make_bpf_map,
    )
    failure = OSError()
    for way in ways:
        try:
            return way()
        except OSError as error:
            failure = error
    raise failure


def make_bpf_map() -> str:
    """Make an array in the kernel, for BPF programs, with one element of 8 bytes."""
    words = b"".join(number.to_bytes(4, "little") for number in (2, 4, 8, 1))
    os.close(call("bpf", 0, ctypes.create_string_buffer(words + bytes(112), 128), 128))
    return "made a map in the kernel"


@attack
@also_as_root_of_a_user_namespace
def reboot(facts: Facts) -> str:
    """Restart the machine."""
    return permitted("reboot", 0, 0, 0, None, nonsense={errno.EINVAL})


@attack
@also_as_root_of_a_user_namespace
def performance_counters(facts: Facts) -> str:
    """Watch the processor through performance counters."""
    # PERF_TYPE_SOFTWARE, 112 bytes, PERF_COUNT_SW_CPU_CLOCK, of this process.
    words = (1).to_bytes(4, "little") + (112).to_bytes(4, "little")
    os.close(call("perf_event_open", ctypes.create_string_buffer(words + bytes(104), 112), 0, -1, -1, 0))
    return "opened a counter"


@attack
def keys_of_the_kernel(facts: Facts) -> str:
    """Find a key that a program of the node keeps in the kernel for the same user, whom no namespace tells apart."""
    # KEYCTL_SEARCH in KEY_SPEC_USER_KEYRING.
    return f"found key {call('keyctl', 10, -4, b'user', facts['key'].encode(), 0)}"


@attack
def faults_in_user_space(facts: Facts) -> str:
    """Handle page faults in user space, which makes races in the kernel easy to win."""
    os.close(call("userfaultfd", 0))
    return "may handle page faults"


@attack
def io_uring(facts: Facts) -> str:
    """Make an io_uring, through which most system calls can be made past a filter."""
    os.close(call("io_uring_setup", 4, ctypes.create_string_buffer(120)))
    return "made a ring"


@attack
@also_as_root_of_a_user_namespace
def clock(facts: Facts) -> str:
    """Set the clock."""
    # ADJ_TICK with a length that no clock has.
    request = ctypes.create_string_buffer((0x4000).to_bytes(4, "little") + bytes(252), 256)
    return permitted("adjtimex", request, nonsense={errno.EINVAL})


@attack
@also_as_root_of_a_user_namespace
def host_name(facts: Facts) -> str:
    """Change the name of the host."""
    socket.sethostname(socket.gethostname())
    return "set the name"


@attack
def kernel_log_by_call(facts: Facts) -> str:
    """Read the host's kernel log with the system call for it."""
    buffer = ctypes.create_string_buffer(4096)
    length = call("syslog", 3, buffer, 4096)
    text = buffer.raw[:length].decode(errors="replace")
    if "Starting gVisor" in text:
        raise RefusedError("it is gVisor's own, an invention")
    return f"read {length} bytes"


@attack
@also_as_root_of_a_user_namespace
def swap_space(facts: Facts) -> str:
    """Give the kernel a file to swap to."""
    return permitted("swapon", b"/nonexistent", 0, nonsense={errno.ENOENT})


# --- the network's own privileges ---------------------------------------------------------------------------------------------


@attack
@also_as_root_of_a_user_namespace
def raw_socket(facts: Facts) -> str:
    """Make a raw IP socket, with which packets of any protocol and any sender can be written."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW):
        return "made a raw IPv4 socket"


@attack
@also_as_root_of_a_user_namespace
def raw_ipv6_socket(facts: Facts) -> str:
    """Make a raw IPv6 socket, with which neighbours can be deceived."""
    with socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6):
        return "made a raw IPv6 socket"


@attack
@also_as_root_of_a_user_namespace
def packet_socket(facts: Facts) -> str:
    """Make a packet socket, which sees and writes the link's own frames."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE_ALL)):
        return "made a packet socket"


@attack
@also_as_root_of_a_user_namespace
def change_of_addresses(facts: Facts) -> str:
    """Give an interface another address through netlink."""
    body = struct.pack("BBBBI", socket.AF_INET, 32, 0, 0, socket.if_nametoindex("lo"))
    body += struct.pack("HH4s", 8, 2, socket.inet_aton("192.0.2.77"))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        netlink.settimeout(SECONDS)
        for message, flags in ((RTM_NEWADDR, 0x605), (RTM_DELADDR, 0x005)):
            netlink.send(struct.pack("IHHII", 16 + len(body), message, flags, 1, 0) + body)
            code = struct.unpack("i", netlink.recv(4096)[16:20])[0]
            if code:
                raise OSError(-code, os.strerror(-code))
    return "added an address and removed it"


@attack
@also_as_root_of_a_user_namespace
def network_interface(facts: Facts) -> str:
    """Make a network interface whose other end is one's own program."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"attack0", IFF_TUN | IFF_NO_PI))
    finally:
        os.close(descriptor)
    return "made an interface"


@attack
def sockets_beyond_namespaces(facts: Facts) -> str:
    """Make a socket of a family that no network namespace holds: to the hypervisor, to the kernel's cryptography."""
    for family, kind in ((40, socket.SOCK_STREAM), (38, socket.SOCK_SEQPACKET)):
        try:
            with socket.socket(family, kind):
                return f"made a socket of family {family}"
        except OSError as error:
            failure = error
    raise failure
