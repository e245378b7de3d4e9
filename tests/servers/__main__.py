"""Runs the servers in the foreground for people: prints what to export, and ends everything on Ctrl-C.

python -m tests.servers [rabbitmq|redis|all]
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.servers.process import ServerRootError
from tests.servers.rabbitmq import RabbitCluster
from tests.servers.redis import RedisServer

VHOST = "crucible"


def main() -> int:
    """Run what is asked for until SIGINT or SIGTERM; the exit status is 1 if the servers cannot be had here."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description="Run real servers in the foreground")
    parser.add_argument("which", nargs="?", choices=("rabbitmq", "redis", "all"), default="all")
    parser.add_argument("--nodes", type=int, default=3, help="how many nodes of RabbitMQ (default: 3)")
    wanted = parser.parse_args()
    # One way out for Ctrl-C (which a shell has its background jobs ignore), `kill` and a closed terminal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        with ExitStack() as running:
            folder = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="crucible-servers-")))
            variables: dict[str, str] = {}
            if wanted.which != "redis":
                cluster = running.enter_context(RabbitCluster(folder / "rabbitmq", nodes=wanted.nodes))
                cluster.make_vhost(VHOST)
                variables["CRUCIBLE_BROKER_URL"] = cluster.url(vhost=VHOST)
                variables["CRUCIBLE_BROKER__MANAGEMENT_URL"] = cluster.management_url
            if wanted.which != "rabbitmq":
                variables["CRUCIBLE_REDIS_URL"] = running.enter_context(RedisServer(folder / "redis")).url
            for name, value in variables.items():
                print(f"export {name}='{value}'")
            print("# Running; Ctrl-C ends it, and its data with it.", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass
    except ServerRootError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
