"""Attacks on files: read what is the node's or another's, write where nothing may stay, fill what others need.

An attack that finds nothing to read or no place to write fails; that a file is not even there is as good a refusal as any.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.kubernetes.attacks.trying import Facts, RefusedError, also_as_root_of_a_user_namespace, attack, runner

MIB = 1024 * 1024
# Where an evaluation may write, all of it memory of its own.
SCRATCH = ("/tmp", "/dev/shm")
# What a container's engine puts over a path that it hides reads as empty.
READ_BYTES = 64
MOST_FOLDERS = 2000


def read(path: str) -> str:
    """Read the beginning of a file; an empty one counts as hidden."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data = os.read(descriptor, READ_BYTES)
    finally:
        os.close(descriptor)
    if not data:
        raise RefusedError(f"{path} is empty")
    return f"read {len(data)} bytes of {path}"


def first_that_works(paths: Iterable[str], attempt: Callable[[str], str]) -> str:
    """Try one path after the other; fail as the last one does."""
    failure: Exception = RefusedError("there is nothing to try")
    for path in paths:
        try:
            return attempt(path)
        except (OSError, RefusedError) as error:
            failure = error
    raise failure


def listed(path: str) -> str:
    """List a folder; an empty one counts as hidden."""
    names = os.listdir(path)
    if not names:
        raise RefusedError(f"{path} is empty")
    return f"{path} holds {names[0]} and {len(names) - 1} more"


def container_output(path: str) -> str:
    """Open a file for writing that is neither our own output nor a terminal of our own."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        opened, own = os.fstat(descriptor), os.fstat(1)
    finally:
        os.close(descriptor)
    if (opened.st_dev, opened.st_ino) == (own.st_dev, own.st_ino):
        raise RefusedError(f"{path} is the pipe to the runner")
    return f"opened {path}"


def write(path: str) -> str:
    """Open an existing file for writing, and leave it as it is."""
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return f"opened {path} for writing"


def create(folder: str) -> str:
    """Create a file in a folder and remove it."""
    path = os.path.join(folder, f"attack-{os.getpid()}")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)
    return f"created a file in {folder}"


def fill(path: str, limit: int) -> str:
    """Write to a file until it is as large as `limit`, then remove it."""
    written, block = 0, bytes(MIB)
    with open(path, "wb", buffering=0) as file:
        try:
            while written < limit:
                written += file.write(block)
        finally:
            file.truncate(0)
    return f"wrote {written} bytes to {path}"


# --- reading ----------------------------------------------------------------------------------------------------------------


@attack
@also_as_root_of_a_user_namespace
def password_hashes(facts: Facts) -> str:
    """Read the hashes of passwords in /etc/shadow."""
    return read("/etc/shadow")


@attack
@also_as_root_of_a_user_namespace
def kernel_memory(facts: Facts) -> str:
    """Read the kernel's memory, or where in it the kernel keeps its functions."""
    return first_that_works(("/proc/kcore", "/dev/mem", "/dev/port", "/proc/kallsyms", "/proc/modules"), read)


@attack
@also_as_root_of_a_user_namespace
def kernel_log(facts: Facts) -> str:
    """Read the kernel's log."""
    return first_that_works(("/dev/kmsg", "/proc/kmsg"), read)


@attack
def host_kernel(facts: Facts) -> str:
    """Speak to the node's own kernel: its release is what the node tells."""
    found = os.uname().release
    if found != facts["node_kernel"]:
        raise RefusedError(f"the kernel says that it is {found}")
    return f"the kernel is the node's, {found}"


@attack
@also_as_root_of_a_user_namespace
def root_of_the_runner(facts: Facts) -> str:
    """Look around in the root folder of the runner."""
    return listed(f"/proc/{runner(facts)}/root")


@attack
def environment_of_the_runner(facts: Facts) -> str:
    """Read the environment of the runner."""
    return read(f"/proc/{runner(facts)}/environ")


@attack
def memory_of_the_runner(facts: Facts) -> str:
    """Open the memory of the runner."""
    return write(f"/proc/{runner(facts)}/mem")


@attack
def descriptors_of_the_runner(facts: Facts) -> str:
    """List the files that the runner holds open."""
    return listed(f"/proc/{runner(facts)}/fd")


@attack
@also_as_root_of_a_user_namespace
def output_of_the_runner(facts: Facts) -> str:
    """Open what the runner writes its report to, in order to forge one."""
    process = runner(facts)
    return first_that_works((f"/proc/{process}/fd/{number}" for number in (1, 2)), write)


@attack
def namespaces_of_the_runner(facts: Facts) -> str:
    """Read which namespaces the runner is in."""
    return f"the runner is in {os.readlink(f'/proc/{runner(facts)}/ns/mnt')}"


@attack
def output_of_the_container(facts: Facts) -> str:
    """Write to the container's own output past the runner, in order to forge its report."""
    return first_that_works(("/dev/stdout", "/dev/console", "/proc/1/fd/1"), container_output)


@attack
def service_account_token(facts: Facts) -> str:
    """Read the token of the Pod's service account."""
    return first_that_works(
        ("/var/run/secrets/kubernetes.io/serviceaccount/token", "/run/secrets/kubernetes.io/serviceaccount/token"), read
    )


@attack
def secrets_in_the_environment(facts: Facts) -> str:
    """Find a secret, or the address of a service but the API server's, in the environment."""
    words = ("SECRET", "TOKEN", "PASSWORD", "CREDENTIAL", "_SERVICE_HOST", "AWS_", "API_KEY")
    # Kubernetes gives the API server's address to every Pod, whatever the Pod asks for.
    names = [name for name in os.environ if not name.startswith("KUBERNETES_")]
    found = [name for name in names if any(word in name.upper() for word in words)]
    if not found:
        raise RefusedError(f"there are only: {', '.join(sorted(os.environ))}")
    return f"found {found[0]}"


@attack
def files_of_the_node(facts: Facts) -> str:
    """Read a file of the node's through something of it that is mounted."""
    return first_that_works(
        ("/host/etc/machine-id", "/host/etc/hostname", "/var/lib/kubelet/config.yaml", "/etc/kubernetes/kubelet.conf"),
        read,
    )


@attack
def sockets_of_the_node(facts: Facts) -> str:
    """Connect to the container runtime of the node."""

    def connect(path: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
        return f"connected to {path}"

    paths = ("/run/containerd/containerd.sock", "/var/run/docker.sock", "/run/crio/crio.sock")
    return first_that_works((prefix + path for prefix in ("/host", "") for path in paths), connect)


@attack
@also_as_root_of_a_user_namespace
def disks(facts: Facts) -> str:
    """Open a disk of the node."""
    found = [f"/dev/{name}" for name in os.listdir("/dev") if stat.S_ISBLK(os.lstat(f"/dev/{name}").st_mode)]
    return first_that_works(found, read)


@attack
def devices(facts: Facts) -> str:
    """Open a device of the node that is none of the harmless ones."""
    # /dev/fuse is gVisor's own in a sandbox; whoever may not mount can do nothing with it.
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "console", "fuse"}
    found = [f"/dev/{name}" for name in os.listdir("/dev") if name not in harmless]
    characters = [path for path in found if stat.S_ISCHR(os.lstat(path).st_mode)]
    return first_that_works(characters, write)


# --- writing ----------------------------------------------------------------------------------------------------------------


@attack
@also_as_root_of_a_user_namespace
def root_folder(facts: Facts) -> str:
    """Create a file in the root folder."""
    return create("/")


@attack
@also_as_root_of_a_user_namespace
def folders_outside_the_scratch_space(facts: Facts) -> str:
    """Create a file in any folder that is not the sandbox's own memory."""
    paths: list[str] = []
    for top, folders, _ in os.walk("/"):
        folders[:] = [name for name in folders if os.path.join(top, name) not in (*SCRATCH, "/proc", "/sys")]
        paths.append(top)
        if len(paths) >= MOST_FOLDERS:
            break
    return first_that_works(paths, create)


@attack
@also_as_root_of_a_user_namespace
def files_outside_the_scratch_space(facts: Facts) -> str:
    """Open a program, the code or the system's configuration for writing."""
    paths = ["/etc/passwd", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", os.path.realpath("/proc/self/exe")]
    return first_that_works([*paths, __file__], write)


@attack
@also_as_root_of_a_user_namespace
def kernel_parameters(facts: Facts) -> str:
    """Change a parameter of the kernel."""

    def set_to_what_it_is(path: str) -> str:
        value = Path(path).read_bytes()
        with open(path, "wb", buffering=0) as file:
            file.write(value)
        return f"wrote {path}"

    names = (
        "net/ipv4/ip_default_ttl",
        "net/ipv4/ip_forward",
        "kernel/hostname",
        "kernel/core_pattern",
        "vm/overcommit_memory",
    )
    # Only the first two exist for each network by itself, so that no control of this ever touches the host.
    return first_that_works(
        (f"/proc/sys/{name}" for name in (names if facts.get("all_parameters") else names[:2])), set_to_what_it_is
    )


@attack
def program_of_the_runner(facts: Facts) -> str:
    """Overwrite the program that the runner runs, through the link that the kernel keeps to it (as in CVE-2019-5736)."""
    held = os.open(f"/proc/{runner(facts)}/exe", os.O_RDONLY)
    try:
        return write(f"/proc/self/fd/{held}")
    except OSError as error:
        # It is allowed, and will work as soon as the program has ended.
        if error.errno == errno.ETXTBSY:
            return "may be overwritten once it has ended"
        raise
    finally:
        os.close(held)


@attack
@also_as_root_of_a_user_namespace
def device_node(facts: Facts) -> str:
    """Make a device file for the first disk."""
    path = f"/tmp/disk-{os.getpid()}"
    os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(8, 0))
    os.unlink(path)
    return "made a device file"


@attack
def scratch_beyond_its_size(facts: Facts) -> str:
    """Fill /tmp beyond its size."""
    return fill(f"/tmp/fill-{os.getpid()}", facts["tmp_bytes"] + 8 * MIB)


@attack
def disk_through_the_termination_message(facts: Facts) -> str:
    """Fill the node's disk through the one file of the node that a container can write, its termination message."""
    return fill("/dev/termination-log", facts["tmp_bytes"] + 8 * MIB)
