"""The process of the installer's image: `install` on the node, `sandbox` inside the probe."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from crucible.nodes import sandbox
from crucible.nodes.api import ServiceAccountApi
from crucible.nodes.installer import Identity, Installer
from crucible.nodes.metrics import Metrics, serve


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the members that the platform's own logs have."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        line = {
            "timestamp": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "service": "gvisor-installer",
            "event": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def install(arguments: argparse.Namespace) -> int:
    """Look after the node until told to stop."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def pause(seconds: float) -> None:
        if stop.wait(seconds):
            raise SystemExit(0)

    metrics = Metrics()
    serve(metrics, arguments.port)
    installer = Installer(
        ServiceAccountApi.of_this_pod(),
        Identity(node=os.environ["NODE_NAME"], pod=os.environ["POD_NAME"], namespace=os.environ["POD_NAMESPACE"]),
        metrics,
        settings=arguments.settings,
        carried=arguments.carried,
        pause=pause,
    )
    installer.run(stop.wait)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return the exit status."""
    parser = argparse.ArgumentParser(prog="gvisor-installer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    node = commands.add_parser("install", help="install gVisor on this node and keep watch over it")
    node.add_argument("--settings", type=Path, default=Path("/etc/crucible/gvisor"))
    node.add_argument("--carried", type=Path, default=Path("/opt/crucible/gvisor"))
    node.add_argument("--port", type=int, default=8085)
    inside = commands.add_parser("sandbox", help="say which kernel this process finds itself on")
    inside.add_argument("--message", type=Path, default=Path("/dev/termination-log"))
    arguments = parser.parse_args(argv)
    if arguments.command == "sandbox":
        sandbox.tell(arguments.message)
        return 0
    return install(arguments)
