"""A dispatcher in a process of its own, for tests that kill it: `python -m tests.support.dispatcher_process EVALUATION_ID`.

It runs code that never ends under that id, prints `running` once it does, and then only waits.
"""

from __future__ import annotations

import asyncio
import sys

from tests.support.sandboxes import running_sandboxes


async def main(evaluation_id: str) -> None:
    """Run a sandbox until killed."""
    code = "import os, time\nos.fork()\nos.setsid() if os.getpid() != 2 else None\nprint('up', flush=True)\ntime.sleep(600)"
    async with running_sandboxes() as sandboxes:
        await sandboxes.begin(code, evaluation_id=evaluation_id, timeout=600)
        await sandboxes.until_output(evaluation_id, b"up")
        sys.stdout.write("running\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
