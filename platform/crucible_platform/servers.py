"""What the platform stands on inside its cluster: RabbitMQ, Redis and PostgreSQL, out of `platform/servers/`.

Who they are to their clients and to each other is said by Secrets, which no program of Pulumi ever sees; they must be there first. `make deploy`
makes them where nothing else does (docs/deploy.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import pulumi
import pulumi_kubernetes as kubernetes
from pydantic import Field, model_validator

from crucible_platform.manifests import read
from crucible_platform.objects import register
from crucible_platform.policies import ImageByDigest
from crucible_platform.sandbox_runtime import with_images
from crucible_platform.section import Section

if TYPE_CHECKING:
    from crucible_platform.manifests import Object

FOLDER = Path(__file__).parents[1] / "servers"
NAMES = ("postgres", "rabbitmq", "redis")
STORAGE_CLASS = "crucible"

# EBS has gp3 up to 16 TiB ("Amazon EBS General Purpose SSD volumes"); what is here is far below.
Gibibytes = Annotated[int, Field(ge=1, le=2048)]


class VolumesConfig(Section):
    """How large each server's volume is. One can grow and never shrink; RabbitMQ has three."""

    postgres: Gibibytes = Field(description="GiB for evaluations, their histories and the outputs that are not in S3")
    rabbitmq: Gibibytes = Field(
        description="GiB for each of three nodes; messages are ids, of which a million take less than one"
    )
    redis: Gibibytes = Field(description="GiB for the stream of events, whose length is limited")

    def of(self, server: str) -> int:
        """Return the size for a server."""
        return int(getattr(self, server))


class ServersConfig(Section):
    """RabbitMQ, Redis and PostgreSQL in the cluster."""

    images: dict[str, ImageByDigest] = Field(
        description="The images `postgres`, `rabbitmq` and `redis`, each by its digest. None, as before the first are pushed: no server is made"
    )
    volumes_gib: VolumesConfig

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        if self.images and (differ := self.images.keys() ^ set(NAMES)):
            raise ValueError(
                f"images: name {', '.join(NAMES)}, or none; {', '.join(sorted(differ))} is too much or missing"
            )
        return self


class Servers(pulumi.ComponentResource):
    """The three, and on AWS the kind of volume that they have."""

    def __init__(
        self,
        config: ServersConfig,
        *,
        environment: str,
        after: pulumi.Resource,
        volume_key_arn: pulumi.Output[str] | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make them.

        Args:
            config: images and sizes.
            environment: what the stack is called.
            after: what guards the cluster, and has the namespace.
            volume_key_arn: encrypts the volumes, on AWS; elsewhere the cluster's default kind of volume is taken.
            opts: the provider.
        """
        super().__init__("crucible:servers:Servers", environment, None, opts)
        below = pulumi.ResourceOptions(parent=self, depends_on=[after])
        if volume_key_arn is not None:
            below = pulumi.ResourceOptions.merge(
                below, pulumi.ResourceOptions(depends_on=[self._storage_class(volume_key_arn)])
            )
        register(servers(config, on_aws=volume_key_arn is not None), below)
        self.register_outputs({})

    def _storage_class(self, key_arn: pulumi.Output[str]) -> kubernetes.storage.v1.StorageClass:
        return kubernetes.storage.v1.StorageClass(
            STORAGE_CLASS,
            metadata={"name": STORAGE_CLASS},
            provisioner="ebs.csi.aws.com",
            parameters={"type": "gp3", "encrypted": "true", "kmsKeyId": key_arn},
            # A volume is in one zone for ever: which one is decided by where its Pod goes first.
            volume_binding_mode="WaitForFirstConsumer",
            reclaim_policy="Retain",
            allow_volume_expansion=True,
            opts=pulumi.ResourceOptions(parent=self),
        )


def servers(config: ServersConfig, *, on_aws: bool) -> list[Object]:
    """Return the servers' objects with a stack's images and sizes.

    Args:
        config: what the stack says of them.
        on_aws: whether their volumes are of `STORAGE_CLASS`.
    """
    return [_sized(each, config.volumes_gib, on_aws=on_aws) for each in with_images(read(FOLDER), config.images)]


def _sized(found: Object, sizes: VolumesConfig, *, on_aws: bool) -> Object:
    if found["kind"] != "StatefulSet":
        return found
    storage = {"requests": {"storage": f"{sizes.of(found['metadata']['name'])}Gi"}}
    own: dict[str, Any] = {"storageClassName": STORAGE_CLASS} if on_aws else {}
    claims = [
        {**each, "spec": {**each["spec"], "resources": storage, **own}}
        for each in found["spec"]["volumeClaimTemplates"]
    ]
    return {**found, "spec": {**found["spec"], "volumeClaimTemplates": claims}}
