"""`make demo BROKER=rabbitmq` as a person runs it: a node dies while evaluations wait, and the demo's verdict is good."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.capabilities import needs

ROOT = Path(__file__).parents[2]


@needs("rabbitmq", "sandbox", "postgres")
def test_the_demo_through_a_cluster_passes_while_the_queues_leader_is_killed(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.servers.demo"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "(SIGKILL of all its processes)" in done.stdout
    assert "evaluations leave the queue again" in done.stdout
    assert "it serves" in done.stdout
    assert "strict priority was kept" in done.stdout
    assert list(folder.iterdir()) == []
