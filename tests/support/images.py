"""The images of services/images, built by `scripts/images` where they are not in its cache."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Image:
    """An image as `scripts/images` tells of it."""

    reference: str
    size: int
    archive: Path


@cache
def built_image(name: str) -> Image:
    """Build one, unless that is done already."""
    command = [str(ROOT / "scripts" / "images"), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = [line.split() for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
    return Image(reference=line[1], size=int(line[2]), archive=Path(line[3]))
