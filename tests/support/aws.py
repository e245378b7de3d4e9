"""AWS, played by moto's server on loopback: a stand-in, which says so in the run's own output."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer


def played_by_moto(request: pytest.FixtureRequest, said: str) -> Iterator[str]:
    """Serve until the fixture ends, and yield the address.

    Args:
        request: of the fixture.
        said: what stands in for what, for whoever reads the output.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"\nstand-in: {said}")
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()
