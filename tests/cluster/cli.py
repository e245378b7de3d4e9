"""The cluster's commands for people: `python -m tests.cluster up|down|status|kubectl ...`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.base import Cluster, default_name
from tests.cluster.choice import open_cluster
from tests.cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NODE_COMMANDS: dict[str, tuple[str, Callable[[Cluster, str], None]]] = {
    "power-cut": (
        "end everything on a node at once; its disk stays",
        lambda cluster, name: cluster.power_cut(name),
    ),
    "revive": ("switch a node on again", lambda cluster, name: cluster.revive(name)),
    "cut": ("pull a node's network cable", lambda cluster, name: cluster.cut(name)),
    "heal": ("plug it in again", lambda cluster, name: cluster.heal(name)),
}
ZONE_COMMANDS: dict[str, tuple[str, Callable[[Cluster, str], None]]] = {
    "cut-zone": ("cut a zone off from all others", lambda cluster, name: cluster.cut_zone(name)),
    "heal-zone": ("undo that", lambda cluster, name: cluster.heal_zone(name)),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=f"A real Kubernetes cluster of several nodes on this machine: {default_name()} (CRUCIBLE_CLUSTER names another)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="bring the cluster up; nothing happens if it is")
    commands.add_parser("down", help="end it and leave nothing behind")
    commands.add_parser("status", help="say how it is")
    for name in ("kubectl", "calicoctl"):
        commands.add_parser(name, help=f"run {name} against it", add_help=False)
    on_node = commands.add_parser("run", help="run a command on a node: run NODE COMMAND...", add_help=False)
    on_node.add_argument("name", metavar="NODE")
    for name, (text, _) in NODE_COMMANDS.items():
        commands.add_parser(name, help=text).add_argument("name", metavar="NODE")
    for name, (text, _) in ZONE_COMMANDS.items():
        commands.add_parser(name, help=text).add_argument("name", metavar="ZONE")
    commands.add_parser("import", help="give an image to every node").add_argument(
        "files", metavar="IMAGE.tar", nargs="+", type=Path
    )
    return parser


def _up(cluster: Cluster) -> None:
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"cluster {cluster.name}: {time.monotonic() - started:5.1f} s  {what}", file=sys.stderr, flush=True)

    if not cluster.up(say):
        say("is up already")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def _run(wanted: argparse.Namespace, rest: list[str]) -> None:
    cluster = open_cluster()
    match wanted.command:
        case "up":
            _up(cluster)
        case "down":
            cluster.down()
        case "status":
            print(cluster.status(), end="")
        case "kubectl":
            _become(cluster.kubectl_command(*rest))
        case "calicoctl":
            print(cluster.calicoctl(*rest, input=None if sys.stdin.isatty() else sys.stdin.read()), end="")
        case "run":
            _become(cluster.node_command(wanted.name, *rest))
        case "import":
            for file in wanted.files:
                cluster.import_image(file)
        case command:
            (NODE_COMMANDS | ZONE_COMMANDS)[command][1](cluster, wanted.name)


def _become(command: Sequence[str | Path]) -> None:
    words = [str(word) for word in command]
    os.execvp(words[0], words)


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit status is 1 if it could not be done."""
    parser = _parser()
    wanted, rest = parser.parse_known_args(arguments)
    if rest and wanted.command not in {"kubectl", "calicoctl", "run"}:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # One way out for Ctrl-C, `kill` and a closed terminal: what is half made is removed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        _run(wanted, rest)
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"cluster: {error}: run it as the one who made the cluster, most likely root", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
