"""What is free, what waits, and whether something would fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import Response

from crucible.api import views
from crucible.api.access import Caller, scope_of
from crucible.api.answers import answer
from crucible.api.body import read_model
from crucible.api.core import Api, api_of
from crucible.api.parameters import OwnerQuery, SinceQuery
from crucible.api.schema import GUARDED, READS_BODY, body, errors, ok
from crucible.api.waiting import estimate
from crucible.contracts import CapacityAnswer, CapacityCheck, Fit, QueueReport, Statistics
from crucible.evaluation import Resources, Violation
from crucible.limits import SizeClass
from crucible.problems import invalid_request
from crucible.quantity import QuantityError, format_cpu, format_memory, parse_cpu, parse_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.limits import Limits

router = APIRouter(tags=["capacity"], default_response_class=Response)


def _queue_view(report: QueueReport, size_class: SizeClass) -> views.QueueView:
    bands = sorted((band for band in report.bands if band.size_class is size_class), key=lambda band: -band.priority)
    waiting = sum(band.waiting for band in bands)
    running = report.running.get(size_class, 0)
    return views.QueueView(
        size_class=size_class,
        waiting=waiting,
        running=running,
        estimated_wait_seconds=estimate(waiting, running, report.mean_hold_seconds.get(size_class)),
        priorities=[
            views.PriorityBand(priority=band.priority, waiting=band.waiting, oldest_seconds=band.oldest_seconds)
            for band in bands
        ],
    )


@router.get(
    "/v1/capacity",
    summary="Read what is free and what waits",
    responses={200: ok(views.CapacityView, "Nodes and queues"), **errors(*GUARDED)},
)
async def get_capacity(request: Request, who: Caller) -> Response:  # noqa: ARG001 - who: anyone with a key may ask
    """Read what each node has free, what waits per size class and priority, and how long a new request is likely to wait."""
    api = api_of(request)
    nodes = (await api.dispatcher.capacity()).nodes
    queue = await api.storage.queue()
    shown = views.CapacityView(
        nodes=[views.NodeView.of(node) for node in sorted(nodes, key=lambda node: node.name)],
        queues=[_queue_view(queue, size_class) for size_class in SizeClass],
    )
    return answer(shown)


def _quantity(field: str, text: str | None, default: int, parse: Callable[[str], int], found: list[Violation]) -> int:
    try:
        return default if text is None else parse(text)
    except QuantityError as error:
        accepted = '"256Mi" or "1Gi"' if field == "memory_limit" else '"250m" or "2"'
        found.append(Violation(field=field, message=str(error), value=ascii(text)[:80], accepted=accepted))
        return default


def _requested(asked: views.CapacityCheckBody, limits: Limits) -> Resources:
    """Return the resources asked about, also beyond the limits: `never` is an answer here, not an error.

    Raises:
        ProblemError: 422, a quantity or profile that means nothing.
    """
    found: list[Violation] = []
    profile = limits.profiles.get(limits.profile_default if asked.profile is None else asked.profile)
    if profile is None:
        accepted = ", ".join(sorted(limits.profiles))
        message = "is not a profile of this installation"
        found.append(Violation(field="profile", message=message, value=ascii(asked.profile)[:80], accepted=accepted))
        profile = limits.profiles[limits.profile_default]
    memory = _quantity("memory_limit", asked.memory_limit, profile.memory_bytes, parse_memory, found)
    cpu = _quantity("cpu_limit", asked.cpu_limit, profile.cpu_millis, parse_cpu, found)
    if found:
        raise invalid_request(found)
    return Resources(cpu_millis=cpu, memory_bytes=memory)


def _outside_limits(wanted: Resources, limits: Limits) -> str | None:
    for name, value, lowest, highest, show in (
        ("memory_limit", wanted.memory_bytes, limits.memory_min_bytes, limits.memory_max_bytes, format_memory),
        ("cpu_limit", wanted.cpu_millis, limits.cpu_min_millis, limits.cpu_max_millis, format_cpu),
    ):
        if not lowest <= value <= highest:
            return f"{name} {show(value)} is outside what this installation accepts, {show(lowest)} to {show(highest)}"
    return None


async def _ask(api: Api, wanted: Resources) -> CapacityAnswer:
    limits = api.limits
    outside = _outside_limits(wanted, limits)
    # Even then the dispatcher is asked, for the largest that would fit; with something that it can take seriously.
    asked = (
        wanted if outside is None else Resources(cpu_millis=limits.cpu_min_millis, memory_bytes=limits.memory_min_bytes)
    )
    found = await api.dispatcher.check(CapacityCheck(resources=asked))
    largest = Resources(
        cpu_millis=min(found.largest.cpu_millis, limits.cpu_max_millis),
        memory_bytes=min(found.largest.memory_bytes, limits.memory_max_bytes),
    )
    if outside is not None:
        return CapacityAnswer(fit=Fit.NEVER, reason=outside, largest=largest)
    return CapacityAnswer(fit=found.fit, reason=found.reason, largest=largest)


@router.post(
    "/v1/capacity/check",
    summary="Ask whether a request would fit",
    openapi_extra=body(views.CapacityCheckBody, {"one": {"memory_limit": "512Mi", "cpu_limit": "500m"}}),
    responses={200: ok(views.CapacityCheckView, "Now, later or never"), **errors(*GUARDED, *READS_BODY)},
)
async def check_capacity(request: Request, who: Caller) -> Response:  # noqa: ARG001 - who: anyone with a key may ask
    """Learn whether a request has room now, would have to wait, or can never run here; why; and the largest that could."""
    api = api_of(request)
    wanted = _requested(await read_model(request, views.CapacityCheckBody, api.limits.body_bytes), api.limits)
    found = await _ask(api, wanted)
    shown = views.CapacityCheckView(
        fit=found.fit,
        reason=found.reason,
        requested=views.ResourcesView.of(wanted),
        largest=views.ResourcesView.of(found.largest),
    )
    return answer(shown)


@router.get(
    "/v1/statistics",
    summary="Read aggregates",
    responses={
        200: ok(Statistics, "Counts, waits and run times"),
        **errors(*GUARDED, "forbidden", "invalid-request"),
    },
)
async def get_statistics(request: Request, who: Caller, since: SinceQuery = None, owner: OwnerQuery = None) -> Response:
    """Read how one's own evaluations (an operator: everyone's) fared."""
    return answer(await api_of(request).storage.statistics(owner=scope_of(who, owner), since=since))
