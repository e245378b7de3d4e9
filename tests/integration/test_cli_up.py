"""`crucible up`: what it announces, how it stops, and that the commands find it, also after it was killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from crucible.cli.exit_codes import ExitCode
from tests.support.folders import scratch_dir
from tests.support.ports import free_port
from tests.support.waits import wait_until

pytestmark = pytest.mark.integration

CRUCIBLE = [sys.executable, "-m", "crucible.cli.main"]


class Up:
    """One `crucible up` as a shell starts it: a process group of its own."""

    def __init__(self, data_dir: Path, *options: str, **environment: str) -> None:
        self.data_dir = data_dir
        self.environment = {
            **os.environ,
            "CRUCIBLE_LOG__LEVEL": "warning",
            "CRUCIBLE_WORKER__SLOTS": "2",
            **environment,
        }
        self.environment["CRUCIBLE_DATA_DIR"] = str(data_dir)
        self.process = subprocess.Popen(
            [*CRUCIBLE, "up", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    @property
    def server_file(self) -> Path:
        return self.data_dir / "server.json"

    def ready(self) -> dict[str, Any]:
        def written() -> bool:
            assert self.process.poll() is None, self.process.communicate()
            # What a killed platform left behind names another process.
            return self.server_file.exists() and self.server()["pid"] == self.process.pid

        wait_until(written, timeout=60, describe="crucible up to serve")
        return self.server()

    def server(self) -> dict[str, Any]:
        return json.loads(self.server_file.read_text())  # type: ignore[no-any-return]

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole process group, PostgreSQL and sandboxes included."""
        os.killpg(self.process.pid, signal.SIGINT)

    def crucible(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [*CRUCIBLE, *arguments], capture_output=True, text=True, env=self.environment, timeout=60, check=False
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return done.stdout + done.stderr

    def submit(self, code: str, *options: str) -> str:
        return self.crucible("submit", "--code", code, *options).strip()

    def state(self, evaluation_id: str) -> str:
        return json.loads(self.crucible("status", evaluation_id, "--json"))["state"]  # type: ignore[no-any-return]

    def wait_running(self, evaluation_id: str) -> None:
        wait_until(lambda: self.state(evaluation_id) == "running", timeout=30, describe="it to run", poll=0.1)

    def end(self) -> None:
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            tree = [own, *own.children(recursive=True)]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate(timeout=30)


@pytest.fixture
def data_dir() -> Iterator[Path]:
    for folder in scratch_dir():
        yield folder / "data"


@pytest.fixture
def started() -> Iterator[list[Up]]:
    """What a test started, to be ended with it."""
    ups: list[Up] = []
    yield ups
    for up in ups:
        up.end()


def test_up_announces_itself_serves_and_stops_cleanly_on_ctrl_c(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, "--port", "0"))
    server = up.ready()
    assert server["pid"] == up.process.pid
    assert stat.S_IMODE(up.server_file.stat().st_mode) == 0o600
    evaluation_id = up.submit("import time; time.sleep(1.5); print('done')")
    up.wait_running(evaluation_id)

    up.interrupt()
    out, err = up.process.communicate(timeout=60)
    assert up.process.returncode == ExitCode.OK, err
    for shown in (server["url"], server["api_key"], str(data_dir), "limits held by"):
        assert shown in out
    assert "draining" in err
    assert "stopped" in err
    assert "Traceback" not in err
    assert not up.server_file.exists()

    started.append(again := Up(data_dir, "--port", "0"))
    assert again.ready()["api_key"] == server["api_key"], "the key is made once"
    ended = json.loads(again.crucible("status", evaluation_id, "--json"))
    assert (ended["state"], ended["attempt"]) == ("completed", 1), "what ran had time to finish in the drain"
    assert again.crucible("logs", evaluation_id) == "done\n"


def test_up_with_json_prints_one_document(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, "--port", "0", "--json"))
    server = up.ready()
    up.interrupt()
    out, _ = up.process.communicate(timeout=60)
    document = json.loads(out)
    assert {key: document[key] for key in ("url", "api_key", "pid")} == server
    assert document["data_dir"] == str(data_dir)
    assert document["sandbox"] in ("bubblewrap", "process")
    assert document["limits_by"]


def test_a_second_up_over_the_same_folder_says_where_the_first_is(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, "--port", "0"))
    server = up.ready()
    told = up.crucible("up", "--port", "0", code=ExitCode.ALREADY_RUNNING)
    assert server["url"] in told
    assert str(server["pid"]) in told
    problem = json.loads(up.crucible("up", "--port", "0", "--json", code=ExitCode.ALREADY_RUNNING))
    assert problem["url"] == server["url"]
    assert up.crucible("list") is not None, "the first is unharmed"


def test_a_second_ctrl_c_stops_at_once_and_leaves_no_process(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, "--port", "0"))
    up.ready()
    evaluation_id = up.submit("import time; time.sleep(60)")
    up.wait_running(evaluation_id)
    tree = psutil.Process(up.process.pid).children(recursive=True)
    assert len(tree) >= 2

    up.interrupt()
    wait_until(lambda: "draining" in _next_line(up), timeout=20, describe="the drain to begin")
    up.interrupt()
    up.process.communicate(timeout=20)
    assert up.process.returncode == ExitCode.INTERRUPTED
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert not alive

    started.append(again := Up(data_dir, "--port", "0"))
    again.ready()
    again.wait_running(evaluation_id)
    again.crucible("cancel", evaluation_id)


def _next_line(up: Up) -> str:
    assert up.process.stderr
    return up.process.stderr.readline()


def test_a_port_that_is_taken_is_named(data_dir: Path, started: list[Up]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        started.append(up := Up(data_dir, "--port", str(port)))
        _, err = up.process.communicate(timeout=60)
    assert up.process.returncode == ExitCode.UNAVAILABLE
    assert "in use" in err
    assert str(port) in err
    assert "Traceback" not in err


def test_a_setting_that_cannot_be_used_is_a_usage_error(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, CRUCIBLE_WORKER__SLOTS="many"))
    _, err = up.process.communicate(timeout=60)
    assert up.process.returncode == ExitCode.USAGE
    assert "CRUCIBLE_WORKER__SLOTS" in err


def test_after_a_kill_commands_say_that_nothing_answers(data_dir: Path, started: list[Up]) -> None:
    started.append(up := Up(data_dir, "--port", "0"))
    server = up.ready()
    up.process.kill()
    up.process.communicate(timeout=30)
    assert server["url"] in up.crucible("list", code=ExitCode.UNAVAILABLE)


def test_following_survives_a_restart_of_the_platform_without_a_lost_or_doubled_byte(
    data_dir: Path, started: list[Up]
) -> None:
    port = str(free_port())
    started.append(up := Up(data_dir, "--port", port))
    up.ready()
    code = "import time\nfor n in range(20): print('line', n, flush=True); time.sleep(0.1)"
    evaluation_id = up.submit(code)
    up.wait_running(evaluation_id)
    follower = subprocess.Popen(
        [*CRUCIBLE, "logs", evaluation_id, "--follow"], stdout=subprocess.PIPE, text=True, env=up.environment
    )
    assert follower.stdout
    first = follower.stdout.readline()
    up.interrupt()
    up.process.communicate(timeout=60)
    started.append(again := Up(data_dir, "--port", port))
    again.ready()
    rest = follower.stdout.read()
    assert follower.wait(60) == ExitCode.OK
    assert first + rest == "".join(f"line {n}\n" for n in range(20))


def test_following_through_a_kill_says_that_the_output_begins_again(data_dir: Path, started: list[Up]) -> None:
    port = str(free_port())
    started.append(up := Up(data_dir, "--port", port))
    up.ready()
    # Long enough that it still runs when the follower, a program that has to start first, has shown a line.
    evaluation_id = up.submit("import time\nfor n in range(60): print('line', n, flush=True); time.sleep(0.1)")
    up.wait_running(evaluation_id)
    follower = subprocess.Popen(
        [*CRUCIBLE, "logs", evaluation_id, "--follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=up.environment,
    )
    assert follower.stdout
    assert follower.stderr
    first = follower.stdout.readline()
    up.process.kill()
    up.process.communicate(timeout=30)
    started.append(again := Up(data_dir, "--port", port))
    again.ready()
    shown = first + follower.stdout.read()
    told = follower.stderr.read()
    assert follower.wait(60) == ExitCode.OK
    assert json.loads(again.crucible("status", evaluation_id, "--json"))["attempt"] == 2
    whole = "".join(f"line {n}\n" for n in range(60))
    assert shown.endswith(whole), "the attempt that counts is shown whole"
    assert whole.startswith(shown.removesuffix(whole)), "what came before is the beginning of the lost one"
    assert "begins again" in told
