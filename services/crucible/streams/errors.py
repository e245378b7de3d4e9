"""What can go wrong with Redis, by cause, and what to do about it."""

from __future__ import annotations

from enum import StrEnum


class StreamFailure(StrEnum):
    """Why Redis did not do what was asked."""

    UNREACHABLE = "unreachable"
    CREDENTIALS = "credentials"
    TLS = "tls"
    REFUSED = "refused"
    TOO_OLD = "too_old"


_HINTS = {
    StreamFailure.UNREACHABLE: "nothing is lost: events wait in the database; see that Redis runs and CRUCIBLE_REDIS_URL names it",
    StreamFailure.CREDENTIALS: "correct the user and password in CRUCIBLE_REDIS_URL",
    StreamFailure.TLS: "use rediss:// exactly where Redis speaks TLS, with CRUCIBLE_BROKER__CA_FILE naming who signed its certificate, "
    "which must be for the host in CRUCIBLE_REDIS_URL",
    StreamFailure.REFUSED: "Redis answers and refuses: it is full, a replica, or does not permit the user the keys `crucible:*` and "
    "channels `evaluation:*`",
    StreamFailure.TOO_OLD: "use Redis 7.0 or later",
}


class StreamError(Exception):
    """Redis did not do what was asked; `hint` says what to do."""

    def __init__(self, reason: StreamFailure, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = _HINTS[reason]
