"""What guards the cluster, out of the repository's `policies/`: admission, network, rights, quota, Pod Security levels.

It is there before anything runs, with the figures of its environment. Calico's own policies are not in it: they go through a path that validates them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import pulumi
from pydantic import Field

from crucible_platform.manifests import name_of, read
from crucible_platform.objects import register
from crucible_platform.section import ROOT, Section

if TYPE_CHECKING:
    from crucible_platform.manifests import Object

FOLDER = ROOT / "policies"
_IMAGES = "ConfigMap/crucible/evaluation-images"

ImageByDigest = Annotated[str, Field(pattern=r"^[^@\s]+@sha256:[0-9a-f]{64}$")]


class PoliciesConfig(Section):
    """What guards the cluster."""

    images: dict[str, ImageByDigest] = Field(
        description="Images that may run as an evaluation: what a request calls one -> its reference by digest. None: nothing may run"
    )


class Policies(pulumi.ComponentResource):
    """Every object of `policies/`, with the quota of an environment."""

    def __init__(self, config: PoliciesConfig, *, environment: str, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("crucible:policies:Policies", environment, None, opts)
        register(policies(config, environment), pulumi.ResourceOptions(parent=self))
        self.register_outputs({})


def policies(config: PoliciesConfig, environment: str) -> list[Object]:
    """Return the objects for an environment.

    Args:
        config: which images may run.
        environment: one that `policies/quota/environments` has figures for.
    """
    found = read(FOLDER, components=[FOLDER / "quota" / "environments" / environment])
    return [{**each, "data": dict(config.images)} if name_of(each) == _IMAGES else each for each in found]
