"""The Python that runs inside sandboxes: where it lives, and the runner compiled for it."""

from __future__ import annotations

import asyncio
import base64
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from crucible import runner
from crucible.dispatcher.runtimes import RuntimeUnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNNER = Path(runner.__file__).with_name("run.py")
_DESCRIBE = Path(__file__).with_name("describe_python.py")
_DESCRIBE_SECONDS = 30.0
# `-I`: no environment, no user site. `-S`: no site, which takes 20 ms. `-u`: what was printed before a kill has been written.
PYTHON_FLAGS: Sequence[str] = ("-I", "-S", "-B", "-u")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """An interpreter for sandboxes.

    Args:
        executable: its real path, no virtual environment's link.
        prefixes: folders that hold it and its standard library.
        version: such as `3.11.7`.
        runner: the compiled runner, the content of a .pyc file.
    """

    executable: Path
    prefixes: tuple[Path, ...]
    version: str
    runner: bytes


async def describe(python: Path | None) -> Interpreter:
    """Ask an interpreter about itself.

    Args:
        python: path of the interpreter; None for the platform's own.

    Raises:
        RuntimeUnavailableError: it does not run, or does not answer as a Python 3 does.
    """
    path = str(python or sys.executable)
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            "-I",
            "-S",
            str(_DESCRIBE),
            str(RUNNER),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(_DESCRIBE_SECONDS):
            out, err = await process.communicate()
        told = orjson.loads(out)
    except (OSError, TimeoutError, orjson.JSONDecodeError) as error:
        said = err.decode(errors="replace").strip().splitlines()[-1:] if "err" in locals() else []
        raise RuntimeUnavailableError(
            f"the interpreter for sandboxes, {path}, does not work: {said[0] if said else error}",
            "set CRUCIBLE_DISPATCHER__PYTHON to a Python 3.9 or later",
        ) from error
    return Interpreter(
        executable=Path(told["executable"]),
        prefixes=tuple(Path(prefix) for prefix in told["prefixes"]),
        version=told["version"],
        runner=base64.b64decode(told["runner"]),
    )
