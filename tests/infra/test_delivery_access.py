"""Who delivers: whom each role trusts, what it may do and never does, and that taking the one for emergencies is noticed."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Any

import pulumi
import pytest
from pydantic import ValidationError

from crucible_platform.delivery_access import (
    AUDIENCE,
    GITHUB,
    BreakGlass,
    DeliveryAccess,
    DeliveryConfig,
    StateBackend,
    subject,
)
from crucible_platform.delivery_rights import BOUNDARY, LARGEST_ATTACHED, LARGEST_INLINE, TRAIL, WRITES
from crucible_platform.iam import Deny
from crucible_platform.place import Place
from crucible_platform.registry import Registry, RegistryConfig
from crucible_platform.rehearsal import Rehearsal, rehearse, unknown_properties
from crucible_platform.section import Section

pytestmark = pytest.mark.unit

ACCOUNT = "111111111111"
IAM = f"arn:aws:iam::{ACCOUNT}"
REPOSITORY = "example/crucible"
STATE = StateBackend(bucket="example-pulumi-state", key_arn=f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/0a1b-2c3d")
STATE_OBJECT = "arn:aws:s3:::example-pulumi-state/.pulumi/stacks/crucible/dev.json"
ROLE, RULE = "aws:iam/role:Role", "aws:cloudwatch/eventRule:EventRule"


def rehearsed(
    config: DeliveryConfig | None = None,
    *,
    place: Place | None = None,
    users: tuple[str, ...] = ("on-call", "people/second"),
    organisation: str = "example",
    repository: str = REPOSITORY,
) -> Rehearsal:
    at = place or Place(ACCOUNT, "eu-central-1", "dev")

    def program() -> None:
        access = DeliveryAccess(
            config or DeliveryConfig(),
            at,
            organisation=organisation,
            repository=repository,
            alarm_email="on-call@example.org",
            registry=Registry(RegistryConfig(images=("runner", "service")), at),
            cluster_name=at.name,
            break_glass=BreakGlass(users=users),
            state=STATE,
        )
        pulumi.export("break_glass_role_arn", access.break_glass_role_arn)

    return rehearse(program, stack=at.stack)


@pytest.fixture(scope="module")
def made() -> Rehearsal:
    return rehearsed()


@pytest.fixture(scope="module")
def otherwise() -> Rehearsal:
    """With everything else than by default that can be."""
    config = DeliveryConfig(branch="release/1.x", environment="aws-dev", up_hours=3, makes_provider=False)
    return rehearsed(config, users=())


def trust(found: Rehearsal, role: str) -> dict[str, Any]:
    [statement] = json.loads(found.one(ROLE, f"crucible-dev-{role}").inputs["assumeRolePolicy"])["Statement"]
    assert statement["Effect"] == "Allow"
    return dict(statement)


def rights(found: Rehearsal, role: str) -> list[dict[str, Any]]:
    """Return the statements of a role: its own, and those of the policy that it shares with others."""
    own = found.one("aws:iam/rolePolicy:RolePolicy", f"crucible-dev-{role}").inputs["policy"]
    statements = list(json.loads(own)["Statement"])
    attached = [
        each.inputs["policyArn"]
        for each in found.of("aws:iam/rolePolicyAttachment:RolePolicyAttachment")
        if each.inputs["role"] == f"crucible-dev-{role}"
    ]
    for arn in attached:
        assert arn.endswith("/crucible-dev-reads")
        statements += json.loads(found.one("aws:iam/policy:Policy").inputs["policy"])["Statement"]
    return statements


def may(statements: list[dict[str, Any]], action: str, resource: str, **context: str) -> bool:
    """Decide as IAM does for a role without a boundary ("Policy evaluation logic", IAM user guide). In `context`, `__` stands for a colon."""
    keys = {key.replace("__", ":"): value for key, value in context.items()}
    effects = {each["Effect"] for each in statements if _is_about(each, action, resource) and _holds(each, keys)}
    return effects == {"Allow"}


def _is_about(statement: dict[str, Any], action: str, resource: str) -> bool:
    if not any(fnmatchcase(action.lower(), each.lower()) for each in statement["Action"]):
        return False
    if "NotResource" in statement:
        return not any(fnmatchcase(resource, each) for each in statement["NotResource"])
    return any(fnmatchcase(resource, each) for each in statement["Resource"])


def _holds(statement: dict[str, Any], context: dict[str, str]) -> bool:
    for operator, keys in statement.get("Condition", {}).items():
        for key, said in keys.items():
            same = context.get(key) in ([said] if isinstance(said, str) else said)
            if same is not {"StringEquals": True, "Bool": True, "StringNotEquals": False}[operator]:
                return False
    return True


def refused(model: type[Section], **fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    [only] = caught.value.errors()
    return f"{'.'.join(map(str, only['loc']))}: {only['msg']}"


# -- whom they trust


@pytest.mark.parametrize(
    ("role", "subjects", "claims"),
    [
        ("plan", [f"repo:{REPOSITORY}:pull_request", f"repo:{REPOSITORY}:ref:refs/heads/main"], {}),
        ("up", [f"repo:{REPOSITORY}:environment:dev"], {f"{GITHUB}:ref": "refs/heads/main"}),
        ("images", [f"repo:{REPOSITORY}:ref:refs/heads/main"], {}),
    ],
)
def test_a_role_trusts_jobs_that_it_names_in_full(
    made: Rehearsal, role: str, subjects: list[str], claims: dict[str, str]
) -> None:
    found = trust(made, role)
    assert found["Principal"] == {"Federated": f"{IAM}:oidc-provider/{GITHUB}"}
    assert found["Action"] == "sts:AssumeRoleWithWebIdentity"
    assert found["Condition"] == {
        "StringEquals": {f"{GITHUB}:aud": AUDIENCE, f"{GITHUB}:sub": subjects, **claims},
    }


def test_no_trust_has_a_pattern_in_it(made: Rehearsal) -> None:
    said = [each.inputs["assumeRolePolicy"] for each in made.of(ROLE)]
    assert len(said) == 4
    assert not [each for each in said if "*" in each or "?" in each or "Like" in each]


def test_the_branch_and_the_environment_are_the_stacks_to_choose(otherwise: Rehearsal) -> None:
    up = trust(otherwise, "up")["Condition"]["StringEquals"]
    assert up[f"{GITHUB}:sub"] == [f"repo:{REPOSITORY}:environment:aws-dev"]
    assert up[f"{GITHUB}:ref"] == "refs/heads/release/1.x"
    assert trust(otherwise, "images")["Condition"]["StringEquals"][f"{GITHUB}:sub"] == [
        f"repo:{REPOSITORY}:ref:refs/heads/release/1.x"
    ]


def test_a_repository_with_numbers_in_its_subjects_is_trusted_by_them() -> None:
    assert subject("example@12/crucible@34", "pull_request") == "repo:example@12/crucible@34:pull_request"


@pytest.mark.parametrize(
    "repository",
    [
        "",
        "crucible",
        "example/*",
        "*/crucible",
        "example/crucible:*",
        "example@12/crucible",
        "example/crucible@34",
        "a/b/c",
        "example/crucible\n",
        "example/crucible?",
    ],
)
def test_what_is_no_repository_is_trusted_in_nothing(repository: str) -> None:
    with pytest.raises(ValueError, match="is no repository; write owner/name, or owner@1/name@2"):
        subject(repository, "pull_request")


def test_github_is_made_known_once_with_the_audience_that_the_roles_ask_for(made: Rehearsal) -> None:
    known = made.one("aws:iam/openIdConnectProvider:OpenIdConnectProvider")
    assert (known.inputs["url"], known.inputs["clientIdLists"]) == (f"https://{GITHUB}", [AUDIENCE])
    assert all(known.urn in each.depends_on for each in made.of(ROLE))


def test_an_account_that_knows_github_already_is_not_told_again(otherwise: Rehearsal) -> None:
    assert not otherwise.of("aws:iam/openIdConnectProvider:OpenIdConnectProvider")
    assert trust(otherwise, "up")["Principal"] == {"Federated": f"{IAM}:oidc-provider/{GITHUB}"}


def test_sessions_are_as_short_as_the_job_allows(made: Rehearsal, otherwise: Rehearsal) -> None:
    for found, hours in ((made, 2), (otherwise, 3)):
        seconds = {
            each.name.removeprefix("crucible-dev-"): each.inputs["maxSessionDuration"] for each in found.of(ROLE)
        }
        assert seconds.pop("up") == hours * 3600
        assert set(seconds.values()) == {3600}


# -- plan


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("ec2:DescribeVpcs", "*"),
        ("eks:DescribeCluster", f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev"),
        ("iam:GetRolePolicy", f"{IAM}:role/crucible-dev-up"),
        ("kms:GetKeyPolicy", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1"),
        ("s3:GetBucketPolicy", "arn:aws:s3:::example-crucible-dev-outputs"),
        ("s3:ListBucket", "arn:aws:s3:::example-crucible-dev-outputs"),
        ("s3:ListBucket", "arn:aws:s3:::example-pulumi-state"),
        ("s3:GetObject", STATE_OBJECT),
        ("kms:Decrypt", STATE.key_arn),
    ],
)
def test_plan_sees_how_everything_is_set_up_and_the_state(made: Rehearsal, action: str, resource: str) -> None:
    assert may(rights(made, "plan"), action, resource)


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("s3:GetObject", "arn:aws:s3:::example-crucible-dev-outputs/1"),
        ("s3:GetObjectVersion", "arn:aws:s3:::example-crucible-dev-backups/1"),
        ("s3:PutObject", STATE_OBJECT),
        ("s3:DeleteObject", STATE_OBJECT),
        ("s3:ListBucket", "arn:aws:s3:::other"),
        ("kms:Decrypt", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1"),
        ("kms:Encrypt", STATE.key_arn),
        ("secretsmanager:GetSecretValue", f"arn:aws:secretsmanager:eu-central-1:{ACCOUNT}:secret:crucible-dev/x"),
        ("ssm:GetParameter", f"arn:aws:ssm:eu-central-1:{ACCOUNT}:parameter/x"),
        ("ssm:GetParametersByPath", f"arn:aws:ssm:eu-central-1:{ACCOUNT}:parameter/x"),
        ("ecr:BatchGetImage", f"arn:aws:ecr:eu-central-1:{ACCOUNT}:repository/crucible-dev/service"),
        ("logs:GetLogEvents", f"arn:aws:logs:eu-central-1:{ACCOUNT}:log-group:/crucible-dev/x"),
        ("sts:AssumeRole", f"{IAM}:role/crucible-dev-up"),
    ],
)
def test_plan_sees_nothing_that_is_kept_and_changes_nothing(made: Rehearsal, action: str, resource: str) -> None:
    assert not may(rights(made, "plan"), action, resource)


def test_plan_would_see_no_data_even_if_it_were_allowed_everything(made: Rehearsal) -> None:
    everything = [*rights(made, "plan"), {"Effect": "Allow", "Action": ["*"], "Resource": ["*"]}]
    assert may(everything, "s3:GetObject", STATE_OBJECT)
    assert not may(everything, "s3:GetObject", "arn:aws:s3:::example-crucible-dev-outputs/1")
    assert not may(everything, "kms:Decrypt", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1")
    assert not may(everything, "secretsmanager:GetSecretValue", "arn:any")


# -- images


def test_images_pushes_to_the_stacks_own_repositories_alone(made: Rehearsal) -> None:
    found = rights(made, "images")
    [push] = [each for each in found if "ecr:PutImage" in each["Action"]]
    assert [each.rpartition("ecr/")[2] for each in push["Resource"]] == ["crucible-dev/runner", "crucible-dev/service"]
    [token] = [each for each in found if each is not push]
    assert (token["Action"], token["Resource"]) == (["ecr:GetAuthorizationToken"], ["*"])
    assert not [each for each in push["Action"] if "Delete" in each or "Policy" in each or "Mutability" in each]


# -- up


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:CreateVpc", f"arn:aws:ec2:eu-central-1:{ACCOUNT}:vpc/*", {}),
        ("ec2:RunInstances", "arn:aws:ec2:eu-central-1::image/ami-1", {}),
        ("eks:UpdateClusterVersion", f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev", {}),
        ("eks:DeleteNodegroup", f"arn:aws:eks:eu-central-1:{ACCOUNT}:nodegroup/crucible-dev/sandbox/1", {}),
        ("ecr:CreateRepository", f"arn:aws:ecr:eu-central-1:{ACCOUNT}:repository/crucible-dev/service", {}),
        ("s3:PutBucketPolicy", "arn:aws:s3:::example-crucible-dev-outputs", {}),
        ("kms:CreateKey", "*", {"aws__RequestedRegion": "eu-central-1"}),
        ("kms:CreateGrant", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1", {"kms__GrantIsForAWSResource": "true"}),
        ("iam:CreateRole", f"{IAM}:role/crucible-dev-new", {"iam__PermissionsBoundary": BOUNDARY}),
        ("iam:PutRolePolicy", f"{IAM}:role/crucible-dev-new", {"iam__PermissionsBoundary": BOUNDARY}),
        ("iam:PassRole", f"{IAM}:role/crucible-dev-new", {"iam__PassedToService": "eks.amazonaws.com"}),
        ("s3:PutObject", STATE_OBJECT, {}),
        ("kms:Encrypt", STATE.key_arn, {}),
        ("iam:GetRole", f"{IAM}:role/crucible-dev-break-glass", {}),
    ],
)
def test_up_changes_what_the_stack_is_made_of(
    made: Rehearsal, action: str, resource: str, context: dict[str, str]
) -> None:
    assert may(rights(made, "up"), action, resource, **context)


@pytest.mark.parametrize(
    ("action", "resource", "context"),
    [
        ("ec2:CreateVpc", f"arn:aws:ec2:us-east-1:{ACCOUNT}:vpc/*", {}),
        ("ecr:DeleteRepository", f"arn:aws:ecr:eu-central-1:{ACCOUNT}:repository/crucible-staging/service", {}),
        ("s3:DeleteBucket", "arn:aws:s3:::example-pulumi-state", {}),
        ("s3:DeleteBucket", "arn:aws:s3:::example-crucible-staging-outputs", {}),
        ("s3:GetObject", "arn:aws:s3:::example-crucible-dev-outputs/1", {}),
        ("kms:CreateKey", "*", {"aws__RequestedRegion": "us-east-1"}),
        ("kms:CreateGrant", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1", {}),
        ("kms:Decrypt", f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1", {}),
        ("secretsmanager:GetSecretValue", f"arn:aws:secretsmanager:eu-central-1:{ACCOUNT}:secret:crucible-dev/x", {}),
        ("iam:CreateRole", f"{IAM}:role/other", {"iam__PermissionsBoundary": BOUNDARY}),
        ("iam:PassRole", f"{IAM}:role/crucible-dev-new", {"iam__PassedToService": "cloudformation.amazonaws.com"}),
        ("iam:PassRole", f"{IAM}:role/Admin", {"iam__PassedToService": "lambda.amazonaws.com"}),
    ],
)
def test_up_reaches_nothing_but_the_stack(made: Rehearsal, action: str, resource: str, context: dict[str, str]) -> None:
    assert not may(rights(made, "up"), action, resource, **context)


BOUNDED = {"iam__PermissionsBoundary": BOUNDARY}
NEVER = [
    # people and keys that outlive it
    ("iam:CreateUser", f"{IAM}:user/crucible-dev-mallory", {}),
    ("iam:CreateAccessKey", f"{IAM}:user/on-call", {}),
    ("iam:CreateLoginProfile", f"{IAM}:user/on-call", {}),
    ("iam:UpdateLoginProfile", f"{IAM}:user/on-call", {}),
    ("iam:AttachUserPolicy", f"{IAM}:user/on-call", BOUNDED),
    ("iam:AddUserToGroup", f"{IAM}:group/admins", {}),
    ("iam:DeactivateMFADevice", f"{IAM}:user/on-call", {}),
    ("iam:CreateOpenIDConnectProvider", f"{IAM}:oidc-provider/evil.example.org", {}),
    ("iam:CreateSAMLProvider", f"{IAM}:saml-provider/evil", {}),
    # a role that is not bounded
    *(
        (f"iam:{each}", f"{IAM}:role/crucible-dev-new", {})
        for each in ("CreateRole", "PutRolePolicy", "AttachRolePolicy")
    ),
    (
        "iam:CreateRole",
        f"{IAM}:role/crucible-dev-new",
        {"iam__PermissionsBoundary": "arn:aws:iam::aws:policy/AdministratorAccess"},
    ),
    (
        "iam:PutRolePermissionsBoundary",
        f"{IAM}:role/crucible-dev-new",
        {"iam__PermissionsBoundary": f"{IAM}:policy/wide"},
    ),
    ("iam:DeleteRolePermissionsBoundary", f"{IAM}:role/crucible-dev-new", BOUNDED),
    # those who deliver, and whom they trust
    *(
        (f"iam:{action}", f"{IAM}:role/crucible-dev-{role}", BOUNDED)
        for role in ("up", "plan", "images", "break-glass")
        for action in (
            "UpdateAssumeRolePolicy",
            "PutRolePolicy",
            "AttachRolePolicy",
            "DeleteRolePolicy",
            "DetachRolePolicy",
            "UpdateRole",
            "DeleteRole",
            "TagRole",
        )
    ),
    ("iam:PassRole", f"{IAM}:role/crucible-dev-up", {"iam__PassedToService": "lambda.amazonaws.com"}),
    ("sts:AssumeRole", f"{IAM}:role/crucible-dev-break-glass", {}),
    ("iam:UpdateOpenIDConnectProviderThumbprint", f"{IAM}:oidc-provider/{GITHUB}", {}),
    ("iam:AddClientIDToOpenIDConnectProvider", f"{IAM}:oidc-provider/{GITHUB}", {}),
    ("iam:CreatePolicyVersion", f"{IAM}:policy/crucible-dev-reads", {}),
    # the record and the alarms
    *((f"cloudtrail:{each}", f"arn:aws:cloudtrail:eu-central-1:{ACCOUNT}:trail/t", {}) for each in TRAIL),
    *(
        (f"events:{action}", f"arn:aws:events:eu-central-1:{ACCOUNT}:rule/crucible-dev-{rule}", {})
        for rule in ("break-glass", "trail")
        for action in ("DeleteRule", "DisableRule", "PutRule", "PutTargets", "RemoveTargets")
    ),
    # the cluster's door
    ("eks:CreateAccessEntry", f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev", {}),
    ("eks:AssociateAccessPolicy", f"arn:aws:eks:eu-central-1:{ACCOUNT}:access-entry/crucible-dev/x", {}),
    ("eks:DeleteCluster", f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev", {}),
    # the state's key
    ("kms:ScheduleKeyDeletion", STATE.key_arn, {}),
    ("kms:PutKeyPolicy", STATE.key_arn, {}),
    ("organizations:LeaveOrganization", "*", {}),
]


@pytest.mark.parametrize(("action", "resource", "context"), NEVER)
def test_up_never_does_what_would_make_it_stronger_or_unseen_even_if_it_were_allowed_everything(
    made: Rehearsal, action: str, resource: str, context: dict[str, str]
) -> None:
    everything = [*rights(made, "up"), {"Effect": "Allow", "Action": ["*"], "Resource": ["*"]}]
    assert may(everything, "ec2:CreateVpc", "arn:any")
    assert not may(everything, action, resource, **context)


def test_up_cannot_silence_the_alarms_topic_nor_lose_its_key(made: Rehearsal) -> None:
    everything = [*rights(made, "up"), {"Effect": "Allow", "Action": ["*"], "Resource": ["*"]}]
    topic = made.one(RULE, "crucible-dev-trail")
    [target] = [each for each in made.of("aws:cloudwatch/eventTarget:EventTarget") if each.inputs["rule"] == topic.name]
    for action in ("sns:DeleteTopic", "sns:SetTopicAttributes", "sns:RemovePermission"):
        assert not may(everything, action, target.inputs["arn"])
    key = made.one("aws:sns/topic:Topic").inputs["kmsMasterKeyId"]
    assert not may(everything, "kms:ScheduleKeyDeletion", key)


def test_up_names_every_action_and_no_resource_of_another_account(made: Rehearsal) -> None:
    for each in (each for each in rights(made, "up") if each["Effect"] == "Allow"):
        assert not [action for action in each["Action"] if action.endswith(":*")]
        for resource in each["Resource"]:
            assert (
                ACCOUNT in resource
                or resource.startswith(("arn:aws:s3:::example-", "arn:aws:ec2:eu-central-1::image/"))
                or (resource == "*" and all(action == "kms:CreateKey" or _looks(action) for action in each["Action"]))
            )


def _looks(action: str) -> bool:
    return action.partition(":")[2].startswith(("Get", "List", "Describe"))


def test_every_service_that_up_changes_it_also_sees(made: Rehearsal) -> None:
    seen = {action.partition(":")[0] for each in rights(made, "plan") for action in each["Action"]}
    assert seen >= {*WRITES, "iam", "kms"}


def test_policies_are_as_short_as_iam_takes_them_whatever_the_names() -> None:
    # The longest region, the longest stack, and the longest name of an organisation.
    place = Place(ACCOUNT, "ap-southeast-1", "production")
    found = rehearsed(place=place, organisation="o" * 20)

    def length(policy: str) -> int:
        return len(json.dumps(json.loads(policy), separators=(",", ":")))

    inline = {each.name: length(each.inputs["policy"]) for each in found.of("aws:iam/rolePolicy:RolePolicy")}
    # Keys and topics have longer ARNs on AWS than here.
    assert max(inline.values()) < LARGEST_INLINE - 200, inline
    assert length(found.one("aws:iam/policy:Policy").inputs["policy"]) < LARGEST_ATTACHED


# -- emergencies


def test_break_glass_is_taken_by_named_users_with_a_second_factor_where_it_is_noticed(made: Rehearsal) -> None:
    found = trust(made, "break-glass")
    assert found["Principal"] == {"AWS": [f"{IAM}:user/on-call", f"{IAM}:user/people/second"]}
    assert found["Action"] == "sts:AssumeRole"
    # Not BoolIfExists, which would let in whoever has no second factor to speak of.
    assert found["Condition"] == {
        "Bool": {"aws:MultiFactorAuthPresent": "true"},
        "StringEquals": {"aws:RequestedRegion": "eu-central-1"},
    }


def test_break_glass_administers_the_cluster_and_looks_at_the_rest(made: Rehearsal) -> None:
    entry = made.one("aws:eks/accessEntry:AccessEntry")
    assert entry.inputs["principalArn"].endswith("/crucible-dev-break-glass")
    association = made.one("aws:eks/accessPolicyAssociation:AccessPolicyAssociation")
    assert association.inputs["policyArn"].endswith("/AmazonEKSClusterAdminPolicy")
    assert association.inputs["accessScope"] == {"type": "cluster"}
    assert entry.urn in association.depends_on
    found = rights(made, "break-glass")
    assert may(found, "eks:DescribeCluster", f"arn:aws:eks:eu-central-1:{ACCOUNT}:cluster/crucible-dev")
    assert may(
        found, "logs:GetLogEvents", f"arn:aws:logs:eu-central-1:{ACCOUNT}:log-group:/aws/eks/crucible-dev/cluster:x"
    )
    for action in ("iam:CreateUser", "iam:PutRolePolicy", "ec2:DeleteVpc", "s3:GetObject", "kms:Decrypt"):
        assert not may(found, action, "arn:any", iam__PermissionsBoundary=BOUNDARY)


def test_without_users_there_is_no_such_way_in(otherwise: Rehearsal) -> None:
    assert {each.name for each in otherwise.of(ROLE)} == {f"crucible-dev-{each}" for each in ("plan", "up", "images")}
    assert [each.name for each in otherwise.of(RULE)] == ["crucible-dev-trail"]
    assert not otherwise.of("aws:eks/accessEntry:AccessEntry")
    assert otherwise.outputs["break_glass_role_arn"] is None


def test_taking_it_raises_an_alarm_though_cloudtrail_calls_that_reading(made: Rehearsal) -> None:
    rule = made.one(RULE, "crucible-dev-break-glass")
    assert rule.inputs["state"] == "ENABLED_WITH_ALL_CLOUDTRAIL_MANAGEMENT_EVENTS"
    pattern = json.loads(rule.inputs["eventPattern"])
    assert pattern["detail-type"] == ["AWS API Call via CloudTrail"]
    detail = pattern["detail"]
    assert (detail["eventSource"], detail["eventName"]) == (["sts.amazonaws.com"], ["AssumeRole"])
    [arn] = detail["requestParameters"]["roleArn"]
    assert arn.endswith("/crucible-dev-break-glass")


def test_whoever_touches_the_trail_raises_an_alarm(made: Rehearsal) -> None:
    pattern = json.loads(made.one(RULE, "crucible-dev-trail").inputs["eventPattern"])
    assert pattern["source"] == ["aws.cloudtrail"]
    assert {"StopLogging", "DeleteTrail", "UpdateTrail", "PutEventSelectors"} <= set(pattern["detail"]["eventName"])
    assert "requestParameters" not in pattern["detail"]


def test_an_alarm_says_who_did_what_when_and_from_where(made: Rehearsal) -> None:
    targets = made.of("aws:cloudwatch/eventTarget:EventTarget")
    assert len(targets) == 2
    for each in targets:
        transformer = each.inputs["inputTransformer"]
        said = json.loads(transformer["inputTemplate"])
        assert said == f"{each.name}: <who> called <what> at <when> from <where>"
        assert transformer["inputPaths"].keys() == {"who", "what", "when", "where"}


def test_alarms_go_by_mail_through_a_topic_under_a_key_that_eventbridge_may_use(made: Rehearsal) -> None:
    subscription = made.one("aws:sns/topicSubscription:TopicSubscription")
    assert (subscription.inputs["protocol"], subscription.inputs["endpoint"]) == ("email", "on-call@example.org")
    topic = made.one("aws:sns/topic:Topic")
    assert topic.inputs["kmsMasterKeyId"].endswith("/crucible-dev-access")
    [publish] = json.loads(made.one("aws:sns/topicPolicy:TopicPolicy").inputs["policy"])["Statement"]
    assert publish["Principal"] == {"Service": "events.amazonaws.com"}
    assert (publish["Action"], publish["Resource"]) == (
        "sns:Publish",
        f"arn:aws:sns:eu-central-1:{ACCOUNT}:{topic.inputs['name']}",
    )
    key = made.one("aws:kms/key:Key", "crucible-dev-access")
    [use] = [
        each for each in json.loads(key.inputs["policy"])["Statement"] if each["Principal"] == publish["Principal"]
    ]
    # EventBridge fulfils no condition here, and would drop the alarm.
    assert "Condition" not in publish
    assert "Condition" not in use


# -- configuration


def test_the_provider_knows_every_property(made: Rehearsal) -> None:
    assert [said for each in made.resources if each.custom for said in unknown_properties(each)] == []


@pytest.mark.parametrize("branch", ["*", "release/*", "main?", "", "/main", "main/", "refs heads"])
def test_a_branch_is_no_pattern(branch: str) -> None:
    assert refused(DeliveryConfig, branch=branch).startswith("branch: ")


@pytest.mark.parametrize("environment", ["*", "dev:x", ""])
def test_an_environment_is_no_pattern(environment: str) -> None:
    assert refused(DeliveryConfig, environment=environment).startswith("environment: ")


@pytest.mark.parametrize("user", ["*", f"{IAM}:user/on-call", "/on-call", "two words", ""])
def test_a_user_is_given_by_their_name(user: str) -> None:
    assert f"users: Value error, {user!r} is no user's name" in refused(BreakGlass, users=[user])


def test_the_states_key_is_given_by_its_arn() -> None:
    assert refused(StateBackend, bucket="state", key_arn="alias/state").startswith("key_arn: ")


def test_a_denial_of_all_but_some_says_so() -> None:
    assert Deny(["s3:GetObject"], ["arn:a"], elsewhere=True).document() == {
        "Effect": "Deny",
        "Action": ["s3:GetObject"],
        "NotResource": ["arn:a"],
    }
