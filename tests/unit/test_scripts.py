"""The programs in scripts/: what they decide, without the machine around them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.scripts import SCRIPTS, load_script

pytestmark = pytest.mark.unit

check = load_script("check_repository")
pip_settings = load_script("pip_settings")
junit = load_script("junit_summary")

DIGEST = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Makefile", "\texport PYTHONPATH=services"),
        ("scripts/setup", "PYTHONPATH=. python x.py"),
        ("pyproject.toml.example.toml", 'pythonpath = ["services"]'),
        ("requirements/run.txt", "--index-url https://" + "pypi." + "org/simple"),
        ("docs/x.md", "see /" + "home/alice/crucible"),
        (".github/workflows/x.yml", "      - uses: actions/checkout@v6"),
        (".github/workflows/x.yml", "      - uses: actions/checkout"),
    ],
)
def test_a_line_that_breaks_a_promise_is_found_with_its_place(name: str, line: str):
    assert [finding.partition(":")[0] for finding in check.findings(name, "fine\n" + line)] == [name]
    assert f"{name}:2: " in next(check.findings(name, "fine\n" + line))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("docs/x.md", "nothing here touches sys.path"),
        ("docs/x.md", "ask /home/user what it holds"),
        (".github/workflows/x.yml", f"      - uses: actions/checkout@{DIGEST} # v6.0.2"),
        (".github/workflows/x.yml", "      - uses: ./.github/actions/own"),
        ("scripts/x", "unset PYTHONPATH # repository-check: allow - it is taken away"),
    ],
)
def test_a_line_that_keeps_the_promises_is_left_alone(name: str, line: str):
    assert list(check.findings(name, line)) == []


def test_a_test_that_sleeps_is_found_and_code_for_the_sandbox_is_not():
    source = 'import time\nCODE = "import time; time.sleep(60)"\nasync def f():\n    await asyncio.sleep(0)\n'
    assert list(check.findings("tests/unit/test_x.py", source)) == []
    found = list(check.findings("tests/unit/test_x.py", source + "    time.sleep(0.1)\n"))
    assert len(found) == 1
    assert found[0].startswith("tests/unit/test_x.py:5: a test sleeps")
    assert list(check.findings("tests/support/waits.py", "time.sleep(1)")) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tests/unit/test_x.py", "from time import sleep as nap"),
        ("tests/unit/test_x.py", "from asyncio import sleep"),
        ("tests/unit/test_x.py", "await anyio.sleep(1)"),
        ("tests/unit/test_x.py", "subprocess.run(['sleep', '5'], check=True)"),
        ("tests/unit/test_x.py", "os.system('sleep 5')"),
        ("tests/cluster/x.sh", "true; sleep 5"),
    ],
)
def test_a_sleep_is_found_under_whatever_name(name: str, line: str):
    assert len(list(check.findings(name, line))) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tests/unit/test_x.py", "subprocess.Popen(['sleep', '600'])"),
        ("tests/unit/test_x.py", "platform.run('import time; time.sleep(5)')"),
        ("tests/cluster/x.sh", "exec sleep infinity"),
        ("scripts/x.sh", "sleep 5"),
    ],
)
def test_what_only_exists_while_others_work_is_no_sleep(name: str, line: str):
    assert list(check.findings(name, line)) == []


def test_uv_is_told_what_pip_was_told_with_the_environment_first():
    listing = "\n".join(
        [
            "global.cert='/etc/ca.crt'",
            "global.index-url='https://mirror.example/simple'",
            "install.index-url='https://install.example/simple'",
            ":env:.find-links='/wheels /more'",
            "global.trusted-host='mirror.example'",
            "download.index-url='https://unrelated.example'",
            "global.timeout='60'",
        ]
    )
    assert pip_settings.for_uv(pip_settings.effective_settings(listing), {"SSL_CERT_FILE"}) == {
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INSECURE_HOST": "mirror.example",
    }


def test_a_machine_without_pip_settings_tells_uv_nothing():
    assert pip_settings.for_uv(pip_settings.effective_settings(""), set()) == {}


JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.unit.test_a" name="test_good" file="tests/unit/test_a.py" line="4" time="0.5"/>
<testcase classname="tests.unit.test_a" name="test_bad" file="tests/unit/test_a.py" line="9" time="1.0">
<failure message="assert 50% == 1&#10;second line">trace ``` here</failure></testcase>
<testcase classname="tests.unit.test_a" name="test_not" file="tests/unit/test_a.py" line="14" time="0">
<skipped message="needs root: running as uid 7">x</skipped></testcase>
</testsuite></testsuites>"""


def test_a_junit_report_becomes_a_summary_and_an_annotation_at_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "unit.xml").write_text(JUNIT)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    junit.main(str(tmp_path))
    assert capsys.readouterr().out == (
        "::error file=tests/unit/test_a.py,line=10::tests.unit.test_a::test_bad: assert 50%25 == 1\n"
    )
    shown = (tmp_path / "summary.md").read_text()
    assert "### unit: 1 passed, 1 failed, 1 skipped in 1.5 s" in shown
    assert "trace ''' here" in shown
    assert "- skipped tests.unit.test_a::test_not: needs root: running as uid 7" in shown


def test_a_tier_that_wrote_no_report_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    junit.main(str(tmp_path))
    assert capsys.readouterr().out == ""


def test_set_up_says_which_python_it_was_given_and_what_it_needs(tmp_path: Path):
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\ncase "$2" in *version_info\\[*) echo 3.10.4 ;; *) exit 1 ;; esac\n')
    old.chmod(0o755)
    checkout = tmp_path / "checkout"
    shutil.copytree(SCRIPTS, checkout / "scripts")
    shutil.copytree(SCRIPTS.parent / "requirements", checkout / "requirements")
    shutil.copy(SCRIPTS.parent / "pyproject.toml", checkout)
    done = subprocess.run(
        [checkout / "scripts" / "setup", "run"],
        env={"PATH": os.environ["PATH"], "CRUCIBLE_PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == f"setup: CRUCIBLE_PYTHON={old} is not Python 3.11 or later (it says: 3.10.4)\n"
    assert not (checkout / ".venv").exists()


def test_shell_scripts_are_known_by_name_or_by_first_line(tmp_path: Path):
    (tmp_path / "run").write_text("#!/usr/bin/env bash\n")
    (tmp_path / "posix").write_text("#!/bin/sh\n")
    (tmp_path / "named.sh").write_text("true\n")
    (tmp_path / "tool").write_text("#!/usr/bin/env python3\n")
    (tmp_path / "notes").write_bytes(b"\xff\x00 no script")
    (tmp_path / "code.py").write_text("#!/bin/sh\n")
    names = ["run", "posix", "named.sh", "tool", "notes", "code.py", "gone"]
    done = subprocess.run(
        [SCRIPTS / "shell-files"],
        input="\n".join(names) + "\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["run", "posix", "named.sh"]
