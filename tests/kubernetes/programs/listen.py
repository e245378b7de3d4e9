"""Answer on some TCP ports: what is sent comes back.

listen.py PORT...
"""

from __future__ import annotations

import asyncio
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()
    writer.close()


async def main(ports: list[str]) -> None:
    servers = [await asyncio.start_server(answer, "0.0.0.0", int(port)) for port in ports]
    print("listening", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


asyncio.run(main(sys.argv[1:]))
