"""How the demo is shown: live on a terminal, as plain lines elsewhere, not at all to a machine; and the table at its end."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crucible.cli import explain
from crucible.cli.demo_judge import taken_order
from crucible.cli.demo_plan import SLOTS
from crucible.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from crucible.cli.client import Document
    from crucible.cli.demo_judge import Result, Verdict
    from crucible.cli.session import Session

_HELD = ("provisioning", "running")


class Progress:
    """What goes on, for whoever watches. `update` takes all evaluations of the demo as they are now."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._started = time.monotonic()
        self._seen: dict[str, str] = {}
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw for as long as the context is open, if there is a terminal to draw on."""
        if self._session.as_json or not self._session.out.is_terminal:
            yield
            return
        with Live(console=self._session.out, refresh_per_second=10, transient=True) as self._live:
            yield

    def say(self, text: str) -> None:
        """Tell what comes next."""
        if not self._session.as_json:
            self._session.out.print(plain(text))

    def update(self, evaluations: Sequence[Document]) -> None:
        """Show where each evaluation is."""
        if self._live:
            self._live.update(self._picture(evaluations))
        for evaluation in sorted(evaluations, key=taken_order):
            name, state = evaluation["labels"]["program"], evaluation["state"]
            if self._seen.get(name) != state:
                self._seen[name] = state
                self._line(name, evaluation)

    def _line(self, name: str, evaluation: Document) -> None:
        if self._live or self._session.as_json:
            return
        told = Text.assemble(
            plain(f"{time.monotonic() - self._started:6.2f} s  {name:18} priority {evaluation['priority']:2}  "),
            explain.state(evaluation),
            plain(" ") + explain.cause(evaluation),
        )
        told.rstrip()
        self._session.out.print(told)

    def _picture(self, evaluations: Sequence[Document]) -> RenderableType:
        counts = Counter(evaluation["state"] for evaluation in evaluations)
        held = sum(evaluation["state"] in _HELD and evaluation["size_class"] == "small" for evaluation in evaluations)
        header = Text.assemble(
            plain(f"{time.monotonic() - self._started:5.1f} s   slots ", "dim"),
            plain("■" * held + "□" * max(0, SLOTS - held), "blue"),
            plain(f"   {counts['queued']} in the queue, {len(evaluations) - _unended(evaluations)} ended", "dim"),
        )
        table = Table.grid(padding=(0, 2))
        for evaluation in sorted(evaluations, key=taken_order):
            name = evaluation["labels"]["program"]
            table.add_row(
                plain(name), f"{evaluation['priority']:2}", explain.state(evaluation), explain.cause(evaluation)
            )
        return Group(header, table)


def _unended(evaluations: Sequence[Document]) -> int:
    return sum(not explain.ended(evaluation) for evaluation in evaluations)


def outcome_table(results: Sequence[Result], verdict: Verdict) -> Table:
    """Print what became of each program, in the order in which the queue gave them out."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("program", "priority", "outcome", "cause", "expected", "wait", "run", "peak memory"):
        table.add_column(
            name, no_wrap=True, justify="right" if name in ("priority", "wait", "run", "peak memory") else "left"
        )
    for result in sorted(results, key=lambda result: taken_order(result.evaluation)):
        evaluation = result.evaluation
        right = result.program.name not in verdict.differences
        table.add_row(
            plain(result.program.name),
            str(evaluation["priority"]),
            explain.state(evaluation),
            explain.cause(evaluation),
            plain("yes", "green") if right else plain("NO", "bold red"),
            explain.seconds(evaluation.get("queue_wait_seconds")),
            explain.seconds(evaluation.get("run_seconds")),
            explain.size(evaluation.get("peak_memory_bytes")),
        )
    return table


def conclusion(results: Sequence[Result], verdict: Verdict) -> Group:
    """Say what was right, and name everything that was not."""
    lines = [Text.assemble(plain("fork_bomb: ", "dim"), plain(forks)) for forks in _forks(results)]
    for result in results:
        found = verdict.differences.get(result.program.name, [])
        lines += [plain(f"{result.program.name}: {text}", "red") for text in found]
        if found and result.program.attacks:
            told = result.stdout.decode(errors="replace").splitlines()
            lines += [plain(f"  {line}", "bold red") for line in told if line.startswith("SUCCEEDED")]
    lines += [plain(text, "red") for text in verdict.order]
    if verdict.good:
        lines.append(plain(f"All {len(results)} ended as expected, and strict priority was kept.", "bold green"))
    else:
        lines.append(plain("Not everything was as expected.", "bold red"))
    return Group(*lines)


def _forks(results: Sequence[Result]) -> list[str]:
    return [result.stdout.decode(errors="replace").strip() for result in results if result.program.name == "fork_bomb"]
