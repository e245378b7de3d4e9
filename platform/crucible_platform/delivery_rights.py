"""What those who deliver may do on AWS, role by role: for `plan`, for `up`, and what neither does whatever comes.

Every action is by name, or by the beginning of one, and every resource by the stack's name where it has a name; what has only a number is
limited to the account and the region. A component of a kind that is not in here cannot be delivered before it is: IAM says which action it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crucible_platform.iam import BOUNDARY, Allow, Deny

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pulumi

    from crucible_platform.place import Place

# Characters, of all policies in a role together and of one that is attached to roles, without white space ("IAM and AWS STS quotas", IAM user
# guide).
LARGEST_INLINE, LARGEST_ATTACHED = 10_240, 6_144

_TAGS = ("TagResource", "UntagResource")

# What Pulumi's provider compares: how things are set up, never what is kept in them.
READS: Mapping[str, Sequence[str]] = {
    "autoscaling": ("Describe*",),
    "cloudwatch": ("DescribeAlarms", "GetDashboard", "ListTagsForResource"),
    "ec2": ("Describe*",),
    "ecr": ("DescribeRepositories", "GetLifecyclePolicy", "GetRepositoryPolicy", "ListTagsForResource"),
    "eks": ("Describe*", "List*"),
    "events": ("Describe*", "List*"),
    "iam": (
        "GetInstanceProfile",
        "GetOpenIDConnectProvider",
        "GetPolicy*",
        "GetRole*",
        "ListAttachedRolePolicies",
        "ListInstanceProfile*",
        "ListOpenIDConnectProvider*",
        "ListPolicyVersions",
        "ListRole*",
    ),
    "kms": ("DescribeKey", "GetKeyPolicy", "GetKeyRotationStatus", "ListAliases", "ListResourceTags"),
    "lambda": ("GetFunction*", "GetPolicy", "ListTags", "ListVersionsByFunction"),
    "logs": ("DescribeLogGroups", "ListTagsForResource"),
    "s3": (
        "GetAccelerateConfiguration",
        "GetBucket*",
        "GetEncryptionConfiguration",
        "GetLifecycleConfiguration",
        "GetReplicationConfiguration",
        "ListTagsForResource",
    ),
    "secretsmanager": ("DescribeSecret", "GetResourcePolicy", "ListSecretVersionIds"),
    "sns": ("GetSubscriptionAttributes", "GetTopicAttributes", "List*"),
    "ssm": ("DescribeDocument*", "DescribeParameters", "GetDocument", "ListTagsForResource"),
}

# What `up` changes, of what the stack's components are made of.
WRITES: Mapping[str, Sequence[str]] = {
    "autoscaling": (
        "CreateAutoScalingGroup",
        "CreateOrUpdateTags",
        "DeleteAutoScalingGroup",
        "DeleteLifecycleHook",
        "DeleteTags",
        "PutLifecycleHook",
        "StartInstanceRefresh",
        "UpdateAutoScalingGroup",
    ),
    "cloudwatch": ("DeleteAlarms", "PutMetricAlarm", *_TAGS),
    "ec2": (
        "AllocateAddress",
        "AssignPrivateIpAddresses",
        "AssociateAddress",
        "AssociateRouteTable",
        "AttachInternetGateway",
        "AttachNetworkInterface",
        "AuthorizeSecurityGroup*",
        "CreateFlowLogs",
        "CreateInternetGateway",
        "CreateLaunchTemplate*",
        "CreateNatGateway",
        "CreateNetworkInterface",
        "CreateRoute",
        "CreateRouteTable",
        "CreateSecurityGroup",
        "CreateSubnet",
        "CreateTags",
        "CreateVpc",
        "CreateVpcEndpoint",
        "DeleteFlowLogs",
        "DeleteInternetGateway",
        "DeleteLaunchTemplate*",
        "DeleteNatGateway",
        "DeleteNetworkInterface",
        "DeleteRoute",
        "DeleteRouteTable",
        "DeleteSecurityGroup",
        "DeleteSubnet",
        "DeleteTags",
        "DeleteVpc",
        "DeleteVpcEndpoints",
        "DetachInternetGateway",
        "DetachNetworkInterface",
        "DisassociateAddress",
        "DisassociateRouteTable",
        "ModifyInstanceAttribute",
        "ModifyInstanceMetadataOptions",
        "ModifyLaunchTemplate",
        "ModifyNetworkInterfaceAttribute",
        "ModifySecurityGroupRules",
        "ModifySubnetAttribute",
        "ModifyVpcAttribute",
        "ModifyVpcEndpoint",
        "ReleaseAddress",
        "ReplaceRoute*",
        "RevokeSecurityGroup*",
        "RunInstances",
        "StartInstances",
        "StopInstances",
        "TerminateInstances",
        "UnassignPrivateIpAddresses",
        "UpdateSecurityGroup*",
    ),
    "ecr": (
        "CreateRepository",
        "DeleteLifecyclePolicy",
        "DeleteRepository",
        "DeleteRepositoryPolicy",
        "PutImageScanningConfiguration",
        "PutImageTagMutability",
        "PutLifecyclePolicy",
        "SetRepositoryPolicy",
        *_TAGS,
    ),
    # Not who may enter the cluster, and not whether there is one.
    "eks": (
        "CreateAddon",
        "CreateNodegroup",
        "CreatePodIdentityAssociation",
        "DeleteAddon",
        "DeleteNodegroup",
        "DeletePodIdentityAssociation",
        "UpdateAddon",
        "UpdateClusterConfig",
        "UpdateClusterVersion",
        "UpdateNodegroup*",
        "UpdatePodIdentityAssociation",
        *_TAGS,
    ),
    "events": ("DeleteRule", "PutRule", "PutTargets", "RemoveTargets", *_TAGS),
    "lambda": (
        "AddPermission",
        "CreateFunction",
        "DeleteFunction*",
        "PutFunctionConcurrency",
        "RemovePermission",
        "UpdateFunctionCode",
        "UpdateFunctionConfiguration",
        *_TAGS,
    ),
    "logs": (
        "AssociateKmsKey",
        "CreateLogGroup",
        "DeleteLogGroup",
        "DeleteRetentionPolicy",
        "PutRetentionPolicy",
        *_TAGS,
    ),
    "s3": (
        "CreateBucket",
        "DeleteBucket",
        "DeleteBucketPolicy",
        "PutBucket*",
        "PutEncryptionConfiguration",
        "PutLifecycleConfiguration",
        *_TAGS,
    ),
    "secretsmanager": (
        "CreateSecret",
        "DeleteResourcePolicy",
        "DeleteSecret",
        "PutResourcePolicy",
        "PutSecretValue",
        "RotateSecret",
        "UpdateSecret",
        *_TAGS,
    ),
    "sns": ("CreateTopic", "DeleteTopic", "SetTopicAttributes", "Subscribe", *_TAGS),
    "ssm": ("AddTagsToResource", "CreateDocument", "DeleteDocument", "RemoveTagsFromResource", "UpdateDocument*"),
}
# By which a role comes to be allowed more, or to be for somebody else.
RAISES = (
    "AttachRolePolicy",
    "CreateRole",
    "PutRolePermissionsBoundary",
    "PutRolePolicy",
    "UpdateAssumeRolePolicy",
    "UpdateRole",
    "UpdateRoleDescription",
)
# What ends or blinds the record of who did what.
TRAIL = (
    "DeleteEventDataStore",
    "DeleteTrail",
    "PutEventSelectors",
    "StopEventDataStoreIngestion",
    "StopLogging",
    "UpdateTrail",
)
PUSHES = (
    "BatchCheckLayerAvailability",
    "BatchGetImage",
    "CompleteLayerUpload",
    "DescribeImages",
    "GetDownloadUrlForLayer",
    "InitiateLayerUpload",
    "PutImage",
    "UploadLayerPart",
)


def _named(service: str, actions: Sequence[str]) -> list[str]:
    return [f"{service}:{each}" for each in actions]


def _buckets(place: Place, organisation: str) -> str:
    return f"arn:aws:s3:::{organisation}-{place.name}-*"


def log_groups(place: Place) -> list[str]:
    """Return the ARNs of the stack's logs."""
    names = (f"/{place.name}/*", f"/aws/eks/{place.name}/*", f"/aws/lambda/{place.name}-*")
    return [place.arn("logs", f"log-group:{each}") for each in names]


def reads(place: Place, organisation: str) -> Iterator[Allow]:
    """Return the right to see how everything is set up."""
    yield Allow([each for service, actions in READS.items() for each in _named(service, actions)], ["*"])
    # By this, too, one asks whether a bucket is there.
    yield Allow(["s3:ListBucket"], [_buckets(place, organisation)])


def changes(place: Place, organisation: str) -> Iterator[Allow]:
    """Return the right to change what the stack is made of."""
    name = place.name
    resources = {
        "autoscaling": [place.arn("autoscaling", f"autoScalingGroup:*:autoScalingGroupName/{name}-*")],
        "cloudwatch": [place.arn("cloudwatch", f"alarm:{name}-*")],
        # An image is of a region and of no account.
        "ec2": [place.arn("ec2", "*/*"), f"arn:aws:ec2:{place.region}::image/*"],
        "ecr": [place.arn("ecr", f"repository/{name}/*")],
        "eks": [
            place.arn("eks", f"cluster/{name}"),
            *(place.arn("eks", f"{kind}/{name}/*") for kind in ("addon", "nodegroup", "podidentityassociation")),
        ],
        "events": [place.arn("events", f"rule/{name}-*")],
        "lambda": [place.arn("lambda", f"function:{name}-*")],
        "logs": log_groups(place),
        "s3": [_buckets(place, organisation)],
        "secretsmanager": [place.arn("secretsmanager", f"secret:{name}*")],
        "sns": [place.arn("sns", f"{name}-*")],
        "ssm": [place.arn("ssm", f"document/{name}-*")],
    }
    for service, actions in WRITES.items():
        yield Allow(_named(service, actions), resources[service])
    yield from _keys(place)
    yield from _roles(place)


def _keys(place: Place) -> Iterator[Allow]:
    keys = place.arn("kms", "key/*")
    yield Allow(
        ["kms:CreateKey"],
        ["*"],
        {"StringEquals": {"aws:RequestedRegion": place.region}},
        unscoped="a key has a number, and none before it is there",
    )
    actions = ("CancelKeyDeletion", "EnableKeyRotation", "PutKeyPolicy", "ScheduleKeyDeletion", "UpdateKeyDescription")
    yield Allow(_named("kms", (*actions, "RetireGrant", *_TAGS)), [keys])
    # An image repository, for one, is lent its key when it is made.
    yield Allow(["kms:CreateGrant"], [keys], {"Bool": {"kms:GrantIsForAWSResource": "true"}})
    aliases = place.arn("kms", f"alias/{place.name}-*")
    yield Allow(["kms:CreateAlias", "kms:DeleteAlias", "kms:UpdateAlias"], [keys, aliases])


def _roles(place: Place) -> Iterator[Allow]:
    roles = f"arn:aws:iam::{place.account}:role/{place.name}-*"
    yield Allow(_named("iam", RAISES), [roles], {"StringEquals": {"iam:PermissionsBoundary": BOUNDARY}})
    lowers = ("DeleteRole", "DeleteRolePolicy", "DetachRolePolicy", "TagRole", "UntagRole")
    yield Allow(_named("iam", lowers), [roles])
    profile = ("AddRoleTo", "Create", "Delete", "RemoveRoleFrom", "Tag", "Untag")
    yield Allow(
        [f"iam:{each}InstanceProfile" for each in profile],
        [f"arn:aws:iam::{place.account}:instance-profile/{place.name}-*"],
    )
    services = ("ec2", "eks", "lambda", "pods.eks", "vpc-flow-logs")
    to = [f"{each}.amazonaws.com" for each in services]
    yield Allow(["iam:PassRole"], [roles], {"StringEquals": {"iam:PassedToService": to}})  # type: ignore[dict-item]


def pushes(repositories: Sequence[pulumi.Input[str]]) -> Iterator[Allow]:
    """Return the right to push images to these repositories, given by their ARNs."""
    # The token is for all of the registry; what it opens is said by the other.
    yield Allow(["ecr:GetAuthorizationToken"], ["*"])
    yield Allow(_named("ecr", PUSHES), repositories)


def state(bucket: str, key_arn: str, *, writes: bool) -> Iterator[Allow]:
    """Return the right to Pulumi's state. A preview takes no lock, and so it writes nothing.

    Args:
        bucket: that the state is in.
        key_arn: under which it, and what is secret in it, is encrypted.
        writes: whether it changes the state.
    """
    arn = f"arn:aws:s3:::{bucket}"
    yield Allow(["s3:ListBucket"], [arn])
    yield Allow(["s3:GetObject", *(["s3:PutObject", "s3:DeleteObject"] if writes else [])], [f"{arn}/*"])
    yield Allow(["kms:Decrypt", *(["kms:Encrypt", "kms:GenerateDataKey"] if writes else [])], [key_arn])


def no_data(*, objects: Sequence[str] = (), keys: Sequence[str] = ()) -> Iterator[Deny]:
    """Return what keeps a reader from what is kept, whatever it comes to be allowed, or a bucket says by itself.

    Args:
        objects: ARNs of those that it reads after all.
        keys: ARNs of those that it decrypts with.
    """
    yield Deny(["secretsmanager:BatchGetSecretValue", "secretsmanager:GetSecretValue", "ssm:GetParameter*"], ["*"])
    yield Deny(["s3:GetObject*"], objects or ["*"], elsewhere=bool(objects))
    yield Deny(["kms:Decrypt"], keys or ["*"], elsewhere=bool(keys))


def never(
    *, own: Sequence[str], rules: Sequence[str], topic: pulumi.Input[str], keys: Sequence[pulumi.Input[str]]
) -> Iterator[Deny]:
    """Return what `up` does not do, whatever it comes to be allowed.

    These are statements of its own policy and no boundary: they win over all that allows, it cannot change them itself, and a boundary
    would have to repeat what it may do. A role that it makes does have one, or it would be the way around these.

    Args:
        own: ARNs of who delivers, and of what they are trusted by.
        rules: ARNs of the alarms' rules.
        topic: the ARN of the alarms' topic.
        keys: ARNs of keys that nobody delivers.
    """
    # Nobody is made who stays when the stack is gone.
    people = ("AccessKey", "Group", "LoginProfile", "MFADevice", "SAMLProvider", "User")
    yield Deny(
        [*(f"iam:*{each}*" for each in people), "iam:CreateOpenIDConnectProvider", "organizations:*", "account:*"],
        ["*"],
    )
    yield Deny(_named("iam", RAISES), ["*"], {"StringNotEquals": {"iam:PermissionsBoundary": BOUNDARY}})
    yield Deny(["iam:DeleteRolePermissionsBoundary"], ["*"])
    verbs = ("Add", "Attach", "Create", "Delete", "Detach", "Pass", "Put", "Remove", "Tag", "Untag", "Update")
    yield Deny([*(f"iam:{each}*" for each in verbs), "sts:AssumeRole"], own)
    yield Deny(_named("cloudtrail", TRAIL), ["*"])
    yield Deny(_named("events", ("DeleteRule", "DisableRule", "PutRule", "PutTargets", "RemoveTargets")), rules)
    yield Deny(_named("sns", ("AddPermission", "DeleteTopic", "RemovePermission", "SetTopicAttributes")), [topic])
    yield Deny(_named("kms", ("DisableKey", "PutKeyPolicy", "ScheduleKeyDeletion")), keys)
    # Whoever says who enters the cluster is its administrator.
    entry = ("AssociateAccessPolicy", "CreateAccessEntry", "UpdateAccessEntry", "CreateCluster", "DeleteCluster")
    yield Deny(_named("eks", entry), ["*"])
