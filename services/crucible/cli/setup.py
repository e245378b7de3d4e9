"""`crucible setup`: prepare what the services stand on. Run once per deployment, before or while they start."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from crucible.cli.broker import Members
from crucible.cli.exit_codes import ExitCode
from crucible.cli.session import Session, offline_command
from crucible.cli.text import plain
from crucible.cli.up import local_settings


@offline_command
def setup(
    session: Session,
    *,
    wait: Annotated[float, typer.Option(min=0, help="How long each server may take to answer, seconds.")] = 60.0,
    members: Members = 3,
) -> None:
    """Bring the database's schema, the first administrator's key and the broker's queues and users to what this version needs.

    Needs CRUCIBLE_STORAGE__DATABASE_URL. The key comes from CRUCIBLE_ADMIN_KEY; the broker is set up where
    CRUCIBLE_BROKER__MANAGEMENT_URL is set, as by `crucible broker apply`. May be called again, by any number of processes at once.
    """
    from crucible.broker.definitions import PasswordError  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.broker.errors import BrokerError  # noqa: PLC0415
    from crucible.problems import ProblemError  # noqa: PLC0415
    from crucible.serve.setup import SetupError, set_up  # noqa: PLC0415
    from crucible.settings import SettingsError  # noqa: PLC0415
    from crucible.storage.migrate import MigrationError  # noqa: PLC0415

    done: list[str] = []

    def say(what: str) -> None:
        done.append(what)
        session.note(what)

    try:
        asyncio.run(set_up(local_settings(), wait_seconds=wait, members=members, say=say))
    except (SettingsError, PasswordError) as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None
    except (ProblemError, BrokerError, MigrationError, SetupError) as error:
        session.report({"type": "about:blank", "title": "The installation is not set up", "detail": str(error)})
        raise typer.Exit(ExitCode.NOT_COMPLETED if isinstance(error, SetupError) else ExitCode.UNAVAILABLE) from None
    session.emit({"done": done}, lambda: plain("set up"))
