"""Code that tries to use up the machine, or to outlive its time, under both ways of limiting; and what is left of it: nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from crucible.evaluation import Reason
from crucible.limits import Limits
from tests.support.capabilities import needs
from tests.support.sandboxes import MEBI, Ran, Sandboxes, processes_of, running_sandboxes

pytestmark = [pytest.mark.integration, needs("sandbox")]

LIMITS = Limits(processes=32, tmp_bytes=32 * MEBI)


@pytest.fixture(
    params=[pytest.param("require", marks=needs("cgroups"), id="cgroups"), pytest.param("off", id="watched")]
)
async def sandboxes(request: pytest.FixtureRequest) -> AsyncIterator[Sandboxes]:
    async with running_sandboxes(limits=LIMITS, cgroups=request.param) as started:
        yield started


def assert_nothing_is_left(ran: Ran) -> None:
    """No process of the evaluation exists any more: its end is recorded only after that."""
    assert processes_of(ran.evaluation_id) == []


# --- memory -----------------------------------------------------------------------------------------------------------------

MEMORY_ATTACKS = {
    "one process": "x = bytearray(1 << 30)",
    "slowly": "x = []\nwhile True: x.append(bytearray(1 << 16))",
    "many processes": (
        "import os, time\nfor _ in range(16):\n    if os.fork() == 0:\n        x = bytearray(24 << 20)\n        time.sleep(60)\n"
        "time.sleep(60)"
    ),
    "files in both folders": (
        "import os\nfor folder in ('/tmp', '/dev/shm'):\n    for n in range(64):\n"
        "        with open(f'{folder}/{n}', 'wb') as f:\n            f.write(bytes(1 << 20))\n"
    ),
}


@pytest.mark.parametrize("attack", MEMORY_ATTACKS)
async def test_memory_is_bounded_however_it_is_taken(sandboxes: Sandboxes, attack: str) -> None:
    ran = await sandboxes.run(MEMORY_ATTACKS[attack], memory=128 * MEBI, timeout=20)

    if attack == "files in both folders":
        # Two folders of 32 MiB: full before the memory is.
        assert (ran.outcome.reason, ran.outcome.exception_type) == (Reason.EXCEPTION, "OSError")
        assert "No space left on device" in ran.err
    else:
        assert ran.outcome.reason is Reason.OOM_KILLED, ran
    assert_nothing_is_left(ran)


async def test_files_in_memory_count_as_memory(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import time\nwith open('/dev/shm/a', 'wb') as f: f.write(bytes(30 << 20))\nprint('written', flush=True)\n"
        "x = bytearray(40 << 20)\ntime.sleep(30)",
        memory=64 * MEBI,
    )

    assert ran.outcome.reason is Reason.OOM_KILLED, ran
    assert ran.out == "written"


async def test_a_memory_file_cannot_hide_memory(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\ntry:\n    fd = os.memfd_create('x')\nexcept PermissionError:\n    raise SystemExit('refused')\n"
        "while True: os.write(fd, bytes(1 << 20))",
        memory=64 * MEBI,
    )

    # Without a control group nothing would count it, so it is refused there; the file size limit bounds it besides.
    assert ran.outcome.reason is Reason.OOM_KILLED or ran.err == "refused" or "File too large" in ran.err, ran


async def test_shared_memory_cannot_hide_memory(sandboxes: Sandboxes) -> None:
    # Each child touches a part that is within the limit and ends; the pages stay, with no process that has them mapped.
    ran = await sandboxes.run(
        "import mmap, os, time\n"
        "try: m = mmap.mmap(-1, 1 << 30)\nexcept PermissionError: raise SystemExit('refused')\n"
        "for start in range(0, 1 << 30, 16 << 20):\n    if os.fork() == 0:\n"
        "        for at in range(start, start + (16 << 20), 4096): m[at] = 1\n        os._exit(0)\n    os.wait()\n"
        "time.sleep(60)",
        memory=64 * MEBI,
    )
    zero = await sandboxes.run(
        "import mmap, os\nfd = os.open('/dev/zero', os.O_RDWR)\nprint(os.read(fd, 3), flush=True)\n"
        "m = mmap.mmap(fd, 1 << 30)\nfor at in range(0, 1 << 30, 4096): m[at] = 1\n",
        memory=64 * MEBI,
    )

    assert ran.outcome.reason is Reason.OOM_KILLED or ran.err == "refused", ran
    assert zero.out == repr(bytes(3))
    assert zero.outcome.reason is Reason.OOM_KILLED or "No such device" in zero.err, zero


async def test_many_empty_files_count_as_memory(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nfor n in range(1 << 20): os.close(os.open(f'/tmp/{n}', os.O_CREAT))", memory=32 * MEBI, timeout=60
    )

    assert ran.outcome.reason is Reason.OOM_KILLED, ran


async def test_an_over_large_child_ends_alone_and_the_code_may_go_on(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import mmap\ntry: mmap.mmap(-1, 1 << 45, flags=0x22)\nexcept OSError as e: print('refused', e.errno)"
    )

    assert ran.out == "refused 12"


# --- processes --------------------------------------------------------------------------------------------------------------


async def test_a_fork_bomb_stays_within_its_number_of_processes(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, time\nstarted = 0\ntry:\n    for _ in range(1000):\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "        started += 1\nexcept BlockingIOError as error:\n    print(started, error.errno)\n"
    )

    started, errno = ran.out.split()
    assert 20 <= int(started) <= 32
    assert errno == "11"
    assert ran.outcome.reason is Reason.EXIT_ZERO
    assert_nothing_is_left(ran)


async def test_a_fork_bomb_that_never_ends_is_ended(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", timeout=2, memory=256 * MEBI
    )

    assert ran.outcome.reason in (Reason.WALL_CLOCK, Reason.OOM_KILLED)
    assert_nothing_is_left(ran)
    assert (await sandboxes.run("print('fine')")).out == "fine"


async def test_threads_count_too(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import threading, time\nstarted = 0\ntry:\n    for _ in range(500):\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n        started += 1\n"
        "except RuntimeError as error:\n    print(started, error)\n"
    )

    assert 20 <= int(ran.out.split()[0]) <= 32
    assert "can't start new thread" in ran.out


async def test_one_sandboxs_processes_do_not_count_against_another(sandboxes: Sandboxes) -> None:
    bomb = await sandboxes.begin(
        "import os, time\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(60)\nexcept OSError: pass\n"
        "print('full', flush=True)\ntime.sleep(60)\n"
    )
    await sandboxes.until_output(bomb, b"full")
    other = await sandboxes.run(
        "import subprocess\nprint(subprocess.run(['echo', 'free'], capture_output=True, text=True).stdout)"
    )

    assert other.out == "free", other
    await sandboxes.client.stop(bomb, Reason.CANCELLED_BY_USER)
    assert processes_of(bomb) == []


async def test_zombies_of_a_careless_program_are_reaped(sandboxes: Sandboxes) -> None:
    # Each grandchild is orphaned to the runner. More of them than the limit, so unreaped ones would make forking fail.
    ran = await sandboxes.run(
        "import os, time\nfor n in range(80):\n    while True:\n        try: child = os.fork()\n"
        "        except BlockingIOError: time.sleep(0.05)\n        else: break\n"
        "    if child == 0:\n        if os.fork() == 0: os._exit(0)\n        os._exit(0)\n    os.waitpid(child, 0)\n"
        "time.sleep(0.3)\nprint(len([n for n in os.listdir('/proc') if n.isdigit()]))"
    )

    assert ran.out == "2", ran


# --- disk and files ---------------------------------------------------------------------------------------------------------


async def test_disk_is_bounded(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nwritten = 0\ntry:\n    for n in range(100):\n        with open(f'/tmp/{n}', 'wb') as f:\n"
        "            written += f.write(bytes(1 << 20))\nexcept OSError as error:\n    print(written >> 20, error.errno)\n"
    )

    megabytes, errno = ran.out.split()
    assert 30 <= int(megabytes) <= 32
    assert errno == "28"


async def test_one_file_is_bounded(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nfd = os.open('/tmp/x', os.O_RDWR | os.O_CREAT)\ntry: os.ftruncate(fd, 1 << 40)\n"
        "except OSError as error: print(error.errno)"
    )

    assert ran.out == "27"


async def test_open_files_are_bounded(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nopened = []\ntry:\n    while True: opened.append(os.open('/dev/null', os.O_RDONLY))\n"
        "except OSError as error: print(len(opened), error.errno)"
    )

    count, errno = ran.out.split()
    assert 240 <= int(count) <= 256
    assert errno == "24"


async def test_no_core_dump_is_written(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import os; os.abort()'], cwd='/tmp')\n"
        "print(os.listdir('/tmp'))"
    )

    assert ran.out == "[]"


async def test_limits_cannot_be_raised_again(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import resource\nfor name in ('NOFILE', 'FSIZE', 'NPROC', 'CORE', 'CPU'):\n"
        "    kind = getattr(resource, 'RLIMIT_' + name)\n    soft, hard = resource.getrlimit(kind)\n"
        "    try: resource.setrlimit(kind, (soft, hard + 1)); print(name, 'raised')\n"
        "    except (ValueError, PermissionError): pass\n    print(name, soft == hard, hard > -1)\n"
    )

    assert ran.out.splitlines() == [f"{name} True True" for name in ("NOFILE", "FSIZE", "NPROC", "CORE", "CPU")]


# --- output -----------------------------------------------------------------------------------------------------------------


async def test_endless_output_is_bounded_whoever_writes_it() -> None:
    async with running_sandboxes(limits=Limits(output_bytes=2_000_000)) as sandboxes:
        ran = await sandboxes.run(
            "import subprocess\nfor _ in range(4): subprocess.Popen(['yes'])\nsubprocess.run(['yes', 'x'])"
        )

    assert ran.outcome.reason is Reason.OUTPUT_LIMIT
    assert len(ran.stdout) == 2_000_000
    assert_nothing_is_left(ran)


# --- time -------------------------------------------------------------------------------------------------------------------

TIME_ATTACKS = {
    "SIGTERM ignored": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n",
    "double fork": "import os\nif os.fork() == 0:\n    if os.fork() == 0: pass\n    else: os._exit(0)\n",
    "new session": "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: pass\n",
    "stops itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\n",
    "stops the runner": "import os, signal\nos.kill(1, signal.SIGSTOP)\n",
    "kills the runner": "import os, signal\nfor n in range(1, 65): os.kill(1, n) if n not in (19, 18) else None\n",
    "kills everything": "import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntry: os.kill(-1, 9)\nexcept OSError: pass\n",
    "many threads": "import threading\nfor _ in range(20): threading.Thread(target=lambda: any(iter(int, 1)), daemon=True).start()\n",
    "closes everything": "import os\nos.closerange(0, 256)\n",
}
FOREVER = "import time\nwhile True: time.sleep(0.05)\n"


@pytest.mark.parametrize("attack", TIME_ATTACKS)
async def test_nothing_outlives_its_time(sandboxes: Sandboxes, attack: str) -> None:
    ran = await sandboxes.run(TIME_ATTACKS[attack] + FOREVER, timeout=1)

    assert ran.outcome.reason is Reason.WALL_CLOCK, ran
    assert ran.outcome.run_seconds is not None
    assert ran.outcome.run_seconds < 2.5
    assert_nothing_is_left(ran)


@pytest.mark.parametrize("way", ["fork", "double fork and new session", "subprocess"])
async def test_what_the_code_leaves_running_ends_with_it(sandboxes: Sandboxes, way: str) -> None:
    code = {
        "fork": f"import os\nif os.fork() == 0:\n    {FOREVER.replace(chr(10), chr(10) + '    ')}\n",
        "double fork and new session": (
            "import os, signal\nr, w = os.pipe()\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n        os.write(w, b'x')\n"
            "        import time\n        while True: time.sleep(0.05)\n    os._exit(0)\nos.read(r, 1)\n"
        ),
        "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\n",
    }[way]
    ran = await sandboxes.run(code + "print('bye')")

    assert (ran.outcome.reason, ran.out) == (Reason.EXIT_ZERO, "bye")
    assert_nothing_is_left(ran)


async def test_what_is_left_behind_cannot_write_after_the_end(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    print('from the grave', flush=True)\nprint('bye', flush=True)\nos._exit(0)"
    )

    assert (ran.outcome.reason, ran.out) == (Reason.EXIT_ZERO, "bye")
