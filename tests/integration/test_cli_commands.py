"""The command line as people use it: real processes against a real `crucible up`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crucible.cli.exit_codes import ExitCode
from tests.support.folders import scratch_dir
from tests.support.platform_process import PlatformProcess
from tests.support.waits import wait_until

pytestmark = pytest.mark.integration

CRUCIBLE = [sys.executable, "-m", "crucible.cli.main"]
Done = subprocess.CompletedProcess[bytes]


@pytest.fixture(scope="module")
def platform() -> Iterator[PlatformProcess]:
    for folder in scratch_dir():
        process = PlatformProcess(folder)
        try:
            asyncio.run(process.up())
            yield process
        finally:
            process.kill()


class Cli:
    """Runs commands that find the platform by its data folder, as on a person's machine."""

    def __init__(self, platform: PlatformProcess) -> None:
        self.environment = {**os.environ, "CRUCIBLE_DATA_DIR": str(platform.data_dir)}

    def run(self, *arguments: str, stdin: bytes = b"", code: int | None = 0, **environment: str) -> Done:
        done = subprocess.run(
            [*CRUCIBLE, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment | environment,
            timeout=60,
            check=False,
        )
        assert code is None or done.returncode == code, (done.stdout, done.stderr)
        return done

    def json(self, *arguments: str, code: int = 0, **options: Any) -> Any:
        """Run with --json; standard output must be one document and standard error empty."""
        done = self.run(*arguments, "--json", code=code, **options)
        assert done.stderr == b""
        return json.loads(done.stdout)

    def problem(self, *arguments: str, code: int, **options: Any) -> dict[str, Any]:
        """Run with --json what must fail; standard output must be empty and standard error a problem."""
        done = self.run(*arguments, "--json", code=code, **options)
        assert done.stdout == b""
        return json.loads(done.stderr)  # type: ignore[no-any-return]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*CRUCIBLE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.environment
        )

    def submit(self, code: str, *options: str) -> str:
        return self.run("submit", "--code", code, *options).stdout.decode().strip()


@pytest.fixture(scope="module")
def cli(platform: PlatformProcess) -> Cli:
    return Cli(platform)


# --- submit and wait ------------------------------------------------------------------------------------------------------


def test_submit_prints_the_id_alone_and_status_explains_the_end(cli: Cli) -> None:
    evaluation_id = cli.submit("print('hi')")
    assert evaluation_id.startswith("ev-")
    text = cli.run("status", evaluation_id, "--wait").stdout.decode()
    assert f"{evaluation_id}  completed: exit_zero" in text
    assert "3 B stdout, 0 B stderr" in text


def test_source_and_input_come_from_files_or_standard_input(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "upper.py"
    source.write_text("import sys; print(sys.stdin.read().upper())")
    (tmp_path / "input.txt").write_text("wörter")
    done = cli.json("submit", str(source), "--stdin-file", str(tmp_path / "input.txt"), "--follow")
    assert done["output"]["stdout"]["text"] == "WÖRTER\n"
    done = cli.json("submit", "-", "--stdin", "abc", "--follow", stdin=source.read_bytes())
    assert done["output"]["stdout"]["text"] == "ABC\n"


def test_every_option_of_submit_arrives(cli: Cli) -> None:
    options = [
        "-p",
        "7",
        "-t",
        "9",
        "--memory",
        "300Mi",
        "--cpu",
        "200m",
        "-l",
        "a=1",
        "-l",
        "b=2",
        "--queue-timeout",
        "50",
    ]
    shown = cli.json("submit", "--code", "1", *options)
    assert (shown["priority"], shown["timeout_seconds"], shown["queue_timeout_seconds"]) == (7, 9, 50)
    assert (shown["memory_limit"], shown["cpu_limit"], shown["size_class"]) == ("300Mi", "200m", "medium")
    assert shown["labels"] == {"a": "1", "b": "2"}
    assert cli.json("submit", "--code", "1", "--profile", "medium")["memory_limit"] == "512Mi"


def test_one_idempotency_key_gives_one_evaluation(cli: Cli) -> None:
    first = cli.submit("print(1)", "--idempotency-key", "the-same")
    assert cli.submit("print(1)", "--idempotency-key", "the-same") == first
    refused = cli.problem("submit", "--code", "print(2)", "--idempotency-key", "the-same", code=ExitCode.REFUSED)
    assert refused["type"] == "/problems/idempotency-key-reused"


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [
        ("print('fine')", ExitCode.OK, "completed: exit_zero"),
        ("1/0", ExitCode.NOT_COMPLETED, "failed: exception ZeroDivisionError"),
        ("import sys; sys.exit(3)", ExitCode.NOT_COMPLETED, "failed: exit_nonzero 3"),
    ],
)
def test_with_wait_the_exit_code_says_whether_it_completed(cli: Cli, code: str, exit_code: int, words: str) -> None:
    assert words in cli.run("submit", "--code", code, "--wait", code=exit_code).stdout.decode()


def test_follow_copies_both_streams_as_they_come(cli: Cli) -> None:
    code = "import sys, time\nprint('one', flush=True)\ntime.sleep(1.5)\nprint('two', file=sys.stderr)"
    process = cli.start("submit", "--code", code, "--follow")
    assert process.stdout
    assert process.stdout.readline() == b"one\n"
    assert process.poll() is None, "the first line must be there while the code still runs"
    out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"", ExitCode.OK)
    assert b"two\n" in err
    assert b"completed: exit_zero" in err


def test_many_copies_are_submitted_in_batches_and_waited_for(cli: Cli) -> None:
    done = cli.json("submit", "--code", "print(1)", "--count", "120", "--label", "many=1")
    assert (done["accepted"], done["rejected"], len(done["items"])) == (120, 0, 120)
    assert [item["index"] for item in done["items"]] == list(range(120))
    ids = [item["evaluation"]["id"] for item in done["items"]]
    assert len(set(ids)) == 120
    listed = cli.json("list", "--label", "many=1", "--limit", "500")
    assert {item["id"] for item in listed["items"]} == set(ids)
    assert listed["more"] is False
    assert len(cli.json("list", "--label", "many=1", "--limit", "110")["items"]) == 110
    # The last first: what still waits ends at once.
    cli.run("cancel", *reversed(ids))


def test_an_interrupted_wait_leaves_the_evaluation_alone_and_says_how_to_find_it(cli: Cli) -> None:
    process = cli.start("submit", "--code", "import time; print('x', flush=True); time.sleep(30)", "--follow")
    assert process.stdout
    assert process.stdout.readline() == b"x\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == ExitCode.INTERRUPTED
    evaluation_id = err.decode().split()[0]
    assert f"crucible cancel {evaluation_id}" in err.decode()
    assert cli.json("status", evaluation_id)["state"] == "running"
    assert cli.json("cancel", evaluation_id)["items"][0]["id"] == evaluation_id


# --- batch ------------------------------------------------------------------------------------------------------------------


def test_a_folder_is_run_as_a_batch(cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.py").write_text(f"print('{name}')")
    done = cli.json("batch", str(tmp_path), "--wait", "--priority", "6")
    assert {Path(item["source"]).name: item["evaluation"]["state"] for item in done["items"]} == {
        "a.py": "completed",
        "b.py": "completed",
        "c.py": "completed",
    }
    assert all(item["evaluation"]["priority"] == 6 for item in done["items"])
    (tmp_path / "d.py").write_text("1/0")
    assert "failed" in cli.run("batch", str(tmp_path), "--wait", code=ExitCode.NOT_COMPLETED).stdout.decode()


def test_what_is_refused_in_a_batch_is_named_and_the_rest_runs(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "batch.jsonl"
    path.write_text('{"code": "print(1)"}\n{"code": "print(2)", "priority": 99}\n')
    done = cli.json("batch", str(path), code=ExitCode.REFUSED)
    assert [item["status"] for item in done["items"]] == ["accepted", "rejected"]
    assert done["items"][1]["problem"]["violations"][0]["field"].endswith("priority")
    text = cli.run("batch", str(path), code=ExitCode.REFUSED).stdout.decode()
    assert f"{path}[1]" in text
    assert "priority" in text


def test_a_batch_of_which_all_is_refused_still_names_each(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "batch.json"
    path.write_text('[{"code": ""}, {"code": "1", "profile": "huge"}]')
    done = cli.json("batch", str(path), code=ExitCode.REFUSED)
    assert [item["status"] for item in done["items"]] == ["rejected", "rejected"]


# --- output -----------------------------------------------------------------------------------------------------------------

BINARY = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 3000); sys.stderr.write('\\x1b]0;owned\\x07')"


@pytest.fixture(scope="module")
def binary(cli: Cli) -> str:
    evaluation_id = cli.submit(BINARY)
    cli.run("status", evaluation_id, "--wait")
    return evaluation_id


@pytest.mark.parametrize("options", [[], ["--follow"], ["--stream", "stdout"], ["--stream", "stdout", "--follow"]])
def test_output_into_a_pipe_is_byte_for_byte_what_the_code_wrote(cli: Cli, binary: str, options: list[str]) -> None:
    done = cli.run("logs", binary, *options)
    assert hashlib.sha256(done.stdout).hexdigest() == hashlib.sha256(bytes(range(256)) * 3000).hexdigest()
    assert done.stderr == (b"" if "--stream" in options else b"\x1b]0;owned\x07")


def test_one_stream_alone_goes_to_standard_output(cli: Cli, binary: str) -> None:
    assert cli.run("logs", binary, "--stream", "stderr").stdout == b"\x1b]0;owned\x07"


def test_output_as_json_keeps_every_byte(cli: Cli, binary: str) -> None:
    document = cli.json("logs", binary)
    assert document["stderr"]["text"] == "\x1b]0;owned\x07"
    assert document["stdout"]["size"] == 256 * 3000
    assert "base64" in document["stdout"]
    # No control character may reach the terminal of whoever looks at the document.
    assert b"\x1b" not in cli.run("logs", binary, "--json").stdout


def on_a_terminal(cli: Cli, *arguments: str) -> bytes:
    """Run a command whose standard output and error are a terminal; returns what the terminal received."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*CRUCIBLE, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=cli.environment | {"TERM": "xterm"}
    )
    os.close(theirs)
    received = b""
    try:
        while select.select([ours], [], [], 30)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side has closed
                break
            if not piece:
                break
            received += piece
    finally:
        os.close(ours)
        process.wait(30)
    return received


@pytest.mark.parametrize("options", [[], ["--follow"]])
def test_output_on_a_terminal_cannot_steer_it(cli: Cli, options: list[str]) -> None:
    evil = "import sys; sys.stdout.write('\\x1b]0;owned\\x07\\rFAKE\\u202e ä\\n'); sys.stderr.write('\\x9b2J')"
    evaluation_id = cli.submit(evil)
    cli.run("status", evaluation_id, "--wait")
    received = on_a_terminal(cli, "logs", evaluation_id, *options).decode()
    assert r"\x1b]0;owned\x07\x0dFAKE\u202e ä" in received
    assert r"\x9b2J" in received
    assert "\x1b" not in received


def test_an_exception_named_to_deceive_is_shown_escaped(cli: Cli) -> None:
    evil = "raise type('\\x1b[2J[red]Evil', (Exception,), {})"
    evaluation_id = cli.submit(evil)
    cli.run("status", evaluation_id, "--wait", code=ExitCode.NOT_COMPLETED)
    assert b"\x1b[2J" not in on_a_terminal(cli, "status", evaluation_id)
    assert b"\x1b[2J" not in on_a_terminal(cli, "list", "--state", "failed")


def test_a_reader_that_goes_away_ends_the_command_quietly(cli: Cli) -> None:
    evaluation_id = cli.submit("print('x' * 79 + '\\n', end='') or [print('y' * 79) for _ in range(100_000)]")
    cli.run("status", evaluation_id, "--wait")
    process = cli.start("logs", evaluation_id)
    assert process.stdout
    assert process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(30) == ExitCode.READER_GONE
    assert process.stderr.read() == b""


# --- reading back -----------------------------------------------------------------------------------------------------------


def test_events_are_shown_from_first_to_last(cli: Cli) -> None:
    evaluation_id = cli.submit("print(1)")
    followed = cli.json("events", evaluation_id, "--follow")["events"]
    assert [event["type"] for event in followed] == ["submitted", "queued", "provisioning", "running", "completed"]
    whole = cli.json("events", evaluation_id)["events"]
    assert [{name: value for name, value in event.items() if value is not None} for event in whole] == followed
    assert cli.json("events", evaluation_id, "--follow")["events"] == followed
    assert "completed" in cli.run("events", evaluation_id).stdout.decode()


def test_list_filters_by_state_reason_priority_label_and_age(cli: Cli) -> None:
    done = cli.json("submit", "--code", "import sys; sys.exit(9)", "-l", "find=me", "-p", "2", "--wait", code=1)
    same = ["--state", "failed", "--reason", "exit_nonzero", "-p", "2", "-l", "find=me", "--since", "1h"]
    assert [item["id"] for item in cli.json("list", *same)["items"]] == [done["id"]]
    assert cli.json("list", *same, "--until", "1h")["items"] == []
    assert cli.json("list", "--label", "find=nobody")["items"] == []
    assert done["id"] in cli.run("list", *same).stdout.decode()
    assert "violations" in cli.problem("list", "--state", "bogus", code=ExitCode.REFUSED)


def test_cancel_ends_what_runs_and_leaves_alone_what_has_ended(cli: Cli) -> None:
    ended = cli.json("submit", "--code", "1", "--wait")["id"]
    running = cli.submit("import time; time.sleep(60)")
    wait_until(lambda: cli.json("status", running)["state"] == "running", timeout=20, describe="it to run", poll=0.1)
    results = cli.json("cancel", running, ended)["items"]
    assert [item["id"] for item in results] == [running, ended]
    assert results[1]["evaluation"]["state"] == "completed"
    assert cli.json("status", running, "--wait", code=ExitCode.NOT_COMPLETED)["reason"] == "cancelled_by_user"


def test_what_is_not_there_has_an_exit_code_of_its_own(cli: Cli) -> None:
    missing = "ev-00000000000000000000000000"
    for command in ("status", "logs", "events"):
        assert cli.problem(command, missing, code=ExitCode.NOT_FOUND)["status"] == 404
    assert cli.json("cancel", missing, code=ExitCode.NOT_FOUND)["items"][0]["problem"]["status"] == 404
    assert cli.problem("logs", missing, "--follow", code=ExitCode.NOT_FOUND)["status"] == 404


def test_a_refusal_names_what_would_be_accepted(cli: Cli) -> None:
    done = cli.run("submit", "--code", "1", "--priority", "11", code=ExitCode.REFUSED)
    assert b"priority: must be 0 to 10" in done.stderr
    assert b"accepted: 0 to 10" in done.stderr
    assert done.stdout == b""


# --- the platform -----------------------------------------------------------------------------------------------------------


def test_capacity_shows_nodes_and_queues_and_what_would_fit(cli: Cli) -> None:
    found = cli.json("capacity")
    assert {queue["size_class"] for queue in found["queues"]} == {"small", "medium", "large"}
    assert found["nodes"][0]["runtime"] in cli.run("capacity").stdout.decode()
    assert cli.json("capacity", "--check", "--memory", "64Mi")["fit"] in ("now", "later")
    never = cli.json("capacity", "--check", "--memory", "1000Gi", "--cpu", "100", code=ExitCode.NOT_COMPLETED)
    assert never["fit"] == "never"
    assert (
        never["reason"] in cli.run("capacity", "--check", "--memory", "1000Gi", "--cpu", "100", code=1).stdout.decode()
    )


def test_statistics_count_what_was_run(cli: Cli) -> None:
    cli.run("submit", "--code", "1", "--wait")
    found = cli.json("stats", "--since", "1d")
    assert found["by_state"]["completed"] >= 1
    assert "completed" in cli.run("stats").stdout.decode()


def test_storage_reports_its_usage_and_deletes_what_is_old(cli: Cli) -> None:
    cli.run("submit", "--code", "print(1)", "--wait")
    usage = cli.json("storage", "usage")
    assert usage["primary"] in [backend["backend"] for backend in usage["backends"]]
    assert usage["primary"] in cli.run("storage", "usage").stdout.decode()
    assert cli.json("storage", "cleanup", "--older-than", "1")["evaluations"] == 0
    would = cli.json("storage", "cleanup", "--older-than", "0", "--dry-run")
    assert would["evaluations"] + would["remaining"] >= 1
    assert b"would delete" in cli.run("storage", "cleanup", "--older-than", "0", "--dry-run").stdout


def test_objects_are_migrated_to_another_folder(cli: Cli, platform: PlatformProcess) -> None:
    large = cli.submit("print('x' * 400_000)")
    cli.run("status", large, "--wait")
    target = (platform.data_dir / "elsewhere").as_uri()
    moved = cli.json("storage", "migrate", "--to", target)
    assert (moved["remaining"], moved["failed"]) == (0, [])
    assert moved["moved"] >= 1
    assert cli.run("logs", large).stdout == b"x" * 400_000 + b"\n"
    assert cli.json("storage", "migrate", "--to", target)["moved"] == 0, "calling it again is harmless"
    assert b"moved 0 objects" in cli.run("storage", "migrate", "--to", target).stdout


def test_migrating_to_what_is_no_object_store_is_refused(cli: Cli) -> None:
    assert "object store" in cli.problem("storage", "migrate", "--to", "nowhere", code=ExitCode.REFUSED)["detail"]


def test_dead_letters_are_listed_and_missing_ones_named(cli: Cli) -> None:
    assert cli.json("dead-letters", "list")["total"] == 0
    for command in ("replay", "delete"):
        items = cli.json("dead-letters", command, "4711", "4712", code=ExitCode.NOT_FOUND)["items"]
        assert [item["problem"]["status"] for item in items] == [404, 404]
    assert cli.json("dead-letters", "replay", "--all")["items"] == []
    assert "--all" in cli.problem("dead-letters", "replay", code=ExitCode.USAGE)["detail"]


def test_without_a_broker_there_is_nothing_to_move(cli: Cli) -> None:
    found = cli.json("broker", "migrate", "status")
    assert (found["brokers"], found.get("phase")) == ([], None)
    assert "database itself" in cli.run("broker", "migrate", "status").stdout.decode()
    for step in (["start", "--share", "5"], ["drain", "--wait"], ["finish"], ["rollback"]):
        problem = cli.problem("broker", "migrate", *step, code=ExitCode.REFUSED)
        assert (problem["status"], "CRUCIBLE_LEGACY_BROKER_URL" in problem["detail"]) == (409, True)


def test_a_new_key_works_until_it_is_revoked(cli: Cli) -> None:
    made = cli.json("keys", "create", "red-team", "--name", "nightly", "--expires-in-days", "7")
    key, key_id = made["key"], made["details"]["key_id"]
    assert cli.json("list", CRUCIBLE_API_KEY=key)["items"] == []
    assert cli.problem("keys", "list", code=ExitCode.REFUSED, CRUCIBLE_API_KEY=key)["status"] == 403
    listed = cli.run("keys", "list").stdout.decode()
    assert key_id in listed
    assert key not in listed
    cli.run("keys", "revoke", key_id)
    assert cli.problem("list", code=ExitCode.REFUSED, CRUCIBLE_API_KEY=key)["status"] == 401


def test_a_key_is_printed_alone_so_that_a_script_can_keep_it(cli: Cli) -> None:
    assert cli.run("keys", "create", "someone").stdout.decode().strip().startswith("crk_")


def test_url_and_key_come_from_the_environment_too(cli: Cli, platform: PlatformProcess) -> None:
    elsewhere = {"CRUCIBLE_DATA_DIR": "/nonexistent", "CRUCIBLE_URL": platform.url}
    assert cli.problem("list", code=ExitCode.REFUSED, **elsewhere)["status"] == 401
    assert cli.json("list", "--api-key", platform.api_key, **elsewhere)["items"]


# --- the process itself -----------------------------------------------------------------------------------------------------


def test_where_no_platform_answers_the_exit_code_says_so(cli: Cli) -> None:
    problem = cli.problem("list", "--url", "http://127.0.0.1:1", code=ExitCode.UNAVAILABLE)
    assert "http://127.0.0.1:1" in problem["detail"]
    assert b"crucible up" in cli.run("list", "--url", "http://127.0.0.1:1", code=ExitCode.UNAVAILABLE).stderr


def test_what_is_no_platform_is_told_from_one(cli: Cli, platform: PlatformProcess) -> None:
    # The API's own front page: it answers, but not with JSON.
    assert "not a platform" in cli.problem("list", "--url", f"{platform.url}/?", code=ExitCode.UNAVAILABLE)["detail"]


def test_a_usage_error_is_json_where_json_was_asked_for(cli: Cli) -> None:
    assert "FILE" in cli.problem("submit", code=ExitCode.USAGE)["detail"]
    assert b"Usage: crucible submit" in cli.run("submit", code=ExitCode.USAGE).stderr


def test_a_mistake_of_ours_has_an_exit_code_of_its_own() -> None:
    program = "import crucible.cli.main as m\nm.app.command('break')(lambda: 1 / 0)\nm.main()"
    done = subprocess.run([sys.executable, "-c", program, "break"], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INTERNAL
    assert "ZeroDivisionError" in done.stderr


def test_shell_completion_is_offered(cli: Cli) -> None:
    done = cli.run("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert b"complete" in done.stdout
