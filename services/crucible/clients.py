"""Typed clients of the internal HTTP services. In `local` they speak over an in-process transport, elsewhere over the network."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import BaseModel

from crucible import contracts as c
from crucible.evaluation import Reason, State
from crucible.frames import Frame, decode_all, encode_all
from crucible.resilience import ServiceCaller

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    ASGIApp = Any

M = TypeVar("M", bound=BaseModel)
# Longer than any long-poll; everything else is bounded by the server's own work.
_READ_TIMEOUT_S = 90.0
_CONNECT_TIMEOUT_S = 2.0
# A peer whose machine has lost its power or its network says nothing, ever. The kernel asks it now and then, also while a long-poll
# waits, and ends the connection within 9 s: in time to ask a living replica before a lease of 30 s is over.
_PROBE_AFTER_S, _PROBE_EVERY_S, _PROBES = 3, 2, 3
_SILENT_S = _PROBE_AFTER_S + _PROBE_EVERY_S * _PROBES


def http_client(base: str | ASGIApp, token: str) -> httpx.AsyncClient:
    """Return an httpx client of an internal service, at a URL or in this process.

    Args:
        base: `http://...` or an ASGI app.
        token: the platform's internal token.
    """
    timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {token}"}
    if isinstance(base, str):
        transport = httpx.AsyncHTTPTransport(socket_options=list(_notice_silence()))
        return httpx.AsyncClient(transport=transport, base_url=base, timeout=timeout, headers=headers)
    # raise_app_exceptions off: an error inside the app is a 500 to the caller, as it would be over the network.
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(base, raise_app_exceptions=False),
        base_url="http://internal",
        timeout=timeout,
        headers=headers,
    )


def _notice_silence() -> Iterator[tuple[int, int, int]]:
    yield socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1
    # All of them on Linux; elsewhere some have no name, and the system's own patience holds.
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_AFTER_S),
        ("TCP_KEEPINTVL", _PROBE_EVERY_S),
        ("TCP_KEEPCNT", _PROBES),
        ("TCP_USER_TIMEOUT", _SILENT_S * 1000),
    ):
        if option := getattr(socket, name, None):
            yield socket.IPPROTO_TCP, option, value


def _json(model: BaseModel) -> dict[str, Any]:
    return {"content": model.model_dump_json().encode(), "headers": {"Content-Type": "application/json"}}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


class StorageClient:
    """The storage service. Every method may raise `CallFailedError`; those that name a missing thing raise it with status 404."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._http = client
        self._caller = ServiceCaller("storage", client)

    async def _get(self, path: str, model: type[M], **params: Any) -> M:
        response = await self._caller.call("GET", path, params=_given(**params))
        return model.model_validate_json(response.content)

    async def _send(self, method: str, path: str, model: type[M], body: BaseModel, **kwargs: Any) -> M:
        response = await self._caller.call(method, path, **_json(body), **kwargs)
        return model.model_validate_json(response.content)

    # -- evaluations

    async def create(self, items: c.NewEvaluations) -> c.StoredList:
        """Store accepted evaluations, all in one transaction; repeating the call is harmless."""
        return await self._send("POST", "/internal/evaluations", c.StoredList, items)

    async def get(self, evaluation_id: str) -> c.EvaluationRecord:
        """Read one evaluation."""
        return await self._get(f"/internal/evaluations/{evaluation_id}", c.EvaluationRecord)

    async def payload(self, evaluation_id: str) -> c.Payload:
        """Read what an evaluation runs."""
        return await self._get(f"/internal/evaluations/{evaluation_id}/payload", c.Payload)

    async def page(
        self,
        *,
        owner: str | None = None,
        state: Sequence[State] | None = None,
        reason: Sequence[Reason] | None = None,
        priority: int | None = None,
        label: Sequence[str] | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> c.EvaluationPage:
        """List evaluations, newest first. `label` entries are `key=value`; `since` and `until` bound the submission time."""
        return await self._get(
            "/internal/evaluations",
            c.EvaluationPage,
            owner=owner,
            state=list(state) if state else None,
            reason=list(reason) if reason else None,
            priority=priority,
            label=list(label) if label else None,
            since=since.isoformat() if since else None,
            until=until.isoformat() if until else None,
            limit=limit,
            cursor=cursor,
        )

    async def events(self, evaluation_id: str, *, after: int = 0) -> c.EventList:
        """Read an evaluation's events with a sequence number above `after`."""
        return await self._get(f"/internal/evaluations/{evaluation_id}/events", c.EventList, after=after)

    async def event_stream(
        self, *, owner: str | None = None, cursor: str | None = None, limit: int = 500
    ) -> c.EventList:
        """Read events over all evaluations (or an owner's) after `cursor`; without one, from now: no events, only a cursor."""
        return await self._get("/internal/events", c.EventList, owner=owner, cursor=cursor, limit=limit)

    async def cancel(self, evaluation_id: str, request: c.CancelRequest) -> c.CancelResult:
        """Ask for an evaluation to end. What waits is cancelled at once; what is held gets the request recorded."""
        return await self._send("POST", f"/internal/evaluations/{evaluation_id}/cancel", c.CancelResult, request)

    # -- queue

    async def claim(self, request: c.ClaimRequest) -> c.ClaimList:
        """Take work from the queue in strict order of effective priority, then age."""
        # Not repeated on a lost answer: the claims of the first try would sit unheard until their lease ends.
        return await self._send("POST", "/internal/claims", c.ClaimList, request, idempotent=False)

    async def claim_one(self, evaluation_id: str, request: c.ClaimOne) -> c.ClaimAnswer:
        """Take one evaluation that the caller was told of. Safe to repeat: the same key gets the same claim."""
        return await self._send("POST", f"/internal/evaluations/{evaluation_id}/claim", c.ClaimAnswer, request)

    async def renew(self, renewal: c.LeaseRenewal) -> c.LeaseAnswer:
        """Renew the leases of what a worker holds, and learn what to let go of."""
        return await self._send("POST", "/internal/leases", c.LeaseAnswer, renewal)

    async def sustain(self, sustaining: c.Sustaining) -> c.Sustained:
        """Keep attempts held whose sandboxes are watched; not those that a cancel was asked for."""
        return await self._send("POST", "/internal/leases/sustain", c.Sustained, sustaining)

    async def release(self, evaluation_id: str, release: c.Release) -> c.EvaluationRecord:
        """Give an attempt back unrun; it does not count as an attempt."""
        return await self._send("POST", f"/internal/evaluations/{evaluation_id}/release", c.EvaluationRecord, release)

    async def running(self, evaluation_id: str, running: c.Running) -> c.EvaluationRecord:
        """Record that the code has started. 409 `stale-attempt` if the attempt is void or a cancel was asked for."""
        return await self._send("POST", f"/internal/evaluations/{evaluation_id}/running", c.EvaluationRecord, running)

    async def append_output(self, evaluation_id: str, frames: Sequence[Frame], *, attempt: int, frame: int) -> int:
        """Ship output frames (STDOUT and STDERR only), and learn how many frames storage has; with none, only learn it.

        Args:
            evaluation_id: whose output.
            frames: what it wrote. Those that storage has already are ignored.
            attempt: its present attempt; 409 `stale-attempt` if it is another one.
            frame: number of the first of the frames, from 0 within the attempt; 409 `conflict` if one before it is missing.
        """
        response = await self._caller.call(
            "POST",
            f"/internal/evaluations/{evaluation_id}/output",
            params={"attempt": attempt, "frame": frame},
            content=encode_all(frames),
            headers={"Content-Type": "application/octet-stream"},
        )
        return c.OutputPosition.model_validate_json(response.content).frames

    async def finish(self, evaluation_id: str, finish: c.Finish) -> c.EvaluationRecord:
        """Record the end of an attempt: exactly one becomes visible. Repeating the call is harmless; 409 `stale-attempt` if void."""
        return await self._send("POST", f"/internal/evaluations/{evaluation_id}/finish", c.EvaluationRecord, finish)

    async def held(self, *, after: str = "", limit: int = 1000) -> c.HeldPage:
        """List attempts under way, by id, from the one after `after`."""
        return await self._get("/internal/held", c.HeldPage, after=after, limit=limit)

    async def queue(self) -> c.QueueReport:
        """Read what waits, by size class and priority."""
        return await self._get("/internal/queue", c.QueueReport)

    async def position(self, evaluation_id: str) -> c.QueuePosition:
        """Read where an evaluation stands in its queue."""
        return await self._get(f"/internal/evaluations/{evaluation_id}/position", c.QueuePosition)

    # -- output

    async def output(
        self, evaluation_id: str, stream: str, *, start: int = 0, length: int | None = None
    ) -> tuple[bytes, int]:
        """Read bytes of `stdout` or `stderr` from offset `start`; also returns the stream's size so far."""
        response = await self._caller.call(
            "GET", f"/internal/evaluations/{evaluation_id}/output/{stream}", params=_given(start=start, length=length)
        )
        return response.content, int(response.headers["X-Output-Size"])

    async def frames(self, evaluation_id: str, *, after: int = 0, limit: int = 1000) -> tuple[list[Frame], int]:
        """Read output of both streams in order, from frame number `after`; also returns the number of the next frame."""
        response = await self._caller.call(
            "GET", f"/internal/evaluations/{evaluation_id}/frames", params={"after": after, "limit": limit}
        )
        return decode_all(response.content), int(response.headers["X-Next-Frame"])

    # -- statistics and dead letters

    async def statistics(self, *, owner: str | None = None, since: datetime | None = None) -> c.Statistics:
        """Read aggregates."""
        return await self._get(
            "/internal/statistics", c.Statistics, owner=owner, since=since.isoformat() if since else None
        )

    async def dead_letters(self, *, limit: int = 50, cursor: str | None = None) -> c.DeadLetterPage:
        """List dead letters, newest first."""
        return await self._get("/internal/dead-letters", c.DeadLetterPage, limit=limit, cursor=cursor)

    async def replay(self, letter_id: int, new_id: str) -> c.EvaluationRecord:
        """Queue a dead letter's evaluation again, whole, under a new id. 409 `conflict` if it has been replayed."""
        response = await self._caller.call(
            "POST", f"/internal/dead-letters/{letter_id}/replay", params={"new_id": new_id}
        )
        return c.EvaluationRecord.model_validate_json(response.content)

    async def delete_dead_letter(self, letter_id: int) -> None:
        """Delete a dead letter; its evaluation stays readable."""
        await self._caller.call("DELETE", f"/internal/dead-letters/{letter_id}")

    # -- keys

    async def add_key(self, key: c.NewApiKey) -> c.ApiKey:
        """Store a key."""
        return await self._send("POST", "/internal/keys", c.ApiKey, key)

    async def keys(self) -> list[c.ApiKey]:
        """List keys."""
        response = await self._caller.call("GET", "/internal/keys")
        return [c.ApiKey.model_validate(item) for item in response.json()]

    async def find_key(self, key_id: str, secret_sha256: str) -> c.ApiKey | None:
        """Return the key if id and secret belong together and it is neither revoked nor expired."""
        response = await self._caller.call(
            "GET", f"/internal/keys/{key_id}", params={"secret_sha256": secret_sha256}, ok=(200, 404)
        )
        return c.ApiKey.model_validate_json(response.content) if response.status_code == 200 else None

    async def revoke_key(self, key_id: str) -> None:
        """Revoke a key."""
        await self._caller.call("DELETE", f"/internal/keys/{key_id}")

    # -- upkeep

    async def usage(self) -> c.StorageUsage:
        """Report where the bytes are."""
        return await self._get("/internal/usage", c.StorageUsage)

    async def migrate(self, request: c.MigrateRequest) -> c.MigrateResult:
        """Move some objects to another backend."""
        return await self._send("POST", "/internal/migrate", c.MigrateResult, request)

    async def cleanup(self, request: c.CleanupRequest) -> c.CleanupResult:
        """Delete old evaluations."""
        return await self._send("POST", "/internal/cleanup", c.CleanupResult, request)

    # -- broker

    async def broker(self) -> c.BrokerReport:
        """Read where the brokers stand."""
        return await self._get("/internal/broker", c.BrokerReport)

    async def move_broker(self, move: c.BrokerMove) -> c.BrokerReport:
        """Take a step from one broker to the other; repeating it is harmless. 409 `conflict` if it is not its turn."""
        return await self._send("POST", "/internal/broker/migration", c.BrokerReport, move)


class DispatcherClient:
    """The dispatcher service."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._caller = ServiceCaller("dispatcher", client)

    async def create(self, evaluation_id: str, request: c.SandboxRequest) -> c.SandboxStatus:
        """Make (or find) the sandbox. 409 `no-capacity` or 422 `never-fits` if it has no room."""
        response = await self._caller.call("PUT", f"/internal/sandboxes/{evaluation_id}", **_json(request))
        return c.SandboxStatus.model_validate_json(response.content)

    async def wait(self, evaluation_id: str, *, attempt: int, wait_seconds: float) -> c.SandboxStatus:
        """Return the sandbox once it has finished, or as it is after `wait_seconds` (at most 60). 404 if there is none."""
        response = await self._caller.call(
            "GET", f"/internal/sandboxes/{evaluation_id}", params={"attempt": attempt, "wait_seconds": wait_seconds}
        )
        return c.SandboxStatus.model_validate_json(response.content)

    async def stop(self, evaluation_id: str, reason: Reason, *, attempt: int | None = None) -> c.SandboxStatus | None:
        """End the sandbox and return once no process of it is left; None if there was none.

        With an `attempt` no later one is touched.
        """
        params = _given(reason=reason, attempt=attempt)
        response = await self._caller.call(
            "DELETE", f"/internal/sandboxes/{evaluation_id}", params=params, ok=(200, 404)
        )
        return c.SandboxStatus.model_validate_json(response.content) if response.status_code == 200 else None

    async def capacity(self) -> c.CapacityReport:
        """Read what is free."""
        response = await self._caller.call("GET", "/internal/capacity")
        return c.CapacityReport.model_validate_json(response.content)

    async def check(self, check: c.CapacityCheck) -> c.CapacityAnswer:
        """Ask whether something would fit."""
        response = await self._caller.call("POST", "/internal/capacity/check", **_json(check))
        return c.CapacityAnswer.model_validate_json(response.content)
