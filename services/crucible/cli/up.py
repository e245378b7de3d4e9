"""`crucible up`: the whole platform in the foreground, until Ctrl-C.

Everything heavy is imported only once the command runs. The platform itself is composed in `crucible.local`; here it is only
started, announced, and told when to stop.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crucible.cli import foreground
from crucible.cli.exit_codes import ExitCode
from crucible.cli.explain import facts_table
from crucible.cli.requests import given
from crucible.cli.session import Session, offline_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crucible.cli.client import Document
    from crucible.local.platform import Platform
    from crucible.settings import Settings


class NotStartedError(Exception):
    """The platform did not start on this machine."""


def local_settings(**given: Any) -> Settings:
    """Return the settings of the environment, with what is given here on top, section by section.

    Raises:
        typer.BadParameter: a setting is not usable; the message names its environment variable.
    """
    from crucible.settings import Settings, SettingsError  # noqa: PLC0415 - slow to import, and only this needs it

    try:
        return Settings(**given)
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None


@offline_command
def up(
    session: Session,
    *,
    data_dir: Annotated[
        Path | None,
        typer.Option(envvar="CRUCIBLE_DATA_DIR", help="Where everything is kept; by default the XDG data folder."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", show_default="8080")
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Queue in this broker, amqp://... or redis://... (CRUCIBLE_BROKER_URL); without it, in the database.",
        ),
    ] = None,
    legacy_broker: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The broker that is being left (CRUCIBLE_LEGACY_BROKER_URL); both are consumed."
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Publish events in this Redis too (CRUCIBLE_REDIS_URL)."),
    ] = None,
) -> None:
    """Run the platform here, in the foreground. Ctrl-C drains and stops it; a second Ctrl-C stops it at once."""
    brokers = given(broker_url=broker, legacy_broker_url=legacy_broker, redis_url=redis)
    settings = local_settings(**given(data_dir=data_dir, api=given(host=host, port=port), **brokers))
    from crucible import logs  # noqa: PLC0415 - slow to import, and only this needs it

    logs.configure("crucible", settings.log)
    with platform_errors(session):
        asyncio.run(_serve(session, settings))


@contextmanager
def platform_errors(session: Session) -> Iterator[None]:
    """Report why a platform did not start, and leave with the exit code for it."""
    from crucible.local.platform import AlreadyRunningError  # noqa: PLC0415 - slow to import, and only this needs it

    try:
        yield
    except AlreadyRunningError as error:
        server = {key: error.server.get(key) for key in ("url", "pid")}
        session.report({"type": "about:blank", "title": "Already running", "detail": str(error), **server})
        raise typer.Exit(ExitCode.ALREADY_RUNNING) from None
    except NotStartedError as error:
        session.report({"type": "about:blank", "title": "The platform did not start", "detail": str(error)})
        raise typer.Exit(ExitCode.UNAVAILABLE) from None


async def start(platform: Platform) -> None:
    """Start a platform.

    Raises:
        AlreadyRunningError: another one holds the data folder.
        NotStartedError: it did not start; the message says why.
    """
    from crucible.broker.errors import BrokerError  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.local.platform import AlreadyRunningError  # noqa: PLC0415 - the same
    from crucible.settings import SettingsError  # noqa: PLC0415 - the same

    try:
        await platform.start()
    except AlreadyRunningError:
        raise
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None
    except (OSError, RuntimeError, BrokerError) as error:
        raise NotStartedError(str(error)) from error


async def _serve(session: Session, settings: Settings) -> None:
    from crucible.local.platform import Platform  # noqa: PLC0415 - slow to import, and only this needs it

    platform = Platform(settings)

    def announce() -> None:
        document = announcement(platform)
        session.emit(document, lambda: facts_table(_facts(document)))

    # The children's lives hang on ours, and the next start recovers what they did.
    await foreground.run(
        session,
        platform,
        start=start(platform),
        started=announce,
        at_once="stopped at once; what ran is queued again at the next start",
    )


def announcement(platform: Platform) -> Document:
    """Return what a person must know of a platform that has just started."""
    return {
        "url": platform.url,
        "api_key": platform.api_key,
        "data_dir": str(platform.settings.data_dir),
        "sandbox": platform.runtime,
        "limits_by": platform.limits_by,
        "queue": platform.queue,
        "pid": os.getpid(),
    }


def _facts(document: Document) -> list[tuple[str, str]]:
    return [
        ("Crucible is up", document["url"]),
        ("API key", document["api_key"]),
        ("documentation", f"{document['url']}/docs"),
        ("data", document["data_dir"]),
        ("sandboxes", f"{document['sandbox']}, limits held by {document['limits_by']}"),
        ("queue", document["queue"]),
        ("try", "crucible submit --code 'print(6 * 7)' --follow"),
        ("stop", "Ctrl-C"),
    ]
