"""The rules of the policy pack: each refuses what it is for, in words that help, and lets the rest through; and the platform itself passes all."""

from __future__ import annotations

import base64
import importlib
import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from crucible import names as service_names
from crucible_platform import iam
from crucible_platform.place import Place
from crucible_platform.rehearsal import Rehearsal, Rehearsed, rehearse_platform, unknown_properties
from crucible_platform.section import ROOT
from crucible_platform.stack import EXAMPLE_FILE, ORGANISATION_VARIABLE
from tests.kubernetes.test_admission import LESS
from tests.support.policies import changed, make_objects, pod_of
from tests.support.stacks import whole_stack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

pytestmark = pytest.mark.unit

PACK = ROOT / "policies" / "pulumi"
PAGE = ROOT / "docs" / "policy-pack.md"
ADMISSION = ROOT / "policies" / "admission"
# The largest, and the one without AWS. The program is the same for all.
STACKS = ("production", "local")
ACCOUNT = "111111111111"


def pack(name: str) -> ModuleType:
    """Return a module of the pack. It is in no environment but its own, which has an older protobuf than the services bear."""
    package = "crucible_policies"
    if package not in sys.modules:
        folder = PACK / package
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.{name}")


RULES = pack("rules").RULES
BY_NAME = {rule.name: rule for rule in RULES}
ResourceRule, StackRule = pack("rule").ResourceRule, pack("rule").StackRule
Unknown, NotYetKnown = pack("resource").Unknown, pack("resource").NotYetKnown
resource = pack("resource").resource

Properties = dict[str, Any]
UNKNOWN = Unknown("04da6b54-80e4-46f7-96ec-b56ff0331ba9")  # what pulumi_policy has for text


@dataclass(frozen=True)
class Case:
    """Something, and what a rule says of it: each of `says` once, and nothing else.

    Attributes:
        given: type and properties of a resource; for rules of stacks, of several, each by its name.
        says: a part of each message; nothing if it passes.
        sources: for rules of stacks: (name, property) -> the name of the resource that the property comes from.
    """

    given: tuple[str, Properties] | dict[str, tuple[str, Properties]]
    says: tuple[str, ...] = ()
    sources: dict[tuple[str, str], str] = field(default_factory=dict)
    provider: Properties = field(default_factory=dict)


def said(rule: Any, case: Case) -> list[str]:
    if isinstance(rule, ResourceRule):
        assert isinstance(case.given, tuple)
        return list(rule.check(resource(*case.given, provider=case.provider)))
    assert isinstance(case.given, dict)
    made = []
    for name, (type_, properties) in case.given.items():
        came_from = {key: frozenset({source}) for (of, key), source in case.sources.items() if of == name}
        made.append(resource(type_, properties, name=name, urn=name, came_from=came_from))
    return [f"{found.name}: {message}" for found, message in rule.check(made)]


# -- examples: of each rule what it lets through, and what it refuses

AWS_KEY = "AKIA" + "ABCDEFGHIJKLMNOP"
KEY_ARN = f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1"
BUCKET_ARN = "arn:aws:s3:::example"
TAGS = {"Project": "crucible", "Environment": "dev", "ManagedBy": "pulumi"}
PROVIDED = {"defaultTags": json.dumps({"tags": TAGS})}


def policy(*statements: Properties) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements)})


def allow(action: Any, res: Any = "*", **more: Any) -> Properties:
    return {"Effect": "Allow", "Action": action, "Resource": res, **more}


def trust(principal: Any, **more: Any) -> tuple[str, Properties]:
    statement = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole", **more}
    return "aws:iam/role:Role", {"assumeRolePolicy": policy(statement)}


def role_policy(*statements: Properties) -> tuple[str, Properties]:
    return "aws:iam/rolePolicy:RolePolicy", {"policy": policy(*statements)}


OIDC = {"Federated": f"arn:aws:iam::{ACCOUNT}:oidc-provider/token.actions.githubusercontent.com"}
SUBJECT = "token.actions.githubusercontent.com:sub"
ACCOUNT_ITSELF = {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}
TLS_ONLY = {
    "Effect": "Deny",
    "Principal": "*",
    "Action": "s3:*",
    "Resource": [BUCKET_ARN, f"{BUCKET_ARN}/*"],
    "Condition": {"Bool": {"aws:SecureTransport": "false"}},
}
LAUNCH = {
    "blockDeviceMappings": [{"deviceName": "/dev/xvda", "ebs": {"encrypted": "true"}}],
    "metadataOptions": {"httpTokens": "required", "httpPutResponseHopLimit": 1.0},
    "tagSpecifications": [{"resourceType": kind, "tags": TAGS} for kind in ("instance", "volume")],
}
BUCKET = "aws:s3/bucket:Bucket"
BLOCK = "aws:s3/bucketPublicAccessBlock:BucketPublicAccessBlock"
ENCRYPTION = "aws:s3/bucketServerSideEncryptionConfiguration:BucketServerSideEncryptionConfiguration"
LOGGING = "aws:s3/bucketLogging:BucketLogging"
BUCKET_POLICY = "aws:s3/bucketPolicy:BucketPolicy"
CLOSED = dict.fromkeys(("blockPublicAcls", "blockPublicPolicy", "ignorePublicAcls", "restrictPublicBuckets"), True)
TEMPLATE = "aws:ec2/launchTemplate:LaunchTemplate"
NODE_GROUP = "aws:eks/nodeGroup:NodeGroup"
CLUSTER = "aws:eks/cluster:Cluster"
INSTANCE = "aws:ec2/instance:Instance"
SCALING_GROUP = "aws:autoscaling/group:Group"
KEY = "aws:kms/key:Key"
CACHE = "aws:elasticache/replicationGroup:ReplicationGroup"
LISTENER = "aws:lb/listener:Listener"
REPOSITORY = "aws:ecr/repository:Repository"
FUNCTION = "aws:lambda/function:Function"
PARAMETER = "aws:ssm/parameter:Parameter"
SECRET_VERSION = "aws:secretsmanager/secretVersion:SecretVersion"
INGRESS = "aws:vpc/securityGroupIngressRule:SecurityGroupIngressRule"
GROUP = "aws:ec2/securityGroup:SecurityGroup"
AL2023 = "resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64"
DIGEST = f"example.com/app@sha256:{'a' * 64}"


def sse(**by_default: str) -> tuple[str, Properties]:
    return ENCRYPTION, {"rules": [{"applyServerSideEncryptionByDefault": by_default}]}


def pod(namespace: str = "crucible", **container: Any) -> tuple[str, Properties]:
    first = {"name": "app", "image": DIGEST, "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}, **container}
    return "kubernetes:core/v1:Pod", {"metadata": {"namespace": namespace}, "spec": {"containers": [first]}}


def within(kind: str, path: Sequence[str], made: tuple[str, Properties]) -> tuple[str, Properties]:
    """Return what makes a Pod."""
    inner: Properties = {"metadata": {}, "spec": made[1]["spec"]}
    for key in reversed(path):
        inner = {key: inner}
    return f"kubernetes:{kind}", {"metadata": made[1]["metadata"], **inner}


UNBOUNDED = pod(resources={"limits": {"cpu": "1"}})
LATEST = pod(image="example.com:5000/app:latest")
# Whatever makes Pods, and where in it they are.
MAKERS = {
    "apps/v1:Deployment": ("spec", "template"),
    "apps/v1:StatefulSet": ("spec", "template"),
    "apps/v1:DaemonSet": ("spec", "template"),
    "apps/v1:ReplicaSet": ("spec", "template"),
    "batch/v1:Job": ("spec", "template"),
    "batch/v1:CronJob": ("spec", "jobTemplate", "spec", "template"),
    "core/v1:ReplicationController": ("spec", "template"),
    "core/v1:PodTemplate": ("template",),
}
SANDBOX = make_objects().job
SANDBOX_TYPE = "kubernetes:batch/v1:Job"
EVALUATIONS = service_names.EVALUATION_NAMESPACE


def bucket_stack(without: str = "") -> dict[str, tuple[str, Properties]]:
    parts = {"block": (BLOCK, CLOSED), "encryption": sse(), "policy": (BUCKET_POLICY, {"policy": policy(TLS_ONLY)})}
    made: dict[str, tuple[str, Properties]] = {"data": (BUCKET, {"bucket": UNKNOWN})}
    return made | {
        name: (kind, given | {"bucket": UNKNOWN}) for name, (kind, given) in parts.items() if name != without
    }


OF_BUCKET = {(part, "bucket"): "data" for part in ("block", "encryption", "policy")}

PASSES: dict[str, list[Case]] = {
    "disks-encrypted": [
        Case((TEMPLATE, LAUNCH)),
        Case(("aws:ebs/volume:Volume", {"encrypted": True})),
        Case((INSTANCE, {"launchTemplate": {"id": UNKNOWN}})),
    ],
    "own-keys": [
        Case(("aws:cloudwatch/logGroup:LogGroup", {"kmsKeyId": KEY_ARN})),
        Case((REPOSITORY, {"encryptionConfigurations": [{"encryptionType": "KMS", "kmsKey": KEY_ARN}]})),
        Case((CLUSTER, {"encryptionConfig": {"provider": {"keyArn": KEY_ARN}, "resources": ["secrets"]}})),
        Case((PARAMETER, {"type": "String", "value": "x"})),
    ],
    "keys-rotated": [
        Case((KEY, {"enableKeyRotation": True})),
        Case((KEY, {"customerMasterKeySpec": "ECC_NIST_P256", "keyUsage": "SIGN_VERIFY"})),
    ],
    "buckets-private": [Case((BLOCK, CLOSED)), Case((BUCKET, {"bucket": "a"})), Case((BUCKET, {"acl": "private"}))],
    "buckets-closed": [
        Case(bucket_stack(), sources=OF_BUCKET),
        Case(
            {"data": (BUCKET, {"bucket": "a"})}
            | {part: (kind, {"bucket": "a"}) for part, kind in (("b", BLOCK), ("e", ENCRYPTION), ("p", BUCKET_POLICY))}
        ),
    ],
    "buckets-encrypted": [Case(sse(sseAlgorithm="aws:kms", kmsMasterKeyId=KEY_ARN))],
    "buckets-own-keys": [
        Case(
            {"b": (BUCKET, {}), "e": sse(sseAlgorithm="aws:kms", kmsMasterKeyId=UNKNOWN)},
            sources={("e", "bucket"): "b"},
        ),
        Case(
            {"b": (BUCKET, {}), "e": sse(sseAlgorithm="AES256"), "l": (LOGGING, {"targetPrefix": "x/"})},
            sources={("e", "bucket"): "b", ("l", "targetBucket"): "b"},
        ),
    ],
    "encrypted-in-transit": [
        Case(
            (BUCKET_POLICY, {"policy": policy(allow("s3:GetObject", BUCKET_ARN, Principal=ACCOUNT_ITSELF), TLS_ONLY)})
        ),
        Case((CACHE, {"transitEncryptionEnabled": True})),
        Case((LISTENER, {"protocol": "HTTP", "defaultActions": [{"type": "redirect"}]})),
        Case(("aws:memorydb/cluster:Cluster", {})),
    ],
    "no-open-ingress": [
        Case((INGRESS, {"cidrIpv4": "10.0.0.0/8", "ipProtocol": "tcp"})),
        Case((INGRESS, {"referencedSecurityGroupId": UNKNOWN, "ipProtocol": "-1"})),
        Case((GROUP, {"egress": [{"cidrBlocks": ["0.0.0.0/0"]}], "vpcId": UNKNOWN})),
        Case(("aws:ec2/securityGroupRule:SecurityGroupRule", {"type": "egress", "cidrBlocks": ["0.0.0.0/0"]})),
    ],
    "cluster-endpoint-closed": [
        Case((CLUSTER, {"vpcConfig": {"endpointPrivateAccess": True, "endpointPublicAccess": False}})),
        Case((CLUSTER, {"vpcConfig": {"endpointPrivateAccess": True, "publicAccessCidrs": ["192.0.2.0/24"]}})),
    ],
    "nothing-public": [
        Case(("aws:rds/instance:Instance", {"publiclyAccessible": False})),
        Case(("aws:ec2/subnet:Subnet", {"mapPublicIpOnLaunch": False})),
        Case(("aws:lambda/functionUrl:FunctionUrl", {"authorizationType": "AWS_IAM"})),
    ],
    "iam-names-what-it-changes": [
        Case(role_policy(allow(["s3:PutObject"], f"{BUCKET_ARN}/*"), allow(["ec2:DescribeInstances", "s3:List*"]))),
        Case(role_policy({"Effect": "Deny", "Action": "*", "Resource": "*"})),
        Case(role_policy(allow("cloudwatch:PutMetricData"))),
        Case((KEY, {"policy": policy(allow("kms:*", Principal=ACCOUNT_ITSELF))})),
    ],
    "iam-no-broad-managed-policies": [
        Case(("aws:iam/rolePolicyAttachment:RolePolicyAttachment", {"policyArn": f"arn:aws:iam::aws:policy/{name}"}))
        for name in ("AmazonEKSWorkerNodePolicy", "AmazonEC2ContainerRegistryPullOnly", "AmazonSSMManagedInstanceCore")
    ],
    "trust-names-who": [
        Case(trust({"Service": "ec2.amazonaws.com"})),
        Case(trust(OIDC, Condition={"StringEquals": {SUBJECT: "repo:example/crucible:environment:production"}})),
        Case((KEY, {"policy": policy(allow("kms:*", Principal=ACCOUNT_ITSELF))})),
        Case((KEY, {"policy": policy(allow(["kms:Decrypt*"], Principal={"Service": "logs.amazonaws.com"}))})),
        Case((BUCKET_POLICY, {"policy": policy(TLS_ONLY)})),
        Case(
            (
                "aws:sns/topicPolicy:TopicPolicy",
                {
                    "policy": policy(
                        allow("sns:Publish", Principal="*", Condition={"StringEquals": {"aws:SourceAccount": ACCOUNT}})
                    )
                },
            )
        ),
    ],
    "no-long-lived-keys": [Case(("aws:iam/user:User", {"name": "break-glass"}))],
    "imdsv2": [
        Case((TEMPLATE, LAUNCH)),
        Case((TEMPLATE, {"metadataOptions": {"httpEndpoint": "disabled"}})),
        Case((INSTANCE, {"launchTemplate": {"id": UNKNOWN}})),
    ],
    "al2023-only": [
        Case((NODE_GROUP, {"amiType": "AL2023_ARM_64_STANDARD"})),
        Case((TEMPLATE, {"imageId": AL2023})),
        Case((TEMPLATE, LAUNCH)),
    ],
    "groups-follow-templates": [
        Case(
            {
                "template": (TEMPLATE, LAUNCH),
                "nodes": (NODE_GROUP, {"launchTemplate": {"id": UNKNOWN, "version": UNKNOWN}}),
            },
            sources={("nodes", "launchTemplate"): "template"},
        ),
        Case(
            {"template": (TEMPLATE, LAUNCH), "nat": (SCALING_GROUP, {"launchTemplate": {"id": UNKNOWN}})},
            sources={("nat", "launchTemplate"): "template"},
        ),
    ],
    "sandbox-nodes": [
        Case((NODE_GROUP, {"labels": {"role": "platform"}})),
        Case(
            (
                NODE_GROUP,
                {
                    "labels": {service_names.LABEL_SANDBOX_NODE: "true"},
                    "taints": [{"key": service_names.TAINT_SANDBOX, "value": "true", "effect": "NO_SCHEDULE"}],
                },
            )
        ),
    ],
    "ecr-immutable": [Case((REPOSITORY, {"imageTagMutability": "IMMUTABLE"}))],
    "images-pinned": [
        Case(pod()),
        Case(pod(image="example.com:5000/app:1.2.3")),
        Case((FUNCTION, {"imageUri": f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com/probe:1"})),
    ],
    "container-limits": [
        Case(pod()),
        Case(
            (
                "kubernetes:core/v1:Pod",
                {"spec": {"containers": [{"name": "app"}], "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}},
            )
        ),
        Case(
            ("kubernetes:apps/v1:DeploymentPatch", {"spec": {"template": {"spec": {"containers": [{"name": "app"}]}}}})
        ),
    ],
    "sandbox-pods": [
        Case((SANDBOX_TYPE, SANDBOX)),
        Case(("kubernetes:core/v1:Pod", pod_of(SANDBOX))),
        Case(pod(namespace="crucible")),
    ],
    "sandbox-kinds": [
        Case((SANDBOX_TYPE, SANDBOX)),
        Case(("kubernetes:core/v1:ConfigMap", {"metadata": {"namespace": EVALUATIONS}})),
        Case(("kubernetes:networking.k8s.io/v1:NetworkPolicy", {"metadata": {"namespace": EVALUATIONS}})),
        Case(("kubernetes:core/v1:Secret", {"metadata": {"namespace": "crucible"}})),
        Case(("kubernetes:helm.sh/v3:Release", {"namespace": "argocd"})),
    ],
    "sandbox-guards": [
        Case(("kubernetes:node.k8s.io/v1:RuntimeClass", {"metadata": {"name": "gvisor"}, "handler": "runsc"})),
        Case(("kubernetes:core/v1:Namespace", {"metadata": {"name": "argocd"}})),
    ],
    "no-plaintext-secrets": [
        Case(pod(env=[{"name": "PASSWORD_FILE", "value": "/run/secrets/x"}, {"name": "TOKEN_SECONDS", "value": "60"}])),
        Case(pod(env=[{"name": "DB_PASSWORD", "valueFrom": {"secretKeyRef": {"name": "db", "key": "password"}}}])),
        Case(pod(args=["--url=postgres://$(USER):$(PASSWORD)@db/crucible"])),
        Case((FUNCTION, {"environment": {"variables": {"SECRET_ARN": "arn:aws:secretsmanager:::secret:x"}}})),
        Case((PARAMETER, {"type": "SecureString", "name": "/db/password", "value": UNKNOWN})),
    ],
    "no-secrets-from-programs": [
        Case(("kubernetes:external-secrets.io/v1:ExternalSecret", {"spec": {"data": [{"secretKey": "password"}]}})),
        Case(("kubernetes:core/v1:Secret", {"metadata": {"name": "filled-by-others"}})),
    ],
    "secrets-are-made": [
        Case({"v": (SECRET_VERSION, {"secretString": "made"})}, sources={("v", "secretString"): "random"}),
        Case({"v": (SECRET_VERSION, {"secretString": UNKNOWN})}),
        Case({"v": (SECRET_VERSION, {"secretId": "x"})}),
        Case({"db": ("aws:rds/cluster:Cluster", {"manageMasterUserPassword": True})}),
        Case({"p": (PARAMETER, {"type": "String", "value": "eu-central-1"})}),
    ],
    "required-tags": [
        Case(("aws:ec2/vpc:Vpc", {"tagsAll": TAGS})),
        Case(("aws:ec2/route:Route", {}), provider=PROVIDED),
        Case(("aws:ec2/vpc:Vpc", {"tags": TAGS})),
        Case((TEMPLATE, LAUNCH), provider=PROVIDED),
        Case((SCALING_GROUP, {"tags": [{"key": k, "value": v, "propagateAtLaunch": True} for k, v in TAGS.items()]})),
        Case(("kubernetes:core/v1:Namespace", {"metadata": {"name": "x"}})),
    ],
}

REFUSES: dict[str, list[Case]] = {
    "disks-encrypted": [
        *(
            Case((kind, {}), (f"{switch} is off; set it to true",))
            for kind, switch in pack("storage").ENCRYPTED_BY.items()
        ),
        Case((TEMPLATE, {}), ("name the root device with ebs.encrypted true",)),
        Case(
            (TEMPLATE, {"blockDeviceMappings": [{"ebs": {"encrypted": "true"}}, {"ebs": {"encrypted": "false"}}]}),
            ("blockDeviceMappings[1].ebs.encrypted is off",),
        ),
        Case((INSTANCE, {"rootBlockDevice": {"encrypted": True}, "ebsBlockDevices": [{}]}), ("ebsBlockDevices[0].encrypted",)),
        Case((INSTANCE, {}), ("rootBlockDevice.encrypted is off",)),
    ],
    "own-keys": [
        *(Case((kind, {}), (f"{key} is not set; name a key",)) for kind, key in pack("storage").KEY_NAMED_BY.items()),
        Case(("aws:sns/topic:Topic", {"kmsMasterKeyId": "alias/aws/sns"}), ("is alias/aws/sns, a key of AWS",)),
        Case((PARAMETER, {"type": "SecureString"}), ("keyId is not set",)),
        Case((REPOSITORY, {}), ("encryptionConfigurations[0].encryptionType is not KMS",)),
        Case((REPOSITORY, {"encryptionConfigurations": [{"encryptionType": "KMS"}]}), ("[0].kmsKey is not set",)),
        Case((CLUSTER, {}), ("encryptionConfig.provider.keyArn is not set",)),
    ],
    "keys-rotated": [
        Case((KEY, {}), ("enableKeyRotation is off; set it to true",)),
        Case((KEY, {"enableKeyRotation": False}), ("enableKeyRotation",)),
    ],
    "buckets-private": [
        *(Case((BLOCK, {**CLOSED, block: False}), (f"{block} is off; set it to true",)) for block in CLOSED),
        Case(("aws:s3/accountPublicAccessBlock:AccountPublicAccessBlock", {}), tuple(CLOSED)),
        Case((BUCKET, {"acl": "public-read"}), ("acl is public-read; leave it out",)),
        Case(("aws:s3/bucketAcl:BucketAcl", {"acl": "authenticated-read"}), ("acl is authenticated-read",)),
        Case(
            (BUCKET, {"grants": [{"type": "Group", "uri": "http://acs.amazonaws.com/groups/global/AllUsers"}]}),
            ("grants[0].uri is everybody",),
        ),
        Case(
            (
                "aws:s3/bucketAcl:BucketAcl",
                {
                    "accessControlPolicy": {
                        "grants": [{"grantee": {"uri": "http://acs.amazonaws.com/groups/global/AuthenticatedUsers"}}]
                    }
                },
            ),
            ("accessControlPolicy.grants[0].grantee.uri is everybody",),
        ),
    ],
    "buckets-closed": [
        Case(bucket_stack(without="block"), ("data: the bucket has no BucketPublicAccessBlock",), OF_BUCKET),
        Case(
            bucket_stack(without="encryption"), ("data: the bucket has no BucketServerSideEncryptionConfiguration",), OF_BUCKET
        ),
        Case(bucket_stack(without="policy"), ("data: the bucket has no BucketPolicy",), OF_BUCKET),
        Case(  # that of another
            bucket_stack() | {"other": (BUCKET, {})},
            ("other: the bucket has no BucketPub", "other: the bucket has no BucketServer", "other: the bucket has no BucketPol"),
            OF_BUCKET,
        ),
    ],
    "buckets-encrypted": [
        Case(sse(sseAlgorithm="none"), ("rules[0].applyServerSideEncryptionByDefault.sseAlgorithm is none; set it to aws:kms",)),
        Case(sse(sseAlgorithm="aws:kms"), (".kmsMasterKeyId is not set",)),
        Case((ENCRYPTION, {"rules": []}), ("rules is empty",)),
    ],
    "buckets-own-keys": [
        Case({"e": sse(sseAlgorithm="AES256")}, ("e: rules say AES256",)),
        Case(
            {"b": (BUCKET, {}), "other": (BUCKET, {}), "e": sse(sseAlgorithm="AES256"), "l": (LOGGING, {"targetPrefix": "x/"})},
            ("e: rules say AES256",),
            sources={("e", "bucket"): "b", ("l", "targetBucket"): "other"},
        ),
    ],
    "encrypted-in-transit": [
        Case((BUCKET_POLICY, {"policy": policy()}), ("policy lets plain HTTP through; add a Deny",)),
        *(
            Case((BUCKET_POLICY, {"policy": policy({**TLS_ONLY, **less})}), ("policy lets plain HTTP through",))
            for less in (
                {"Effect": "Allow"},
                {"Action": "s3:GetObject"},
                {"Principal": ACCOUNT_ITSELF},
                {"Resource": BUCKET_ARN},
                {"Condition": {"Bool": {"aws:SecureTransport": "true"}}},
            )
        ),
        Case((CACHE, {}), ("transitEncryptionEnabled is off",)),
        Case(("aws:memorydb/cluster:Cluster", {"tlsEnabled": False}), ("tlsEnabled is off",)),
        Case((LISTENER, {"protocol": "HTTP", "defaultActions": [{"type": "forward"}]}), ("protocol is HTTP",)),
    ],
    "no-open-ingress": [
        Case((INGRESS, {"cidrIpv4": "0.0.0.0/0"}), ("cidrIpv4 is 0.0.0.0/0, which is everybody",)),
        Case((INGRESS, {"cidrIpv4": "128.0.0.0/1"}), ("cidrIpv4 is 128.0.0.0/1",)),
        Case((INGRESS, {"cidrIpv6": "::/0"}), ("cidrIpv6 is ::/0",)),
        Case((INGRESS, {"cidrIpv6": "2000::/3"}), ("cidrIpv6 is 2000::/3",)),
        Case(
            (GROUP, {"ingress": [{"cidrBlocks": ["10.0.0.0/8"]}, {"cidrBlocks": ["0.0.0.0/0"], "ipv6CidrBlocks": ["::/0"]}]}),
            ("ingress[1].cidrBlocks is 0.0.0.0/0", "ingress[1].ipv6CidrBlocks is ::/0"),
        ),
        Case(
            ("aws:ec2/securityGroupRule:SecurityGroupRule", {"type": "ingress", "cidrBlocks": ["0.0.0.0/0"]}),
            ("cidrBlocks is 0.0.0.0/0",),
        ),
        Case((NODE_GROUP, {"remoteAccess": {"ec2SshKey": "mine"}}), ("remoteAccess has no sourceSecurityGroupIds",)),
    ],
    "cluster-endpoint-closed": [
        Case((CLUSTER, {"vpcConfig": {"endpointPrivateAccess": True}}), ("publicAccessCidrs is not set, which means 0.0.0.0/0",)),
        Case((CLUSTER, {"vpcConfig": {"endpointPublicAccess": False}}), ("endpointPrivateAccess is off",)),
        Case(
            (CLUSTER, {"vpcConfig": {"endpointPrivateAccess": True, "publicAccessCidrs": ["192.0.2.0/24", "0.0.0.0/0"]}}),
            ("publicAccessCidrs has 0.0.0.0/0, which is everybody",),
        ),
    ],
    "nothing-public": [
        Case(("aws:rds/instance:Instance", {"publiclyAccessible": True}), ("publiclyAccessible is true; set it to false",)),
        Case(("aws:mq/broker:Broker", {"publiclyAccessible": True}), ("publiclyAccessible is true",)),
        Case(("aws:ec2/subnet:Subnet", {"mapPublicIpOnLaunch": True}), ("mapPublicIpOnLaunch is true",)),
        Case(("aws:lambda/functionUrl:FunctionUrl", {"authorizationType": "NONE"}), ("anybody may call the function",)),
    ],
    "iam-names-what-it-changes": [
        Case(role_policy(allow("*", BUCKET_ARN)), ("policy.Statement[0]: Action has *; name the actions",)),
        Case(role_policy(allow("s3:*", BUCKET_ARN)), ("Action has s3:*",)),
        Case(role_policy(allow("s3:?*", BUCKET_ARN)), ("Action has s3:?*",)),
        Case(role_policy(allow("ec2:DescribeInstances"), allow("ec2:TerminateInstances")), ("Statement[1]: ec2:TerminateInstances on",)),
        Case(role_policy(allow("s3:PutObject", "arn:aws:s3:::*")), ("s3:PutObject on every resource; name the resources",)),
        Case(role_policy(allow("iam:Pass*")), ("iam:Pass* on every resource",)),
        Case(role_policy(allow("secretsmanager:Get*")), ("secretsmanager:Get* on every resource",)),
        Case(role_policy(allow(["s3:GetObject", "s3:ListAllMyBuckets"])), ("s3:GetObject on every resource",)),
        Case(role_policy({"Effect": "Allow", "NotAction": "iam:*", "Resource": BUCKET_ARN}), ("NotAction allows all",)),
        Case(role_policy({"Effect": "Allow", "Action": "s3:PutObject", "NotResource": BUCKET_ARN}), ("NotResource allows all",)),
        Case(("aws:iam/policy:Policy", {"policy": "{"}), ("policy is no policy document",)),
        Case(("aws:iam/policy:Policy", {"policy": {"Statement": allow("s3:*")}}), ("policy.Statement[0]: Action has s3:*",)),
        Case(
            ("aws:iam/role:Role", {"inlinePolicies": [{"policy": policy(allow("ec2:RunInstances"))}]}),
            ("inlinePolicies[0].policy.Statement[0]: ec2:RunInstances on every resource",),
        ),
        *(Case((kind, {"policy": policy(allow("*"))}), ("Action has *",)) for kind in sorted(pack("identity").IDENTITY_POLICIES)),
    ],
    "iam-no-broad-managed-policies": [
        *(
            Case((kind, {"policyArn": "arn:aws:iam::aws:policy/AdministratorAccess"}), ("policyArn is AdministratorAccess",))
            for kind in sorted(pack("identity").ATTACHMENTS)
        ),
        Case(
            ("aws:iam/role:Role", {"managedPolicyArns": ["arn:aws:iam::aws:policy/AmazonS3FullAccess"]}),
            ("managedPolicyArns is AmazonS3FullAccess",),
        ),
        Case(
            (
                "aws:iam/rolePolicyAttachment:RolePolicyAttachment",
                {"policyArn": "arn:aws:iam::aws:policy/job-function/PowerUserAccess"},
            ),
            ("policyArn is PowerUserAccess",),
        ),
    ],
    "trust-names-who": [
        Case(trust("*"), ("assumeRolePolicy.Statement[0]: Principal has a *; name who may take the role",)),
        Case(trust({"AWS": "*"}, Condition={"StringEquals": {"aws:PrincipalOrgID": "o-1"}}), ("Principal has a *",)),
        Case(trust(OIDC), ("trusted for every subject",)),
        Case(trust(OIDC, Condition={"StringLike": {SUBJECT: "repo:example/*"}}), ("or for a pattern of them",)),
        Case(trust(OIDC, Condition={"StringEqualsIfExists": {SUBJECT: "repo:example/crucible:ref:refs/heads/main"}}), (":sub",)),
        Case((BUCKET_POLICY, {"policy": policy(allow("s3:GetObject", BUCKET_ARN, Principal="*"))}), ("Principal has a *",)),
        *(
            Case(
                (BUCKET_POLICY, {"policy": policy(allow("s3:GetObject", BUCKET_ARN, Principal="*", Condition=condition))}),
                ("Principal has a *, which is everybody",),
            )
            for condition in (
                {"StringNotEquals": {"aws:PrincipalOrgID": "o-1"}},
                {"StringLike": {"aws:PrincipalArn": "*"}},
                {"Bool": {"aws:SecureTransport": "true"}},
            )
        ),
        Case((KEY, {"policy": policy(allow("kms:Decrypt", Principal={"AWS": "*"}))}), ("policy.Statement[0]: Principal has a *",)),
        Case(
            (KEY, {"policy": policy(allow("kms:*", Principal={"AWS": f"arn:aws:iam::{ACCOUNT}:role/ci"}))}),
            ("all of kms is allowed to arn:aws:iam::111111111111:role/ci",),
        ),
        Case((KEY, {"policy": policy(allow("kms:*", Principal={"Service": "s3.amazonaws.com"}))}), ("all of kms is allowed to",)),
        Case(("aws:lambda/permission:Permission", {"principal": "*"}), ("principal is *",)),
        Case(("aws:secretsmanager/secretPolicy:SecretPolicy", {"policy": "no"}), ("policy is no policy document",)),
    ],
    "no-long-lived-keys": [Case(("aws:iam/accessKey:AccessKey", {"user": "ci"}), ("an access key never ends",))],
    "imdsv2": [
        Case((TEMPLATE, {}), ("metadataOptions.httpTokens is not required", "httpPutResponseHopLimit is not 1")),
        Case(
            (TEMPLATE, {"metadataOptions": {"httpTokens": "required", "httpPutResponseHopLimit": 2}}),
            ("metadataOptions.httpPutResponseHopLimit is not 1",),
        ),
        Case(
            (INSTANCE, {"metadataOptions": {"httpTokens": "optional", "httpPutResponseHopLimit": 1}}),
            ("metadataOptions.httpTokens is not required",),
        ),
    ],
    "al2023-only": [
        *(
            Case((NODE_GROUP, {"amiType": kind}), (f"amiType is {kind}; set it to AL2023",))
            for kind in ("AL2_x86_64", "BOTTLEROCKET_x86_64", "CUSTOM", "WINDOWS_CORE_2022_x86_64")
        ),
        Case((NODE_GROUP, {}), ("amiType is not set",)),
        Case((TEMPLATE, {"imageId": "ami-0123456789abcdef0"}), ("imageId is ami-0123456789abcdef0, which does not say",)),
        Case((TEMPLATE, {"imageId": "resolve:ssm:/aws/service/ami-amazon-linux-latest/amzn2-ami-hvm"}), ("imageId is",)),
        Case((INSTANCE, {"ami": "ami-0123456789abcdef0"}), ("ami is ami-0123456789abcdef0",)),
        Case((CLUSTER, {"computeConfig": {"enabled": True}}), ("computeConfig.enabled gives nodes of EKS Auto Mode",)),
    ],
    "groups-follow-templates": [
        Case({"nodes": (NODE_GROUP, {})}, ("nodes: launchTemplate is no launch template of this stack",)),
        Case(
            {"template": (TEMPLATE, LAUNCH), "nodes": (NODE_GROUP, {"launchTemplate": {"id": "lt-1"}})},
            ("nodes: launchTemplate is no launch template of this stack",),
        ),
        Case({"nat": (SCALING_GROUP, {"launchConfiguration": "x"})}, ("nat: launchTemplate is no launch template",)),
    ],
    "sandbox-nodes": [
        Case((NODE_GROUP, {"labels": {service_names.LABEL_SANDBOX_NODE: "true"}}), ("taints lacks crucible.dev/sandbox",)),
        Case(
            (
                NODE_GROUP,
                {
                    "labels": {service_names.LABEL_SANDBOX_NODE: "true"},
                    "taints": [{"key": service_names.TAINT_SANDBOX, "effect": "PREFER_NO_SCHEDULE"}],
                },
            ),
            ("taints lacks crucible.dev/sandbox with NO_SCHEDULE",),
        ),
    ],
    "ecr-immutable": [
        Case((REPOSITORY, {}), ("imageTagMutability is not set, which means MUTABLE; set it to IMMUTABLE",)),
        *(
            Case((REPOSITORY, {"imageTagMutability": kind}), (f"imageTagMutability is {kind};",))
            for kind in ("MUTABLE", "IMMUTABLE_WITH_EXCLUSION")
        ),
    ],
    "images-pinned": [
        Case(LATEST, ("spec.containers[0].image is example.com:5000/app:latest; name a version",)),
        Case(pod(image="example.com:5000/app"), ("which has no tag and so means latest",)),
        *(
            Case(within(kind, path, LATEST), (f"{'.'.join((*path, 'spec'))}.containers[0].image is",))
            for kind, path in MAKERS.items()
        ),
        Case(
            ("kubernetes:core/v1:PodList", {"items": [pod()[1], LATEST[1]]}),
            ("items[1].spec.containers[0].image is example.com:5000/app:latest",),
        ),
        Case(
            ("kubernetes:core/v1:Pod", {"spec": {"initContainers": [{"image": "busybox"}], "volumes": [{"image": {"reference": "data:latest"}}]}}),
            ("spec.initContainers[0].image is busybox", "spec.volumes[0].image.reference is data:latest"),
        ),
        Case((FUNCTION, {"imageUri": "example.com/probe:latest"}), ("imageUri is example.com/probe:latest",)),
    ],
    "container-limits": [
        Case(UNBOUNDED, ("spec.containers[0] (app).resources.limits lacks memory; say how much it may take",)),
        Case(pod(resources={}), ("lacks cpu and memory",)),
        *(
            Case(within(kind, path, UNBOUNDED), (f"{'.'.join((*path, 'spec'))}.containers[0] (app).resources.limits",))
            for kind, path in MAKERS.items()
        ),
        Case(("kubernetes:core/v1:Pod", {"spec": {"initContainers": [{"name": "first"}]}}), ("spec.initContainers[0] (first)",)),
    ],
    "sandbox-pods": [
        Case((SANDBOX_TYPE, changed(SANDBOX, ("spec", "backoffLimit"), 1)), ("spec: a Job is one attempt",)),
        Case((SANDBOX_TYPE, changed(SANDBOX, ("spec", "ttlSecondsAfterFinished"), 1)), ("spec: a Job stays until",)),
        Case(
            ("kubernetes:core/v1:Pod", changed(pod_of(SANDBOX), ("metadata", "labels", "crucible.dev/attempt"), ...)),
            ("spec: an evaluation says which one it is",),
        ),
        # the provider's namespace is meant where none is named
        Case(
            (SANDBOX_TYPE, changed(changed(SANDBOX, ("metadata", "namespace"), ...), ("spec", "completions"), 2)),
            ("spec: a Job is one attempt",),
            provider={"namespace": EVALUATIONS},
        ),
    ],
    "sandbox-kinds": [
        *(
            Case((f"kubernetes:any/v1:{kind}", {"metadata": {"namespace": EVALUATIONS}}), (f"a {kind} cannot be made",))
            for kind in sorted(pack("sandbox").REFUSED_KINDS)
        ),
        Case(("kubernetes:helm.sh/v3:Release", {"namespace": EVALUATIONS}), ("a Helm release cannot be made",)),
    ],
    "sandbox-guards": [
        Case(
            ("kubernetes:node.k8s.io/v1:RuntimeClass", {"metadata": {"name": "gvisor"}, "handler": "runc"}),
            ("so its handler must be runsc",),
        ),
        Case(
            ("kubernetes:scheduling.k8s.io/v1:PriorityClass", {"metadata": {"name": "crucible-evaluation"}, "value": 5}),
            ("its value must be negative",),
        ),
        Case(("kubernetes:core/v1:Namespace", {"metadata": {"name": EVALUATIONS}}), ("enforce=restricted",)),
        Case(
            (
                "kubernetes:admissionregistration.k8s.io/v1:ValidatingAdmissionPolicy",
                {"metadata": {"name": "crucible-evaluation-pods"}, "spec": {"failurePolicy": "Ignore"}},
            ),
            ("spec.failurePolicy: a rule that cannot be evaluated must refuse",),
        ),
        Case(
            (
                "kubernetes:admissionregistration.k8s.io/v1:ValidatingAdmissionPolicyBinding",
                {"metadata": {"name": "crucible-evaluation-pods"}, "spec": {"validationActions": ["Warn", "Audit"]}},
            ),
            ("spec.validationActions: a rule that only warns holds nothing",),
        ),
    ],
    "no-plaintext-secrets": [
        Case(pod(env=[{"name": "DB_PASSWORD", "value": "hunter2"}]), ("spec.containers[0].env[0].value is a secret by its name",)),
        Case(pod(args=["--key", AWS_KEY]), ("spec.containers[0].args[1] holds an access key of AWS",)),
        Case(pod(command=["psql", "postgres://me:hunter2@db/x"]), ("command[1] holds an address with a password",)),
        Case(
            ("kubernetes:core/v1:ConfigMap", {"data": {"tls.pem": "-----BEGIN EC PRIVATE KEY-----\n"}}),
            ("data.tls.pem holds a private key",),
        ),
        Case(
            ("kubernetes:core/v1:Service", {"metadata": {"annotations": {"x/api-key": "abc"}}}),
            ("metadata.annotations.x/api-key is a secret by its name",),
        ),
        Case((FUNCTION, {"environment": {"variables": {"HOOK": f"ghp_{'a' * 36}"}}}), ("variables.HOOK holds a token of GitHub",)),
        Case((PARAMETER, {"type": "String", "name": "/db/password", "value": "x1y"}), ("value is a secret by its name",)),
        Case(
            (TEMPLATE, {"userData": base64.b64encode(f"export A={AWS_KEY}".encode()).decode()}),
            ("userData holds an access key of AWS",),
        ),
        Case((INSTANCE, {"userData": f"export A={AWS_KEY}"}), ("userData holds an access key of AWS",)),
    ],
    "no-secrets-from-programs": [
        Case(("kubernetes:core/v1:Secret", {"data": {"password": "eA=="}}), ("data comes from the program; have an ExternalSecret",)),
        Case(("kubernetes:core/v1:Secret", {"stringData": {"password": UNKNOWN}}), ("stringData comes from the program",)),
    ],
    "secrets-are-made": [
        Case({"v": (SECRET_VERSION, {"secretString": "typed"})}, ("v: secretString comes from no resource",)),
        Case({"v": (SECRET_VERSION, {"secretBinary": "dHlwZWQ="})}, ("v: secretBinary comes from no resource",)),
        Case({"db": ("aws:rds/instance:Instance", {"password": "typed"})}, ("db: password comes from no resource",)),
        Case({"db": ("aws:rds/cluster:Cluster", {"masterPassword": "typed"})}, ("db: masterPassword",)),
        Case({"w": ("aws:redshift/cluster:Cluster", {"masterPassword": "typed"})}, ("w: masterPassword",)),
        Case({"c": (CACHE, {"authToken": "typed"})}, ("c: authToken",)),
        Case({"b": ("aws:mq/broker:Broker", {"users": [{"username": "a", "password": "typed"}]})}, ("b: users",)),
        Case({"p": (PARAMETER, {"type": "SecureString", "value": "typed"})}, ("p: value",)),
    ],
    "required-tags": [
        Case(("aws:ec2/vpc:Vpc", {}), ("tags lacks Project, Environment, ManagedBy; make it by the platform's provider",)),
        Case(("aws:ec2/vpc:Vpc", {"tagsAll": {**TAGS, "Project": ""}}), ("tags lacks Project;",)),
        Case(
            ("aws:ec2/vpc:Vpc", {"tags": {"ManagedBy": ""}}), ("tags lacks ManagedBy;",), provider={"defaultTags": {"tags": TAGS}}
        ),
        Case((SCALING_GROUP, {}), ("tags lacks Project, Environment, ManagedBy with propagateAtLaunch",), provider=PROVIDED),
        Case(
            (TEMPLATE, {"tagSpecifications": [{"resourceType": "instance", "tags": TAGS}]}),
            ("tagSpecifications lacks Project, Environment, ManagedBy for volume",),
            provider=PROVIDED,
        ),
    ],
}  # fmt: skip


def ids(value: object) -> str | None:
    return value.name if isinstance(value, (ResourceRule, StackRule)) else None


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_a_rule_lets_through_what_is_right(rule: Any) -> None:
    assert PASSES.get(rule.name), f"{rule.name} has no example of what it lets through"
    for case in PASSES[rule.name]:
        assert said(rule, case) == [], case


@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_a_rule_refuses_what_it_is_for_and_says_what_and_nothing_else(rule: Any) -> None:
    assert REFUSES.get(rule.name), f"{rule.name} has no example of what it refuses"
    for case in REFUSES[rule.name]:
        messages = said(rule, case)
        assert len(messages) == len(case.says), (case, messages)
        for part in case.says:
            assert sum(part in message for message in messages) == 1, (part, messages)


def test_there_are_no_examples_of_a_rule_that_is_gone_and_no_two_rules_of_one_name() -> None:
    assert [name for name, count in Counter(rule.name for rule in RULES).items() if count > 1] == []
    assert PASSES.keys() | REFUSES.keys() == BY_NAME.keys()


def examples() -> Iterator[tuple[str, Properties]]:
    for case in (case for cases in (*PASSES.values(), *REFUSES.values()) for case in cases):
        yield from case.given.values() if isinstance(case.given, dict) else [case.given]


def test_the_examples_are_of_resources_and_properties_that_there_are() -> None:
    """A rule for a property that is called otherwise would never refuse anything."""
    made = [
        Rehearsed(type_, "", given, "", "", frozenset(), False, True, "", {})
        for type_, given in examples()
        if type_.startswith("aws:")
    ]
    computed = {"tagsAll"}  # by the provider
    found = {
        unknown for each in made for unknown in unknown_properties(each) if unknown.rpartition(".")[2] not in computed
    }
    assert found == set()


def test_no_message_repeats_a_secret() -> None:
    for name in ("no-plaintext-secrets", "secrets-are-made"):
        for case in REFUSES[name]:
            text = " ".join(said(BY_NAME[name], case))
            assert not [secret for secret in ("hunter2", AWS_KEY, "ghp_", "typed", "x1y", "abc") if secret in text]


# -- what is not known yet


@pytest.mark.parametrize(
    ("rule", "type_", "properties"),
    [
        ("iam-names-what-it-changes", "aws:iam/rolePolicy:RolePolicy", {"policy": UNKNOWN}),
        ("iam-no-broad-managed-policies", "aws:iam/rolePolicyAttachment:RolePolicyAttachment", {"policyArn": UNKNOWN}),
        ("trust-names-who", KEY, {"policy": UNKNOWN}),
        ("encrypted-in-transit", BUCKET_POLICY, {"policy": UNKNOWN}),
        ("disks-encrypted", "aws:ebs/volume:Volume", {"encrypted": UNKNOWN}),
        ("imdsv2", TEMPLATE, {"metadataOptions": {"httpTokens": UNKNOWN}}),
        ("own-keys", "aws:cloudwatch/logGroup:LogGroup", {"kmsKeyId": UNKNOWN}),
        ("images-pinned", *pod(image=UNKNOWN)),
        ("no-plaintext-secrets", *pod(env=[{"name": "TOKEN", "value": UNKNOWN}])),
        ("required-tags", "aws:ec2/vpc:Vpc", {"tagsAll": UNKNOWN}),
        ("no-open-ingress", GROUP, {"ingress": UNKNOWN}),
    ],
)
def test_what_hangs_on_an_unknown_value_is_neither_refused_nor_let_through(
    rule: str, type_: str, properties: Properties
) -> None:
    with pytest.raises(NotYetKnown) as told:
        list(BY_NAME[rule].check(resource(type_, properties)))
    assert told.value.unknown == UNKNOWN
    assert str(told.value).split(".")[0] in properties


def test_what_is_wrong_before_an_unknown_value_is_told_all_the_same() -> None:
    two = {"ingress": [{"cidrBlocks": ["0.0.0.0/0"]}, {"cidrBlocks": UNKNOWN}]}
    messages = iter(BY_NAME["no-open-ingress"].check(resource(GROUP, two)))
    assert "ingress[0].cidrBlocks is 0.0.0.0/0" in next(messages)
    with pytest.raises(NotYetKnown, match=r"ingress\.1\.cidrBlocks"):
        next(messages)


def test_a_value_that_no_rule_asks_for_may_be_unknown() -> None:
    assert (
        list(
            BY_NAME["no-open-ingress"].check(resource(INGRESS, {"securityGroupId": UNKNOWN, "cidrIpv4": "10.0.0.0/8"}))
        )
        == []
    )


@pytest.mark.parametrize("rule", [rule for rule in RULES if isinstance(rule, StackRule)], ids=ids)
def test_a_rule_of_the_stack_is_decided_in_the_preview_since_it_is_asked_too_late_afterwards(rule: Any) -> None:
    kinds = {type_ for type_, _ in examples()}
    everything_unknown = [
        resource(kind, {key: UNKNOWN for type_, given in examples() if type_ == kind for key in given}, urn=kind)
        for kind in kinds
    ]
    list(rule.check(everything_unknown))


# -- the sandbox: the same words as in the cluster


@cache
def admission_messages(*files: str) -> set[str]:
    said_there = set()
    for file in files:
        for policy_ in yaml.safe_load_all((ADMISSION / file).read_text(encoding="utf-8")):
            said_there |= {rule["message"] for rule in policy_["spec"].get("validations", ()) if "message" in rule}
    return said_there


# Of the cluster's cases those that take the cluster's list of images.
ATTACKS = {name: case for name, case in LESS.items() if case[2] != "not on the list"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", ["Job", "Pod"])
def test_what_the_cluster_would_refuse_is_refused_in_the_same_words(attack: str, kind: str) -> None:
    path, value, says = ATTACKS[attack]
    if kind == "Job":
        given = SANDBOX_TYPE, changed(SANDBOX, ("spec", "template", "spec", *path), value)
    else:
        given = "kubernetes:core/v1:Pod", changed(pod_of(SANDBOX), ("spec", *path), value)
    messages = said(BY_NAME["sandbox-pods"], Case(given))
    assert [message for message in messages if says in message]
    words = {message.partition(": ")[2] for message in messages}
    assert words <= admission_messages("evaluation-pods.yaml")


def test_every_rule_of_the_cluster_for_evaluations_is_one_of_the_pack() -> None:
    refused = [case.given for case in REFUSES["sandbox-pods"]] + [
        (SANDBOX_TYPE, changed(SANDBOX, ("spec", "template", "spec", *path), value))
        for path, value, _ in ATTACKS.values()
    ]
    words = {
        message.partition(": ")[2]
        for type_, given in refused
        for message in BY_NAME["sandbox-pods"].check(resource(type_, given, provider={"namespace": EVALUATIONS}))
    }
    assert words == admission_messages("evaluation-pods.yaml", "evaluation-jobs.yaml")


def test_the_kinds_that_are_refused_are_the_clusters() -> None:
    [rule, _] = yaml.safe_load_all((ADMISSION / "evaluation-kinds.yaml").read_text(encoding="utf-8"))
    plurals = {
        kind
        for each in rule["spec"]["matchConstraints"]["resourceRules"]
        for kind in each["resources"]
        if "/" not in kind
    }
    ours = {kind.lower() for kind in pack("sandbox").REFUSED_KINDS}
    assert plurals == {kind if kind == "endpoints" else kind + ("es" if kind.endswith("ss") else "s") for kind in ours}


# -- names and patterns that are repeated


def test_names_are_those_of_the_services() -> None:
    ours = pack("names")
    repeated = {name for name in vars(ours) if name.isupper()} - {"REQUIRED_TAGS"}
    assert {name: getattr(ours, name) for name in repeated} == {name: getattr(service_names, name) for name in repeated}


def test_the_required_tags_are_those_that_the_platforms_provider_gives() -> None:
    assert set(pack("names").REQUIRED_TAGS) == Place(ACCOUNT, "eu-central-1", "dev").tags.keys()


def test_what_only_reads_is_the_same_for_the_pack_as_for_the_components() -> None:
    assert pack("identity").READS.pattern == iam._READS.pattern


# -- the platform itself


@pytest.fixture(scope="module")
def platform() -> Iterator[dict[str, list[Any]]]:
    """Return all that each stack registers, as the engine would show it to the rules."""

    def shown(made: Rehearsal) -> list[Any]:
        providers = {each.urn: each.inputs for each in made.resources if each.type.startswith("pulumi:providers:")}
        return [
            resource(
                each.type,
                each.inputs,
                name=each.name,
                urn=each.urn,
                provider=providers.get(each.provider),
                came_from=each.came_from,
            )
            for each in made.resources
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ORGANISATION_VARIABLE, str(ROOT / EXAMPLE_FILE))
        yield {name: shown(rehearse_platform(name, whole_stack(name))) for name in STACKS}


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("rule", RULES, ids=ids)
def test_the_platform_passes(platform: dict[str, list[Any]], name: str, rule: Any) -> None:
    if isinstance(rule, StackRule):
        found = [f"{each.type} {each.name}: {message}" for each, message in rule.check(platform[name])]
    else:
        found = [f"{each.type} {each.name}: {message}" for each in platform[name] for message in rule.check(each)]
    assert found == []


def test_the_platform_would_not_pass_without_its_providers_tags(platform: dict[str, list[Any]]) -> None:
    vpc = next(each for each in platform["production"] if each.type == "aws:ec2/vpc:Vpc")
    alone = resource(vpc.type, dict(vpc.properties))
    assert list(BY_NAME["required-tags"].check(alone)) != []


def test_references_between_resources_reach_the_rules(platform: dict[str, list[Any]]) -> None:
    association = next(
        each for each in platform["production"] if each.type == "aws:ec2/routeTableAssociation:RouteTableAssociation"
    )
    [source] = association.came_from["subnetId"]
    assert "aws:ec2/subnet:Subnet" in source


# -- the pack as a whole


def test_the_page_has_a_row_for_each_rule_that_says_what_the_rule_says() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [tuple(row) for row in rows] == [(rule.name, rule.refuses, rule.because, rule.instead) for rule in RULES]


def test_the_packs_environment_has_pulumi_policy_and_hashes_and_no_addresses() -> None:
    locked = (PACK / "requirements.txt").read_text(encoding="utf-8")
    wanted = (PACK / "requirements.in").read_text(encoding="utf-8").split()
    pinned = re.findall(r"^(\S+==\S+)", locked, re.MULTILINE)
    assert wanted
    assert set(wanted) <= set(pinned)
    assert len(re.findall(r"^\S+==\S+ .*\\\n    --hash=sha256:", locked, re.MULTILINE)) == len(pinned)
    assert "://" not in locked
