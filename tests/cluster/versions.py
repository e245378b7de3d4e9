"""The versions of everything in the test cluster, from the one file that has them."""

from __future__ import annotations

from pathlib import Path

VERSIONS_FILE = Path(__file__).with_name("versions.env")


def versions() -> dict[str, str]:
    """Return each version by its name in `versions.env`."""
    lines = VERSIONS_FILE.read_text(encoding="ascii").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
