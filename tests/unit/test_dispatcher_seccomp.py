"""The filter of system calls, run through an interpreter of classic BPF: what it lets through and what not, on both architectures.

That the kernel takes the same program and acts on it is shown by tests/integration/test_sandbox_attacks.py.
"""

from __future__ import annotations

import errno
import functools
import struct

import pytest

from crucible.dispatcher import seccomp

pytestmark = pytest.mark.unit

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL = 0x7FFF0000, 0x80000000
NAMES = seccomp._REFUSED | seccomp._INSPECTED


def run(program: bytes, *, arch: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel would answer: the returned value of the filter."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, arch, 0, *(value & (2**64 - 1) for value in padded))
    instructions = list(struct.iter_unpack("=HBBI", program))
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = instructions[at]
        at += 1
        match code:
            case 0x20:
                accumulator = struct.unpack_from("<I", data, k)[0]
            case 0x15:
                at += if_true if accumulator == k else if_false
            case 0x45:
                at += if_true if accumulator & k else if_false
            case 0x35:
                at += if_true if accumulator >= k else if_false
            case 0x06:
                return k
            case _:
                raise AssertionError(f"an instruction that the filter has no use for: {code:#x}")


@pytest.fixture(params=ARCHITECTURES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@functools.cache
def program_of(machine: str, counted: bool) -> bytes:
    return seccomp.build_filter(machine, counted=counted)


def answer(machine: str, name: str, *arguments: int, counted: bool = True) -> str:
    number = NAMES[name][list(ARCHITECTURES).index(machine)]
    assert number is not None
    program = program_of(machine, counted)
    result = run(program, arch=ARCHITECTURES[machine], number=number, arguments=arguments)
    return "allowed" if result == ALLOW else errno.errorcode[result & 0xFFFF]


def test_the_program_is_one_that_the_kernel_accepts(machine: str) -> None:
    program = seccomp.build_filter(machine, counted=False)

    count = len(program) // 8
    # BPF_MAXINSNS, and no jump past the end.
    assert len(program) % 8 == 0
    assert count <= 4096
    for at, (code, if_true, if_false, _) in enumerate(struct.iter_unpack("=HBBI", program)):
        if code in (0x15, 0x45, 0x35):
            assert at + 1 + max(if_true, if_false) < count


def test_every_refused_call_is_refused(machine: str) -> None:
    column = list(ARCHITECTURES).index(machine)
    for name, numbers in seccomp._REFUSED.items():
        if numbers[column] is not None:
            assert answer(machine, name) == "EPERM", name


def test_what_is_not_named_is_allowed(machine: str) -> None:
    program = seccomp.build_filter(machine, counted=False)
    named = {numbers[list(ARCHITECTURES).index(machine)] for numbers in NAMES.values()}
    for number in set(range(470)) - named:
        assert run(program, arch=ARCHITECTURES[machine], number=number) == ALLOW, number


def test_no_two_calls_share_a_number() -> None:
    for column in range(2):
        numbers = [numbers[column] for numbers in NAMES.values() if numbers[column] is not None]
        assert len(numbers) == len(set(numbers))


def test_a_foreign_architecture_is_killed(machine: str) -> None:
    program = seccomp.build_filter(machine, counted=True)

    assert run(program, arch=0x40000003, number=20) == KILL
    if machine == "x86_64":
        assert run(program, arch=ARCHITECTURES[machine], number=0x40000000 + 39) == KILL


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("clone", (0x3D0F00,), "allowed"),  # pthread_create
        ("clone", (0x01200011,), "allowed"),  # fork
        ("clone", (0x10000011,), "EPERM"),
        ("clone", (0x40000011,), "EPERM"),
        ("clone", (0x00020011,), "EPERM"),
        ("clone3", (0,), "ENOSYS"),
        ("ioctl", (0, 0x5401), "allowed"),
        ("ioctl", (0, 0x5412), "EPERM"),
        ("ioctl", (0, 0x541C), "EPERM"),
        ("ioctl", (0, 0x5412 | 1 << 32), "EPERM"),  # the kernel looks at 32 bits only
        ("socket", (1, 1, 0), "allowed"),
        ("socket", (2, 1, 0), "allowed"),
        ("socket", (10, 2, 0), "allowed"),
        ("socket", (16, 3, 0), "allowed"),
        ("socket", (16, 3, 12), "EAFNOSUPPORT"),
        ("socket", (40, 1, 0), "EAFNOSUPPORT"),
        ("socket", (38, 5, 0), "EAFNOSUPPORT"),
        ("socket", (40 | 1 << 32, 1, 0), "EAFNOSUPPORT"),
        ("socketpair", (1, 1, 0), "allowed"),
        ("socketpair", (30, 1, 0), "EAFNOSUPPORT"),
        ("prlimit64", (0, 7), "allowed"),
        ("prlimit64", (1, 7), "EPERM"),
        ("sched_setaffinity", (0,), "allowed"),
        ("sched_setaffinity", (1,), "EPERM"),
        ("sched_setscheduler", (1,), "EPERM"),
        ("setpriority", (0, 0, 5), "allowed"),
        ("setpriority", (0, 1, 5), "EPERM"),
        ("setpriority", (1, 0, 5), "EPERM"),
        ("setpriority", (2, 0, 5), "EPERM"),
        ("ioprio_set", (1, 0), "allowed"),
        ("ioprio_set", (1, 1), "EPERM"),
        ("ioprio_set", (3, 0), "EPERM"),
        ("personality", (0xFFFFFFFF,), "allowed"),
        ("personality", (0x0040000,), "EPERM"),
        ("mmap", (0, 4096, 3, 0x22), "allowed"),
        ("mmap", (0, 4096, 3, 0x40022), "EPERM"),
        ("memfd_create", (0, 1), "allowed"),
        ("memfd_create", (0, 4), "EPERM"),
    ],
)
def test_what_depends_on_arguments_is_decided_by_them(
    machine: str, name: str, arguments: tuple[int, ...], expected: str
) -> None:
    assert answer(machine, name, *arguments) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("memfd_create", (0, 1), "EPERM"),
        ("mmap", (0, 4096, 3, 0x22), "allowed"),  # private and anonymous: malloc
        ("mmap", (0, 4096, 3, 0x01), "allowed"),  # shared and of a file
        ("mmap", (0, 4096, 3, 0x02), "allowed"),
        ("mmap", (0, 4096, 3, 0x21), "EPERM"),
        ("mmap", (0, 4096, 3, 0x23), "EPERM"),  # MAP_SHARED_VALIDATE
        ("mmap", (0, 4096, 3, 0x40022), "EPERM"),
        ("madvise", (0, 4096, 4), "allowed"),
        ("madvise", (0, 4096, 21), "EPERM"),
    ],
)
def test_memory_that_can_be_hidden_is_refused_where_nothing_counts_it(
    machine: str, name: str, arguments: tuple[int, ...], expected: str
) -> None:
    assert answer(machine, name, *arguments, counted=False) == expected


def test_an_architecture_without_a_filter_is_said_to_be_unsupported() -> None:
    assert [seccomp.supported(name) for name in ("x86_64", "aarch64", "riscv64")] == [True, True, False]
