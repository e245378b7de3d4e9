"""Passes connections on from this machine into a cluster's network, which is reached from nowhere else.

    nsenter --net=... -- python -I relay.py FD HOST:PORT...

A program of its own: it inherits a listening socket that belongs to the machine's network and runs in the cluster's. Each
connection goes to the first target that answers. One that cannot be passed on is closed, as a server's that has just died.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

CONNECT_SECONDS = 2
CHUNK_BYTES = 256 * 1024


async def connect(targets: list[tuple[str, int]]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """Return a connection to the first target that answers, or None."""
    for host, port in targets:
        with contextlib.suppress(OSError, TimeoutError):
            return await asyncio.wait_for(asyncio.open_connection(host, port, limit=CHUNK_BYTES), CONNECT_SECONDS)
    return None


async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass bytes on in one direction until that direction ends."""
    while data := await source.read(CHUNK_BYTES):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()


async def serve(listener: socket.socket, targets: list[tuple[str, int]]) -> None:
    """Relay every connection until the program is ended."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward = await connect(targets)
        writers = [writer] if onward is None else [writer, onward[1]]
        try:
            if onward is not None:
                async with asyncio.TaskGroup() as directions:
                    directions.create_task(pump(reader, onward[1]))
                    directions.create_task(pump(onward[0], writer))
        except* OSError:
            for end in writers:
                end.transport.abort()
        for end in writers:
            end.close()

    async with await asyncio.start_server(relay, sock=listener, limit=CHUNK_BYTES) as server:
        await server.serve_forever()


def parse_target(text: str) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`."""
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), [parse_target(text) for text in sys.argv[2:]]))
