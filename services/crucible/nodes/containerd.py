"""What containerd's configuration must say for a drop-in to be read, and the drop-in itself. Pure.

containerd merges what its configuration imports since 2.0; before, an imported file replaced the whole section of the plugin. It is
silent about a drop-in that no import names, about a section under the name that version 1 had, and about a drop-in whose
version is above that of the file that imports it (containerd pull request 12891): each is refused here with a reason instead.
"""

from __future__ import annotations

import posixpath
import re
import string
import tomllib
from pathlib import PurePosixPath
from typing import Any

from crucible import names
from crucible.nodes.problems import NotReadyError, Reason

OLDEST = 2
CONFIG_VERSION = 3
PLUGIN = "io.containerd.cri.v1.runtime"
RUNTIME_TYPE = "io.containerd.runsc.v1"
_VERSION = re.compile(r"containerd://v?(\d+)\.")


def check_version(runtime_version: str) -> None:
    """Raise if the node's `containerRuntimeVersion` is not a containerd that merges drop-ins."""
    found = _VERSION.match(runtime_version)
    if not found or int(found[1]) < OLDEST:
        raise NotReadyError(
            Reason.CONTAINERD_TOO_OLD,
            f"the node's runtime is {runtime_version or 'unknown'}; drop-ins are merged by containerd {OLDEST} and later",
        )


def parse(text: str) -> dict[str, Any]:
    """Return containerd's own configuration file as a table."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise NotReadyError(Reason.CONTAINERD_CONFIG_UNREADABLE, f"containerd's configuration: {error}") from error


def check_imports(config: dict[str, Any], *, config_path: str, drop_in_path: str) -> None:
    """Raise unless containerd reads `drop_in_path` when it starts with this configuration.

    Args:
        config: the file that containerd is started with.
        config_path: where that file is on the node; relative imports start there.
        drop_in_path: absolute path of the drop-in on the node.
    """
    imports = config.get("imports", [])
    folder = posixpath.dirname(config_path)
    patterns = [posixpath.normpath(posixpath.join(folder, str(pattern))) for pattern in imports]
    if not any(PurePosixPath(drop_in_path).match(pattern) for pattern in patterns):
        wanted = f"{posixpath.dirname(drop_in_path)}/*.toml"
        raise NotReadyError(
            Reason.DROP_IN_NOT_IMPORTED,
            f'{config_path} does not import {drop_in_path} (imports = {imports!r}): seed imports = ["{wanted}"] '
            "where the node's configuration is made, on AL2023 in its NodeConfig",
        )
    version = config.get("version", 1)
    if version < CONFIG_VERSION:
        raise NotReadyError(
            Reason.CONTAINERD_CONFIG_VERSION,
            f"{config_path} has version {version}; beside a drop-in of version {CONFIG_VERSION} it would not be migrated",
        )


def uses_systemd_cgroups(config: dict[str, Any]) -> bool:
    """Tell whether runc on this node puts its cgroups below systemd's, as gVisor then must too."""
    table: Any = config
    for key in ("plugins", PLUGIN, "containerd", "runtimes", "runc", "options", "SystemdCgroup"):
        table = table.get(key) if isinstance(table, dict) else None
    return table is True


def render(template: str, **values: str) -> str:
    """Return the template with its `$names` filled in.

    Raises:
        NotReadyError: the template asks for something else, or is no TOML afterwards.
    """
    try:
        text = string.Template(template).substitute(values)
        tomllib.loads(text)
    except (KeyError, ValueError) as error:
        raise NotReadyError(Reason.CONFIGURATION_INVALID, f"a template of the ConfigMap is wrong: {error}") from error
    return text


def check_drop_in(text: str, *, folder: str) -> None:
    """Raise unless the rendered drop-in gives containerd exactly one more runtime, wholly inside `folder`."""
    table = tomllib.loads(text)
    try:
        runtimes = table["plugins"][PLUGIN]["containerd"]["runtimes"]
        runtime = runtimes[names.RUNTIME_HANDLER]
        paths = [runtime["runtime_path"], runtime["options"]["ConfigPath"]]
        right = (
            table["version"] == CONFIG_VERSION
            and set(table) == {"version", "plugins"}
            and list(table["plugins"]) == [PLUGIN]
            and list(runtimes) == [names.RUNTIME_HANDLER]
            and runtime["runtime_type"] == RUNTIME_TYPE
            and all(posixpath.dirname(path) == folder for path in paths)
        )
    except (KeyError, TypeError) as error:
        raise NotReadyError(Reason.CONFIGURATION_INVALID, f"the drop-in lacks {error}") from error
    if not right:
        raise NotReadyError(
            Reason.CONFIGURATION_INVALID,
            f"the drop-in must set runtime {names.RUNTIME_HANDLER} of {PLUGIN} (version {CONFIG_VERSION}) with files in {folder}, and nothing else",
        )
