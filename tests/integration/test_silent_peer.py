"""A service whose machine goes without a word: its clients ask another in time, whatever they were waiting for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from crucible.clients import http_client
from tests.servers.network import NamespaceNetwork
from tests.support.capabilities import needs
from tests.support.waits import pass_time, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

PORT = 8080
# What is left of a worker's lease of 30 s when its first renewal, after a third of it, meets a silent peer: this and another try.
IN_TIME_SECONDS = 15.0
# Answers `/` at once and nothing else ever.
SERVER = f"""
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.path != "/":
            time.sleep(600)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
http.server.ThreadingHTTPServer(("0.0.0.0", {PORT}), Handler).serve_forever()
"""


@pytest.fixture
def network() -> Iterator[NamespaceNetwork]:
    network = NamespaceNetwork()
    yield network
    network.close()


@pytest.fixture
def server(network: NamespaceNetwork) -> Iterator[str]:
    """The URL of a service with a network of its own."""
    process = subprocess.Popen(["unshare", "--net", sys.executable, "-I", "-S", "-c", SERVER])
    try:
        own = Path("/proc/self/ns/net").readlink()
        wait_until(lambda: Path(f"/proc/{process.pid}/ns/net").readlink() != own, timeout=10, describe="its network")
        network.connect(1, process.pid)
        url = f"http://{network.client_address(1)}:{PORT}"
        wait_until(lambda: httpx.get(url, trust_env=False), timeout=10, describe="it", tolerate=(httpx.HTTPError,))
        yield url
    finally:
        process.kill()
        process.wait()


@needs("network namespaces")
@pytest.mark.parametrize("sent", ["before", "after"])
async def test_a_peer_that_has_lost_its_network_is_given_up_long_before_a_long_poll_ends(
    network: NamespaceNetwork, server: str, sent: str
) -> None:
    async with http_client(server, "token") as client:
        # The connection is there already, as it is between services that talk all the time.
        await client.get("/")
        if sent == "before":
            call = asyncio.create_task(client.get("/wait"))
            # It must be under way: its bytes are acknowledged, and nothing will ever be sent to this machine again.
            await pass_time(0.5)
            network.cut_off([1], clients=True)
        else:
            network.cut_off([1], clients=True)
            call = asyncio.create_task(client.get("/"))
        began = time.monotonic()
        with pytest.raises(httpx.TransportError):
            await asyncio.wait_for(call, 60)
        assert time.monotonic() - began < IN_TIME_SECONDS
