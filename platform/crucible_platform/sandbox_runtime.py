"""gVisor on the nodes for sandboxes: the installer of `gitops/base/gvisor`, which opens a node once a sandbox has really run there.

The node's half is its NodeConfig (`node_groups`), which has containerd read what the installer puts down. Until the installer has been there, a sandbox
node takes nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pulumi
from pydantic import Field

from crucible_platform.manifests import read
from crucible_platform.objects import register
from crucible_platform.policies import ImageByDigest
from crucible_platform.section import ROOT, Section

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from crucible_platform.manifests import Object

FOLDER = ROOT / "gitops" / "base" / "gvisor"
INSTALLER = "gvisor-installer"
# What the repository's YAML calls images of its own, before an environment has said where they are.
_OWN = "crucible.local/"


class SandboxRuntimeConfig(Section):
    """gVisor on the nodes for sandboxes."""

    installer: ImageByDigest | None = Field(
        default=None,
        description="The image `gvisor-installer`, by its digest, from this environment's registry. Unset, as before the first image is pushed, sandbox nodes "
        "stay closed and no evaluation runs; in a cluster whose nodes come with gVisor it is not needed",
    )


class SandboxRuntime(pulumi.ComponentResource):
    """The installer, and what it may do."""

    def __init__(
        self, installer: str, *, environment: str, after: pulumi.Resource, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        """Make it.

        Args:
            installer: the image.
            environment: what the stack is called.
            after: what guards the cluster, and has the namespace.
            opts: the provider.
        """
        super().__init__("crucible:sandbox_runtime:SandboxRuntime", environment, None, opts)
        objects = with_images(read(FOLDER), {INSTALLER: installer})
        register(objects, pulumi.ResourceOptions(parent=self, depends_on=[after]))
        self.register_outputs({})


def with_images(objects: Iterable[Object], images: Mapping[str, str]) -> list[Object]:
    """Return objects in which the repository's own images are those of an environment.

    Raises:
        KeyError: one of them is not in `images`.
    """

    def visit(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {inner: visit(each, inner) for inner, each in value.items()}
        if isinstance(value, list):
            return [visit(each) for each in value]
        own = key == "image" and isinstance(value, str) and value.startswith(_OWN)
        return images[value.removeprefix(_OWN).partition(":")[0]] if own else value

    return [visit(each) for each in objects]
