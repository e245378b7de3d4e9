"""An evaluation in words for people: where it is, why it waits, why it ended, and what one can do about it.

Pure: from the API's document to lines of rich text. Every word that an evaluation chose itself passes through `plain`.
"""

from __future__ import annotations

import signal
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from crucible.cli.client import TERMINAL_STATES
from crucible.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.console import RenderableType

    from crucible.cli.client import Document

STATE_STYLES = {
    "submitted": "dim",
    "queued": "dim",
    "provisioning": "cyan",
    "running": "blue",
    "completed": "green",
    "failed": "red",
    "timeout": "yellow",
    "cancelled": "magenta",
}
_PLATFORM_FAULT = (
    "The cause lies with the platform and not with the code; an operator finds it with `crucible dead-letters`."
)
_ADVICE = {
    "oom_killed": "Ask for more with --memory, or use less.",
    "wall_clock": "Allow more time with --timeout, or do less.",
    "output_limit": "Write less; `crucible logs` has all that was kept.",
    "queue_wait": "It waited for longer than it agreed to; submit it again, perhaps at a higher --priority.",
    "exception": "`crucible logs --stream stderr` shows the traceback.",
    "exit_nonzero": "The code chose this exit code itself.",
    "sandbox_error": _PLATFORM_FAULT,
    "node_lost": _PLATFORM_FAULT,
    "evicted": _PLATFORM_FAULT,
    "preempted": _PLATFORM_FAULT,
    "image_error": _PLATFORM_FAULT,
}


def ended(evaluation: Document) -> bool:
    """Whether nothing more can happen to the evaluation."""
    return evaluation["state"] in TERMINAL_STATES


def size(count: float | None) -> str:
    """Print bytes with a binary suffix."""
    if count is None:
        return "-"
    if count < 1024:
        return f"{count:.0f} B"
    if count < 1024**2:
        return f"{count / 1024:.1f} KiB"
    return f"{count / 1024**2:.1f} MiB" if count < 1024**3 else f"{count / 1024**3:.1f} GiB"


def seconds(value: float | None) -> str:
    """Print a duration with as much detail as its length deserves."""
    if value is None:
        return "-"
    if value < 60:
        return f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def signal_name(number: int) -> str:
    """Name a signal, or give its number where it has no name here."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def state(evaluation: Document) -> Text:
    """Print the state in its colour."""
    return plain(evaluation["state"], STATE_STYLES.get(evaluation["state"], ""))


def cause(evaluation: Document) -> Text:
    """Print why it ended, with the number or name that belongs to the reason; nothing while it has not ended."""
    reason = evaluation.get("reason") or ""
    extra = ""
    if reason == "exit_nonzero" and evaluation.get("exit_code") is not None:
        extra = f" {evaluation['exit_code']}"
    elif reason == "exception" and evaluation.get("exception_type"):
        extra = f" {evaluation['exception_type']}"
    elif reason == "signal" and evaluation.get("signal") is not None:
        extra = f" {signal_name(evaluation['signal'])}"
    return plain(reason + extra)


def explain(evaluation: Document) -> RenderableType:
    """Tell all about one evaluation."""
    headline = Text.assemble(plain(evaluation["id"], "bold"), "  ", state(evaluation))
    if evaluation.get("reason"):
        headline.append_text(Text.assemble(": ", cause(evaluation)))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _facts(evaluation):
        table.add_row(name, plain(text))
    return Group(headline, table)


def _facts(evaluation: Document) -> Iterator[tuple[str, str]]:
    yield from _waiting(evaluation.get("waiting") or {}, evaluation["size_class"])
    yield from _ending(evaluation)
    yield "priority", _priority(evaluation)
    limits = f"{evaluation['memory_limit']} memory, {evaluation['cpu_limit']} CPU, {evaluation['timeout_seconds']} s"
    yield "limits", limits
    if evaluation.get("peak_memory_bytes") is not None or evaluation.get("cpu_seconds") is not None:
        memory, cpu = size(evaluation.get("peak_memory_bytes")), seconds(evaluation.get("cpu_seconds"))
        yield "used", f"{memory} at most, {cpu} CPU"
    yield "times", "; ".join(_times(evaluation))
    if evaluation.get("attempt", 0) > 1:
        yield "attempts", str(evaluation["attempt"])
    if evaluation["labels"]:
        yield "labels", " ".join(f"{key}={value}" for key, value in sorted(evaluation["labels"].items()))
    if evaluation.get("replay_of"):
        yield "repeats", evaluation["replay_of"]
    yield "output", f"{size(evaluation['stdout']['size'])} stdout, {size(evaluation['stderr']['size'])} stderr"


def _waiting(waiting: Document, size_class: str) -> Iterator[tuple[str, str]]:
    if "detail" in waiting:
        yield "waits", waiting["detail"]
    if waiting.get("position"):
        yield "place", f"{waiting['position']} in the {size_class} queue"
    if waiting.get("estimated_wait_seconds") is not None:
        yield "likely wait", f"about {seconds(waiting['estimated_wait_seconds'])}"


def _ending(evaluation: Document) -> Iterator[tuple[str, str]]:
    if evaluation.get("detail"):
        yield "why", evaluation["detail"]
    if ended(evaluation) and evaluation.get("reason") in _ADVICE:
        yield "advice", _ADVICE[evaluation["reason"]]
    if evaluation.get("exit_code") is not None:
        yield "exit code", str(evaluation["exit_code"])
    if evaluation.get("signal") is not None:
        yield "signal", f"{evaluation['signal']} ({signal_name(evaluation['signal'])})"
    if evaluation.get("exception_type"):
        yield "exception", evaluation["exception_type"]


def _priority(evaluation: Document) -> str:
    text = f"{evaluation['priority']} in the {evaluation['size_class']} queue"
    if evaluation["effective_priority"] != evaluation["priority"]:
        text += f", counts as {evaluation['effective_priority']} for its long wait"
    return text


def _times(evaluation: Document) -> Iterator[str]:
    yield f"submitted {clock(evaluation['submitted_at'])}"
    if evaluation.get("queue_wait_seconds") is not None:
        yield f"waited {seconds(evaluation['queue_wait_seconds'])}"
    if evaluation.get("run_seconds") is not None:
        yield f"ran {seconds(evaluation['run_seconds'])}"
    if evaluation.get("finished_at"):
        yield f"ended {clock(evaluation['finished_at'])}"


def clock(text: str, *, milliseconds: bool = False) -> str:
    """Print a time of the API in the reader's own zone."""
    local = datetime.fromisoformat(text).astimezone()
    shown = f"{local:%Y-%m-%d %H:%M:%S}"
    return f"{shown}.{local.microsecond // 1000:03d}" if milliseconds else shown


def listing(evaluations: Iterable[Document]) -> RenderableType:
    """Print evaluations as a table, one a line."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("id", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("cause")
    table.add_column("priority", justify="right")
    table.add_column("wait", justify="right", no_wrap=True)
    table.add_column("run", justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("submitted", no_wrap=True)
    for evaluation in evaluations:
        table.add_row(
            plain(evaluation["id"]),
            state(evaluation),
            cause(evaluation),
            str(evaluation["priority"]),
            seconds(evaluation.get("queue_wait_seconds")),
            seconds(evaluation.get("run_seconds")),
            size(evaluation.get("peak_memory_bytes")),
            clock(evaluation["submitted_at"]),
        )
    return table


def facts_table(rows: Iterable[tuple[str, Any]]) -> Table:
    """Print names and values in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(plain(name), plain(value))
    return table
