"""How data is kept and carried: encrypted, under keys of the account, in buckets that nobody else can open.

A bucket is closed by three resources beside it. That they are there is a rule of the whole stack; what they say is a rule of each, since
the ARN in a bucket's policy is unknown in the preview in which the stack is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crucible_policies.identity import statements
from crucible_policies.resource import Resource, is_on, texts
from crucible_policies.rule import ResourceRule, StackRule

BUCKETS = {"aws:s3/bucket:Bucket", "aws:s3/bucketV2:BucketV2"}
BUCKET_ACLS = {"aws:s3/bucketAcl:BucketAcl", "aws:s3/bucketAclV2:BucketAclV2"}
BUCKET_BLOCK = "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock"
ACCOUNT_BLOCK = "aws:s3/accountPublicAccessBlock:AccountPublicAccessBlock"
BUCKET_LOGGING = {"aws:s3/bucketLogging:BucketLogging", "aws:s3/bucketLoggingV2:BucketLoggingV2"}
S3_OWN = "AES256"
BUCKET_POLICY = "aws:s3/bucketPolicy:BucketPolicy"
BUCKET_ENCRYPTION = {
    "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration",
    "aws:s3/bucketServerSideEncryptionConfigurationV2:BucketServerSideEncryptionConfigurationV2",
}
BLOCKS = ("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets")
# "Canned ACL", Amazon S3 user guide: all others are open to more than the account.
PRIVATE_ACLS = {"private", "bucket-owner-read", "bucket-owner-full-control", "log-delivery-write"}
LAUNCH_TEMPLATE = "aws:ec2/launchTemplate:LaunchTemplate"
# Whose switch is off unless it is on.
ENCRYPTED_BY = {
    "aws:ebs/volume:Volume": "encrypted",
    "aws:efs/fileSystem:FileSystem": "encrypted",
    "aws:redshift/cluster:Cluster": "encrypted",
    "aws:rds/instance:Instance": "storageEncrypted",
    "aws:rds/cluster:Cluster": "storageEncrypted",
    "aws:elasticache/replicationGroup:ReplicationGroup": "atRestEncryptionEnabled",
    "aws:ebs/encryptionByDefault:EncryptionByDefault": "enabled",
}
INSTANCES = {"aws:ec2/instance:Instance", "aws:ec2/launchConfiguration:LaunchConfiguration"}
# Whose data is under a key of AWS's own, or under none, unless one is named.
KEY_NAMED_BY = {
    "aws:cloudwatch/logGroup:LogGroup": "kmsKeyId",
    "aws:secretsmanager/secret:Secret": "kmsKeyId",
    "aws:sns/topic:Topic": "kmsMasterKeyId",
    "aws:sqs/queue:Queue": "kmsMasterKeyId",
}
REPOSITORY = "aws:ecr/repository:Repository"
CLUSTER = "aws:eks/cluster:Cluster"
PARAMETER = "aws:ssm/parameter:Parameter"
KEY = "aws:kms/key:Key"
# Whose connections are in the clear unless the switch is on.
CARRIED_BY = {
    "aws:elasticache/replicationGroup:ReplicationGroup": "transitEncryptionEnabled",
    "aws:elasticache/cluster:Cluster": "transitEncryptionEnabled",
    "aws:memorydb/cluster:Cluster": "tlsEnabled",
}
LISTENERS = {"aws:lb/listener:Listener", "aws:alb/listener:Listener"}
_OWN = "name a key that the account owns"


def unencrypted(found: Resource) -> Iterator[str]:
    """Tell what is written to disks in the clear."""
    given = found.properties
    switch = ENCRYPTED_BY.get(found.type)
    if switch and not is_on(given.get(switch)):
        yield f"{switch} is off; set it to true"
    if found.type == LAUNCH_TEMPLATE:
        mappings = given.get("blockDeviceMappings") or ()
        disks = [(f"blockDeviceMappings[{n}].ebs", each["ebs"]) for n, each in enumerate(mappings) if "ebs" in each]
        if not disks:
            yield "blockDeviceMappings has no ebs, so disks are as the image has them; name the root device with ebs.encrypted true"
        yield from (
            f"{where}.encrypted is off; set it to true" for where, each in disks if not is_on(each.get("encrypted"))
        )
    # An instance that follows a launch template has its disks from there.
    if found.type in INSTANCES and "launchTemplate" not in given:
        root = given.get("rootBlockDevice") or {}
        if not is_on(root.get("encrypted")):
            yield "rootBlockDevice.encrypted is off; set it to true"
        for number, each in enumerate(given.get("ebsBlockDevices") or ()):
            if not is_on(each.get("encrypted")):
                yield f"ebsBlockDevices[{number}].encrypted is off; set it to true"


def foreign_keys(found: Resource) -> Iterator[str]:
    """Tell what is not kept under a key of the account."""
    given = found.properties
    if key := KEY_NAMED_BY.get(found.type):
        yield from _not_own(key, given.get(key))
    if found.type == PARAMETER and given.get("type") == "SecureString":
        yield from _not_own("keyId", given.get("keyId"))
    if found.type == REPOSITORY:
        settings: Mapping[str, Any] = next(iter(given.get("encryptionConfigurations") or ()), {})
        if settings.get("encryptionType") not in {"KMS", "KMS_DSSE"}:
            yield f"encryptionConfigurations[0].encryptionType is not KMS; set it, and {_OWN} in kmsKey"
        else:
            yield from _not_own("encryptionConfigurations[0].kmsKey", settings.get("kmsKey"))
    if found.type == CLUSTER:
        provider = (given.get("encryptionConfig") or {}).get("provider") or {}
        yield from _not_own("encryptionConfig.provider.keyArn", provider.get("keyArn"))


def _not_own(where: str, key: Any) -> Iterator[str]:
    if not key:
        yield f"{where} is not set; {_OWN}"
    elif "alias/aws/" in key:
        yield f"{where} is {key}, a key of AWS; {_OWN}"


def unrotated(found: Resource) -> Iterator[str]:
    """Tell which keys stay as they are for ever."""
    if found.type != KEY:
        return
    given = found.properties
    # KMS rotates no others ("Rotate AWS KMS keys", AWS KMS developer guide).
    symmetric = given.get("customerMasterKeySpec") in {None, "SYMMETRIC_DEFAULT"} and "customKeyStoreId" not in given
    if symmetric and not is_on(given.get("enableKeyRotation")):
        yield "enableKeyRotation is off; set it to true"


def public_buckets(found: Resource) -> Iterator[str]:
    """Tell what opens a bucket, or leaves it to others to do so."""
    given = found.properties
    if found.type in {BUCKET_BLOCK, ACCOUNT_BLOCK}:
        yield from (f"{block} is off; set it to true" for block in BLOCKS if not is_on(given.get(block)))
    if found.type in BUCKETS | BUCKET_ACLS and "acl" in given and given["acl"] not in PRIVATE_ACLS:
        yield f"acl is {given['acl']}; leave it out: who may read is said by policies"
    if found.type in BUCKETS:
        grantees = [(f"grants[{n}]", each) for n, each in enumerate(given.get("grants") or ())]
    elif found.type in BUCKET_ACLS:
        rules = (given.get("accessControlPolicy") or {}).get("grants") or ()
        grantees = [
            (f"accessControlPolicy.grants[{n}].grantee", each.get("grantee") or {}) for n, each in enumerate(rules)
        ]
    else:
        return
    for where, grantee in grantees:
        if (grantee.get("uri") or "").endswith(("/AllUsers", "/AuthenticatedUsers")):
            yield f"{where}.uri is everybody; take it out"


def bucket_encryption(found: Resource) -> Iterator[str]:
    """Tell which buckets' encryption is not with a key of the account."""
    if found.type not in BUCKET_ENCRYPTION:
        return
    rules = found.properties.get("rules") or ()
    if not rules:
        yield "rules is empty; say applyServerSideEncryptionByDefault"
    for number, rule in enumerate(rules):
        where = f"rules[{number}].applyServerSideEncryptionByDefault"
        said = rule.get("applyServerSideEncryptionByDefault") or {}
        if said.get("sseAlgorithm") == S3_OWN:
            continue  # `buckets_of_s3s_own_key` sees whose bucket it is
        if said.get("sseAlgorithm") not in {"aws:kms", "aws:kms:dsse"}:
            yield f"{where}.sseAlgorithm is {said.get('sseAlgorithm')}; set it to aws:kms, and {_OWN} in kmsMasterKeyId"
        else:
            yield from _not_own(f"{where}.kmsMasterKeyId", said.get("kmsMasterKeyId"))


def buckets_of_s3s_own_key(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str]]:
    """Tell which buckets have S3's own key, but for those that S3 delivers access logs to, for which it takes no other."""
    logs = [each for each in resources if each.type in BUCKET_LOGGING]
    for found in (each for each in resources if each.type in BUCKET_ENCRYPTION):
        rules = found.properties.known("rules") or ()
        defaults = [rule.known("applyServerSideEncryptionByDefault") or {} for rule in rules]
        if all(default.get("sseAlgorithm") != S3_OWN for default in defaults):
            continue
        own = [each for each in resources if each.type in BUCKETS and found.is_part_of(each, "bucket", "bucket", "id")]
        if not any(log.is_part_of(bucket, "targetBucket", "bucket", "id") for log in logs for bucket in own):
            yield (
                found,
                f"rules say {S3_OWN}, which is S3's own key; set sseAlgorithm to aws:kms, and {_OWN} in kmsMasterKeyId",
            )


def in_the_clear(found: Resource) -> Iterator[str]:
    """Tell what may be carried unencrypted."""
    given = found.properties
    switch = CARRIED_BY.get(found.type)
    # MemoryDB's is on unless it is off.
    if switch and not is_on(given.get(switch, switch == "tlsEnabled")):
        yield f"{switch} is off; set it to true"
    if found.type == BUCKET_POLICY and "policy" in given:
        refusals = [each for each in statements(given["policy"]) or () if _refuses_plain_http(each)]
        if not refusals:
            yield (
                "policy lets plain HTTP through; add a Deny of s3:* for Principal * on the bucket and all in it "
                'under the condition Bool: {"aws:SecureTransport": "false"}'
            )
    if found.type in LISTENERS and given.get("protocol") == "HTTP":
        actions = given.get("defaultActions") or ()
        if not all(each.get("type") == "redirect" for each in actions):
            yield "protocol is HTTP; set it to HTTPS, or have it do nothing but redirect"


def _refuses_plain_http(statement: Mapping[str, Any]) -> bool:
    condition = (statement.get("Condition") or {}).get("Bool") or {}
    principal = statement.get("Principal")
    everybody = principal == "*" or (isinstance(principal, Mapping) and "*" in texts(principal.get("AWS")))
    return (
        statement.get("Effect") == "Deny"
        and everybody
        and bool({"s3:*", "*"} & set(texts(statement.get("Action"))))
        and "false" in {str(value).lower() for value in _values(condition.get("aws:SecureTransport"))}
        and any(str(each).endswith("/*") or each == "*" for each in texts(statement.get("Resource")))
    )


def _values(said: Any) -> tuple[Any, ...]:
    return texts(str(said) if isinstance(said, bool) else said)


def open_buckets(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str]]:
    """Tell which buckets lack what closes them."""
    for bucket in (each for each in resources if each.type in BUCKETS):
        for types, what in (
            ({BUCKET_BLOCK}, "BucketPublicAccessBlock: nothing keeps it from being made public"),
            (BUCKET_ENCRYPTION, "BucketServerSideEncryptionConfiguration: what is in it is under a key of AWS"),
            ({BUCKET_POLICY}, "BucketPolicy: it answers plain HTTP"),
        ):
            if not any(each.type in types and each.is_part_of(bucket, "bucket", "bucket", "id") for each in resources):
                yield bucket, f"the bucket has no {what}; add one for it"


RULES = (
    ResourceRule(
        "disks-encrypted",
        "a volume, file system, database or cache, or a launch template's or instance's disks, without encryption",
        "disks outlive what wrote them: as snapshots, and as hardware",
        "`encrypted: true` (`storageEncrypted`, `atRestEncryptionEnabled`); a launch template names its root device",
        unencrypted,
    ),
    ResourceRule(
        "own-keys",
        "a log, secret, topic, queue, image repository, `SecureString` or cluster's Secrets that are not under a KMS key of the account",
        "only a key of one's own can be taken away from whoever should not read any more, and shows who did",
        "`encryption.key`, or `encryption.log_group` for logs",
        foreign_keys,
    ),
    ResourceRule(
        "keys-rotated",
        "a symmetric KMS key that is not rotated",
        "a key that is lost gives away all that it ever encrypted",
        "`enableKeyRotation: true`, as `encryption.key` does",
        unrotated,
    ),
    ResourceRule(
        "buckets-private",
        "a bucket's ACL for others than the account, and a public access block with a hole",
        "one object that anybody may read is a leak, whatever else is closed",
        "no ACL; all four settings of the block on",
        public_buckets,
    ),
    StackRule(
        "buckets-closed",
        "a bucket without public access block, encryption of its own, or policy",
        "each of the three is a resource that is easily forgotten, and its absence is seen by nobody",
        "the three resources, with `bucket` from the bucket",
        open_buckets,
    ),
    ResourceRule(
        "buckets-encrypted",
        "a bucket's encryption by anything but a KMS key of the account, or S3's own",
        "what S3 does by default lets everyone who may read the bucket read the data",
        "`sseAlgorithm: aws:kms` and `kmsMasterKeyId`",
        bucket_encryption,
    ),
    StackRule(
        "buckets-own-keys",
        "a bucket under S3's own key, unless access logs are delivered to it",
        "S3's own key lets everyone who may read the bucket read the data; for access logs it takes no other",
        "`sseAlgorithm: aws:kms` and `kmsMasterKeyId`",
        buckets_of_s3s_own_key,
    ),
    ResourceRule(
        "encrypted-in-transit",
        "a bucket's policy that lets plain HTTP through, a cache without TLS, a listener that serves HTTP",
        "what crosses a network in the clear is read by whoever is on it",
        "a `Deny` under `aws:SecureTransport: false`; `transitEncryptionEnabled`; HTTPS, or a redirect to it",
        in_the_clear,
    ),
)
