"""Code that tries to tell its own story: to write the runner's report, to reach the runner, or to make the platform doubt itself."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from crucible.evaluation import Reason, State
from crucible.frames import Frame, Kind
from tests.support.capabilities import needs
from tests.support.sandboxes import Sandboxes, running_sandboxes

pytestmark = [pytest.mark.integration, needs("sandbox")]

REPORT = Frame(Kind.REPORT, 1, b'{"status":"exited","exit_code":0}').encode()


@pytest.fixture(
    params=[pytest.param("require", marks=needs("cgroups"), id="cgroups"), pytest.param("off", id="watched")]
)
async def sandboxes(request: pytest.FixtureRequest) -> AsyncIterator[Sandboxes]:
    async with running_sandboxes(cgroups=request.param) as started:
        yield started


async def test_a_report_written_to_every_descriptor_changes_nothing(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        f"import os\nreport = {REPORT!r}\nfor fd in range(3, 256):\n    try: os.write(fd, report)\n    except OSError: pass\n"
        "os._exit(3)"
    )

    assert (ran.outcome.state, ran.outcome.reason, ran.outcome.exit_code) == (State.FAILED, Reason.EXIT_NONZERO, 3)


async def test_a_report_on_the_standard_streams_is_output(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(f"import os\nos.write(1, {REPORT!r})\nos.write(2, {REPORT!r})\nos._exit(3)")

    assert (ran.outcome.exit_code, ran.stdout, ran.stderr) == (3, REPORT, REPORT)


async def test_the_runners_descriptors_and_memory_are_closed(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\n"
        "def attempt(name, do):\n    try: do()\n    except OSError as e: print(name, e.errno in (1, 13, 2))\n    else: print(name, 'WORKED')\n"
        "attempt('list', lambda: os.listdir('/proc/1/fd'))\n"
        "for n in range(10): attempt(f'fd{n}', lambda: os.open(f'/proc/1/fd/{n}', os.O_WRONLY))\n"
        "attempt('mem', lambda: os.open('/proc/1/mem', os.O_RDWR))\n"
        "attempt('maps', lambda: os.listdir('/proc/1/map_files'))\n"
        "attempt('root', lambda: os.listdir('/proc/1/root/'))\n"
        "attempt('pidfd', lambda: (os.pidfd_open(1), __import__('ctypes').CDLL(None, use_errno=True).syscall(438, 3, 3, 0) < 0 and exec('raise PermissionError(1, 1)')))\n"
    )

    told = dict(line.split() for line in ran.out.splitlines())
    assert len(told) == 15, ran
    assert set(told.values()) == {"True"}


async def test_the_runner_survives_every_signal(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, signal, time\nfor _ in range(20):\n    for n in range(1, 65):\n        os.kill(1, n)\n"
        "for n in range(1, 65):\n    signal.pidfd_send_signal(os.pidfd_open(1), n)\n"
        "time.sleep(0.2)\nprint('alive', open('/proc/1/stat').read().split()[2])\nraise SystemExit(5)"
    )

    assert ran.outcome.exit_code == 5, ran
    assert ran.out.startswith("alive ")
    assert ran.out.split()[1] in "SR"


async def test_the_runners_limits_cannot_be_lowered(sandboxes: Sandboxes) -> None:
    # prlimit(2) asks only for the same user. A CPU limit of nothing would have the kernel kill even a PID 1.
    ran = await sandboxes.run(
        "import resource, time\nfor name in ('CPU', 'AS', 'NOFILE', 'FSIZE', 'DATA'):\n"
        "    try: resource.prlimit(1, getattr(resource, 'RLIMIT_' + name), (0, 0))\n    except PermissionError: print(name)\n"
        "time.sleep(0.3)\nraise SystemExit(5)"
    )

    assert ran.out.split() == ["CPU", "AS", "NOFILE", "FSIZE", "DATA"]
    assert (ran.outcome.reason, ran.outcome.exit_code) == (Reason.EXIT_NONZERO, 5)


async def test_a_lie_about_the_exception_stays_small_and_plain(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os\nfor fd in range(3, 256):\n"
        '    try: os.write(fd, b\'"},"exit_code":0,"status":"exited\\n\' * 100)\n    except OSError: pass\nos._exit(1)'
    )

    assert (ran.outcome.exit_code, ran.outcome.exception_type) == (1, None)
    assert ran.outcome.reason is Reason.EXIT_NONZERO


async def test_code_cannot_make_its_failure_look_like_the_platforms(sandboxes: Sandboxes) -> None:
    # A platform's failure would be tried again, and would be hidden from the one who asked.
    ran = await sandboxes.run(
        "import os\nfor fd in range(3, 256):\n    try: os.write(fd, b'!the set-up failed')\n    except OSError: pass\nos._exit(125)"
    )

    assert (ran.outcome.reason, ran.outcome.exit_code) == (Reason.EXIT_NONZERO, 125)


async def test_a_class_name_that_is_no_name_is_not_repeated(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("raise type('<script>\"\\n' + 'x' * 500, (Exception,), {})('boo')")
    hostile = await sandboxes.run(
        "class Meta(type):\n    @property\n    def __module__(cls): raise SystemExit(0)\n"
        "class Odd(Exception, metaclass=Meta): pass\nraise Odd()"
    )

    assert (ran.outcome.exit_code, ran.outcome.exception_type) == (1, None)
    assert hostile.outcome.exit_code == 1
    assert hostile.outcome.state is State.FAILED


async def test_replacing_what_python_offers_does_not_reach_the_runner(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, sys, time, select, builtins\n"
        "for module in (os, time, select):\n    for name in list(vars(module)):\n"
        "        if callable(getattr(module, name)) and name not in ('error',) and not name.startswith('__'):\n"
        "            setattr(module, name, None)\n"
        "sys._getframe(1).f_globals.clear() if hasattr(sys, '_getframe') and sys._getframe().f_back else None\n"
        "sys.exit(6)"
    )

    assert ran.outcome.exit_code in (1, 6), ran  # 1: it broke its own process, and nothing else
    assert ran.outcome.state is State.FAILED


async def test_flooding_the_runner_with_signals_and_children_does_not_blind_it(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, signal\nif os.fork() == 0:\n    while True: os.kill(1, signal.SIGCHLD)\n"
        "while True:\n    try:\n        if os.fork() == 0: os._exit(0)\n    except OSError: pass\n",
        timeout=1,
    )

    assert ran.outcome.reason is Reason.WALL_CLOCK
    assert ran.outcome.run_seconds is not None
    assert ran.outcome.run_seconds < 2.5
