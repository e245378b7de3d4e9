"""`crucible broker migrate`: from one broker to another while work goes on, a step at a time, each of which can be undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from crucible.cli.explain import clock, facts_table
from crucible.cli.session import Session, command
from crucible.cli.text import plain

if TYPE_CHECKING:
    from rich.console import RenderableType

    from crucible.cli.client import Document

_LOOK_EVERY_S = 1.0

migrate = typer.Typer(
    help="Move from CRUCIBLE_LEGACY_BROKER_URL to CRUCIBLE_BROKER_URL while both are consumed: start, drain, finish (admins).",
    no_args_is_help=True,
)


@migrate.command("status")
@command
def status(session: Session) -> None:
    """Show what each broker holds, how far the move has come and what comes next."""
    found = session.client().get("/v1/broker")
    session.emit(found, lambda: _view(found))


@migrate.command("start")
@command
def start(
    session: Session,
    *,
    share: Annotated[int, typer.Option("--share", min=1, max=100, metavar="N", help="Percent for the new broker.")],
) -> None:
    """Send a share of new work to the new broker; again with another share to change it."""
    _step(session, action="start", share=share)


@migrate.command("drain")
@command
def drain(
    session: Session,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Return only once the legacy broker holds nothing.")] = False,
) -> None:
    """Send all work to the new broker, what waits in the legacy one too."""
    client = session.client()
    found: Document = client.call("POST", "/v1/broker/migration", body={"action": "drain"})
    while wait and not found["drained"]:
        if found["phase"] != "draining":
            break
        session.note(found["next"])
        client.pause(_LOOK_EVERY_S)
        found = client.get("/v1/broker")
    session.emit(found, lambda: _view(found))


@migrate.command("finish")
@command
def finish(session: Session) -> None:
    """Leave the legacy broker: refused until it is drained, then its queues are deleted."""
    _step(session, action="finish")


@migrate.command("rollback")
@command
def rollback(session: Session) -> None:
    """Go back from any step: all work, what waits too, to the legacy broker; the new one's queues are emptied."""
    _step(session, action="rollback")


def _step(session: Session, **body: object) -> None:
    found = session.client().call("POST", "/v1/broker/migration", body=body)
    session.emit(found, lambda: _view(found))


def _view(found: Document) -> RenderableType:
    sides = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("broker", "kind", "where", "up", "messages", "waiting", "in flight", "workers"):
        number = name in ("messages", "waiting", "in flight", "workers")
        sides.add_column(name, justify="right" if number else "left", overflow="fold")
    for side in found["brokers"]:
        sides.add_row(
            side["role"],
            side["kind"],
            plain(side["url"]),
            "yes" if side["up"] else plain("no", "red"),
            _by_class(side.get("queued")),
            str(side["waiting"]),
            str(side["in_flight"]),
            _by_class(side.get("consumers")),
        )
    facts = [("told to no broker yet", str(found["untold"]))]
    if found.get("phase"):
        changed = f", since {clock(found['changed_at'])} by {found['changed_by']}" if found.get("changed_at") else ""
        facts = [("phase", f"{found['phase']}{changed}"), ("share of the new broker", f"{found['share']} %"), *facts]
    facts.append(("next", found["next"]))
    problems = [plain(f"{side['role']}: {side['problem']}", "red") for side in found["brokers"] if side.get("problem")]
    notes = [plain(note, "yellow") for note in found["notes"]]
    return Group(sides, "", facts_table(facts), *problems, *notes)


def _by_class(counts: Document | None) -> str:
    return "-" if not counts else "  ".join(f"{name}: {count}" for name, count in counts.items())
