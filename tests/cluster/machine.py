"""What a machine needs so that a cluster of namespaces can run on it, and the programs that it is made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import cgroups
from tests.cluster.errors import ClusterError

REPOSITORY = Path(__file__).parents[2]
TOOLS_SCRIPT = REPOSITORY / "scripts" / "cluster-tools"
# A cold build takes about fifteen minutes of two processors.
BUILD_SECONDS = 3600
# Each kubelet, containerd and controller needs some; the kernel's 128 for a user are too few for a cluster.
_INOTIFY_INSTANCES = Path("/proc/sys/fs/inotify/max_user_instances")
INOTIFY_INSTANCES = 8192


@dataclass(frozen=True)
class Tools:
    """The folder that `scripts/cluster-tools` made."""

    path: Path

    @property
    def bin(self) -> Path:
        """The programs."""
        return self.path / "bin"

    @property
    def calico_manifests(self) -> Path:
        """Calico's own definitions and roles."""
        return self.path / "calico"


def why_unusable() -> str | None:
    """Return why no cluster of namespaces can run on this machine, and what to do, or None if one can."""
    if sys.platform != "linux":
        return f"this is {sys.platform}: run it on Linux, in a Linux virtual machine, or install Docker and kind"
    if os.geteuid() != 0:
        return (
            f"running as uid {os.geteuid()}: nodes are made of namespaces, mounts and cgroups, which takes root. Run it with sudo, "
            "best in a throw-away machine; or install Docker and kind; or name a cluster in KUBECONFIG"
        )
    if reason := cgroups.why_unusable():
        return f"{reason}: run it where cgroups can be made; in a container that takes --privileged and --cgroupns=host"
    if not Path("/dev/loop-control").exists():
        return "there is no /dev/loop-control: each node's disk is a loop device. Do `modprobe loop`, or run it in a privileged container"
    if not shutil.which("apt-get") and not shutil.which("runc"):
        return "there is neither runc nor apt-get to install it with: install runc, iptables, nftables, conntrack, ipset and the CNI plugins"
    return None


def calico_manifest() -> Path:
    """Return Calico's manifest for a cluster that is to run it as Pods.

    Raises:
        ClusterError: its module cannot be had here.
    """
    return _run_tools_script("calico-manifest")


def build_tools() -> Tools:
    """Return the cluster's programs, built where this machine has none yet; what it says goes to standard error.

    Raises:
        ClusterError: they cannot be built here.
    """
    return Tools(_run_tools_script())


def _run_tools_script(*arguments: str) -> Path:
    try:
        done = subprocess.run(
            [TOOLS_SCRIPT, *arguments],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{TOOLS_SCRIPT.name}: {error}") from None
    if done.returncode != 0:
        raise ClusterError("scripts/cluster-tools failed; it says above what it lacks")
    return Path(done.stdout.strip())


def kubectl() -> str:
    """Return the kubectl of this machine, for clusters that bring none.

    Raises:
        ClusterError: there is none.
    """
    found = shutil.which("kubectl")
    if found is None:
        raise ClusterError("there is no kubectl on this machine, and this kind of cluster brings none: install it")
    return found


def raise_inotify_limit() -> None:
    """Let root watch more files, as kind's users are told to; a machine that allows more keeps what it has."""
    if int(_INOTIFY_INSTANCES.read_text(encoding="ascii")) < INOTIFY_INSTANCES:
        _INOTIFY_INSTANCES.write_text(str(INOTIFY_INSTANCES), encoding="ascii")
