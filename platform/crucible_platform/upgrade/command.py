"""`crucible-platform upgrade`: shows the way to a later Kubernetes version, and whether the next minor can begin. It changes nothing."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from crucible_platform.upgrade.plan import UpgradeRefusedError, known, next_allowed, plan
from crucible_platform.upgrade.versions import NEWEST, Minor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crucible_platform.upgrade.plan import Finding, Leg, Step, UpgradePlan


class ExitCode(IntEnum):
    """What both commands end with. A command line that is wrong ends with 2 as well."""

    READY = 0
    NOT_READY = 1
    UNREAD = 2


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help=(
        "The way to a later Kubernetes version. Reads the cluster and changes nothing.\n\n"
        "Exit codes: 0, nothing to do, or the next minor can begin; 1, something keeps it from beginning, or the upgrade is refused; "
        "2, the cluster could not be read, or not all of it."
    ),
)
ClusterOption = Annotated[str, typer.Option("--cluster", help="Name of the EKS cluster, such as crucible-dev")]
RegionOption = Annotated[str, typer.Option("--region", help="Its AWS region")]
TargetOption = Annotated[str, typer.Option("--target", help="Where it is to be")]
ConfiguredOption = Annotated[
    str | None,
    typer.Option("--configured", help="Version that the stack's configuration has; refused if it is not the next one"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.command("plan")
def show_plan(
    cluster: ClusterOption, region: RegionOption, target: TargetOption = str(NEWEST), as_json: JsonOption = False
) -> None:
    """Show every step to the target: what, why, how, and whether there is a way back."""
    found = _planned(cluster, region, target, as_json=as_json)
    _print(jsonable(found) if as_json else told(found))
    raise typer.Exit(exit_code(found))


@app.command()
def check(
    cluster: ClusterOption,
    region: RegionOption,
    target: TargetOption = str(NEWEST),
    configured: ConfiguredOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell whether the next minor on the way to the target can begin, and what keeps it from that."""
    found = _planned(cluster, region, target, configured, as_json=as_json)
    _print(verdict(found) if as_json else told_verdict(found))
    raise typer.Exit(exit_code(found))


def exit_code(found: UpgradePlan) -> ExitCode:
    """Return what a plan's command ends with."""
    if found.unread:
        return ExitCode.UNREAD
    return ExitCode.READY if found.ready else ExitCode.NOT_READY


def _planned(cluster: str, region: str, target: str, configured: str | None = None, *, as_json: bool) -> UpgradePlan:
    from crucible_platform.upgrade.read import ReadError, eks_client, read_cluster  # noqa: PLC0415 - boto3 takes long to import

    try:
        wanted = known(target)
        reading = read_cluster(eks_client(region), cluster)
        if configured:
            next_allowed(str(reading.state.version), configured)
        return plan(reading.state, wanted, reading.compatible, datetime.now(UTC).date())
    except UpgradeRefusedError as error:
        _end(ExitCode.NOT_READY, "refused", error.reason, str(error), error.hint, as_json=as_json)
    except ReadError as error:
        _end(ExitCode.UNREAD, "could not be read", error.reason, str(error), error.hint, as_json=as_json)


def _print(said: dict[str, Any] | Iterator[str]) -> None:
    if isinstance(said, dict):
        typer.echo(json.dumps(said, indent=2))
    else:
        typer.echo("\n".join(map(_visible, said)))


def _visible(line: str) -> str:
    """Return a line that cannot command a terminal: user agents, which insights name, are words of strangers."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)


def _end(code: ExitCode, outcome: str, reason: str, message: str, hint: str, *, as_json: bool) -> NoReturn:
    if as_json:
        _print({"outcome": outcome, "reason": reason, "message": message, "hint": hint})
    else:
        typer.echo(f"{outcome}: {_visible(message)}\n  {hint}", err=True)
    raise typer.Exit(code)


def verdict(found: UpgradePlan) -> dict[str, Any]:
    """Return what `check` says, for programs."""
    return {
        "cluster": found.cluster,
        "current": str(found.current),
        "next": str(found.next_minor) if found.next_minor else None,
        "target": str(found.target),
        "ready": found.ready,
        "blockers": jsonable(found.blockers),
        "unread": jsonable(found.unread),
    }


def jsonable(value: Any) -> Any:
    """Return a plan, or a part of one, as JSON has it: versions and dates are texts."""
    if isinstance(value, Minor | date):
        return str(value)
    if isinstance(value, tuple | list):
        return [jsonable(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: jsonable(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def told(found: UpgradePlan) -> Iterator[str]:
    """Yield a plan's lines, for people."""
    steps = len(found.steps)
    yield f"{found.cluster} in {found.region}: {found.current} -> {found.target}, {_count(steps, 'step')}"
    yield f"staying at {found.current}: {found.staying}"
    yield from _unread_lines(found)
    number = 0
    for leg in found.legs:
        if leg.steps or leg.findings or leg.minor > found.current:
            yield ""
            yield from _leg_lines(leg, number, own=leg.minor == found.current)
        number += len(leg.steps)
    yield ""
    yield _verdict_line(found)


def _leg_lines(leg: Leg, number: int, *, own: bool) -> Iterator[str]:
    price = "" if leg.usd_per_hour is None else f", {leg.usd_per_hour:.2f} USD an hour"
    yield f"{'at' if own else 'to'} {leg.minor} (support: {leg.support}{price})"
    for finding in leg.findings:
        yield from _finding_lines(finding)
    for removed in leg.removed:
        yield f"  removed  {removed}"
    for note in leg.notes:
        yield f"  note     {note}"
    for step in leg.steps:
        number += 1
        yield from _step_lines(step, number)


def _finding_lines(finding: Finding) -> Iterator[str]:
    yield f"  {finding.severity:<8} {finding.text}"
    yield f"           {finding.hint}"


def _step_lines(step: Step, number: int) -> Iterator[str]:
    yield f"  {number:>2}. {step.what}"
    yield f"      why   {step.why}"
    yield from (f"      {'how' if line == 0 else '':<5} {each}" for line, each in enumerate(step.how))
    yield f"      back  {step.undo}: {step.way_back}"


def told_verdict(found: UpgradePlan) -> Iterator[str]:
    """Yield the lines of what `check` says, for people."""
    yield _verdict_line(found)
    for finding in found.blockers:
        yield from _finding_lines(finding)
    yield from _unread_lines(found)


def _verdict_line(found: UpgradePlan) -> str:
    due = str(found.next_minor or f"staying at {found.current}")
    if not found.ready:
        first = _count(len(found.blockers), "thing")
        return f"not ready for {due}: {first} to do first, {_count(len(found.unread), 'part')} unread"
    if found.next_minor:
        return f"ready for {due}"
    if found.steps:
        return f"ready, with {_count(len(found.steps), 'step')} left at {found.current}"
    return f"nothing to do: {found.cluster} is at {found.current}, with all that belongs to it"


def _unread_lines(found: UpgradePlan) -> Iterator[str]:
    for unread in found.unread:
        yield f"  unread   {unread.part}: {unread.problem}"
        yield f"           {unread.hint}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
