"""Ties a child's life to ours, so that a killed platform leaves no process behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(sig: signal.Signals) -> Callable[[], None] | None:
    """Return a `preexec_fn` that has the kernel send `sig` to the child when we die, or None where the kernel cannot.

    Linux only. The kernel watches the thread that forked, so children must be started from the main thread.
    """
    if not sys.platform.startswith("linux"):
        return None
    # Loaded here and not in the child: between fork and exec only the bare call is safe.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def set_signal() -> None:
        prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
        if os.getppid() != parent:  # it died before the kernel was told to watch it
            os._exit(1)

    return set_signal
