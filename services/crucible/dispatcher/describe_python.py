"""Describes the interpreter that executes it, and compiles the runner for it: one JSON object on standard output.

Executed by path (`python -I -S describe_python.py RUNNER`) with the interpreter that sandboxes will use, which need not be the platform's
own. The runner is compiled here since compiling it anew would cost every evaluation 5 ms. Standard library alone.
"""

import base64
import importlib.util
import json
import marshal
import os
import sys

# Where the sandbox will find it; it stands in the runner's own tracebacks only.
RUNNER_NAME = "/run/crucible/run.py"


def main() -> None:
    """Print the description."""
    with open(sys.argv[1], "rb") as file:  # noqa: PTH123 - the interpreter may be bare
        code = compile(file.read(), RUNNER_NAME, "exec", dont_inherit=True)
    # The format of a .pyc file (PEP 552): magic number, flags, and a modification time and size that no one checks.
    compiled = importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
    executable = getattr(sys, "_base_executable", "") or sys.executable
    json.dump(
        {
            "executable": os.path.realpath(executable),
            "prefixes": sorted({os.path.realpath(sys.base_prefix), os.path.realpath(sys.base_exec_prefix)}),
            "version": ".".join(str(part) for part in sys.version_info[:3]),
            "runner": base64.b64encode(compiled).decode(),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
