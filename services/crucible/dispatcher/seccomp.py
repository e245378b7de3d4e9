"""The system calls that a sandbox may not make, as a classic BPF program for `bwrap --seccomp`.

Namespaces already take the host away; this takes away the parts of the kernel that a Python program does not need and that were the
way out of sandboxes before: tracing, mounting, new namespaces, key rings, BPF, io_uring and their like. It also protects the
runner from what Linux lets any process do to another of the same user (`prlimit`, priorities), and closes the one way to the outside
that no namespace covers: socket families such as AF_VSOCK, which reaches the hypervisor.

It is a list of what is refused, not of what is allowed: `subprocess`, `multiprocessing` and any library keep working. Numbers are those of
Linux 6.18's `asm/unistd_64.h` (x86_64) and `asm-generic/unistd.h` (aarch64). Pure: it builds bytes and applies nothing.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

# linux/audit.h
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000
# linux/seccomp.h
_RET_KILL_PROCESS = 0x80000000
_RET_ERRNO = 0x00050000
_RET_ALLOW = 0x7FFF0000
# linux/bpf_common.h: load word at absolute offset, jump if equal, jump if any bit set, jump if greater or equal, return.
_LOAD, _JEQ, _JSET, _JGE, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
# struct seccomp_data
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGUMENTS = 0, 4, 16

# linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. (NEWTIME is for unshare and clone3 only.)
_CLONE_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_MAP_SHARED, _MAP_ANONYMOUS, _MAP_HUGETLB = 0x1, 0x20, 0x40000
_MFD_HUGETLB, _MADV_PAGEOUT = 0x4, 21
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_NETLINK_ROUTE = 0
_ALL_ONES = 0xFFFFFFFF

# Refused whatever the arguments: (x86_64, aarch64), None where the architecture has no such call.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # other processes' memory and descriptors
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # mounts, old and new interface
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_tree_attr": (467, 467),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    # namespaces
    "unshare": (272, 97),
    "setns": (308, 268),
    # kernel machinery with a history
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # memory that no limit of a process shows
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    # the machine itself
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "lookup_dcookie": (212, 18),
}
# Looked at more closely.
_INSPECTED: dict[str, tuple[int, int]] = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "ioctl": (16, 29),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "prlimit64": (302, 261),
    "sched_setaffinity": (203, 122),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "personality": (135, 92),
    "mmap": (9, 222),
    "madvise": (28, 233),
    "memfd_create": (319, 279),
}


@dataclass(frozen=True, slots=True)
class _Instruction:
    code: int
    k: int
    if_true: int = 0
    if_false: int = 0

    def encode(self) -> bytes:
        return struct.pack("=HBBI", self.code, self.if_true, self.if_false, self.k)


def _load(offset: int) -> _Instruction:
    return _Instruction(_LOAD, offset)


def _argument(index: int) -> _Instruction:
    # Both architectures are little endian; every argument looked at here is an `int` to the kernel, so its low half decides.
    return _load(_OFFSET_ARGUMENTS + 8 * index)


def _fail(error: int) -> _Instruction:
    return _Instruction(_RETURN, _RET_ERRNO | error)


_ALLOW = _Instruction(_RETURN, _RET_ALLOW)
_EPERM = _fail(errno.EPERM)


def _when(number: int, body: list[_Instruction]) -> list[_Instruction]:
    """Run `body`, which returns on every path, if the call has this number."""
    return [_Instruction(_JEQ, number, 0, len(body)), *body]


def _only(index: int, *values: int, error: int = errno.EPERM) -> list[_Instruction]:
    """Allow the call if an argument is one of `values`."""
    tests = [_Instruction(_JEQ, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [_argument(index), *tests, _fail(error), _ALLOW]


def _never(index: int, *values: int) -> list[_Instruction]:
    """Refuse the call if an argument is one of `values`."""
    tests = [_Instruction(_JEQ, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [_argument(index), *tests, _ALLOW, _EPERM]


def _without_bits(index: int, bits: int) -> list[_Instruction]:
    """Refuse the call if an argument has any of `bits`."""
    return [_argument(index), _Instruction(_JSET, bits, 1, 0), _ALLOW, _EPERM]


def _zero_both(first: int, second: int, *, value_of_first: int) -> list[_Instruction]:
    """Allow the call if the first argument has a value and the second, a process, is the caller itself."""
    return [
        _argument(first),
        _Instruction(_JEQ, value_of_first, 0, 2),
        _argument(second),
        _Instruction(_JEQ, 0, 1, 0),
        _EPERM,
        _ALLOW,
    ]


def _sockets() -> list[_Instruction]:
    """Allow the families that a network namespace or the file system covers; of netlink only what lists interfaces."""
    return [
        _argument(0),
        _Instruction(_JEQ, _AF_UNIX, 6, 0),
        _Instruction(_JEQ, _AF_INET, 5, 0),
        _Instruction(_JEQ, _AF_INET6, 4, 0),
        _Instruction(_JEQ, _AF_NETLINK, 0, 2),
        _argument(2),
        _Instruction(_JEQ, _NETLINK_ROUTE, 1, 0),
        _fail(errno.EAFNOSUPPORT),
        _ALLOW,
    ]


def _private_or_of_a_file() -> list[_Instruction]:
    """Refuse anonymous memory that is shared: its pages live on when no process has them mapped, where no one sees them."""
    return [
        _argument(3),
        _Instruction(_JSET, _MAP_HUGETLB, 3, 0),
        _Instruction(_JSET, _MAP_ANONYMOUS, 0, 1),
        _Instruction(_JSET, _MAP_SHARED, 1, 0),
        _ALLOW,
        _EPERM,
    ]


def _inspections(*, counted: bool) -> dict[str, list[_Instruction]]:
    itself = _only(0, 0)
    return {
        "clone": _without_bits(0, _CLONE_NAMESPACES),
        # Its flags are in memory, where no filter can look; libc falls back to clone.
        "clone3": [_fail(errno.ENOSYS)],
        "ioctl": _never(1, _TIOCSTI, _TIOCLINUX),
        "socket": _sockets(),
        "socketpair": _only(0, _AF_UNIX, error=errno.EAFNOSUPPORT),
        "prlimit64": itself,
        "sched_setaffinity": itself,
        "sched_setparam": itself,
        "sched_setscheduler": itself,
        "sched_setattr": itself,
        "setpriority": _zero_both(0, 1, value_of_first=0),
        "ioprio_set": _zero_both(0, 1, value_of_first=1),
        "personality": _only(0, 0, _ALL_ONES),
        "mmap": _without_bits(3, _MAP_HUGETLB) if counted else _private_or_of_a_file(),
        "memfd_create": _without_bits(1, _MFD_HUGETLB) if counted else [_EPERM],
        "madvise": [_ALLOW] if counted else _never(2, _MADV_PAGEOUT),
    }


def supported(machine: str) -> bool:
    """Whether there is a filter for this architecture (`platform.machine()`)."""
    return machine in _AUDIT_ARCH


def build_filter(machine: str, *, counted: bool) -> bytes:
    """Return the program for an architecture, as an array of `struct sock_filter`.

    Args:
        machine: `x86_64` or `aarch64`, as `platform.machine()` says.
        counted: whether a control group counts the memory. Where none does, memory that processes can hold without having it
            mapped and resident (anonymous files, shared anonymous memory, pages pushed to swap) is refused.

    Raises:
        KeyError: there is no filter for this architecture.
    """
    column = list(_AUDIT_ARCH).index(machine)
    program = [
        _load(_OFFSET_ARCH),
        # A foreign architecture's numbers mean other calls (32-bit code on a 64-bit kernel): no second chance.
        _Instruction(_JEQ, _AUDIT_ARCH[machine], 1, 0),
        _Instruction(_RETURN, _RET_KILL_PROCESS),
        _load(_OFFSET_NUMBER),
    ]
    if machine == "x86_64":
        program += [_Instruction(_JGE, _X32_BIT, 0, 1), _Instruction(_RETURN, _RET_KILL_PROCESS)]
    for name, body in _inspections(counted=counted).items():
        program += _when(_INSPECTED[name][column], body)
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            program += _when(number, [_EPERM])
    program.append(_ALLOW)
    return b"".join(instruction.encode() for instruction in program)
