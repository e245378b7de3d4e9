"""Commands about the platform: what it has free, how it fares, what it stores, dead letters and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

import typer
from rich.console import Group
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from crucible.cli import requests
from crucible.cli.client import ApiError
from crucible.cli.exit_codes import ExitCode, for_status
from crucible.cli.explain import clock, facts_table, seconds, size
from crucible.cli.session import Session, command
from crucible.cli.text import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import RenderableType

    from crucible.cli.client import Client, Document

_CLEANUP_STEP = 500
_MIGRATE_STEP = 20


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


# --- capacity and statistics --------------------------------------------------------------------------------------------------


@command
def capacity(
    session: Session,
    *,
    check: Annotated[bool, typer.Option("--check", help="Ask whether a request with these limits would fit.")] = False,
    profile: Annotated[str | None, typer.Option(help="With --check: named limits.")] = None,
    memory: Annotated[str | None, typer.Option(help="With --check: memory limit, such as 512Mi.")] = None,
    cpu: Annotated[str | None, typer.Option(help="With --check: CPU limit, such as 500m.")] = None,
) -> None:
    """Show what is free and what waits. With --check, exit code 1 means that it can never run here."""
    client = session.client()
    wanted = requests.given(profile=profile, memory_limit=memory, cpu_limit=cpu)
    if not check:
        if wanted:
            raise typer.BadParameter("limits are for --check", param_hint="--check")
        found = client.get("/v1/capacity")
        session.emit(found, lambda: _capacity_view(found))
        return
    answer = client.call("POST", "/v1/capacity/check", body=wanted)
    session.emit(answer, lambda: _check_view(answer))
    if answer["fit"] == "never":
        raise typer.Exit(ExitCode.NOT_COMPLETED)


def _capacity_view(found: Document) -> RenderableType:
    nodes = _table("node", "runtime", "sandboxes", "free memory", "free CPU", right=("sandboxes",))
    for node in found["nodes"]:
        free, total = node["free"], node["total"]
        nodes.add_row(
            plain(node["name"]),
            plain(node["runtime"]),
            str(node["sandboxes"]),
            f"{size(free['memory_limit_bytes'])} of {size(total['memory_limit_bytes'])}",
            f"{free['cpu_limit']} of {total['cpu_limit']}",
        )
    queues = _table("queue", "running", "waiting", "likely wait", "by priority", right=("running", "waiting"))
    for queue in found["queues"]:
        bands = "  ".join(f"{band['priority']}: {band['waiting']}" for band in queue["priorities"])
        wait = seconds(queue.get("estimated_wait_seconds"))
        queues.add_row(queue["size_class"], str(queue["running"]), str(queue["waiting"]), wait, bands)
    return Group(nodes, "", queues)


def _check_view(answer: Document) -> RenderableType:
    asked, largest = answer["requested"], answer["largest"]
    words = {"now": "fits now", "later": "fits, but not now", "never": "can never run here"}
    return facts_table(
        [
            (f"{asked['memory_limit']}, {asked['cpu_limit']} CPU", words.get(answer["fit"], answer["fit"])),
            *([("why", answer["reason"])] if answer.get("reason") else []),
            ("largest", f"{largest['memory_limit']}, {largest['cpu_limit']} CPU"),
        ]
    )


@command
def stats(
    session: Session,
    *,
    since: Annotated[str | None, typer.Option(help="Submitted since: ISO 8601, or an age such as 2h or 7d.")] = None,
    owner: Annotated[str | None, typer.Option(help="Only of this owner (operators).")] = None,
) -> None:
    """Show how evaluations fared: outcomes, causes, waits and run times."""
    found = session.client().get("/v1/statistics", since=requests.parse_time(since, "--since"), owner=owner)
    session.emit(found, lambda: _stats_view(found))


def _stats_view(found: Document) -> RenderableType:
    rate = found.get("success_rate")
    return facts_table(
        [
            ("evaluations", f"{found['total']}, {found['last_24h']} in the last 24 h"),
            ("completed", "-" if rate is None else f"{rate:.1%} of those that ended"),
            ("states", _counts(found["by_state"])),
            ("causes", _counts(found["by_reason"])),
            ("priorities", _counts(found["by_priority"])),
            ("wait", f"{seconds(found.get('wait_seconds_p50'))} median, {seconds(found.get('wait_seconds_p95'))} p95"),
            ("run", f"{seconds(found.get('run_seconds_p50'))} median, {seconds(found.get('run_seconds_p95'))} p95"),
            ("CPU used", seconds(found["cpu_seconds"])),
        ]
    )


def _counts(counts: Document) -> str:
    return "  ".join(f"{name}: {count}" for name, count in counts.items()) or "-"


# --- storage --------------------------------------------------------------------------------------------------------------------

storage = typer.Typer(help="What is stored, and where (admins).", no_args_is_help=True)


@storage.command("usage")
@command
def usage(session: Session) -> None:
    """Show where the bytes are: database, object backends, owners."""
    found = session.client().get("/v1/admin/storage/usage")
    session.emit(found, lambda: _usage_view(found))


def _usage_view(found: Document) -> RenderableType:
    backends = _table("backend", "objects", "size", right=("objects", "size"))
    for backend in found["backends"]:
        primary = " (primary)" if backend["backend"] == found["primary"] else ""
        backends.add_row(plain(backend["backend"] + primary), str(backend["objects"]), size(backend["bytes"]))
    owners = _table("owner", "evaluations", "output", "CPU", right=("evaluations", "output", "CPU"))
    for owner in found["owners"]:
        cells = (str(owner["evaluations"]), size(owner["output_bytes"]), seconds(owner["cpu_seconds"]))
        owners.add_row(plain(owner["owner"]), *cells)
    database = f"{size(found['database_bytes'])}, of that {size(found['inline_output_bytes'])} output"
    return Group(facts_table([("database", database)]), "", backends, "", owners)


@storage.command("migrate")
@command
def migrate(
    session: Session,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URL",
            help="file:///path or s3://bucket/prefix, or a name that `crucible storage usage` shows.",
        ),
    ],
) -> None:
    """Move all objects to another backend, each verified by its SHA-256. May be interrupted and called again."""
    client = session.client()
    done: Document = {"target": to, "moved": 0, "moved_bytes": 0, "remaining": None, "failed": []}
    columns = (TextColumn("moving"), BarColumn(), MofNCompleteColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=session.err, disable=not session.live) as progress:
        task = progress.add_task("moving", total=None)
        while True:
            step = client.call("POST", "/v1/admin/storage/migrate", body={"target": to, "limit": _MIGRATE_STEP})
            done["moved"] += step["moved"]
            done["moved_bytes"] += step["moved_bytes"]
            done["remaining"] = step["remaining"]
            progress.update(task, completed=done["moved"], total=done["moved"] + step["remaining"])
            failed = {*done["failed"], *step["failed"]}
            stuck = step["moved"] == 0 and len(failed) == len(done["failed"])
            done["failed"] = sorted(failed)
            # What failed is tried last, so a step in which only that is left ends the matter.
            if step["remaining"] == 0 or stuck:
                break
    session.emit(done, lambda: _migrated_view(done))
    if done["failed"] or done["remaining"]:
        raise typer.Exit(ExitCode.NOT_COMPLETED)


def _migrated_view(done: Document) -> RenderableType:
    lines = [plain(f"moved {done['moved']} objects, {size(done['moved_bytes'])}; {done['remaining']} remain")]
    lines += [plain(f"left where it is, its content does not match: {name}", "red") for name in done["failed"]]
    return Group(*lines)


@storage.command("cleanup")
@command
def cleanup(
    session: Session,
    *,
    older_than: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="Ended at least so long ago.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete evaluations that ended long ago, with their output."""
    client = session.client()
    body = {"older_than_days": older_than, "limit": _CLEANUP_STEP, "dry_run": dry_run}
    done: Document = {"evaluations": 0, "objects": 0, "bytes": 0, "dry_run": dry_run, "remaining": 0}
    columns = (TextColumn("deleting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=session.err, disable=not session.live) as progress:
        task = progress.add_task("deleting", total=None)
        while True:
            step = client.call("POST", "/v1/admin/storage/cleanup", body=body)
            for field in ("evaluations", "objects", "bytes"):
                done[field] += step[field]
            done["remaining"] = step["remaining"]
            progress.update(task, completed=done["evaluations"], total=done["evaluations"] + step["remaining"])
            if dry_run or step["remaining"] == 0 or step["evaluations"] == 0:
                break
    session.emit(done, lambda: _cleaned_view(done))


def _cleaned_view(done: Document) -> RenderableType:
    verb = "would delete" if done["dry_run"] else "deleted"
    more = f", and {done['remaining']} more" if done["remaining"] else ""
    counts = f"{done['evaluations']} evaluations{more}; {done['objects']} objects, {size(done['bytes'])}"
    return plain(f"{verb} {counts}")


# --- dead letters ---------------------------------------------------------------------------------------------------------------

dead_letters = typer.Typer(help="Evaluations that the platform itself could not run (admins).", no_args_is_help=True)
_LETTERS_PER_PAGE = 200
_LETTERS = typer.Argument(metavar="ID...", help="Dead letters, by the number that list shows.")
LetterIds = Annotated[list[int], _LETTERS]


@dead_letters.command("list")
@command
def list_dead_letters(
    session: Session,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="Most to list.")] = 50,
) -> None:
    """List dead letters, newest first."""
    found = session.client().get("/v1/dead-letters", limit=limit)
    session.emit(found, lambda: _letters_view(found))


def _letters_view(found: Document) -> RenderableType:
    table = _table("id", "evaluation", "owner", "cause", "attempts", "since", "replayed as", right=("id", "attempts"))
    for letter in found["items"]:
        because = ": ".join(filter(None, (letter["reason"], letter.get("detail"))))
        table.add_row(
            str(letter["id"]),
            plain(letter["evaluation_id"]),
            plain(letter["owner"]),
            plain(because),
            str(letter["attempts"]),
            clock(letter["created_at"]),
            plain(letter.get("replayed_as") or "-"),
        )
    return Group(table, plain(f"{found['total']} in all", "dim"))


@dead_letters.command("replay")
@command
def replay(
    session: Session,
    letter_ids: Annotated[list[int] | None, _LETTERS] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All that have not been replayed yet.")] = False,
) -> None:
    """Queue dead letters again, whole, each under a new id."""
    if every == bool(letter_ids):
        raise typer.BadParameter("name dead letters, or say --all", param_hint="ID...")
    client = session.client()
    _each(
        session,
        letter_ids or _not_replayed(client),
        lambda letter: client.call("POST", f"/v1/dead-letters/{letter}/replay"),
        "queued again as",
    )


def _not_replayed(client: Client) -> list[int]:
    """Return the ids of all dead letters that wait for someone, oldest first."""
    found: list[int] = []
    path: str | None = f"/v1/dead-letters?limit={_LETTERS_PER_PAGE}"
    while path:
        page = client.get(path)
        found += [letter["id"] for letter in page["items"] if not letter.get("replayed_as")]
        path = page.get("next")
    return found[::-1]


@dead_letters.command("delete")
@command
def delete_dead_letters(session: Session, letter_ids: LetterIds) -> None:
    """Delete dead letters; their evaluations stay readable."""
    client = session.client()
    _each(session, letter_ids, lambda letter: client.call("DELETE", f"/v1/dead-letters/{letter}"), "deleted")


def _each(session: Session, ids: Iterable[int | str], act: Callable[[int | str], Document | None], verb: str) -> None:
    """Do the same to each, show each outcome, and leave with the worst exit code."""
    worst = ExitCode.OK
    results: list[Document] = []
    lines: list[RenderableType] = []
    for item in ids:
        try:
            made = act(item)
        except ApiError as error:
            worst = max(worst, for_status(error.status))
            results.append({"id": item, "problem": error.problem})
            lines.append(plain(f"{item}: ") + plain(str(error), "red"))
        else:
            results.append({"id": item, "done": True} | ({"evaluation": made} if made else {}))
            lines.append(plain(f"{item}: {verb} {made['id'] if made else ''}".rstrip()))
    session.emit({"items": results}, lambda: Group(*lines))
    raise typer.Exit(worst)


# --- keys -----------------------------------------------------------------------------------------------------------------------

keys = typer.Typer(help="API keys (admins).", no_args_is_help=True)


@keys.command("create")
@command
def create_key(
    session: Session,
    owner: Annotated[str, typer.Argument(metavar="OWNER", help="Whom the key's evaluations belong to.")],
    *,
    role: Annotated[str, typer.Option(help="submitter, operator or admin.")] = "submitter",
    name: Annotated[str | None, typer.Option(help="What the key is for.")] = None,
    expires_in_days: Annotated[
        float | None, typer.Option("--expires-in-days", help="Days until it stops working.")
    ] = None,
) -> None:
    """Make a key. It is printed now and never again."""
    body = requests.given(owner=owner, role=role, name=name, expires_in_days=expires_in_days)
    made = session.client().call("POST", "/v1/keys", body=body)
    session.emit(made, lambda: plain(made["key"]))
    session.note("keep it now: only its hash is stored")


@keys.command("list")
@command
def list_keys(session: Session) -> None:
    """List all keys, without their secrets."""
    found = session.client().get("/v1/keys")
    session.emit(found, lambda: _keys_view(found))


def _keys_view(found: Document) -> RenderableType:
    table = _table("key", "owner", "role", "made", "expires", "revoked", "for")
    for key in found["items"]:
        when = [clock(key[field]) if key.get(field) else "-" for field in ("created_at", "expires_at", "revoked_at")]
        table.add_row(plain(key["key_id"]), plain(key["owner"]), plain(key["role"]), *when, plain(key.get("name", "")))
    return table


@keys.command("revoke")
@command
def revoke_keys(
    session: Session, key_ids: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, as list names them.")]
) -> None:
    """Revoke keys for good."""
    client = session.client()
    _each(session, key_ids, lambda key: _revoke(client, str(key)), "revoked")


def _revoke(client: Client, key_id: str) -> None:
    client.call("DELETE", f"/v1/keys/{quote(key_id, safe='')}")
