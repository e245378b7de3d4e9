"""The node as the installer's Pod sees it: where its folders are mounted, and how something is run on it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crucible.nodes.problems import NotReadyError, Reason

# On the node.
RELEASES = "/opt/crucible/gvisor"
CONTAINERD_CONFIG = "/etc/containerd/config.toml"
DROP_INS = "/etc/containerd/conf.d"
# Among the releases: a drop-in was written that containerd may not have been restarted for.
RESTART_OWED = ".restart-owed"

_RESTART_SECONDS = 60


@dataclass(frozen=True)
class Host:
    """Folders of the node inside the installer's container, and its processes (the Pod shares their namespace)."""

    releases: Path = Path("/host/releases")
    containerd: Path = Path("/host/containerd")
    drop_ins: Path = Path("/host/drop-ins")
    processes: Path = Path("/proc")

    @property
    def containerd_config(self) -> Path:
        """The file that containerd is started with."""
        return self.containerd / Path(CONTAINERD_CONFIG).name

    @property
    def restart_owed(self) -> Path:
        """Exists from before a drop-in is written until containerd has been restarted, also over a crash in between."""
        return self.releases / RESTART_OWED

    def restart(self, command: Sequence[str]) -> None:
        """Run the command in the namespaces of the node's first process, and wait for its end.

        Raises:
            NotReadyError: it failed, or took longer than a minute.
        """
        enter = ["nsenter", "--target", "1", "--mount", "--uts", "--ipc", "--net", "--pid", "--", *command]
        try:
            done = subprocess.run(  # noqa: S603 - the words are the ConfigMap's, and no shell reads them
                enter, capture_output=True, text=True, timeout=_RESTART_SECONDS, check=False, stdin=subprocess.DEVNULL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotReadyError(Reason.RESTART_FAILED, f"{' '.join(command)}: {error}") from error
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise NotReadyError(Reason.RESTART_FAILED, f"{' '.join(command)} ended with {done.returncode}: {said}")
