"""What the command's exit code says. `crucible --help` and docs/cli.md show this table."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes, each with one meaning."""

    OK = 0
    NOT_COMPLETED = 1
    USAGE = 2
    REFUSED = 3
    UNAVAILABLE = 4
    NOT_FOUND = 5
    ALREADY_RUNNING = 6
    INTERNAL = 70
    INTERRUPTED = 130
    READER_GONE = 141


# 70 is EX_SOFTWARE (sysexits.h); 130 and 141 are what a shell reports for SIGINT and SIGPIPE.
MEANINGS = {
    ExitCode.OK: "done; with --wait or --follow: every evaluation completed",
    ExitCode.NOT_COMPLETED: "an evaluation ended otherwise than completed; a check found a difference",
    ExitCode.USAGE: "the command line is wrong",
    ExitCode.REFUSED: "the platform refused the request (a 4xx other than 404)",
    ExitCode.UNAVAILABLE: "the platform does not answer, cannot do it now, or did not start",
    ExitCode.NOT_FOUND: "there is no such evaluation, dead letter or key",
    ExitCode.ALREADY_RUNNING: "up: a platform already runs over that data folder",
    ExitCode.INTERNAL: "a mistake in the command itself",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.READER_GONE: "whoever read our output closed it",
}


def for_status(status: int) -> ExitCode:
    """Return the exit code for an HTTP status that is not 2xx."""
    if status >= 500:
        return ExitCode.UNAVAILABLE
    return ExitCode.NOT_FOUND if status == 404 else ExitCode.REFUSED
