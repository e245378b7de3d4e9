"""The runner writes by itself what `crucible.frames` and `crucible.outcome` read: these tests hold the two together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crucible.frames import MAX_PAYLOAD, Decoder, Frame, Kind, LineDecoder
from crucible.outcome import RunnerReport, RunnerStatus
from crucible.runner import run

pytestmark = pytest.mark.unit


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def received(end: socket.socket) -> list[Frame]:
    end.setblocking(False)
    decoder, frames = Decoder(), []
    while True:
        try:
            data = end.recv(1 << 20)
        except BlockingIOError:
            assert decoder.pending == 0
            return frames
        frames += decoder.feed(data)


def test_both_sides_give_the_kinds_the_same_numbers_and_sizes() -> None:
    assert (run.STDOUT, run.STDERR, run.STARTED, run.REPORT) == (Kind.STDOUT, Kind.STDERR, Kind.STARTED, Kind.REPORT)
    assert max(run.FRAME_BYTES, run.READ_BYTES) <= MAX_PAYLOAD


def test_frames_arrive_as_they_were_added(ends: tuple[socket.socket, socket.socket]) -> None:
    outbox = run.Outbox(ends[1].fileno())
    outbox.add(run.STARTED, 0.0, 0, b"")
    outbox.add(run.STDOUT, 0.0, 5, b"a")
    outbox.add(run.STDERR, 0.0, 6, b"\x00\xff")
    outbox.add(run.STDOUT, 0.0, 2**40, b"b")

    assert outbox.send()
    assert outbox.size == 0
    assert received(ends[0]) == [
        Frame(Kind.STARTED, 0, b""),
        Frame(Kind.STDOUT, 5, b"a"),
        Frame(Kind.STDERR, 6, b"\x00\xff"),
        Frame(Kind.STDOUT, 2**40, b"b"),
    ]


def test_as_lines_they_are_what_the_platform_reads_from_a_log(ends: tuple[socket.socket, socket.socket]) -> None:
    outbox = run.Outbox(ends[1].fileno(), lines=True)
    outbox.add(run.STARTED, 0.0, 0, b"")
    outbox.add(run.STDOUT, 0.0, 5, b"\r\n\x00\xff" * 300)
    outbox.add(run.REPORT, 0.0, 6, b"{}")

    assert outbox.send()
    assert list(LineDecoder().feed(ends[0].recv(1 << 20))) == [
        Frame(Kind.STARTED, 0, b""),
        Frame(Kind.STDOUT, 5, b"\r\n\x00\xff" * 300),
        Frame(Kind.REPORT, 6, b"{}"),
    ]


def test_pieces_of_one_stream_travel_together_up_to_a_size(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * run.FRAME_BYTES)
    outbox = run.Outbox(ends[1].fileno())
    for at in range(4):
        outbox.add(run.STDOUT, 0.0, at, b"x" * 10)
    outbox.add(run.STDOUT, 0.0, 9, b"y" * (run.FRAME_BYTES - 39))
    frames = []
    while not outbox.send():
        frames += received(ends[0])
    frames += received(ends[0])

    assert [(frame.at_ms, len(frame.payload)) for frame in frames] == [(0, 40), (9, run.FRAME_BYTES - 39)]


def test_what_the_reader_does_not_take_yet_stays_and_keeps_its_order(ends: tuple[socket.socket, socket.socket]) -> None:
    outbox = run.Outbox(ends[1].fileno())
    pieces = [bytes((n,)) * 60_000 for n in range(20)]
    for n, piece in enumerate(pieces):
        outbox.add((run.STDOUT, run.STDERR)[n % 2], 0.0, n, piece)
    assert not outbox.send()
    assert outbox.size > 0

    decoder, frames = Decoder(), []
    done = False
    while not done:
        done = outbox.send()
        frames += decoder.feed(ends[0].recv(1 << 20))
    while decoder.pending or len(frames) < 20:
        frames += decoder.feed(ends[0].recv(1 << 20))
    assert [frame.payload for frame in frames] == pieces


def test_a_reader_that_is_gone_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    outbox = run.Outbox(ends[1].fileno())
    ends[0].close()
    outbox.add(run.STDOUT, 0.0, 0, b"x")

    with pytest.raises(run.ReaderGoneError):
        outbox.send()


@given(st.text(max_size=run.REPORT_TEXT))
def test_text_in_a_report_is_json_whatever_it_holds(text: str) -> None:
    assert json.loads(run.json_text(text)) == text


def test_a_report_is_one_that_the_platform_reads() -> None:
    report = run.json_object(
        {
            "status": "exited",
            "exit_code": 3,
            "signal": None,
            "cpu_seconds": 1e-06,
            "detail": 'a "quoted"\nline \U0001f600',
        }
    )

    read = RunnerReport.model_validate_json(report)
    assert (read.status, read.exit_code, read.signal, read.cpu_seconds) == (RunnerStatus.EXITED, 3, None, 1e-06)
    assert read.detail == 'a "quoted" line \U0001f600'


def test_the_longest_report_fits_a_termination_message() -> None:
    worst = "\U0001f600" * 10_000
    fields: dict[str, str | int | float | None] = {
        "detail": worst,
        "exception_type": run.class_name("\U00020000".encode() * 200),
    }
    numbers = dict.fromkeys(
        (
            "exit_code",
            "signal",
            "peak_memory_bytes",
            "cpu_seconds",
            "run_seconds",
            "stdout_bytes",
            "stderr_bytes",
            "left",
        ),
        2**53,
    )

    assert len(run.json_object({"status": "memory_limit", **fields, **numbers})) <= 4096


def test_every_status_that_the_runner_reports_is_known() -> None:
    source = Path(run.__file__).read_text(encoding="utf-8")

    assert {status for status in RunnerStatus if f'"{status}"' in source} == set(RunnerStatus)


@pytest.mark.parametrize("name", ["ZeroDivisionError", "json.decoder.JSONDecodeError", "f.<locals>.Mine", "Größe"])
def test_a_class_name_is_taken_over(name: str) -> None:
    assert run.class_name(name.encode()) == name


@pytest.mark.parametrize("told", [b"", b"x" * 201, b"two words", b'"}', b"line\nbreak", b"\xff\xfe", b"{}", b"a\x00b"])
def test_what_is_no_class_name_is_not_taken_over(told: bytes) -> None:
    assert run.class_name(told) is None


def test_arguments_become_a_plan() -> None:
    plan = run.Plan(["frames=3", "code=/a=b/main.py", "timeout_ms=1500", "memory_folders=/tmp:/dev/shm"])

    assert (plan.frames, plan.commands, plan.code, plan.timeout_seconds) == (3, -1, "/a=b/main.py", 1.5)
    assert (plan.memory_bytes, plan.memory_folders, plan.report) == (0, ["/tmp", "/dev/shm"], "")
    assert (plan.lines, plan.stdin) == (False, "")
    assert run.Plan(["frames=1", "encoding=lines", "code=x"]).lines


def test_the_runner_never_signals_everything_unless_it_is_the_first_process(
    monkeypatch: pytest.MonkeyPatch, ends: tuple[socket.socket, socket.socket]
) -> None:
    signalled: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: signalled.append(pid))
    supervised = run.Run(run.Plan([f"frames={ends[1].fileno()}", "code=x"]))
    supervised._main = 4_000_000

    supervised._kill()

    assert -1 not in signalled
    assert -4_000_000 in signalled


def test_the_runner_starts_with_nothing_but_small_modules() -> None:
    # Each of these costs every evaluation milliseconds.
    slow = {
        "json",
        "re",
        "enum",
        "signal",
        "ctypes",
        "struct",
        "subprocess",
        "socket",
        "threading",
        "typing",
        "pathlib",
    }
    code = f"import sys; sys.argv = ['x']; exec(open({run.__file__!r}).read().split('if __name__')[0]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)

    assert slow & set(done.stdout.split()) == set()
