"""`crucible cleanup-cluster`: remove once, now, what nobody needs any more; or only say what that would be."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from crucible.cli.exit_codes import ExitCode
from crucible.cli.requests import given
from crucible.cli.session import Session, offline_command
from crucible.cli.text import plain
from crucible.cli.up import local_settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from crucible.cleanup.cleanup import Report
    from crucible.settings import Settings


@offline_command
def cleanup_cluster(
    session: Session,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    older_than: Annotated[
        float | None,
        typer.Option(
            "--older-than",
            min=1,
            metavar="SECONDS",
            help="Orphans at least so old. What is recorded goes whatever its age.",
            show_default="CRUCIBLE_CLEANUP__ORPHAN_SECONDS",
        ),
    ] = None,
    limit: Annotated[float, typer.Option("--limit", min=1, metavar="SECONDS", help="How long it may take.")] = 60,
) -> None:
    """Remove from the cluster what is recorded, and what no attempt owns that storage knows as under way (operators).

    Needs CRUCIBLE_STORAGE_URL, CRUCIBLE_INTERNAL_TOKEN and a cluster, as `crucible serve cleanup` does. Exit code 1 means that something
    could not be removed; its name and the obstacle are shown.
    """
    settings = local_settings(cleanup=given(dry_run=dry_run or None, orphan_seconds=older_than))
    report = asyncio.run(_sweep(session, settings, limit))
    document = {
        "removed": report.removed,
        "would_remove": report.would_remove,
        "kept": sorted(report.kept),
        "stuck": report.stuck,
    }
    session.emit(document, lambda: _view(report))
    if report.stuck:
        raise typer.Exit(ExitCode.NOT_COMPLETED)


async def _sweep(session: Session, settings: Settings, limit: float) -> Report:
    from crucible.cleanup.cleanup import Cleanup  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.clients import StorageClient, http_client  # noqa: PLC0415 - the same
    from crucible.kubernetes.api import ApiError, KubernetesApi, KubernetesConfigError  # noqa: PLC0415 - the same
    from crucible.resilience import CallFailedError  # noqa: PLC0415 - the same

    if not settings.storage_url or not settings.internal_token:
        named = "CRUCIBLE_STORAGE_URL and CRUCIBLE_INTERNAL_TOKEN"
        raise typer.BadParameter(f"{named} say how to reach storage, which is the judge", param_hint="environment")
    try:
        async with (
            KubernetesApi.from_settings(settings.kubernetes, "crucible-cleanup") as api,
            http_client(settings.storage_url, settings.internal_token.get_secret_value()) as client,
        ):
            cleanup = Cleanup(api, StorageClient(client), settings.cleanup, settings.kubernetes)
            try:
                return await cleanup.sweep_once(limit)
            finally:
                await cleanup.aclose()
    except (ApiError, KubernetesConfigError, CallFailedError) as error:
        session.report({"type": "about:blank", "title": "Nothing could be cleaned up", "detail": str(error)})
        raise typer.Exit(ExitCode.UNAVAILABLE) from None


def _view(report: Report) -> RenderableType:
    lines = [plain(f"removed {name}: {why.words}") for name, why in sorted(report.removed.items())]
    lines += [plain(f"would remove {name}: {why.words}") for name, why in sorted(report.would_remove.items())]
    lines += [plain(f"kept {name}: storage holds it") for name in sorted(report.kept)]
    lines += [plain(problem, "red") for problems in report.stuck.values() for problem in problems]
    return Group(*lines or [plain("there is nothing to remove")])
