"""Commands about what an evaluation says and what happens to it: logs, events; whole or as it comes."""

from __future__ import annotations

import base64
import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from crucible.cli import explain
from crucible.cli.client import TERMINAL_STATES, evaluation_path
from crucible.cli.session import Session, command
from crucible.cli.text import output_writers, plain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from rich.text import Text

    from crucible.cli.client import Client, Document

BOTH = ("stdout", "stderr")


class StreamChoice(StrEnum):
    """Which output to show."""

    STDOUT = "stdout"
    STDERR = "stderr"
    BOTH = "both"


@command
def logs(
    session: Session,
    evaluation_id: Annotated[str, typer.Argument(metavar="ID", help="An evaluation's id.")],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as output comes, until the evaluation ends.")
    ] = False,
    stream: Annotated[StreamChoice, typer.Option(help="Which output; both go to our own streams of the same name.")] = (
        StreamChoice.BOTH
    ),
) -> None:
    """Print an evaluation's output: byte for byte into a pipe or file, control characters escaped on a terminal."""
    client = session.client()
    wanted = BOTH if stream is StreamChoice.BOTH else (stream.value,)
    if session.as_json:
        if follow:
            client.wait_ended(evaluation_id)
        session.emit_json({"id": evaluation_id, **output_document(client, evaluation_id, wanted)})
    elif follow:
        follow_output(client, evaluation_id, wanted)
    elif stream is StreamChoice.BOTH:
        _copy_both(client, evaluation_id)
    else:
        _copy_one(client, evaluation_id, stream.value)


def _copy_one(client: Client, evaluation_id: str, stream: str) -> None:
    writer = output_writers()["stdout"]
    for chunk in client.chunks(evaluation_path(evaluation_id, f"/output/{stream}")):
        writer.write(chunk)
    writer.close()


def _copy_both(client: Client, evaluation_id: str) -> None:
    writers = output_writers()
    for piece in _pieces(client, evaluation_id):
        writers[piece["stream"]].write(_bytes_of(piece))
    for writer in writers.values():
        writer.close()


def _pieces(client: Client, evaluation_id: str) -> Iterator[Document]:
    """Read both streams in order; the API sends one JSON object a line."""
    pending = b""
    for chunk in client.chunks(evaluation_path(evaluation_id, "/output")):
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _bytes_of(piece: Document) -> bytes:
    return base64.b64decode(piece["base64"]) if "base64" in piece else piece["text"].encode()


def follow_output(client: Client, evaluation_id: str, wanted: Collection[str]) -> None:
    """Copy output as it comes until the evaluation ends. One stream alone goes to our standard output."""
    writers = output_writers()
    both = len(wanted) > 1
    path = evaluation_path(evaluation_id, "/output" if both else f"/output/{next(iter(wanted))}")
    for event in client.stream(path, params={"follow": True}):
        if event.event == "end":
            break
        if event.event == "reset":
            notice = "\n[the platform lost this attempt; the output begins again]\n"
            writers["stderr"].write(notice.encode())
        elif event.event == "output":
            piece = json.loads(event.data)
            writers[piece["stream"] if both else "stdout"].write(_bytes_of(piece))
    for writer in writers.values():
        writer.close()


def output_document(client: Client, evaluation_id: str, wanted: Collection[str] = BOTH) -> Document:
    """Return output for machines: per stream `text`, or `base64` where the bytes are not UTF-8."""
    document: Document = {}
    for stream in wanted:
        data = b"".join(client.chunks(evaluation_path(evaluation_id, f"/output/{stream}")))
        try:
            document[stream] = {"size": len(data), "text": data.decode()}
        except UnicodeDecodeError:
            document[stream] = {"size": len(data), "base64": base64.b64encode(data).decode()}
    return document


@command
def events(
    session: Session,
    evaluation_id: Annotated[str, typer.Argument(metavar="ID", help="An evaluation's id.")],
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as events come, until the evaluation ends.")
    ] = False,
) -> None:
    """Print what happened to an evaluation, event by event."""
    client = session.client()
    path = evaluation_path(evaluation_id, "/events")
    if follow:
        found = []
        for event in _followed(client, path):
            found.append(event)
            if not session.as_json:
                session.out.print(_event_line(event))
        if session.as_json:
            session.emit_json({"events": found})
        return
    found = client.get(path)["events"]
    session.emit({"events": found}, lambda: _event_table(found))


def _followed(client: Client, path: str) -> Iterator[Document]:
    for message in client.stream(path):
        event = json.loads(message.data)
        yield event
        if event["state"] in TERMINAL_STATES:
            return


def _event_cells(event: Document) -> list[Text]:
    because = ": ".join(filter(None, (event.get("reason"), event.get("detail"))))
    return [
        plain(explain.clock(event["at"], milliseconds=True), "dim"),
        plain(event["seq"]),
        plain(event["type"], explain.STATE_STYLES.get(event["type"], "")),
        plain(event["actor"]),
        plain(because),
    ]


def _event_line(event: Document) -> Text:
    return plain("  ").join(_event_cells(event))


def _event_table(found: list[Document]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("time", "seq", "event", "by", "because"):
        table.add_column(name, overflow="fold")
    for event in found:
        table.add_row(*_event_cells(event))
    return table
