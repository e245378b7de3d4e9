"""One part's view of whether Redis is there: said once when it goes and once when it comes back, with growing pauses between."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from crucible import logs, metrics

if TYPE_CHECKING:
    from crucible.streams.errors import StreamError

log = logs.get_logger("streams")

_WAIT_FIRST_S = 0.1
_WAIT_LONGEST_S = 2.0


class Outage:
    """Of one part, such as the relay. Begins without one."""

    def __init__(self, part: str, says: str = "Redis does not serve events; they wait in the database") -> None:
        self._part = part
        self._says = says
        self._up = metrics.EVENT_STREAM_UP.labels(part)
        self._since: float | None = None
        self._wait = _WAIT_FIRST_S
        self._retry_at = 0.0

    @property
    def seconds_left(self) -> float:
        """How long to leave Redis alone; 0 once it may be tried (again)."""
        return max(0.0, self._retry_at - time.monotonic())

    def failed(self, error: StreamError) -> None:
        """Redis did not do what was asked: leave it alone for a while, each time longer."""
        self._up.set(0)
        if self._since is None:
            self._since = time.monotonic()
            log.warning(
                self._says,
                part=self._part,
                reason=error.reason,
                error=str(error),
                hint=error.hint,
            )
        self._retry_at = time.monotonic() + self._wait * random.uniform(0.5, 1.5)  # noqa: S311 - jitter
        self._wait = min(self._wait * 2, _WAIT_LONGEST_S)

    def ended(self) -> None:
        """Redis did what was asked."""
        self._up.set(1)
        if self._since is not None:
            away = round(time.monotonic() - self._since, 1)
            log.info("Redis serves again", part=self._part, away_seconds=away)
        self._since, self._wait, self._retry_at = None, _WAIT_FIRST_S, 0.0
