"""`crucible serve`: one service in the foreground, from settings alone. What the images run, one service each.

Each service's modules are imported only when it is served, so that an image needs no other's packages.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from crucible.cli import foreground
from crucible.cli.exit_codes import ExitCode
from crucible.cli.explain import facts_table
from crucible.cli.requests import given
from crucible.cli.session import Session, offline_command
from crucible.cli.up import local_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from crucible.serve.service import Service
    from crucible.settings import Settings

serve = typer.Typer(help="Run one service (operators).", no_args_is_help=True)

Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")]


@serve.command("storage")
@offline_command
def storage(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run the owner of PostgreSQL and the object store. Needs CRUCIBLE_STORAGE__DATABASE_URL and CRUCIBLE_INTERNAL_TOKEN.

    With CRUCIBLE_BROKER_URL it publishes what waits, with CRUCIBLE_REDIS_URL what happened.
    """

    def make(settings: Settings) -> Service:
        from crucible.serve.storage import StorageService  # noqa: PLC0415 - slow to import, and only this needs it

        return StorageService(settings)

    _run(session, make, storage=given(host=host, port=port))


@serve.command("dispatcher")
@offline_command
def dispatcher(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run the only creator of sandboxes on this node. Needs CRUCIBLE_STORAGE_URL and CRUCIBLE_INTERNAL_TOKEN."""

    def make(settings: Settings) -> Service:
        from crucible.serve.dispatcher import DispatcherService  # noqa: PLC0415 - slow to import, and only this needs it

        return DispatcherService(settings)

    _run(session, make, dispatcher=given(host=host, port=port))


@serve.command("api")
@offline_command
def api(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run the public API. Needs CRUCIBLE_STORAGE_URL, CRUCIBLE_DISPATCHER_URL and CRUCIBLE_INTERNAL_TOKEN.

    Without CRUCIBLE_REDIS_URL no events reach it, and streams and long-polls look into the table once a second.
    """

    def make(settings: Settings) -> Service:
        from crucible.serve.api import ApiService  # noqa: PLC0415 - slow to import, and only this needs it

        return ApiService(settings)

    _run(session, make, api=given(host=host, port=port))


@serve.command("worker")
@offline_command
def worker(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run a worker of the broker. Needs CRUCIBLE_BROKER_URL, CRUCIBLE_STORAGE_URL, CRUCIBLE_DISPATCHER_URL, CRUCIBLE_INTERNAL_TOKEN.

    Only health and metrics are served. The first Ctrl-C or SIGTERM drains: what runs may finish, the rest is given back.
    """

    def make(settings: Settings) -> Service:
        from crucible.serve.worker import WorkerService  # noqa: PLC0415 - slow to import, and only this needs it

        return WorkerService(settings)

    _run(session, make, worker=given(host=host, port=port))


@serve.command("cleanup")
@offline_command
def cleanup(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run what removes from the cluster what is recorded. Needs CRUCIBLE_STORAGE_URL, CRUCIBLE_INTERNAL_TOKEN and a cluster.

    The cluster is the one that this runs in, or the one that CRUCIBLE_KUBERNETES__KUBECONFIG names.
    """

    def make(settings: Settings) -> Service:
        from crucible.serve.cleanup import CleanupService  # noqa: PLC0415 - slow to import, and only this needs it

        return CleanupService(settings)

    _run(session, make, cleanup=given(host=host, port=port))


@serve.command("monitor")
@offline_command
def monitor(session: Session, *, host: Host = None, port: Port = None) -> None:
    """Run a replica of what watches the cluster's sandboxes. Needs CRUCIBLE_STORAGE_URL and CRUCIBLE_INTERNAL_TOKEN.

    Finds the cluster by CRUCIBLE_KUBERNETES__KUBECONFIG, or as the Pod that it runs in. Only health and metrics are served.
    """

    def make(settings: Settings) -> Service:
        from crucible.serve.monitor import MonitorService  # noqa: PLC0415 - slow to import, and only this needs it

        return MonitorService(settings)

    _run(session, make, monitor=given(host=host, port=port))


def _run(session: Session, make: Callable[[Settings], Service], **sections: Any) -> None:
    settings = local_settings(**sections)
    from crucible import logs  # noqa: PLC0415 - slow to import, and only this needs it

    service = make(settings)
    logs.configure(service.name, settings.log)
    asyncio.run(
        foreground.run(
            session,
            service,
            start=_start(session, service),
            started=lambda: _announce(session, service),
            ended=service.ended,
            at_once="stopped at once; what ran here is settled by those who remain",
        )
    )


async def _start(session: Session, service: Service) -> None:
    from crucible.broker.errors import BrokerError  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.kubernetes.api import KubernetesConfigError  # noqa: PLC0415 - the same
    from crucible.problems import ProblemError  # noqa: PLC0415 - the same
    from crucible.settings import SettingsError  # noqa: PLC0415 - the same

    try:
        await service.start()
    except SettingsError as error:
        raise typer.BadParameter(str(error), param_hint="environment") from None
    except (OSError, RuntimeError, ProblemError, BrokerError, KubernetesConfigError) as error:
        session.report({"type": "about:blank", "title": f"{service.name} did not start", "detail": str(error)})
        raise typer.Exit(ExitCode.UNAVAILABLE) from None


def _announce(session: Session, service: Service) -> None:
    document = {"service": service.name, "url": service.url, "instance": service.instance}
    session.emit(document, lambda: facts_table([(f"{service.name} serves", service.url), ("stop", "Ctrl-C")]))
