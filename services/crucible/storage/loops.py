"""Loops that never end by themselves: they outlive the database's absence and their own mistakes, and say so in the log."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from crucible import logs
from crucible.problems import ProblemError
from crucible.storage.engine import unavailable_if_down

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = logs.get_logger("storage.loops")

_WAIT_FIRST_S = 0.1
_WAIT_LONGEST_S = 2.0


async def keep_trying(name: str, session: Callable[[], Awaitable[None]]) -> None:
    """Run `session` again and again, with growing pauses while it fails at once."""
    wait = _WAIT_FIRST_S
    while True:
        started = asyncio.get_running_loop().time()
        try:
            with unavailable_if_down():
                await session()
        except ProblemError as error:
            log.warning("a storage loop lost the database and will try again", loop=name, error=error.detail)
        except Exception:
            log.exception("a storage loop failed and will try again", loop=name)
        if asyncio.get_running_loop().time() - started > _WAIT_LONGEST_S:
            wait = _WAIT_FIRST_S
        await asyncio.sleep(wait * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
        wait = min(wait * 2, _WAIT_LONGEST_S)


async def every(name: str, seconds: float, work: Callable[[], Awaitable[object]]) -> None:
    """Do `work` about every `seconds`; what fails is logged and done again next time."""
    while True:
        await asyncio.sleep(seconds * random.uniform(0.9, 1.1))  # noqa: S311 - so that instances do not march in step
        try:
            await work()
        except ProblemError as error:
            log.warning("storage upkeep could not be done now", loop=name, error=error.detail)
        except Exception:
            log.exception("storage upkeep failed", loop=name)
