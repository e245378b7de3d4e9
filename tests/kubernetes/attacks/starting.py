"""Runs the program beside it as a child and passes on what it writes, so that a control, too, has a PID 1 that is not its own."""

from __future__ import annotations

import signal
import subprocess
import sys


def main() -> int:
    """Run `main.py` with `input` on its standard input."""
    with open("/program/input", encoding="utf-8") as given:
        command = [sys.executable, "-I", "/program/main.py"]
        program = subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, text=True)
    # The first process of a container gets no signal that it does not handle, and its child none at all.
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())
    assert program.stdout is not None
    for line in program.stdout:
        print(line, end="", flush=True)
    return program.wait()


if __name__ == "__main__":
    sys.exit(main())
