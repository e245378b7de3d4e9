"""What the installer is told: `installer.toml` and the two templates beside it, from a ConfigMap."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crucible.nodes.problems import NotReadyError, Reason

INSTALLER = "installer.toml"
DROP_IN = "50-crucible-gvisor.toml"
RUNSC = "runsc.toml"

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Configuration:
    """The contents of the ConfigMap, checked.

    Attributes:
        version: what `runsc --version` must call itself.
        sha256: digests that the carried binaries must have, by file name; those left out are only held against the image's own.
        restart: the command that restarts containerd, as it is run on the node.
        verify_seconds: between two looks at what is installed.
        probe_seconds: between two sandboxes that are started to see whether they still run.
        retry_seconds: between two tries while the node is not ready.
        restart_timeout_seconds: how long a restart may take until the kubelet lists the runtime.
        probe_timeout_seconds: how long the probe's Pod may take, image and all.
        drop_in: template of the containerd drop-in.
        runsc: template of gVisor's own configuration.
    """

    version: str
    drop_in: str
    runsc: str
    sha256: dict[str, str] = field(default_factory=dict)
    restart: tuple[str, ...] = ("systemctl", "restart", "containerd")
    verify_seconds: float = 60.0
    probe_seconds: float = 900.0
    retry_seconds: float = 15.0
    restart_timeout_seconds: float = 90.0
    probe_timeout_seconds: float = 90.0


def _seconds(table: dict[str, Any], name: str, default: float) -> float:
    value = table.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _invalid(f"{name} must be a number of seconds above 0, not {value!r}")
    return float(value)


def _invalid(message: str) -> NotReadyError:
    return NotReadyError(Reason.CONFIGURATION_INVALID, f"{INSTALLER}: {message}")


def parse(text: str, *, drop_in: str, runsc: str) -> Configuration:
    """Return the configuration that the three files say.

    Raises:
        NotReadyError: a value is missing, wrong or unknown (a misspelt key would otherwise be silently without effect).
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _invalid(str(error)) from error
    version = table.pop("version", None)
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise _invalid(f"version must name gVisor's release, not {version!r}")
    restart = table.pop("restart", list(Configuration.restart))
    if not isinstance(restart, list) or not restart or not all(isinstance(word, str) and word for word in restart):
        raise _invalid(f"restart must be a command as a list of words, not {restart!r}")
    digests = table.pop("sha256", {})
    if not isinstance(digests, dict) or not all(_SHA256.fullmatch(str(digest)) for digest in digests.values()):
        raise _invalid("sha256 must hold digests of 64 hexadecimal digits by file name")
    configuration = Configuration(
        version=version,
        drop_in=drop_in,
        runsc=runsc,
        sha256=digests,
        restart=tuple(restart),
        verify_seconds=_seconds(table, "verify_seconds", Configuration.verify_seconds),
        probe_seconds=_seconds(table, "probe_seconds", Configuration.probe_seconds),
        retry_seconds=_seconds(table, "retry_seconds", Configuration.retry_seconds),
        restart_timeout_seconds=_seconds(table, "restart_timeout_seconds", Configuration.restart_timeout_seconds),
        probe_timeout_seconds=_seconds(table, "probe_timeout_seconds", Configuration.probe_timeout_seconds),
    )
    if table:
        raise _invalid(f"unknown: {', '.join(sorted(table))}")
    return configuration


def read(folder: Path) -> Configuration:
    """Return the configuration in `folder`, as a ConfigMap is mounted.

    Raises:
        NotReadyError: a file is missing or wrong.
    """
    try:
        return parse(
            (folder / INSTALLER).read_text("utf-8"),
            drop_in=(folder / DROP_IN).read_text("utf-8"),
            runsc=(folder / RUNSC).read_text("utf-8"),
        )
    except OSError as error:
        raise NotReadyError(Reason.CONFIGURATION_INVALID, f"the ConfigMap is incomplete: {error}") from error
