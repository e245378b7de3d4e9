"""`crucible events consume`: every event from Redis, a JSON object a line, for whoever forwards them to a system of their own.

It speaks to Redis and not to the API, so it stays apart from the commands that show the events of one evaluation.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from crucible.cli import following
from crucible.cli.exit_codes import ExitCode
from crucible.cli.session import Session, offline_command
from crucible.cli.up import local_settings

if TYPE_CHECKING:
    from pydantic import SecretStr

    from crucible.events import Event, Lagged
    from crucible.settings import Settings

SHOW = "show"


class EventsGroup(TyperGroup):
    """`crucible events ID` means `crucible events show ID`: no evaluation's id is the name of a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command there where it was left out."""
        named = args[:1] and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [SHOW, *args])


@offline_command
def consume(
    session: Session,
    *,
    group: Annotated[
        str, typer.Option(help="Consumer group; consumers of one group share the events. Made where it does not exist.")
    ],
    consumer: Annotated[
        str | None, typer.Option(help="Name within the group.", show_default="host and process number")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Leave after so many events.")] = None,
) -> None:
    """Print every event of the stream in Redis (CRUCIBLE_REDIS_URL) as JSON lines, and acknowledge each once it is written."""
    settings = local_settings()
    if settings.redis_url is None:
        raise typer.BadParameter("names no Redis", param_hint="CRUCIBLE_REDIS_URL")
    from crucible import logs  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.settings import SettingsError  # noqa: PLC0415

    logs.configure("crucible", settings.log)
    name = consumer or f"{socket.gethostname()}-{os.getpid()}"
    try:
        asyncio.run(_consume(session, settings.redis_url, settings, group=group, name=name, count=count))
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None
    except asyncio.CancelledError:
        raise typer.Exit(ExitCode.INTERRUPTED) from None


async def _consume(
    session: Session, url: SecretStr, settings: Settings, *, group: str, name: str, count: int | None
) -> None:
    from crucible.events import Lagged  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.streams.consumer import EventConsumer, StopConsuming  # noqa: PLC0415
    from crucible.streams.contract import encode  # noqa: PLC0415

    consumer = EventConsumer(url, settings.events, settings.broker, group=group, name=name)

    async def write(item: Event | Lagged) -> None:
        if isinstance(item, Lagged):
            session.note("events before the next may be missing; GET /v1/events has them")
            return
        try:
            sys.stdout.write(encode(item) + "\n")
            sys.stdout.flush()
        except BrokenPipeError as error:
            raise StopConsuming from error

    running = asyncio.create_task(consumer.run(write, limit=count))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    try:
        await running
    except StopConsuming:
        raise BrokenPipeError from None
    finally:
        await consumer.aclose()


events = typer.Typer(
    cls=EventsGroup,
    help="Events: of one evaluation (`crucible events ID`), or all of them from Redis.",
    rich_markup_mode=None,
)
events.command(SHOW)(following.events)
events.command("consume")(consume)
