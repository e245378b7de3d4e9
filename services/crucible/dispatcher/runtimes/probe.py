"""Proof that a runtime works: one real sandbox, run to its end, before the platform promises anything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from crucible.dispatcher.runtimes import RuntimeUnavailableError, SandboxSpec, SandboxStartError
from crucible.evaluation import Resources
from crucible.frames import Decoder, FrameError, Kind
from crucible.outcome import RunnerReport, RunnerStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from crucible.dispatcher.runtimes import Runtime, Sandbox
    from crucible.limits import Limits

_CODE = b"print('ready')\n"
_EXPECTED = b"ready\n"
_SECONDS = 30


async def probe(runtime: Runtime, limits: Limits, explain: Callable[[str], RuntimeUnavailableError]) -> None:
    """Run one sandbox.

    Args:
        runtime: what to prove.
        limits: for the size of the sandbox.
        explain: turns what a failed sandbox left as its last words into advice.

    Raises:
        RuntimeUnavailableError: it did not do what every evaluation needs.
    """
    profile = limits.profiles[limits.profile_default]
    spec = SandboxSpec(
        name="probe",
        evaluation_id="probe",
        code=_CODE,
        stdin=b"",
        timeout_seconds=_SECONDS,
        resources=Resources(cpu_millis=profile.cpu_millis, memory_bytes=profile.memory_bytes),
    )
    try:
        sandbox = runtime.create(spec)
    except SandboxStartError as error:
        raise explain(str(error)) from error
    try:
        async with asyncio.timeout(_SECONDS):
            output, report = await _collect(sandbox)
    except (TimeoutError, FrameError) as error:
        sandbox.kill()
        await sandbox.ended()
        raise explain(f"a first sandbox did not answer as it should: {type(error).__name__} {error}") from error
    end = await sandbox.ended()
    if report is None:
        raise explain(end.description)
    if report.status is not RunnerStatus.EXITED or report.exit_code != 0 or output != _EXPECTED:
        raise explain(f"a first sandbox did not run its code: {report.detail or report.status}, {end.description}")


async def _collect(sandbox: Sandbox) -> tuple[bytes, RunnerReport | None]:
    decoder, output, report = Decoder(), b"", None
    while data := await sandbox.receive():
        for frame in decoder.feed(data):
            if frame.kind is Kind.STDOUT:
                output += frame.payload
            elif frame.kind is Kind.REPORT:
                report = RunnerReport.model_validate_json(frame.payload)
    return output, report
