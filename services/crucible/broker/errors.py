"""What goes wrong with a broker, each with its reason and with what to do about it. Never a password in any text."""

from __future__ import annotations

from enum import StrEnum


class BrokerReason(StrEnum):
    """Why a broker cannot be used. A person reads the message; programs and metrics read this."""

    URL = "url"  # the URL itself cannot be used
    UNREACHABLE = "unreachable"
    CREDENTIALS = "credentials"
    VHOST = "vhost"
    TLS = "tls"
    TOO_OLD = "too_old"
    QUEUE_DIFFERS = "queue_differs"
    NOT_DECLARED = "not_declared"
    REFUSED = "refused"  # the user lacks a permission, or a limit of the broker says no
    FULL = "full"  # the queue is at its length limit and takes no more
    BLOCKED = "blocked"  # an alarm (disk, memory) stops all publishing


# What waiting alone can heal. For anything else a person has to change something.
PASSING_REASONS = frozenset({BrokerReason.UNREACHABLE, BrokerReason.BLOCKED, BrokerReason.FULL})


class BrokerError(Exception):
    """A broker that cannot be used. `str()` says what happened, and then what to do."""

    def __init__(self, reason: BrokerReason, message: str, hint: str) -> None:
        super().__init__(f"{message}; {hint}")
        self.reason = reason
        self.message = message
        self.hint = hint

    @property
    def passing(self) -> bool:
        """Whether trying again later can help without anybody changing anything."""
        return self.reason in PASSING_REASONS
