"""Attacks on what there is only so much of: processes, descriptors, processor time. Each stops by itself where nothing stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from tests.kubernetes.attacks.trying import Facts, RefusedError, attack

PROCESSES = 200
DESCRIPTORS = 5000
FILE_BYTES = 8 * 1024 * 1024
BLOCK_BYTES = 1024 * 1024
MEMORY_BLOCKS = 300
SPINNERS, SPIN_SECONDS = 8, 12.0


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


@attack
def scratch_space(facts: Facts) -> str:
    """Fill the scratch space with many files, each of a size that is allowed."""
    written = 0
    paths = [f"/tmp/many-{os.getpid()}-{number}" for number in range(facts["tmp_bytes"] // FILE_BYTES + 2)]
    try:
        for path in paths:
            with open(path, "wb", buffering=0) as file:
                written += file.write(bytes(FILE_BYTES))
    finally:
        for path in paths:
            with contextlib.suppress(OSError):
                os.unlink(path)
    if written <= facts["tmp_bytes"]:
        raise RefusedError(f"only {written} bytes were taken")
    return f"wrote {written} bytes"


@attack
def more_memory(facts: Facts) -> str:
    """Take more memory than there is; in an evaluation that ends it, so it is tried in one of its own."""
    taken = []
    while len(taken) < MEMORY_BLOCKS:
        # Not zeros, which take no memory until they are changed.
        taken.append(b"x" * BLOCK_BYTES)
    return f"took {len(taken)} MiB"


def spin() -> None:
    """Use all processors for some seconds, in more processes than there are processors."""
    print("spinning", flush=True)
    children = []
    for _ in range(SPINNERS):
        child = os.fork()
        if child == 0:
            until = time.monotonic() + SPIN_SECONDS
            while time.monotonic() < until:
                sum(range(1000))
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    print("done", flush=True)
