"""From rows to the records that the other services see, and from hostile values to ones that PostgreSQL can hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import orjson

from crucible.contracts import EvaluationRecord, OutputInfo
from crucible.evaluation import EvaluationSpec, Resources, State
from crucible.events import Event

if TYPE_CHECKING:
    from crucible.storage.engine import Row

_INT_MAX = 2**31 - 1
_BIGINT_MAX = 2**63 - 1


def _hex(digest: bytes | None) -> str | None:
    return None if digest is None else digest.hex()


def evaluation_record(row: Row) -> EvaluationRecord:
    """Return the record of a whole row of `evaluations`."""
    return EvaluationRecord(
        id=row["id"],
        owner=row["owner"],
        state=row["state"],
        reason=row["reason"],
        detail=row["detail"],
        priority=row["priority"],
        effective_priority=row["effective_priority"],
        size_class=row["size_class"],
        resources=Resources(cpu_millis=row["cpu_millis"], memory_bytes=row["memory_bytes"]),
        image=row["image"],
        labels=orjson.loads(row["labels"]),
        timeout_seconds=row["timeout_seconds"],
        queue_timeout_seconds=row["queue_timeout_seconds"],
        code_sha256=row["code_sha256"].hex(),
        seq=row["seq"],
        attempt=row["attempt"],
        submitted_at=row["submitted_at"],
        queued_at=row["queued_at"],
        provisioning_at=row["provisioning_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        cancel_requested=row["cancel_reason"] is not None,
        exit_code=row["exit_code"],
        signal=row["signal"],
        exception_type=row["exception_type"],
        peak_memory_bytes=row["peak_memory_bytes"],
        cpu_seconds=row["cpu_seconds"],
        run_seconds=row["run_seconds"],
        stdout=OutputInfo(size=row["stdout_bytes"], sha256=_hex(row["stdout_sha256"])),
        stderr=OutputInfo(size=row["stderr_bytes"], sha256=_hex(row["stderr_sha256"])),
        replay_of=row["replay_of"],
        retry_at=row["retry_at"],
    )


def evaluation_spec(row: Row) -> EvaluationSpec:
    """Return what an evaluation runs, from a row of `evaluations` joined with its payload."""
    return EvaluationSpec(
        code=row["code"],
        stdin=row["stdin"],
        priority=row["priority"],
        timeout_seconds=row["timeout_seconds"],
        queue_timeout_seconds=row["queue_timeout_seconds"],
        resources=Resources(cpu_millis=row["cpu_millis"], memory_bytes=row["memory_bytes"]),
        size_class=row["size_class"],
        image=row["image"],
        labels=orjson.loads(row["labels"]),
    )


def event(row: Row, cursor: str | None = None) -> Event:
    """Return an event from its row. `cursor` belongs to the stream over all evaluations."""
    return Event(
        type=row["type"],
        evaluation_id=row["evaluation_id"],
        seq=row["seq"],
        at=row["at"],
        owner=row["owner"],
        actor=row["actor"],
        state=State(row["state"]),
        attempt=row["attempt"],
        reason=row["reason"],
        detail=row["detail"],
        data=orjson.loads(row["data"]),
        cursor=cursor,
    )


# What ends an attempt comes in part from inside the sandbox, which is hostile. It must never keep the end from being recorded, so
# what PostgreSQL could not hold is replaced here and not refused.


def storable_text(text: str | None) -> str | None:
    """Return the text with NUL and lone surrogates replaced by U+FFFD."""
    if text is None:
        return None
    return text.replace("\x00", "\ufffd").encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def storable_int(value: int | None) -> int | None:
    """Return the value if a 32-bit column can hold it, else None."""
    return value if value is not None and abs(value) <= _INT_MAX else None


def storable_size(value: int | None) -> int | None:
    """Return the value, at most what a 64-bit column can hold."""
    return None if value is None else max(0, min(value, _BIGINT_MAX))


def storable_seconds(value: float | None) -> float | None:
    """Return the value if it is a number that JSON can carry, else None."""
    return value if value is not None and math.isfinite(value) else None


def storable_json(data: dict[str, Any]) -> str:
    """Return an event's data as JSON that a jsonb column accepts."""
    return orjson.dumps(
        {key: storable_text(value) if isinstance(value, str) else value for key, value in data.items()}
    ).decode()
