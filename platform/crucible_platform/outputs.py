"""Buckets: for outputs of evaluations that are too large for the database, for backups, and for the log of who asked either for what.

Each is closed in the same ways, and what is deleted or written over stays behind as an old version for some days. That nothing is kept for
ever is said here too: the storage service deletes what it does not need, and the bucket is what ends whatever it has forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import pulumi
import pulumi_aws as aws
from pydantic import Field, model_validator

from crucible_platform.encryption import key
from crucible_platform.iam import VERSION, Allow, by_pod, role
from crucible_platform.section import Section

if TYPE_CHECKING:
    from crucible_platform.iam import Role
    from crucible_platform.place import Place

# S3 moves nothing to STANDARD_IA sooner, and bills what is there for as long at least ("Transitioning objects using Amazon S3
# Lifecycle", Amazon S3 user guide).
INFREQUENT_ACCESS_DAYS = 30
# Of an upload that nobody finishes, nothing is seen but its cost.
UNFINISHED_DAYS = 7
# Whose accesses are written down; those to the log itself would be written down for ever.
LOGGED = ("outputs", "backups")
_TLS = "1.2"


class OutputsConfig(Section):
    """The buckets for outputs and backups."""

    infrequent_access_days: int = Field(
        default=30,
        ge=INFREQUENT_ACCESS_DAYS,
        le=365,
        description="When outputs, backups and access logs move to a class that costs half as much to keep and more to read, days",
    )
    output_days: int = Field(
        default=365,
        ge=60,
        le=3650,
        description="When outputs are deleted whatever the storage service says, days. Longer than it keeps evaluations (`retention_days`), "
        "since an evaluation whose output is gone is damaged",
    )
    old_version_days: int = Field(
        default=7, ge=1, le=365, description="How long what was deleted or written over can still be brought back, days"
    )
    backup_days: int = Field(default=35, ge=7, le=3650, description="How long backups are kept, days")
    access_log_days: int = Field(default=90, ge=30, le=3650, description="How long the log of accesses is kept, days")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        earliest = self.infrequent_access_days + INFREQUENT_ACCESS_DAYS
        if self.output_days < earliest:
            raise ValueError(
                f"output_days {self.output_days} is less than {INFREQUENT_ACCESS_DAYS} days after infrequent_access_days "
                f"{self.infrequent_access_days}, and S3 bills that long; keep outputs for {earliest} days or more"
            )
        return self


class Outputs(pulumi.ComponentResource):
    """The buckets, and the storage service's role.

    Attributes:
        outputs_bucket: the name of the bucket for outputs.
        outputs_url: of the same, as the storage service has it in `objects_url`.
        backups_bucket: the name of the bucket for backups.
        backups_bucket_arn: the same bucket's ARN.
        backups_key_arn: the key that backups are encrypted with.
        access_logs_bucket: the name of the bucket that says who asked the others for what.
        storage_role_arn: what the storage service's Pods take to reach outputs.
        storage_role_policies: what must be there before they do.
    """

    def __init__(
        self,
        config: OutputsConfig,
        place: Place,
        *,
        organisation: str,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make them.

        Args:
            config: how long what is kept.
            place: where.
            organisation: its short name, which buckets begin with.
            opts: the provider.
        """
        super().__init__("crucible:outputs:Outputs", place.name, None, opts)
        self._place = place
        self._prefix = f"{organisation}-{place.name}"
        self._config = config
        self._below = pulumi.ResourceOptions(parent=self)
        # A bucket's data are gone with it, and so they are with its key.
        self._kept = pulumi.ResourceOptions(parent=self, protect=place.stack == "production")

        outputs_key = key("outputs", place, description="Encrypts outputs of evaluations", opts=self._kept)
        backups_key = key("backups", place, description="Encrypts backups", opts=self._kept)
        logs, logs_policy = self._bucket("access-logs", config.access_log_days, None, self._log_delivery())
        outputs, _ = self._bucket("outputs", config.output_days, outputs_key)
        backups, _ = self._bucket("backups", config.backup_days, backups_key)
        for name, bucket in zip(LOGGED, (outputs, backups), strict=True):
            aws.s3.BucketLogging(
                f"{self._prefix}-{name}",
                bucket=bucket.id,
                target_bucket=logs.id,
                target_prefix=f"{name}/",
                opts=pulumi.ResourceOptions(parent=self, depends_on=[logs_policy]),
            )
        storage = self._storage_role(outputs, outputs_key)

        self.outputs_bucket = outputs.id
        self.outputs_url = pulumi.Output.concat("s3://", outputs.id)
        self.backups_bucket = backups.id
        self.backups_bucket_arn = backups.arn
        self.backups_key_arn = backups_key.arn
        self.access_logs_bucket = logs.id
        self.storage_role_arn = storage.arn
        self.storage_role_policies = storage.policies
        self.register_outputs({"outputs_bucket": self.outputs_bucket, "backups_bucket": self.backups_bucket})

    def _bucket(
        self, name: str, days: int, own: aws.kms.Key | None, *allowed: dict[str, Any]
    ) -> tuple[aws.s3.Bucket, aws.s3.BucketPolicy]:
        """Make a bucket; without a key of its own, what is in it is encrypted with one of S3's."""
        full = f"{self._prefix}-{name}"
        bucket = aws.s3.Bucket(full, bucket=full, opts=self._kept)
        block = aws.s3.BucketPublicAccessBlock(
            full,
            bucket=bucket.id,
            block_public_acls=True,
            block_public_policy=True,
            ignore_public_acls=True,
            restrict_public_buckets=True,
            opts=self._below,
        )
        # No ACLs at all: what is in the bucket is the account's, whoever wrote it.
        aws.s3.BucketOwnershipControls(
            full,
            bucket=bucket.id,
            rule=aws.s3.BucketOwnershipControlsRuleArgs(object_ownership="BucketOwnerEnforced"),
            opts=self._below,
        )
        versioning = aws.s3.BucketVersioning(
            full,
            bucket=bucket.id,
            versioning_configuration=aws.s3.BucketVersioningVersioningConfigurationArgs(status="Enabled"),
            opts=self._below,
        )
        aws.s3.BucketServerSideEncryptionConfiguration(
            full, bucket=bucket.id, rules=[_encryption(own)], opts=self._below
        )
        aws.s3.BucketLifecycleConfiguration(
            full,
            bucket=bucket.id,
            rules=[lifecycle(days, self._config)],
            # What it says of old versions means nothing before there are any.
            opts=pulumi.ResourceOptions(parent=self, depends_on=[versioning]),
        )
        policy = aws.s3.BucketPolicy(
            full,
            bucket=bucket.id,
            policy=pulumi.Output.json_dumps({"Version": VERSION, "Statement": [*allowed, *only_tls(full)]}),
            # S3 refuses to have both of them changed at the same time.
            opts=pulumi.ResourceOptions(parent=self, depends_on=[block]),
        )
        return bucket, policy

    def _log_delivery(self) -> dict[str, Any]:
        """Let S3 write down, in the bucket for it, who asked the others for what."""
        return {
            "Sid": "AccessLogs",
            "Effect": "Allow",
            "Principal": {"Service": "logging.s3.amazonaws.com"},
            "Action": "s3:PutObject",
            "Resource": f"arn:aws:s3:::{self._prefix}-access-logs/*",
            "Condition": {
                "StringEquals": {"aws:SourceAccount": self._place.account},
                "ArnEquals": {"aws:SourceArn": [f"arn:aws:s3:::{self._prefix}-{each}" for each in LOGGED]},
            },
        }

    def _storage_role(self, bucket: aws.s3.Bucket, own: aws.kms.Key) -> Role:
        return role(
            "storage",
            self._place,
            by_pod(),
            Allow(
                ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
                [pulumi.Output.concat(bucket.arn, "/*")],
            ),
            # The service lists nothing. But without this right S3 answers 403 and not 404 for what is not there ("HeadObject", Amazon S3
            # API reference), and a lost object would be taken for a store that is away.
            Allow(["s3:ListBucket"], [bucket.arn]),
            Allow(
                ["kms:Decrypt", "kms:GenerateDataKey"],
                [own.arn],
                {"StringEquals": {"kms:ViaService": f"s3.{self._place.region}.amazonaws.com"}},
            ),
            description="Lets the storage service keep outputs of evaluations",
            opts=self._below,
        )


def _encryption(own: aws.kms.Key | None) -> aws.s3.BucketServerSideEncryptionConfigurationRuleArgs:
    default = aws.s3.BucketServerSideEncryptionConfigurationRuleApplyServerSideEncryptionByDefaultArgs
    if own is None:
        # S3 delivers access logs to no bucket whose default is a key of KMS ("Enabling Amazon S3 server access logging", Amazon S3 user guide).
        return aws.s3.BucketServerSideEncryptionConfigurationRuleArgs(
            apply_server_side_encryption_by_default=default(sse_algorithm="AES256")
        )
    return aws.s3.BucketServerSideEncryptionConfigurationRuleArgs(
        apply_server_side_encryption_by_default=default(sse_algorithm="aws:kms", kms_master_key_id=own.arn),
        # One request to KMS for many objects, and not one for each.
        bucket_key_enabled=True,
    )


def only_tls(bucket: str) -> list[dict[str, Any]]:
    """Return what refuses whoever comes to a bucket without TLS, or with one that is too old.

    S3 calls the second by the version's number and knows it of nothing that came without ("Amazon S3 condition keys").
    """
    everything = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": "s3:*",
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    return [
        {"Sid": "OnlyTls", **everything, "Condition": {"Bool": {"aws:SecureTransport": "false"}}},
        {"Sid": "OnlyModernTls", **everything, "Condition": {"NumericLessThan": {"s3:TlsVersion": _TLS}}},
    ]


def lifecycle(days: int, config: OutputsConfig) -> aws.s3.BucketLifecycleConfigurationRuleArgs:
    """Return what becomes of what is in a bucket.

    Args:
        days: after which it is deleted.
        config: when it moves to STANDARD_IA, if it stays there for as long as it is billed, and how long old versions are kept.
    """
    moves = days >= config.infrequent_access_days + INFREQUENT_ACCESS_DAYS
    transition = aws.s3.BucketLifecycleConfigurationRuleTransitionArgs(
        days=config.infrequent_access_days, storage_class="STANDARD_IA"
    )
    return aws.s3.BucketLifecycleConfigurationRuleArgs(
        id="everything",
        status="Enabled",
        filter=aws.s3.BucketLifecycleConfigurationRuleFilterArgs(),
        transitions=[transition] if moves else [],
        # It also takes away the markers of what was deleted, once no version is left behind them.
        expiration=aws.s3.BucketLifecycleConfigurationRuleExpirationArgs(days=days),
        noncurrent_version_expiration=aws.s3.BucketLifecycleConfigurationRuleNoncurrentVersionExpirationArgs(
            noncurrent_days=config.old_version_days
        ),
        abort_incomplete_multipart_upload=aws.s3.BucketLifecycleConfigurationRuleAbortIncompleteMultipartUploadArgs(
            days_after_initiation=UNFINISHED_DAYS
        ),
    )
