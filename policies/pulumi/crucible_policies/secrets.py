"""Secrets: in Secrets Manager, made by a machine, and never in a program, its configuration, a ConfigMap or an environment.

No message repeats what it found.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from crucible_policies.resource import Resource
from crucible_policies.rule import ResourceRule, StackRule
from crucible_policies.workloads import Object, objects, pods

FUNCTION = "aws:lambda/function:Function"
PARAMETER = "aws:ssm/parameter:Parameter"
USER_DATA = {
    "aws:ec2/launchTemplate:LaunchTemplate",
    "aws:ec2/instance:Instance",
    "aws:ec2/launchConfiguration:LaunchConfiguration",
}
# Properties that are secrets, by type.
VALUES = {
    "aws:secretsmanager/secretVersion:SecretVersion": ("secretString", "secretBinary"),
    "aws:rds/instance:Instance": ("password",),
    "aws:rds/cluster:Cluster": ("masterPassword",),
    "aws:redshift/cluster:Cluster": ("masterPassword",),
    "aws:elasticache/replicationGroup:ReplicationGroup": ("authToken",),
    "aws:mq/broker:Broker": ("users",),
    PARAMETER: ("value",),
}
# A name that ends so is the secret itself; PASSWORD_FILE and TOKEN_URL say where one is.
_SECRET_NAME = re.compile(
    r"(passw(or)?d|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credentials?)$", re.IGNORECASE
)
# What such a name may have as its value: nothing, a switch, a number, a reference, a path, an ARN.
_NO_SECRET = re.compile(r"^(|true|false|[0-9.]+|\$[({].*|/.*|arn:.*)$", re.IGNORECASE | re.DOTALL)
_SECRET_VALUES = {
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "an access key of AWS": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of GitHub": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})"),
    "a token of Slack": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10}|hooks\.slack\.com/services/T[A-Z0-9]+/"),
    "a signed token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\."),
    "an address with a password": re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s:/@]*:(?!\$[({])[^\s:/@]+@"),
}
_INSTEAD = "keep it in Secrets Manager and give its name"


def plaintext(found: Resource) -> Iterator[str]:
    """Tell where something that is, or is called, a secret stands in the clear."""
    for where, name, value in _places(found):
        if name and _SECRET_NAME.search(name) and not _NO_SECRET.match(value):
            yield f"{where} is a secret by its name, in the clear; {_INSTEAD}"
        else:
            yield from (
                f"{where} holds {what}, in the clear; {_INSTEAD}"
                for what, like in _SECRET_VALUES.items()
                if like.search(value)
            )


def _places(found: Resource) -> Iterator[tuple[str, str, str]]:
    """Return text that anybody may read who may see the resource: where, under which name, and what."""
    given = found.properties
    if found.type == FUNCTION:
        yield from _named("environment.variables", (given.get("environment") or {}).get("variables") or {})
    if found.type == PARAMETER and given.get("type") != "SecureString":
        for key in ("value", "insecureValue"):
            if key in given:
                yield key, given.get("name") or "", str(given[key])
    if found.type in USER_DATA:
        for key in ("userData", "userDataBase64"):
            if key in given:
                yield key, "", _decoded(str(given[key]))
    for made in objects(found):
        yield from _of_object(made)


def _of_object(made: Object) -> Iterator[tuple[str, str, str]]:
    annotations = (made.content.get("metadata") or {}).get("annotations") or {}
    yield from _named(f"{made.where}metadata.annotations", annotations)
    if (made.group, made.kind) == ("core", "ConfigMap"):
        yield from _named(f"{made.where}data", made.content.get("data") or {})
    for pod in pods(made):
        for where, container in pod.containers():
            for key in ("command", "args"):
                yield from ((f"{where}.{key}[{n}]", "", str(each)) for n, each in enumerate(container.get(key) or ()))
            for number, variable in enumerate(container.get("env") or ()):
                if "value" in variable:
                    yield f"{where}.env[{number}].value", variable.get("name") or "", str(variable["value"])


def _named(where: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    yield from ((f"{where}.{name}", name, str(value)) for name, value in values.items() if value is not None)


def _decoded(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode(errors="replace")
    except (ValueError, binascii.Error):  # it was not encoded
        return text


def kubernetes_secrets(found: Resource) -> Iterator[str]:
    """Tell which Secrets of a cluster the program fills itself."""
    for made in objects(found):
        if (made.group, made.kind) == ("core", "Secret"):
            for key in ("data", "stringData"):
                if made.content.get(key):
                    yield f"{made.where}{key} comes from the program; have an ExternalSecret bring it from Secrets Manager"


def literal_secrets(resources: Sequence[Resource]) -> Iterator[tuple[Resource, str]]:
    """Tell which secrets are written in the program or its configuration: known, and from no other resource."""
    for found in resources:
        for key in VALUES.get(found.type, ()):
            secret = found.type != PARAMETER or found.properties.known("type") == "SecureString"
            if secret and found.properties.known(key) and not found.came_from.get(key):
                yield (
                    found,
                    f"{key} comes from no resource, so it is in the program or its configuration; have AWS or a random resource make it",
                )


RULES = (
    ResourceRule(
        "no-plaintext-secrets",
        "what is called a secret, or looks like one, in an environment, a ConfigMap, a command, an annotation, user data, or a parameter that is no "
        "`SecureString`",
        "all of these are read with rights that are given to many, and end up in logs and state",
        "Secrets Manager, through External Secrets; give names, files and ARNs",
        plaintext,
    ),
    ResourceRule(
        "no-secrets-from-programs",
        "a Secret of Kubernetes with `data` or `stringData`",
        "its value is then in Pulumi's state, and whoever rotates it in Secrets Manager changes nothing",
        "an `ExternalSecret`",
        kubernetes_secrets,
    ),
    StackRule(
        "secrets-are-made",
        "a secret's value, a database's, cache's or broker's password that comes from the program or its configuration",
        "what a person has typed, others have seen, and git never forgets",
        "`manageMasterUserPassword`, `secretStringWo`, or a value that another resource makes",
        literal_secrets,
    ),
)
