"""The `process` runtime: no isolation, and the same outcomes, limits and cleanliness as far as a plain process can have them."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog

from crucible.evaluation import Reason
from crucible.limits import Limits
from tests.support.sandboxes import MEBI, Sandboxes, fail_to_start, processes_of, running_sandboxes, until_no_process

pytestmark = pytest.mark.integration

SYSTEM_PYTHON = Path("/usr/bin/python3")


def python() -> Path:
    """An interpreter that the evaluations' user may execute: our own may lie in root's closed home."""
    if os.geteuid() != 0:
        return Path(sys.executable)
    if not SYSTEM_PYTHON.exists():
        pytest.skip(
            "as root this needs a Python that every user may execute: install /usr/bin/python3, or run as another user"
        )
    return SYSTEM_PYTHON


@pytest.fixture(params=["off", "auto"], ids=["watched", "groups if any"])
async def sandboxes(request: pytest.FixtureRequest) -> AsyncIterator[Sandboxes]:
    async with running_sandboxes(runtime="process", python=python(), cgroups=request.param) as started:
        yield started


def _folders() -> set[str]:
    return {str(path) for path in Path(tempfile.gettempdir()).glob("crucible-process-*")}


async def test_outcomes_are_those_of_any_runtime(sandboxes: Sandboxes) -> None:
    fine = await sandboxes.run("import sys\nprint(input(), __name__)\nprint('err', file=sys.stderr)", stdin="line\n")
    exited = await sandboxes.run("import sys; sys.exit(3)")
    raised = await sandboxes.run("1/0")
    killed = await sandboxes.run("import os; os.abort()")

    assert (fine.outcome.reason, fine.out, fine.err) == (Reason.EXIT_ZERO, "line __main__", "err")
    assert (exited.outcome.reason, exited.outcome.exit_code) == (Reason.EXIT_NONZERO, 3)
    assert (raised.outcome.reason, raised.outcome.exception_type) == (Reason.EXCEPTION, "ZeroDivisionError")
    assert (killed.outcome.reason, killed.outcome.signal) == (Reason.SIGNAL, 6)


async def test_time_memory_and_output_are_limited() -> None:
    limits = Limits(output_bytes=500_000)
    async with running_sandboxes(runtime="process", python=python(), limits=limits) as sandboxes:
        slow = await sandboxes.run("print('a', end='')\nwhile True: pass", timeout=1)
        large = await sandboxes.run("x = []\nwhile True: x.append(bytearray(1 << 16))", memory=64 * MEBI)
        loud = await sandboxes.run("while True: print('x' * 100)")

    assert (slow.outcome.reason, slow.out) == (Reason.WALL_CLOCK, "a")
    assert large.outcome.reason is Reason.OOM_KILLED, large
    assert (loud.outcome.reason, len(loud.stdout)) == (Reason.OUTPUT_LIMIT, 500_000)


async def test_memory_is_watched_over_all_processes() -> None:
    async with running_sandboxes(runtime="process", python=python(), cgroups="off") as sandboxes:
        ran = await sandboxes.run(
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        x = bytearray(30 << 20)\n        time.sleep(60)\n"
            "time.sleep(60)",
            memory=64 * MEBI,
        )

    assert ran.outcome.reason is Reason.OOM_KILLED


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux lets the runner adopt what leaves its session; run it there"
)
async def test_what_leaves_its_session_is_ended_too(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, signal, time\nr, w = os.pipe()\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        signal.signal(15, signal.SIG_IGN); os.write(w, b'x'); time.sleep(600)\n    os._exit(0)\nos.read(r, 1)\nprint('bye')"
    )

    assert (ran.outcome.reason, ran.out) == (Reason.EXIT_ZERO, "bye")
    assert processes_of(ran.evaluation_id) == []


async def test_a_cancel_leaves_no_process_and_no_file(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(
        "import os, time\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b', 0)\nos.fork()\n"
        "print('up', flush=True)\ntime.sleep(600)"
    )
    await sandboxes.until_output(evaluation_id, b"up")
    await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)

    assert processes_of(evaluation_id) == []
    assert [path for folder in _folders() for path in Path(folder).iterdir() if path.is_dir()] == []


async def test_closing_leaves_nothing() -> None:
    before = _folders()
    async with running_sandboxes(runtime="process", python=python()) as sandboxes:
        evaluation_id = await sandboxes.begin("import time\nprint('up', flush=True)\ntime.sleep(600)")
        await sandboxes.until_output(evaluation_id, b"up")

    assert processes_of(evaluation_id) == []
    assert _folders() == before


async def test_a_launcher_that_is_killed_takes_its_processes_along(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin("import os, time\nos.fork()\nprint('up', flush=True)\ntime.sleep(600)")
    await sandboxes.until_output(evaluation_id, b"up")
    os.kill(sandboxes.dispatcher._runtime.launcher_pid, 9)  # type: ignore[attr-defined]
    ran = await sandboxes.end(evaluation_id)

    assert ran.outcome.reason is Reason.SANDBOX_ERROR
    await until_no_process(evaluation_id)


async def test_what_a_killed_instance_left_is_removed_at_the_next_start() -> None:
    left = Path(tempfile.mkdtemp(prefix="crucible-process-"))
    (left / "run-1" / "tmp").mkdir(parents=True)
    async with running_sandboxes(runtime="process", python=python()) as first:
        assert not left.exists()
        async with running_sandboxes(runtime="process", python=python()):
            # The first lives, so its folder is not a leftover.
            assert (await first.run("print('still here')")).out == "still here"


async def test_it_says_loudly_that_it_isolates_nothing() -> None:
    with structlog.testing.capture_logs() as logs:
        async with running_sandboxes(runtime="process", python=python()) as sandboxes:
            assert sandboxes.dispatcher.runtime == "process"

    assert [entry for entry in logs if entry["log_level"] == "warning" and "NO ISOLATION" in entry["event"]]


async def test_even_without_isolation_the_code_is_not_root(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import os\nprint(os.getuid(), os.geteuid(), os.getgid())")

    assert "0" not in ran.out.split()


async def test_a_start_that_fails_leaves_neither_a_host_user_taken_nor_a_control_group_nor_a_folder() -> None:
    async with running_sandboxes(runtime="process", python=python()) as sandboxes:
        await fail_to_start(sandboxes)
        home = sandboxes.dispatcher._runtime._home  # type: ignore[attr-defined]
        assert not [entry for entry in home.iterdir() if entry.is_dir()]
