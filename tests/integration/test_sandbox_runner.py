"""The runner by itself, started as whatever makes sandboxes starts it: also where it has no commands, or a report file (Kubernetes)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crucible.frames import Decoder, Frame, Kind, LineDecoder, decode_all
from crucible.outcome import RunnerReport, RunnerStatus
from crucible.runner import run
from tests.support.waits import wait_until

pytestmark = pytest.mark.integration

LIMITS = ("timeout_ms=20000", "output_bytes=100000000", "open_files=256", "file_bytes=1000000")


@contextmanager
def runner(code: Path, source: str, *arguments: str, passed: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start the runner as a plain process, as the process runtime does."""
    code.write_text(source)
    command = [sys.executable, "-I", "-S", "-B", "-u", run.__file__, f"code={code}", *LIMITS, *arguments]
    with subprocess.Popen(command, pass_fds=[passed], stdin=subprocess.DEVNULL) as program:
        try:
            yield program
        finally:
            program.kill()


def descendants(program: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(program.pid).children(recursive=True)


def report_of(frames: list[Frame]) -> RunnerReport:
    assert frames[-1].kind is Kind.REPORT
    return RunnerReport.model_validate_json(frames[-1].payload)


def test_without_commands_it_runs_and_writes_its_report_to_a_file_too(tmp_path: Path) -> None:
    read, write = os.pipe()
    report = tmp_path / "termination-log"
    with runner(
        tmp_path / "main.py", "print('hi')\n1/0", f"frames={write}", f"report={report}", passed=write
    ) as program:
        os.close(write)
        with os.fdopen(read, "rb") as frames:
            told = decode_all(frames.read())
        assert program.wait(10) == 0

    assert [frame.kind for frame in told] == [Kind.STARTED, Kind.STDOUT, Kind.STDERR, Kind.REPORT]
    assert told[-1].payload == report.read_bytes()
    assert (report_of(told).exit_code, report_of(told).exception_type) == (1, "ZeroDivisionError")
    assert report.stat().st_size <= 4096


def test_on_its_own_standard_output_as_lines_with_its_input_from_a_file(tmp_path: Path) -> None:
    code, given = tmp_path / "main.py", tmp_path / "stdin"
    code.write_text("import sys\nprint(sys.stdin.read() * 2, end='\\r\\n')\nprint('e', file=sys.stderr)\nsys.exit(3)")
    given.write_text("said")
    command = [sys.executable, "-I", "-S", "-B", "-u", run.__file__, "frames=1", "encoding=lines"]
    done = subprocess.run(
        [*command, f"code={code}", f"stdin={given}", *LIMITS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    decoder = LineDecoder()
    told = list(decoder.feed(done.stdout))

    assert [(frame.kind, frame.payload) for frame in told[:-1]] == [
        (Kind.STARTED, b""),
        (Kind.STDOUT, b"saidsaid\r\n"),
        (Kind.STDERR, b"e\n"),
    ]
    assert report_of(told).exit_code == 3
    assert (decoder.pending, decoder.strays, done.stderr) == (0, "", b"")


def test_many_small_pieces_of_output_do_not_take_more_of_a_log_than_it_may_hold(tmp_path: Path) -> None:
    code = tmp_path / "main.py"
    code.write_text("import os\nwhile True:\n    os.write(1, b'a')\n    os.write(2, b'b')")
    command = [sys.executable, "-I", "-S", "-B", "-u", run.__file__, "frames=1", "encoding=lines", "log_bytes=200000"]
    done = subprocess.run(
        [*command, f"code={code}", *LIMITS], stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    told = list(LineDecoder().feed(done.stdout))

    assert report_of(told).status is RunnerStatus.OUTPUT_LIMIT
    assert "small pieces" in (report_of(told).detail or "")
    assert len(done.stdout) + 45 * len(told) < 200_000 + 70_000, "what was in the pipes may still come"


def test_when_no_one_listens_any_more_everything_ends(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    source = "import os, time\nos.fork()\nprint('up', flush=True)\ntime.sleep(600)"
    channel = theirs.fileno()
    with runner(tmp_path / "main.py", source, f"frames={channel}", f"commands={channel}", passed=channel) as program:
        theirs.close()
        wait_until(lambda: len(descendants(program)) == 2, timeout=10, describe="the code and its child to run")
        left = descendants(program)
        ours.close()
        assert program.wait(10) == 1

    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_reader_that_falls_behind_makes_the_code_wait_and_loses_nothing(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    size = 20_000_000
    source = f"import sys\nfor _ in range({size} // 1000): sys.stdout.buffer.write(b'x' * 1000)"
    channel = theirs.fileno()
    with runner(tmp_path / "main.py", source, f"frames={channel}", f"commands={channel}", passed=channel) as program:
        theirs.close()
        wait_until(
            lambda: [each.status() for each in descendants(program)] == [psutil.STATUS_SLEEPING],
            timeout=10,
            describe="the code to wait for the reader",
        )
        assert psutil.Process(program.pid).memory_info().rss < 30_000_000
        decoder, frames = Decoder(), []
        with ours:
            while data := ours.recv(1 << 20):
                frames += decoder.feed(data)

    assert sum(len(frame.payload) for frame in frames if frame.kind is Kind.STDOUT) == size
    assert report_of(frames).stdout_bytes == size


def test_a_stop_ends_it_and_is_not_called_a_signal_of_the_codes(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    channel = theirs.fileno()
    source = "import time\nprint('up', flush=True)\ntime.sleep(600)"
    with runner(tmp_path / "main.py", source, f"frames={channel}", f"commands={channel}", passed=channel), ours:
        theirs.close()
        decoder, frames = Decoder(), list[Frame]()
        while not [frame for frame in frames if frame.kind is Kind.STDOUT]:
            frames += decoder.feed(ours.recv(1 << 20))
        ours.send(run.STOP)
        while data := ours.recv(1 << 20):
            frames += decoder.feed(data)

    report = report_of(frames)
    assert (report.status, report.signal, report.exit_code) == (RunnerStatus.SIGNALLED, None, None)


def test_it_ends_its_own_descendants_and_no_one_elses(tmp_path: Path) -> None:
    read, write = os.pipe()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\ntime.sleep(0.2)"
        with runner(tmp_path / "main.py", source, f"frames={write}", passed=write) as program:
            os.close(write)
            with os.fdopen(read, "rb") as frames:
                told = decode_all(frames.read())
            assert program.wait(10) == 0
        assert bystander.poll() is None
        bystander.send_signal(signal.SIGKILL)

    # Only Linux lets it adopt what leaves its session.
    assert report_of(told).processes_killed == (1 if sys.platform == "linux" else 0)


def test_code_that_is_not_there_is_the_codes_own_exception(tmp_path: Path) -> None:
    read, write = os.pipe()
    with runner(tmp_path / "main.py", "", f"frames={write}", "code=/nowhere/main.py", passed=write) as program:
        os.close(write)
        with os.fdopen(read, "rb") as frames:
            told = decode_all(frames.read())
        program.wait(10)

    assert report_of(told).exception_type == "FileNotFoundError"


def test_a_set_up_that_fails_is_the_platforms_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    # There is no such limit.
    with runner(
        tmp_path / "main.py", "print('never')", f"frames={write}", "file_bytes=9" + "9" * 30, passed=write
    ) as program:
        os.close(write)
        with os.fdopen(read, "rb") as frames:
            told = decode_all(frames.read())
        program.wait(10)

    report = report_of(told)
    assert report.status is RunnerStatus.RUNNER_ERROR
    assert report.detail is not None
    assert "Error" in report.detail
