"""The image registry: a repository for each image that the platform builds, in which a tag never comes to mean another image.

What was tested under a name is then what runs under it, and what ran last week is still there to go back to. Old images are expired by
count and never by age: one that still runs is not older than another for having run long.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import pulumi
import pulumi_aws as aws
from pydantic import AfterValidator, Field

from crucible_platform.encryption import key
from crucible_platform.section import Section

if TYPE_CHECKING:
    from crucible_platform.place import Place

# The folders of services/images that have a Dockerfile. A test compares them.
IMAGES = ("gvisor-installer", "postgres", "rabbitmq", "redis", "runner", "service")
# As ECR names the parts of a repository's name ("CreateRepository", Amazon ECR API reference).
ImageName = Annotated[str, Field(pattern=r"^[a-z0-9]+([._-][a-z0-9]+)*$", max_length=100)]


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ValueError("names none; nothing of the platform would have where to come from")
    if twice := sorted({each for each in names if names.count(each) > 1}):
        raise ValueError(f"names {', '.join(twice)} twice")
    return names


class RegistryConfig(Section):
    """The image registry."""

    images: Annotated[tuple[ImageName, ...], AfterValidator(_distinct)] = Field(
        default=IMAGES,
        description="Images that have a repository. One that is taken out can be deleted only once its repository is empty",
    )
    untagged_days: int = Field(
        default=7,
        ge=1,
        le=365,
        description="How long an image without a tag is kept, such as what a build that failed halfway has left, days",
    )
    kept_images: int = Field(
        default=50,
        ge=10,
        le=1000,
        description="Tagged images kept in each repository, the newest; signatures that have tags count too. "
        "What still runs, and what one may want to go back to, must be among them",
    )


class Registry(pulumi.ComponentResource):
    """A repository for each image, all under one key.

    Attributes:
        urls: image -> what it is pushed to and pulled from, without tag or digest.
        arns: image -> its repository's ARN.
    """

    def __init__(self, config: RegistryConfig, place: Place, *, opts: pulumi.ResourceOptions | None = None) -> None:
        super().__init__("crucible:registry:Registry", place.name, None, opts)
        # Nothing starts without its image, and no image is read without the key.
        kept = pulumi.ResourceOptions(parent=self, protect=place.stack == "production")
        # ECR uses it by grants that it makes for itself when a repository is made, so whoever pulls needs no right to it
        # ("Encryption at rest", Amazon ECR user guide).
        own = key("registry", place, description="Encrypts the images", opts=kept)
        repositories = {image: self._repository(image, config, place, own, kept) for image in config.images}
        self.urls = {image: each.repository_url for image, each in repositories.items()}
        self.arns = {image: each.arn for image, each in repositories.items()}
        self.register_outputs({"urls": self.urls})

    def _repository(
        self, image: str, config: RegistryConfig, place: Place, own: aws.kms.Key, kept: pulumi.ResourceOptions
    ) -> aws.ecr.Repository:
        name = f"{place.name}/{image}"
        repository = aws.ecr.Repository(
            name,
            name=name,
            image_tag_mutability="IMMUTABLE",
            image_scanning_configuration=aws.ecr.RepositoryImageScanningConfigurationArgs(scan_on_push=True),
            encryption_configurations=[
                aws.ecr.RepositoryEncryptionConfigurationArgs(encryption_type="KMS", kms_key=own.arn)
            ],
            opts=kept,
        )
        aws.ecr.LifecyclePolicy(
            name,
            repository=repository.name,
            policy=json.dumps(expiry(config)),
            opts=pulumi.ResourceOptions(parent=self),
        )
        return repository


def expiry(config: RegistryConfig) -> dict[str, Any]:
    """Return which images expire, as ECR has it: an image is of the first rule that selects it."""
    return {
        "rules": [
            {
                "rulePriority": 1,
                "description": f"Without a tag for {config.untagged_days} days",
                "selection": {
                    "tagStatus": "untagged",
                    "countType": "sinceImagePushed",
                    "countUnit": "days",
                    "countNumber": config.untagged_days,
                },
                "action": {"type": "expire"},
            },
            {
                "rulePriority": 2,
                "description": f"Older than the newest {config.kept_images}",
                "selection": {
                    "tagStatus": "tagged",
                    "tagPatternList": ["*"],
                    "countType": "imageCountMoreThan",
                    "countNumber": config.kept_images,
                },
                "action": {"type": "expire"},
            },
        ]
    }
