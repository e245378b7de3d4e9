"""Holds the unit tier to its promise: no network, and a whole run that stays within its budget.

The network is refused through an interpreter audit hook, which sees every connect, bind, send and name look-up that goes
through Python's sockets, whoever makes it. Such a hook cannot be taken away again, so it is added once and obeys a switch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BUDGET_SECONDS = 10

_LOOKUPS = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo"}
_TRAFFIC = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}


class NetworkInUnitTierError(AssertionError):
    """A unit test reached for the network; it belongs in tests/integration, or needs a transport of its own."""


class _Guard:
    def __init__(self) -> None:
        self.refusing = False
        self._added = False

    def add_once(self) -> None:
        if not self._added:
            sys.addaudithook(self._audit)
            self._added = True

    def _audit(self, event: str, args: tuple[object, ...]) -> None:
        if not self.refusing:
            return
        if event in _LOOKUPS:
            raise NetworkInUnitTierError(f"a unit test looked up a host: {event}{args[:2]}")
        if event in _TRAFFIC and getattr(args[0], "family", None) != socket.AF_UNIX:
            raise NetworkInUnitTierError(f"a unit test used the network: {event}{args[1:]}")


_guard = _Guard()


@contextmanager
def no_network() -> Iterator[None]:
    """Refuse every socket but Unix ones until the block ends."""
    _guard.add_once()
    before, _guard.refusing = _guard.refusing, True
    try:
        yield
    finally:
        _guard.refusing = before
