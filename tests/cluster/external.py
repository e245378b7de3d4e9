"""A cluster that is there already, named by KUBECONFIG: used, never made, changed as a machine, or ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster import machine
from tests.cluster.base import Cluster, say_nothing

if TYPE_CHECKING:
    from collections.abc import Callable


class ExternalCluster(Cluster):
    """Whatever cluster the file in KUBECONFIG names."""

    kind = "a cluster that KUBECONFIG names"

    def up(self, say: Callable[[str], None] = say_nothing) -> bool:
        """Check that it answers; it is up already, or that is an error."""
        self.kubectl("version", "--request-timeout=10s")
        return False

    def down(self) -> None:
        """Do nothing: who made it ends it."""

    @property
    def kubeconfig(self) -> Path:
        """The file that KUBECONFIG names."""
        return Path(os.environ["KUBECONFIG"])

    @property
    def kubectl_program(self) -> str:
        """The kubectl of this machine."""
        return machine.kubectl()

    def import_image(self, file: Path) -> None:
        """Raise, always."""
        raise self._unsupported(
            f"be given images from files: push {file.name} to the registry that its nodes pull from"
        )
