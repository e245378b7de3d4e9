"""Attacks on what there is only so much of: processes, descriptors, processor time. Each stops by itself where nothing stops it."""

from __future__ import annotations

import os
import signal
import time

from tests.kubernetes.attacks.trying import Facts, RefusedError, attack

PROCESSES = 200
DESCRIPTORS = 5000
SPIN_SECONDS = 2.0


@attack
def fork_bomb(facts: Facts) -> str:
    """Start far more processes than an evaluation may have."""
    children = []
    try:
        for _ in range(PROCESSES):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{PROCESSES} processes at once"


@attack
def descriptors(facts: Facts) -> str:
    """Open far more files than an evaluation may."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(DESCRIPTORS)]
    return f"{len(opened)} open files"


@attack
def higher_limits(facts: Facts) -> str:
    """Raise one's own limits."""
    import resource

    raised = []
    for name in ("RLIMIT_NPROC", "RLIMIT_NOFILE", "RLIMIT_FSIZE"):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY:
            raised.append(f"{name} has no limit")
            continue
        try:
            resource.setrlimit(kind, (hard + 1, hard + 1))
            raised.append(f"{name} raised")
        except (ValueError, OSError):
            continue
    if not raised:
        raise RefusedError("all limits stay as they are")
    return ", ".join(raised)


def spin(seconds: float = SPIN_SECONDS, processes: int = 2) -> int:
    """Compute in some processes at once, and return how much was done."""
    readers = []
    for _ in range(processes):
        reading, writing = os.pipe()
        if os.fork() == 0:
            done, until = 0, time.monotonic() + seconds
            while time.monotonic() < until:
                done += sum(range(1000)) > 0
            os.write(writing, str(done).encode())
            os._exit(0)
        os.close(writing)
        readers.append(reading)
    return sum(int(os.read(reading, 100)) for reading in readers)
