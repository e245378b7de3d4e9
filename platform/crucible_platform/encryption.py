"""Keys of KMS and what is always made with one: nothing of this platform is stored under a key that the account does not own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pulumi
import pulumi_aws as aws

from crucible_platform.iam import VERSION

if TYPE_CHECKING:
    from crucible_platform.place import Place

# What CloudWatch takes ("PutRetentionPolicy", Amazon CloudWatch Logs API reference).
RetentionDays = Literal[
    1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827, 2192, 2557, 2922, 3288, 3653
]
# Long enough to notice that something still needed it ("Deleting AWS KMS keys": 7 to 30 days).
DELETION_DAYS = 30
_USE = ["kms:Encrypt*", "kms:Decrypt*", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"]


def key(
    name: str,
    place: Place,
    *,
    description: str,
    opts: pulumi.ResourceOptions,
    used_by: dict[str, Any] | None = None,
    lent: bool = False,
) -> aws.kms.Key:
    """Make a key that is rotated every year, with an alias of its name.

    Args:
        name: of the key, after the stack's own.
        place: where.
        description: for whoever finds it in the console.
        opts: the parent.
        used_by: `Principal` and `Condition` of a service that uses it beside those whom IAM lets; None if there is none.
        lent: whether that service lets others of AWS use it for what they keep on its behalf, such as a volume for as long as it is attached.
    """
    full = f"{place.name}-{name}"
    # Without the account itself, IAM could give nobody a right to the key, not even to change this policy.
    statements = [
        {
            "Sid": "GovernedByIam",
            "Effect": "Allow",
            "Principal": {"AWS": f"arn:aws:iam::{place.account}:root"},
            "Action": "kms:*",
            "Resource": "*",
        }
    ]
    if used_by:
        statements.append({"Sid": "Service", "Effect": "Allow", "Action": _USE, "Resource": "*", **used_by})
    if used_by and lent:
        condition = {**used_by.get("Condition", {}), "Bool": {"kms:GrantIsForAWSResource": "true"}}
        grant = {"Sid": "Lent", "Effect": "Allow", "Action": "kms:CreateGrant", "Resource": "*"}
        statements.append({**grant, **used_by, "Condition": condition})
    made = aws.kms.Key(
        full,
        description=description,
        enable_key_rotation=True,
        deletion_window_in_days=DELETION_DAYS,
        policy=pulumi.Output.json_dumps({"Version": VERSION, "Statement": statements}),
        opts=opts,
    )
    aws.kms.Alias(full, name=f"alias/{full}", target_key_id=made.key_id, opts=opts)
    return made


def log_group(
    name: str, place: Place, *, path: str, days: RetentionDays, opts: pulumi.ResourceOptions
) -> aws.cloudwatch.LogGroup:
    """Make a log group under a key of its own, which only that group may use.

    Args:
        name: of the key, after the stack's own.
        place: where.
        path: what the group is called.
        days: how long its entries are kept.
        opts: the parent.
    """
    group_arn = place.arn("logs", f"log-group:{path}")
    own = key(
        f"{name}-log",
        place,
        description=f"Encrypts the log {path}",
        used_by={
            "Principal": {"Service": f"logs.{place.region}.amazonaws.com"},
            "Condition": {"ArnEquals": {"kms:EncryptionContext:aws:logs:arn": group_arn}},
        },
        opts=opts,
    )
    return aws.cloudwatch.LogGroup(
        f"{place.name}-{name}", name=path, retention_in_days=days, kms_key_id=own.arn, opts=opts
    )
