"""What the platform says of how code ended, and what it keeps of what the code wrote: real sandboxes, both ways of limiting."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from crucible.evaluation import Reason, State
from crucible.frames import Kind
from crucible.limits import Limits
from tests.support.capabilities import needs
from tests.support.sandboxes import MEBI, Sandboxes, running_sandboxes, until_no_process

pytestmark = [pytest.mark.integration, needs("sandbox")]


@pytest.fixture
async def sandboxes() -> AsyncIterator[Sandboxes]:
    async with running_sandboxes() as started:
        yield started


@pytest.fixture(
    params=[pytest.param("require", marks=needs("cgroups"), id="cgroups"), pytest.param("off", id="watched")]
)
async def limited(request: pytest.FixtureRequest) -> AsyncIterator[Sandboxes]:
    async with running_sandboxes(cgroups=request.param) as started:
        yield started


# --- exit code, signal, exception -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("pass", 0),
        ("raise SystemExit", 0),
        ("import sys; sys.exit(0)", 0),
        ("exit()", 0),
        ("import sys; sys.exit(1)", 1),
        ("quit(3)", 3),
        ("import sys; sys.exit(255)", 255),
        ("import sys; sys.exit(256 + 7)", 7),
        ("import sys; sys.exit(-1)", 255),
        ("import os; os._exit(42)", 42),
        ("import atexit, os; atexit.register(os._exit, 9)", 9),
    ],
)
async def test_the_exit_code_is_the_one_that_python_gives(sandboxes: Sandboxes, code: str, exit_code: int) -> None:
    ran = await sandboxes.run(code)

    assert ran.outcome.exit_code == exit_code
    assert ran.outcome.signal is None
    assert ran.outcome.exception_type is None
    expected = (State.COMPLETED, Reason.EXIT_ZERO) if exit_code == 0 else (State.FAILED, Reason.EXIT_NONZERO)
    assert (ran.outcome.state, ran.outcome.reason) == expected


async def test_a_text_given_to_exit_goes_to_standard_error(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import sys; sys.exit('no such luck')")

    assert (ran.outcome.exit_code, ran.err, ran.out) == (1, "no such luck", "")


@pytest.mark.parametrize(
    ("code", "number"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 9),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", 15),
        ("import os; os.abort()", 6),
        ("import ctypes; ctypes.string_at(0)", 11),
        ("import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)", 2),
        ("raise KeyboardInterrupt", 2),
    ],
)
async def test_a_signal_is_named_and_no_exit_code_invented(sandboxes: Sandboxes, code: str, number: int) -> None:
    ran = await sandboxes.run(code)

    assert (ran.outcome.state, ran.outcome.reason) == (State.FAILED, Reason.SIGNAL)
    assert (ran.outcome.signal, ran.outcome.exit_code) == (number, None)


@pytest.mark.parametrize(
    ("code", "exception", "last_line"),
    [
        ("1/0", "ZeroDivisionError", "ZeroDivisionError: division by zero"),
        ("class Mine(Exception): pass\nraise Mine('x')", "Mine", "Mine: x"),
        ("import json; json.loads('{')", "json.decoder.JSONDecodeError", "json.decoder.JSONDecodeError: "),
        ("import not_there", "ModuleNotFoundError", "ModuleNotFoundError: No module named 'not_there'"),
        ("from . import sibling", "ImportError", "ImportError: attempted relative import with no known parent package"),
        ("from .. import parent", "ImportError", "ImportError: attempted relative import with no known parent package"),
        ("def broken(:", "SyntaxError", "SyntaxError: invalid syntax"),
        ("if True:\nprint(1)", "IndentationError", "IndentationError: expected an indented block"),
        ("def f(): f()\nf()", "RecursionError", "RecursionError: maximum recursion depth exceeded"),
        ("open('/nowhere')", "FileNotFoundError", "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere'"),
    ],
)
async def test_an_uncaught_exception_is_named_and_its_traceback_kept(
    sandboxes: Sandboxes, code: str, exception: str, last_line: str
) -> None:
    ran = await sandboxes.run(code)

    assert (ran.outcome.state, ran.outcome.reason) == (State.FAILED, Reason.EXCEPTION)
    assert (ran.outcome.exception_type, ran.outcome.exit_code) == (exception, 1)
    assert ran.err.splitlines()[-1].startswith(last_line)
    assert 'File "/code/main.py", line ' in ran.err


async def test_a_traceback_shows_the_codes_own_lines_and_nothing_of_the_platforms(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("def f():\n    return 1 / 0\n\n\nf()\n")

    lines = ran.err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert [line.strip() for line in lines if line.startswith("  File")] == [
        'File "/code/main.py", line 5, in <module>',
        'File "/code/main.py", line 2, in f',
    ]
    assert "    return 1 / 0" in lines
    assert "crucible" not in ran.err


async def test_an_exception_in_a_forked_child_is_not_the_evaluations(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import os\nif os.fork() == 0:\n    1/0\nos.wait()\nraise SystemExit(1)")

    assert (ran.outcome.reason, ran.outcome.exception_type) == (Reason.EXIT_NONZERO, None)
    assert "ZeroDivisionError" in ran.err


async def test_finalisation_runs_as_in_any_python(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import atexit, threading, time\n"
        "class Late:\n    def __del__(self): print('deleted')\n"
        "late = Late()\n"
        "atexit.register(print, 'atexit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
        "print('main')\n"
    )

    assert ran.outcome.reason is Reason.EXIT_ZERO
    assert ran.out.splitlines() == ["main", "thread", "atexit", "deleted"]


async def test_the_main_module_is_a_real_one(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import sys, pickle, inspect\n"
        "class Here: pass\n"
        "print(__name__, __file__, sys.argv, sys.modules['__main__'].Here is Here)\n"
        "print(type(pickle.loads(pickle.dumps(Here()))).__name__, inspect.getsource(Here).strip())\n"
        "print(sys.path[0], __builtins__.__name__, __package__, __spec__)\n"
    )

    assert ran.out.splitlines() == [
        "__main__ /code/main.py ['/code/main.py'] True",
        "Here class Here: pass",
        "/code builtins None None",
    ]


async def test_the_codes_own_excepthook_is_used(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import sys\nsys.excepthook = lambda *a: print('caught', a[0].__name__)\n1/0")

    assert (ran.out, ran.err) == ("caught ZeroDivisionError", "")
    assert ran.outcome.exception_type == "ZeroDivisionError"


async def test_the_wall_clock_ends_a_loop_and_keeps_what_was_written_before(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("print('before', end='')\nwhile True: pass", timeout=1)

    assert (ran.outcome.state, ran.outcome.reason) == (State.TIMEOUT, Reason.WALL_CLOCK)
    assert (ran.outcome.exit_code, ran.outcome.signal, ran.out) == (None, None, "before")
    assert ran.outcome.run_seconds is not None
    assert 1.0 <= ran.outcome.run_seconds < 2.0


async def test_nothing_is_written_after_the_limit(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5); print('early', flush=True)\ntime.sleep(2); print('late', flush=True)",
        timeout=1,
    )

    assert (ran.outcome.reason, ran.out) == (Reason.WALL_CLOCK, "early")


@pytest.mark.parametrize("hog", ["x = bytearray(1 << 30)", "x = []\nwhile True: x.append('.' * 4096)"])
async def test_more_memory_than_allowed_is_told_as_such(limited: Sandboxes, hog: str) -> None:
    ran = await limited.run(f"print('started')\n{hog}\nprint('never')", memory=128 * MEBI)

    assert (ran.outcome.state, ran.outcome.reason) == (State.FAILED, Reason.OOM_KILLED), ran
    assert (ran.outcome.exit_code, ran.out) == (None, "started")
    assert "128Mi" in ran.outcome.detail


async def test_a_memory_error_that_the_code_could_have_caught_is_an_exception(limited: Sandboxes) -> None:
    ran = await limited.run("x = bytearray(1 << 46)", memory=128 * MEBI)

    assert (ran.outcome.reason, ran.outcome.exception_type) == (Reason.EXCEPTION, "MemoryError")


async def test_usage_is_measured(limited: Sandboxes) -> None:
    ran = await limited.run(
        "import time\nx = bytearray(50 << 20)\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    )

    assert ran.outcome.reason is Reason.EXIT_ZERO
    assert ran.outcome.peak_memory_bytes is not None
    assert 50 * MEBI < ran.outcome.peak_memory_bytes < 100 * MEBI
    assert ran.outcome.cpu_seconds is not None
    assert 0.3 <= ran.outcome.cpu_seconds < 1.5


async def test_cpu_time_of_all_processes_counts(limited: Sandboxes) -> None:
    ran = await limited.run(
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        end = time.process_time() + 0.2\n"
        "        while time.process_time() < end: pass\n        os._exit(0)\n"
        "for _ in range(3): os.wait()\n"
    )

    assert ran.outcome.cpu_seconds is not None
    assert ran.outcome.cpu_seconds >= 0.6


@needs("cgroups")
async def test_the_cpu_limit_holds_for_all_processes_together(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import os, time\nfor _ in range(2): os.fork()\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass\n",
        cpu=200,
    )

    assert ran.outcome.cpu_seconds is not None
    assert ran.outcome.cpu_seconds < 0.2 * 2 + 0.35


# --- output ----------------------------------------------------------------------------------------------------------------


async def test_the_two_streams_are_kept_apart_and_in_order(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import sys\nfor i in range(200):\n    print('out', i)\n    print('err', i, file=sys.stderr)\n"
    )

    assert ran.out.splitlines() == [f"out {i}" for i in range(200)]
    assert ran.err.splitlines() == [f"err {i}" for i in range(200)]
    # A line may travel in two frames; what counts is the order of the streams' turns.
    turns = [
        (kind, b"".join(frame.payload for frame in frames).decode())
        for kind, frames in itertools.groupby(ran.story.frames(), key=lambda frame: frame.kind)
    ]
    assert turns == [turn for i in range(200) for turn in ((Kind.STDOUT, f"out {i}\n"), (Kind.STDERR, f"err {i}\n"))]
    times = [frame.at_ms for frame in ran.story.frames()]
    assert times == sorted(times)


async def test_output_is_bytes_and_comes_back_exactly(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import sys\nsys.stdout.buffer.write(bytes(range(256)) * 4 + b'\\x00\\r\\n\\xff')")

    assert ran.stdout == bytes(range(256)) * 4 + b"\x00\r\n\xff"


async def test_json_on_one_line_comes_back_exactly(sandboxes: Sandboxes) -> None:
    value = {"text": "ünï\u202ecode \U0001f600", "numbers": [1, 2.5, None, True], "long": "x" * 200_000}
    ran = await sandboxes.run("import sys, json\njson.dump(json.load(sys.stdin), sys.stdout)", stdin=json.dumps(value))

    assert ran.outcome.reason is Reason.EXIT_ZERO
    assert ran.stdout == json.dumps(value).encode()


@pytest.mark.parametrize("size", [1024 * 1024 + 1, 5 * 1024 * 1024])
async def test_large_output_comes_back_whole(sandboxes: Sandboxes, size: int) -> None:
    ran = await sandboxes.run(
        f"import sys, random\nrandom.seed(7)\nsys.stdout.buffer.write(random.randbytes({size}))\n"
        "print('done', file=sys.stderr)"
    )

    expected = random.Random(7).randbytes(size)
    assert len(ran.stdout) == size
    assert hashlib.sha256(ran.stdout).hexdigest() == hashlib.sha256(expected).hexdigest()
    assert ran.err == "done"


async def test_many_small_writes_arrive_in_few_frames(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("for i in range(50_000): print(i)")

    assert ran.stdout == b"".join(b"%d\n" % i for i in range(50_000))
    assert len(ran.story.frames()) < 2_000


async def test_a_longer_run_is_announced_before_it_ends(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import time; time.sleep(0.3); print('a')")

    assert ran.story.calls == ["running", "output", "finish"]


async def test_a_short_run_costs_storage_at_most_three_calls(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import sys\nprint('a'); print('b', file=sys.stderr); print('c')")

    # On a busy machine even this is long enough to be announced.
    assert ran.story.calls in (["output", "finish"], ["running", "output", "finish"])
    finish = ran.story.finishes[0]
    assert finish.started_at is not None
    assert finish.actor == "dispatcher/test"


async def test_output_beyond_the_limit_ends_it_and_all_up_to_the_limit_is_kept() -> None:
    limit = 1_000_000
    async with running_sandboxes(limits=Limits(output_bytes=limit)) as sandboxes:
        ran = await sandboxes.run("import sys\nsys.stderr.write('e' * 10)\nwhile True: print('x' * 999)")

    assert (ran.outcome.state, ran.outcome.reason) == (State.FAILED, Reason.OUTPUT_LIMIT)
    assert (ran.outcome.exit_code, ran.outcome.signal) == (None, None)
    assert len(ran.stdout) + len(ran.stderr) == limit
    assert ran.stdout == ((b"x" * 999 + b"\n") * 1001)[: len(ran.stdout)]
    assert str(limit) in ran.outcome.detail


async def test_output_of_exactly_the_limit_is_within_it() -> None:
    async with running_sandboxes(limits=Limits(output_bytes=300_000)) as sandboxes:
        ran = await sandboxes.run("print('x' * 299_999)")

    assert (ran.outcome.reason, len(ran.stdout)) == (Reason.EXIT_ZERO, 300_000)


async def test_what_children_write_is_output_too(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import subprocess\nsubprocess.run(['sh', '-c', 'echo out; echo err >&2'], check=True)")

    assert (ran.out, ran.err) == ("out", "err")


async def test_standard_input_is_what_was_given_and_then_ends(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import sys\nprint(sys.stdin.readline().strip(), len(sys.stdin.read()))", stdin="first\nrest"
    )
    empty = await sandboxes.run("import sys\nprint(repr(sys.stdin.read()))")

    assert (ran.out, empty.out) == ("first 4", "''")


async def test_closing_the_streams_early_is_no_trouble(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import os, time\nprint('x')\nos.close(1); os.close(2); time.sleep(0.3)\nos._exit(4)")

    assert (ran.outcome.exit_code, ran.out) == (4, "x")
    assert ran.outcome.cpu_seconds is not None
    assert ran.outcome.cpu_seconds < 0.2


# --- fast failures ---------------------------------------------------------------------------------------------------------


async def test_an_instant_failure_keeps_its_output(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import os\nos.write(1, b'out'); os.write(2, b'err'); os._exit(1)")

    assert (ran.stdout, ran.stderr, ran.outcome.exit_code) == (b"out", b"err", 1)


async def test_many_fast_failures_leave_nothing_behind(sandboxes: Sandboxes) -> None:
    ran = await asyncio.gather(
        *(sandboxes.run(f"import sys; print({i}); sys.exit({i % 3})", cpu=100) for i in range(30))
    )

    assert [each.out for each in ran] == [str(i) for i in range(30)]
    assert [each.outcome.exit_code for each in ran] == [i % 3 for i in range(30)]
    node = (await sandboxes.client.capacity()).nodes[0]
    assert (node.sandboxes, node.free_cpu_millis) == (0, node.total.cpu_millis)
    for each in ran:
        await until_no_process(each.evaluation_id)


# --- imports ----------------------------------------------------------------------------------------------------------------


async def test_the_standard_library_is_there(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import json, hashlib, datetime, os, sys, sqlite3, ssl, ctypes, asyncio, decimal\n"
        "from collections import (\n    OrderedDict,\n    deque,\n)\nprint('ok', len(sys.path))"
    )

    assert ran.out.startswith("ok "), ran.err


async def test_the_evaluations_id_is_in_the_environment(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run("import os\nprint(os.environ['EVALUATION_ID'], os.environ['EVAL_ID'])")

    assert ran.out == f"{ran.evaluation_id} {ran.evaluation_id}"


async def test_subprocess_works_and_returns_zero(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import subprocess, sys\n"
        "done = subprocess.run([sys.executable, '-c', 'import json; print(json.dumps([1]))'], capture_output=True, text=True)\n"
        "print(done.returncode, done.stdout.strip())\n"
    )

    assert ran.out == "0 [1]", ran


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_multiprocessing_works(sandboxes: Sandboxes, method: str) -> None:
    ran = await sandboxes.run(
        "import multiprocessing\n\n\ndef square(n):\n    return n * n\n\n\n"
        "if __name__ == '__main__':\n"
        f"    with multiprocessing.get_context('{method}').Pool(3) as pool:\n"
        "        print(pool.map(square, range(5)))\n"
    )

    assert ran.out == "[0, 1, 4, 9, 16]", ran


async def test_threads_and_asyncio_work(sandboxes: Sandboxes) -> None:
    ran = await sandboxes.run(
        "import asyncio, concurrent.futures\n"
        "async def main():\n"
        "    process = await asyncio.create_subprocess_exec('echo', 'hi', stdout=-1)\n"
        "    print((await process.communicate())[0].decode().strip())\n"
        "asyncio.run(main())\n"
        "with concurrent.futures.ThreadPoolExecutor(8) as pool: print(sum(pool.map(int, '12345')))\n"
    )

    assert ran.out == "hi\n15", ran


async def test_packages_of_the_installation_can_be_imported(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)  # closed to the sandbox's user on purpose, as root's home is
    packages = tmp_path / "packages"
    packages.mkdir(mode=0o755)
    (packages / "helpful.py").write_text("VALUE = 42\n")
    async with running_sandboxes(packages=packages) as sandboxes:
        ran = await sandboxes.run(
            "import helpful, subprocess, sys\nprint(helpful.VALUE, helpful.__file__)\n"
            "subprocess.run([sys.executable, '-c', 'import helpful; print(helpful.VALUE)'])\n"
            "open(helpful.__file__, 'a')"
        )

    assert ran.out == "42 /packages/helpful.py\n42"
    assert ran.outcome.exception_type in ("OSError", "PermissionError")
