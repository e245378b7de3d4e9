"""The images of this checkout, as `scripts/images` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.deployment.target import run

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
RUNNER = "runner"
NAMES = ("service", RUNNER, "postgres", "redis", "rabbitmq")
REGISTRY = "crucible.local"


@dataclass(frozen=True)
class Image:
    """An image in a file. `reference` is by digest, `size` in bytes, unpacked."""

    name: str
    reference: str
    size: int
    archive: Path

    @property
    def digest(self) -> str:
        """Its digest, with the algorithm."""
        return self.reference.rpartition("@")[2]


def build(names: Sequence[str] = NAMES) -> list[Image]:
    """Build what has changed since the last time; takes a moment where nothing has.

    Raises:
        DeployError: an image cannot be built.
    """
    lines = run([str(ROOT / "scripts" / "images"), *names]).splitlines()
    return [
        Image(name, reference, int(size), Path(archive)) for name, reference, size, archive in map(str.split, lines)
    ]
