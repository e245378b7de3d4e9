"""Try to connect to many places at once, and print those that answered, as JSON.

connect.py SECONDS HOST:PORT...
"""

from __future__ import annotations

import asyncio
import json
import sys


async def connects(place: str, seconds: float) -> bool:
    host, _, port = place.rpartition(":")
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host, int(port))
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


async def main(seconds: float, places: list[str]) -> None:
    found = await asyncio.gather(*(connects(place, seconds) for place in places))
    print(json.dumps([place for place, open_ in zip(places, found, strict=True) if open_]))


asyncio.run(main(float(sys.argv[1]), sys.argv[2:]))
