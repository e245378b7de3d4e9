"""Sends from its first instruction on: a policy that comes a moment after the code lets something out."""

from __future__ import annotations

import json
import socket
import sys
import time

SECONDS = 3.0
PAUSE = 0.005


def main() -> None:
    """Send to every address that standard input names, every few milliseconds, whether or not anything can be sent."""
    asked = json.load(sys.stdin)
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    started, tried = time.monotonic(), 0
    while time.monotonic() - started < SECONDS:
        for host in asked["hosts"]:
            try:
                client.sendto(asked["word"].encode(), (host, asked["port"]))
            except OSError:
                continue
        tried += 1
        time.sleep(PAUSE)
    print(json.dumps({"tried": tried}), flush=True)
