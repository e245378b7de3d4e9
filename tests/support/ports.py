"""Ports of loopback for what a test starts."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a port of loopback that nobody listens on now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port
