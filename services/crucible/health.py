"""Health of a service: its own only, answered from memory, never by calling another service.

`/healthz` says that the process answers at all; `/readyz` that it can do its work now; `/health` gives the detail. A check is a
cheap look at the service's own state (a flag, a heartbeat's age), so that all three answer well under 100 ms.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Health:
    """Named checks of one service. A check returns None if all is well, else what is wrong."""

    def __init__(self, service: str, version: str) -> None:
        self._service = service
        self._version = version
        self._started = time.monotonic()
        self._checks: dict[str, Callable[[], str | None]] = {}
        self.draining = False

    def add(self, name: str, check: Callable[[], str | None]) -> None:
        """Register a check under a name that operators will read."""
        self._checks[name] = check

    def problems(self) -> dict[str, str]:
        """Return what is wrong now, by check."""
        found = {name: problem for name, check in self._checks.items() if (problem := _ask(check))}
        if self.draining:
            found["lifecycle"] = "draining: finishing what is under way, taking nothing new"
        return found

    def report(self) -> dict[str, Any]:
        """Return the detail that `/health` shows."""
        problems = self.problems()
        return {
            "service": self._service,
            "version": self._version,
            "status": "unhealthy" if problems else "healthy",
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "checks": dict.fromkeys(self._checks, "ok") | problems,
        }


def _ask(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, and must not hide the others
        return f"the check itself failed: {type(error).__name__}"


class Heartbeat:
    """Proof that a loop still turns: it beats, and the check fails once the last beat is too old."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._last = time.monotonic()

    def beat(self) -> None:
        """Say that the loop came round."""
        self._last = time.monotonic()

    def check(self) -> str | None:
        """Return what is wrong, if anything."""
        age = time.monotonic() - self._last
        return f"no progress for {age:.0f} s (limit {self._limit:g} s)" if age > self._limit else None
