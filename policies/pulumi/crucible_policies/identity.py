"""Who may do what: policies of IAM, trust in roles, and policies of resources.

In a policy that says what its holder may do, `*` is every resource of the account. In a policy of a resource, such as a key's, `*` is that
resource, and what matters is who is meant: `kms:*` on `*` for the account itself is how a key is governed by IAM at all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from crucible_policies.resource import Resource, texts
from crucible_policies.rule import ResourceRule

ROLE = "aws:iam/role:Role"
ACCESS_KEY = "aws:iam/accessKey:AccessKey"
KEY_POLICIES = {"aws:kms/key:Key", "aws:kms/keyPolicy:KeyPolicy"}
PERMISSION = "aws:lambda/permission:Permission"
IDENTITY_POLICIES = {
    "aws:iam/rolePolicy:RolePolicy",
    "aws:iam/policy:Policy",
    "aws:iam/userPolicy:UserPolicy",
    "aws:iam/groupPolicy:GroupPolicy",
}
RESOURCE_POLICIES = KEY_POLICIES | {
    "aws:s3/bucket:Bucket",
    "aws:s3/bucketPolicy:BucketPolicy",
    "aws:sqs/queue:Queue",
    "aws:sqs/queuePolicy:QueuePolicy",
    "aws:sns/topic:Topic",
    "aws:sns/topicPolicy:TopicPolicy",
    "aws:ecr/repositoryPolicy:RepositoryPolicy",
    "aws:secretsmanager/secret:Secret",
    "aws:secretsmanager/secretPolicy:SecretPolicy",
}
ATTACHMENTS = {
    "aws:iam/rolePolicyAttachment:RolePolicyAttachment",
    "aws:iam/userPolicyAttachment:UserPolicyAttachment",
    "aws:iam/groupPolicyAttachment:GroupPolicyAttachment",
    "aws:iam/policyAttachment:PolicyAttachment",
}
# What only looks; the same as crucible_platform/iam.py has.
READS = re.compile(r"^[a-z0-9-]+:(Get|List|Describe|BatchGet|BatchCheck|Check|Lookup|Head)[A-Za-z]*\*?$")
# Looking that gives away what is kept: to be named like a change.
SECRET_READS = (
    "secretsmanager:GetSecretValue",
    "secretsmanager:BatchGetSecretValue",
    "ssm:GetParameter",
    "ssm:GetParameters",
    "ssm:GetParametersByPath",
    "s3:GetObject",
)
# What changes something and takes no resource: its row of the Service Authorization Reference has no resource type.
UNSCOPED = {
    "cloudwatch:PutMetricData",
    "ec2messages:AcknowledgeMessage",
    "ec2messages:DeleteMessage",
    "ec2messages:FailMessage",
    "ec2messages:SendReply",
    "kms:CreateKey",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
    "xray:PutTelemetryRecords",
    "xray:PutTraceSegments",
}
# An action that begins with no letter, such as `*`, `s3:*` or `s3:?*`, is all of a service.
_NAMED = re.compile(r"^[a-z0-9-]+:[A-Za-z]", re.IGNORECASE)
_EVERY_RESOURCE = re.compile(r"^(\*|arn:[^:]*:[^:]*:[^:]*:[^:]*:\*)$")
_BROAD_POLICY = re.compile(
    r":policy/(?:[^/]+/)*([A-Za-z0-9]*(?:AdministratorAccess|PowerUserAccess|FullAccess)[A-Za-z0-9_]*)$"
)
_ACCOUNT = re.compile(r"^(arn:aws[a-z-]*:iam::[0-9]{12}:root|[0-9]{12})$")
# What narrows "everybody" down ("AWS global condition context keys", IAM user guide; "AWS KMS condition keys").
_NARROWING = {
    "aws:principalaccount",
    "aws:principalarn",
    "aws:principalorgid",
    "aws:sourceaccount",
    "aws:sourcearn",
    "aws:sourcevpc",
    "aws:sourcevpce",
    "kms:calleraccount",
}
_NO_DOCUMENT = "is no policy document; write the JSON of one"

Statement = Mapping[str, Any]


def statements(document: Any) -> list[Statement] | None:
    """Return the statements of a policy, given as JSON or as data; None if it is neither."""
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except json.JSONDecodeError:
            return None
    if not isinstance(document, Mapping):
        return None
    said = document.get("Statement") or ()
    found = [said] if isinstance(said, Mapping) else list(said)
    return found if all(isinstance(each, Mapping) for each in found) else None


def allows(document: Any) -> list[tuple[str, Statement]]:
    """Return what a policy allows, each with its place in it."""
    found = statements(document) or []
    return [(f"Statement[{n}]", each) for n, each in enumerate(found) if each.get("Effect") == "Allow"]


# -- what a holder may do


def _held(found: Resource) -> Iterator[tuple[str, Any]]:
    """Return the policies that say what their holder may do."""
    given = found.properties
    if found.type in IDENTITY_POLICIES and "policy" in given:
        yield "policy", given["policy"]
    if found.type == ROLE:
        for number, each in enumerate(given.get("inlinePolicies") or ()):
            if "policy" in each:
                yield f"inlinePolicies[{number}].policy", each["policy"]


def broad_rights(found: Resource) -> Iterator[str]:
    """Tell which statements allow to change more than they name."""
    for where, document in _held(found):
        yield from _document(where, document, _too_much)


def _too_much(statement: Statement) -> Iterator[str]:
    for key in ("NotAction", "NotResource"):
        if key in statement:
            yield f"{key} allows all that it does not name; name what is allowed"
    actions = texts(statement.get("Action"))
    if every := [action for action in actions if not _NAMED.match(action)]:
        yield f"Action has {', '.join(every)}; name the actions"
    if not any(_EVERY_RESOURCE.match(each) for each in texts(statement.get("Resource"))):
        return
    if changes := [action for action in actions if action not in every and _needs_a_name(action)]:
        yield f"{', '.join(changes)} on every resource; name the resources"


def _needs_a_name(action: str) -> bool:
    if not READS.match(action):
        return action not in UNSCOPED
    return any(fnmatchcase(secret.lower(), action.lower()) for secret in SECRET_READS)


def broad_managed_policies(found: Resource) -> Iterator[str]:
    """Tell which of AWS's own policies give away the account, or a whole service."""
    attached: list[tuple[str, str]] = []
    if found.type in ATTACHMENTS:
        attached += [("policyArn", arn) for arn in texts(found.properties.get("policyArn"))]
    if found.type == ROLE:
        attached += [("managedPolicyArns", arn) for arn in texts(found.properties.get("managedPolicyArns"))]
    for where, arn in attached:
        if match := _BROAD_POLICY.search(arn):
            yield f"{where} is {match[1]}, which allows far more than anything here does; write a policy that names what it allows"


def long_lived_keys(found: Resource) -> Iterator[str]:
    """Tell of keys of users."""
    if found.type == ACCESS_KEY:
        yield "an access key never ends and stands in Pulumi's state; use a role: Pod Identity, an instance profile, or OIDC for GitHub"


# -- who is meant


def unnamed_principals(found: Resource) -> Iterator[str]:
    """Tell which trust or policy of a resource means everybody."""
    given = found.properties
    if found.type == ROLE and "assumeRolePolicy" in given:
        yield from _document("assumeRolePolicy", given["assumeRolePolicy"], _trusts_too_many)
    if found.type in RESOURCE_POLICIES and "policy" in given:
        yield from _document("policy", given["policy"], _lets_everybody)
        if found.type in KEY_POLICIES:
            yield from _document("policy", given["policy"], _gives_the_key_away)
    if found.type == PERMISSION and given.get("principal") == "*" and "principalOrgId" not in given:
        yield "principal is *, which is everybody; name the service or the account that calls"


def _document(where: str, document: Any, check: Callable[[Statement], Iterator[str]]) -> Iterator[str]:
    if statements(document) is None:
        yield f"{where} {_NO_DOCUMENT}"
    for place, statement in allows(document):
        yield from (f"{where}.{place}: {said}" for said in check(statement))


def _principals(statement: Statement) -> list[tuple[str, str]]:
    principal = statement.get("Principal")
    if isinstance(principal, str):
        return [("AWS", principal)]
    return [(kind, each) for kind, said in (principal or {}).items() for each in texts(said)]


def _conditions(statement: Statement) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Return which keys must be one of which values. A condition that also holds without its key, or for all but its values, is none."""
    for operator, keys in (statement.get("Condition") or {}).items():
        if "Not" not in operator and not operator.endswith("IfExists") and not operator.startswith("ForAllValues:"):
            for key, values in keys.items():
                yield key, texts(values)


def _everybody(statement: Statement) -> bool:
    return "NotPrincipal" in statement or any("*" in who for _, who in _principals(statement))


def _trusts_too_many(statement: Statement) -> Iterator[str]:
    if _everybody(statement):
        yield "Principal has a *; name who may take the role"
    for kind, who in _principals(statement):
        if kind == "Federated" and ":oidc-provider/" in who:
            subjects = [values for key, values in _conditions(statement) if key.endswith(":sub")]
            if not subjects or any(not each or "*" in each or "?" in each for values in subjects for each in values):
                yield (
                    f"{who} is trusted for every subject, or for a pattern of them; "
                    "add a condition StringEquals on its `:sub` that names one in full"
                )


def _lets_everybody(statement: Statement) -> Iterator[str]:
    if not _everybody(statement):
        return
    narrowed = any(
        key.lower() in _NARROWING and values and not any(each.strip("*?") == "" for each in values)
        for key, values in _conditions(statement)
    )
    if not narrowed:
        yield "Principal has a *, which is everybody; name who is meant, or add a condition such as aws:PrincipalOrgID"


def _gives_the_key_away(statement: Statement) -> Iterator[str]:
    if all(_NAMED.match(action) for action in texts(statement.get("Action"))):
        return
    if others := [who for kind, who in _principals(statement) if kind != "AWS" or not _ACCOUNT.match(who)]:
        yield f"all of kms is allowed to {', '.join(others)}, and not to the account alone; name the actions"


RULES = (
    ResourceRule(
        "iam-names-what-it-changes",
        "a policy with an action such as `s3:*`, one that changes something (or reads a secret) on resource `*`, `NotAction`, `NotResource`",
        "whoever takes over the holder of such a policy has the account",
        "name actions and resources, with `iam.Allow`; what AWS knows no resource for is in `identity.UNSCOPED`",
        broad_rights,
    ),
    ResourceRule(
        "iam-no-broad-managed-policies",
        "AWS's own `AdministratorAccess`, `PowerUserAccess` and `...FullAccess`",
        "they allow whole services, and grow without anybody here deciding so",
        "a policy of one's own that names what it allows",
        broad_managed_policies,
    ),
    ResourceRule(
        "trust-names-who",
        "a role that everybody, or any branch of any repository, may take; a policy of a bucket, key, queue, topic, repository or secret that "
        "lets everybody; a key given away whole",
        "the strongest role and the best lock are worth what the weakest trust in them is",
        "name the principal; for OIDC the whole `:sub`; for a resource, narrow everybody down by `aws:PrincipalOrgID` or the like",
        unnamed_principals,
    ),
    ResourceRule(
        "no-long-lived-keys",
        "an access key of an IAM user",
        "it is valid until somebody notices, wherever it was copied to",
        "a role: Pod Identity, an instance profile, or OIDC for GitHub",
        long_lived_keys,
    ),
)
