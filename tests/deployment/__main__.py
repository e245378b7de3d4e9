"""`scripts/deploy`: the commands for people."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from tests.cluster import ClusterError
from tests.deployment import DeployError, deploy, find_deployed, find_target, make_secrets, remove

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/deploy", description="Put the platform of this checkout on a cluster, or take it away."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="deploy, or bring what is deployed to this checkout")
    up.add_argument("--registry", help="push images here, and have the cluster pull them; not needed on this machine")
    up.add_argument("--timeout", type=float, default=600.0, help="seconds until it is given up")
    down = commands.add_parser("down", help="take it away; what it has stored and its secrets stay")
    down.add_argument("--data", action="store_true", help="delete those too")
    secrets = commands.add_parser("secrets", help="make the secrets that are not there yet, and nothing else")
    show = commands.add_parser("show", help="print how to reach what is deployed")
    for command in (up, down, secrets, show):
        command.add_argument(
            "--context", help="the cluster by its name in the kubeconfig; needed where it is elsewhere"
        )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Do what is asked; the exit status is 1 if it could not be done."""
    wanted = _parser().parse_args(arguments)
    started = time.monotonic()

    def say(what: str) -> None:
        print(f"deploy: {time.monotonic() - started:5.1f} s  {what}", file=sys.stderr, flush=True)

    try:
        target = find_target(wanted.context, getattr(wanted, "registry", None))
        say(target.description)
        if wanted.command == "down":
            remove(target, data=wanted.data, say=say)
            return 0
        if wanted.command == "secrets":
            make_secrets(target)
            return 0
        if wanted.command == "show":
            deployed = find_deployed(target)
        else:
            deployed = deploy(target, timeout=wanted.timeout, say=say)
            say("ready")
    except (DeployError, ClusterError) as error:
        print(f"deploy: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(f"export CRUCIBLE_URL={deployed.url}\nexport CRUCIBLE_API_KEY={deployed.api_key}")
    print("# crucible submit --code 'print(6 * 7)' --follow", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
