"""Ports of loopback for what a test starts."""

from __future__ import annotations

import random
import socket

# Below the ports that the kernel hands out, any of which a connection of somebody else may have taken by the time it is used; and above
# those of the RabbitMQ nodes on loopback (`tests/servers/network.py`).
_PORTS = range(23_000, 32_000)

_held: list[socket.socket] = []


def free_port() -> int:
    """Return a port of loopback that nobody listens on now, and that no other test process is given while this one lives."""
    for port in random.sample(_PORTS, len(_PORTS)):
        # An abstract name goes when its holder goes, whatever ends it.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0crucible-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
        else:
            _held.append(claim)
            return port
    raise RuntimeError(f"none of the ports {_PORTS.start} to {_PORTS.stop} of 127.0.0.1 is free")
