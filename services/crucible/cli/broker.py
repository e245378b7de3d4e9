"""`crucible broker`: the broker's topology as a file, made in a running broker, and compared with it.

Everything heavy is imported only once a command runs. Passwords come from the environment or from files and are never shown.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from crucible.cli.broker_migrate import migrate
from crucible.cli.exit_codes import ExitCode
from crucible.cli.session import Session, offline_command
from crucible.cli.text import plain
from crucible.cli.up import local_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from crucible.broker.verify import Difference
    from crucible.settings import Settings

broker = typer.Typer(help="The message broker (operators).", no_args_is_help=True)
broker.add_typer(migrate, name="migrate")

VHost = Annotated[
    str | None,
    typer.Option("--vhost", metavar="NAME", help="Virtual host; without it, that of CRUCIBLE_BROKER_URL, or crucible."),
]
Members = Annotated[int, typer.Option("--members", min=1, max=9, help="How many nodes must hold a copy of each queue.")]


@broker.command("definitions")
@offline_command
def definitions(
    session: Session,
    *,
    vhost: VHost = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write here, readable by the owner only.")
    ] = None,
) -> None:
    """Print RabbitMQ's definitions file: virtual host, exchanges, queues, bindings, users.

    Passwords come from CRUCIBLE_BROKER_PASSWORD_STORAGE, _WORKER and _MONITOR, or from files that the same names with _FILE
    at their end name; with _ADMIN there is an administrator too. The file holds salted hashes of them.
    """
    from crucible.broker import definitions as document  # noqa: PLC0415 - slow to import, and only this needs it

    with _errors(session):
        settings = local_settings()
        passwords = document.read_passwords(os.environ)
        found = document.definitions(settings.broker, _vhost(settings, vhost), passwords)
    text = json.dumps(found, indent=2) + "\n"
    if output is None:
        typer.echo(text, nl=False)
        return
    with os.fdopen(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    session.emit({"file": str(output)}, lambda: plain(f"wrote {output}"))


@broker.command("apply")
@offline_command
def apply(session: Session, *, vhost: VHost = None, members: Members = 3) -> None:
    """Make in the broker what is missing, and set users and permissions. Deletes nothing; may be called again.

    The broker is CRUCIBLE_BROKER__MANAGEMENT_URL; passwords of users come as for `definitions`, and a user whose password is not
    given keeps its own. Exit code 1 if something is left that only a person can resolve.
    """
    from crucible.broker import definitions as document  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.broker import verify as compare  # noqa: PLC0415
    from crucible.broker.management import Management  # noqa: PLC0415

    with _errors(session):
        settings = local_settings()
        passwords = document.read_passwords(os.environ)
        with Management(settings.broker) as api:
            applied = compare.apply(api, settings.broker, _vhost(settings, vhost), passwords, members=members)
    report = {"done": applied.done, "differences": [_document(found) for found in applied.remaining]}
    session.emit(report, lambda: Group(*map(plain, applied.done), _view(applied.remaining)))
    if applied.remaining:
        raise typer.Exit(ExitCode.NOT_COMPLETED)


@broker.command("verify")
@offline_command
def verify(session: Session, *, vhost: VHost = None, members: Members = 3) -> None:
    """Compare what the broker has with what the code says, and name every difference. Exit code 1 if there is one."""
    from crucible.broker import verify as compare  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.broker.management import Management  # noqa: PLC0415

    with _errors(session):
        settings = local_settings()
        name = _vhost(settings, vhost)
        with Management(settings.broker) as api:
            found = compare.differences(compare.observe(api, name), settings.broker, name, members=members)
    session.emit({"differences": [_document(difference) for difference in found]}, lambda: _view(found))
    if found:
        raise typer.Exit(ExitCode.NOT_COMPLETED)


def _vhost(settings: Settings, given: str | None) -> str:
    from crucible.broker.topology import VHOST  # noqa: PLC0415 - slow to import, and only a command that runs needs it
    from crucible.broker.urls import BrokerUrl  # noqa: PLC0415

    if given or settings.broker_url is None:
        return given or VHOST
    url = BrokerUrl.parse(settings.broker_url.get_secret_value())
    return url.vhost if url.kind == "rabbitmq" else VHOST


@contextmanager
def _errors(session: Session) -> Iterator[None]:
    """Report what is wrong with the broker or with the settings, and leave with the exit code for it."""
    from crucible.broker.definitions import PasswordError  # noqa: PLC0415 - slow to import, and only a command that runs needs it
    from crucible.broker.errors import BrokerError, BrokerReason  # noqa: PLC0415

    try:
        yield
    except PasswordError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None
    except BrokerError as error:
        title = error.message[0].upper() + error.message[1:]
        session.report({"type": "about:blank", "title": title, "detail": error.hint, "reason": error.reason})
        if error.reason is BrokerReason.URL:
            raise typer.Exit(ExitCode.USAGE) from None
        raise typer.Exit(ExitCode.UNAVAILABLE if error.passing else ExitCode.REFUSED) from None


def _document(difference: Difference) -> dict[str, object]:
    fields = ("where", "what", "wanted", "found", "remedy")
    return {name: getattr(difference, name) for name in fields}


def _view(found: list[Difference]) -> RenderableType:
    if not found:
        return plain("the broker has all that the code says, and nothing else under our names")
    return Group(*(plain(difference) for difference in found), plain(f"differences: {len(found)}", "bold"))
