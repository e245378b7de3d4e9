"""`crucible demo` as a newcomer runs it: everything ends as it must, in little time, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.capabilities import needs
from tests.support.waits import wait_until

pytestmark = [pytest.mark.integration, needs("sandbox", "postgres")]

DEMO = [sys.executable, "-m", "crucible.cli.main", "demo"]


def environment(folder: Path) -> dict[str, str]:
    """One in which temporary folders are made where the test can see them."""
    return {**os.environ, "TMPDIR": str(folder)}


def test_the_demo_passes_and_leaves_nothing_behind(folder: Path) -> None:
    process = subprocess.Popen(
        [*DEMO, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder)
    )
    seen: dict[int, psutil.Process] = {}
    own = psutil.Process(process.pid)

    def over() -> bool:
        if process.poll() is None:
            seen.update({child.pid: child for child in own.children(recursive=True)})
        return process.poll() is not None

    wait_until(over, timeout=100, describe="the demo to end", poll=0.2, tolerate=(psutil.NoSuchProcess,))
    out, err = process.communicate()
    report = json.loads(out)
    assert process.returncode == 0, (report["order"], [r for r in report["results"] if r["differences"]])
    assert err == ""
    assert report["good"] is True
    assert report["left_out"] == []
    assert report["order"] == []
    assert len(seen) > 4, "PostgreSQL and sandboxes are children of the demo"
    assert not psutil.wait_procs(list(seen.values()), timeout=10)[1]
    assert list(folder.iterdir()) == []


def test_on_a_terminal_the_demo_draws_its_progress_and_ends_with_the_table(folder: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*DEMO, "--data-dir", str(folder / "kept")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(folder) | {"TERM": "xterm", "COLUMNS": "150", "LINES": "50"},
    )
    os.close(theirs)
    received = b""
    while True:
        try:
            received += os.read(ours, 65536)
        except OSError:  # Linux says so when the other side has closed
            break
    os.close(ours)
    assert process.wait(30) == 0
    text = received.decode()
    assert "■" in text, "slots are drawn while it runs"
    assert "forks succeeded" in text
    assert "strict priority was kept" in text
    assert (folder / "kept").is_dir()


def test_into_a_pipe_the_demo_writes_plain_lines(folder: Path) -> None:
    done = subprocess.run(DEMO, capture_output=True, text=True, check=False, timeout=100, env=environment(folder))
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert any("memory_hog" in line and "failed oom_killed" in line for line in lines)
    assert any(line.split()[:4] == ["exit_three", "4", "failed", "exit_nonzero"] for line in lines)


def test_an_interrupted_demo_leaves_nothing_behind(folder: Path) -> None:
    process = subprocess.Popen(
        DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(folder), start_new_session=True
    )
    assert process.stdout
    running = wait_until(
        lambda: "sleeper" in process.stdout.readline() if process.stdout else False,
        timeout=60,
        describe="the batch to be submitted",
    )
    assert running
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert list(folder.iterdir()) == []
