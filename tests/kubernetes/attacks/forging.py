"""Claims to have ended well, in every place where a runner would say so, and ends otherwise."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    """Write what standard input holds, a `report` and a `frame`, wherever it may be believed; exit with status 3."""
    asked = json.load(sys.stdin)
    for path in ("/dev/termination-log", "/proc/1/fd/1", "/dev/stdout", "/dev/console"):
        try:
            with open(path, "w", encoding="ascii") as file:
                file.write(asked["report"] if path == "/dev/termination-log" else asked["frame"] + "\n")
        except OSError:
            continue
    print(asked["frame"], flush=True)
    sys.stdout.flush()
    os._exit(3)
