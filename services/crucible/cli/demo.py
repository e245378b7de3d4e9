"""`crucible demo`: the platform, a mixed batch of honest, failing and hostile programs, and whether each ended as it must.

The platform runs in this process's event loop. The demo is its client in a thread, over HTTP, as any other client would be.
"""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from crucible.cli import demo_plan as plan
from crucible.cli.client import Client, StoppedError, evaluation_path
from crucible.cli.demo_judge import Result, judge
from crucible.cli.exit_codes import ExitCode
from crucible.cli.explain import ended
from crucible.cli.session import Session, offline_command
from crucible.cli.up import local_settings, platform_errors, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crucible.cli.client import Document
    from crucible.cli.demo_plan import Program
    from crucible.cli.demo_view import Progress
    from crucible.settings import Settings

_LOOK_S = 0.1
# Beyond this the demo gives up; it takes some seconds on two processors.
_PATIENCE_LOOKS = 1200


@offline_command
def demo(
    session: Session,
    *,
    data_dir: Annotated[
        Path | None, typer.Option(help="Keep the demo's data here; by default a folder that is deleted at the end.")
    ] = None,
) -> None:
    """Start a platform, run a mixed batch on it, and check each outcome. Exit code 0 only if all was as expected."""
    try:
        with platform_errors(session), _folder(data_dir) as folder:
            report = asyncio.run(_run(session, _settings(folder), durable=data_dir is not None))
    except StoppedError as error:
        session.report({"type": "about:blank", "title": "The demo was given up", "detail": str(error)})
        raise typer.Exit(ExitCode.NOT_COMPLETED) from None
    if session.as_json:
        session.emit_json(report)
    if not report["good"]:
        raise typer.Exit(ExitCode.NOT_COMPLETED)


@contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    if data_dir is not None:
        yield data_dir
        return
    with tempfile.TemporaryDirectory(prefix="crucible-demo-") as name:
        # Where we are root, PostgreSQL and sandboxes run as others, who must get through.
        Path(name).chmod(0o711)
        yield Path(name)


def _settings(folder: Path) -> Settings:
    return local_settings(
        data_dir=folder,
        api={"port": 0},
        worker={"slots": plan.SLOTS, "drain_seconds": 1},
        log={"level": "error"},
    )


async def _run(session: Session, settings: Settings, *, durable: bool) -> Document:
    from crucible import logs  # noqa: PLC0415 - slow to import, and only this needs it
    from crucible.local.platform import Platform  # noqa: PLC0415 - the same

    logs.configure("crucible", settings.log)
    platform = Platform(settings, durable=durable)
    stop = threading.Event()
    await start(platform)
    try:
        client = Client(platform.url, platform.api_key, stop=stop)
        return await asyncio.to_thread(_drive, session, client, settings.data_dir)
    finally:
        # A thread cannot be cancelled, but it asks at every pause.
        stop.set()
        await platform.aclose()


def _drive(session: Session, client: Client, data_dir: Path) -> Document:
    from crucible.cli.demo_view import Progress, conclusion, outcome_table  # noqa: PLC0415 - rich.live is slow to import

    runtime = client.get("/v1/capacity")["nodes"][0]["runtime"]
    progress = Progress(session)
    progress.say(f"platform at {client.url}, sandboxes: {runtime}, {plan.SLOTS} slots, data in {data_dir}")
    batch, left_out = _choose(client, data_dir, isolated=not runtime.startswith("process"))
    if left_out:
        names = ", ".join(program.name for program in left_out)
        progress.say(f"WARNING: this runtime isolates nothing. Left out, since they would attack this machine: {names}")

    run = secrets.token_hex(4)
    with progress.shown():
        blockers = _submit(client, plan.blockers(), run)
        _watch(client, run, progress, lambda all_of: all(one["state"] != "queued" for one in all_of))
        submitted = _submit(client, batch, run)
        _watch(
            client, run, progress, lambda all_of: all(map(ended, all_of)), cancel={p.name for p in batch if p.cancel}
        )
        afterwards = _submit(client, [plan.afterwards()], run)
        for evaluation_id in afterwards:
            client.wait_ended(evaluation_id)

    queued = _results(client, batch, submitted)
    others = _results(client, [*plan.blockers(), plan.afterwards()], [*blockers, *afterwards])
    verdict = judge(queued, others)
    if not session.as_json:
        session.out.print(outcome_table([*queued, *others], verdict))
        session.out.print(conclusion([*queued, *others], verdict))
    return {
        "good": verdict.good,
        "sandbox": runtime,
        "results": [
            {
                "program": result.program.name,
                "expected": [str(ending) for ending in result.program.endings],
                "differences": verdict.differences.get(result.program.name, []),
                "evaluation": result.evaluation,
            }
            for result in (*queued, *others)
        ],
        "order": verdict.order,
        "left_out": [program.name for program in left_out],
    }


def _choose(client: Client, data_dir: Path, *, isolated: bool) -> tuple[list[Program], list[Program]]:
    """Return the programs to run, and those that must not run where nothing isolates them."""
    address = urlsplit(client.url)
    secret_files = "\n".join(str(data_dir / name) for name in ("api-key", "server.json"))
    programs = plan.programs(f"{address.hostname} {address.port}\n", secret_files + "\n")
    if isolated:
        return programs, []
    return [one for one in programs if not one.attacks], [one for one in programs if one.attacks]


def _submit(client: Client, programs: Sequence[Program], run: str) -> list[str]:
    """Submit all in one call, and so in one transaction; returns their ids."""
    body = {"evaluations": [program.body(run) for program in programs]}
    answer = client.call("POST", "/v1/evaluations/batch", body=body)
    return [item["evaluation"]["id"] for item in answer["items"]]


def _watch(
    client: Client,
    run: str,
    progress: Progress,
    done: Callable[[list[Document]], bool],
    cancel: set[str] | None = None,
) -> None:
    """Show progress until it is done. What is named in `cancel` is cancelled as soon as it runs.

    Raises:
        StoppedError: it takes far too long, or was interrupted.
    """
    waiting = set(cancel or ())
    for _ in range(_PATIENCE_LOOKS):
        evaluations = client.get("/v1/evaluations", label=f"{plan.LABEL}={run}", limit=100)["items"]
        progress.update(evaluations)
        for evaluation in evaluations:
            if evaluation["labels"]["program"] in waiting and evaluation["state"] == "running":
                waiting.remove(evaluation["labels"]["program"])
                client.call("POST", evaluation_path(evaluation["id"], "/cancel"))
        if done(evaluations):
            return
        client.pause(_LOOK_S)
    raise StoppedError("what was submitted did not come to its end; `crucible demo --data-dir ...` keeps the data")


def _results(client: Client, programs: Sequence[Program], ids: Sequence[str]) -> list[Result]:
    return [
        Result(
            program,
            client.evaluation(evaluation_id),
            b"".join(client.chunks(evaluation_path(evaluation_id, "/output/stdout"))),
        )
        for program, evaluation_id in zip(programs, ids, strict=True)
    ]
