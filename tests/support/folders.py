"""Folders that a test throws away."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def scratch_dir() -> Iterator[Path]:
    """Yield a folder that other users may pass through, as PostgreSQL's must where the tests run as root."""
    with tempfile.TemporaryDirectory(prefix="crucible-test-") as name:
        path = Path(name)
        path.chmod(0o711)
        yield path
