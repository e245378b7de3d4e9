"""What each service may do in the cluster: exactly what stands here, in every namespace, and nothing else.

The API server is asked, as each identity, for all that it may do (SelfSubjectRulesReview); from the answer is taken what every authenticated
user may. Whatever is left must be in the table, and whatever is in the table must be left.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from crucible import names
from crucible.kubernetes.api import KubernetesApi, from_kubeconfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.cluster import Cluster

pytestmark = pytest.mark.cluster

PLATFORM, EVALUATIONS, NODE = names.PLATFORM_NAMESPACE, names.EVALUATION_NAMESPACE, names.NODE_NAMESPACE
NAMESPACES = (PLATFORM, EVALUATIONS, NODE, "kube-system", "default")

# (API group, resource or subresource, verb)
Right = tuple[str, str, str]


def rights(group: str, resource: str, verbs: str) -> set[Right]:
    return {(group, resource, verb) for verb in verbs.split()}


READ = "get list watch"
FOLLOW = "list watch"
NODES = rights("", "nodes", FOLLOW)
WATCHER = rights("batch", "jobs", f"{READ} patch") | rights("", "pods", f"{READ} patch") | rights("", "pods/log", "get")
CALICO = "crd.projectcalico.org"
CALICO_POLICIES = ["globalnetworkpolicies", "networkpolicies", "globalnetworksets", "networksets"]

# Everywhere: what comes from ClusterRoles.
CLUSTER: dict[str, set[Right]] = {
    "api": set(),
    "storage": set(),
    "worker": set(),
    "dispatcher": NODES | rights("node.k8s.io", "runtimeclasses", "get"),
    "monitor": NODES,
    "cleanup": NODES,
    "policies": {
        right
        for resource in CALICO_POLICIES
        for right in rights(CALICO, resource, f"{READ} create update patch delete")
    }
    | rights(CALICO, "clusterinformations", "get list"),
    "evaluation": set(),
    "default": set(),
}
# In one namespace only.
NAMESPACED: dict[tuple[str, str], set[Right]] = {
    ("dispatcher", EVALUATIONS): rights("crucible.dev", "sandboxes", "create")
    | rights("batch", "jobs", f"create {READ} patch")
    | rights("", "configmaps", "create get patch")
    | rights("", "pods", f"{FOLLOW} delete")
    | rights("", "resourcequotas", FOLLOW),
    ("monitor", EVALUATIONS): WATCHER,
    ("monitor", PLATFORM): rights("coordination.k8s.io", "leases", f"create {READ} patch delete"),
    ("cleanup", EVALUATIONS): rights("batch", "jobs", f"{FOLLOW} delete")
    | rights("", "pods", f"{FOLLOW} patch delete")
    | rights("", "configmaps", "list delete"),
}
SERVICES = [service for service in CLUSTER if service not in {"evaluation", "default"}]
IDENTITIES = {
    **{service: (PLATFORM, service) for service in SERVICES},
    "evaluation": (EVALUATIONS, "evaluation"),
    "default": (EVALUATIONS, "default"),
}
NOBODY = (PLATFORM, "nobody-in-particular")


async def may(client: httpx.AsyncClient, identity: tuple[str, str], namespace: str) -> set[Right]:
    """Ask for all that a service account may do in a namespace, what is not bound to one included."""
    account_namespace, account = identity
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    who = [
        ("Impersonate-User", f"system:serviceaccount:{account_namespace}:{account}"),
        *(("Impersonate-Group", group) for group in groups_of(account_namespace)),
    ]
    answer = await client.post("/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", json=review, headers=who)
    answer.raise_for_status()
    status = answer.json()["status"]
    assert not status["incomplete"], status
    # A rule for named objects only would not be comparable; there is none.
    assert not any(rule.get("resourceNames") for rule in status["resourceRules"])
    return {
        (group, resource, verb)
        for rule in status["resourceRules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def groups_of(namespace: str) -> list[str]:
    return ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]


@pytest.fixture(scope="module")
def matrix(guarded_cluster: Cluster) -> dict[tuple[str, str], set[Right]]:
    """What each identity may do in each namespace, beyond what everybody may."""
    asked = [(name, identity, namespace) for name, identity in IDENTITIES.items() for namespace in NAMESPACES]
    endpoint = from_kubeconfig(guarded_cluster.kubeconfig)

    async def ask() -> dict[tuple[str, str], set[Right]]:
        limits = httpx.Limits(max_connections=8)
        async with httpx.AsyncClient(
            base_url=endpoint.server, verify=endpoint.tls, limits=limits, timeout=60
        ) as client:
            everybody = await may(client, NOBODY, "default")
            found = await asyncio.gather(*(may(client, identity, namespace) for _, identity, namespace in asked))
        return {
            (name, namespace): rights - everybody for (name, _, namespace), rights in zip(asked, found, strict=True)
        }

    return asyncio.run(ask())


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_may_do_exactly_what_it_uses(
    matrix: dict[tuple[str, str], set[Right]], name: str, namespace: str
) -> None:
    assert matrix[name, namespace] == CLUSTER[name] | NAMESPACED.get((name, namespace), set())


# --- what would be worst, asked one by one --------------------------------------------------------------------------------

FORBIDDEN: list[tuple[str, str, str, str]] = [
    (EVALUATIONS, "", "pods", "create"),
    (EVALUATIONS, "", "pods/exec", "create"),
    (EVALUATIONS, "", "pods/ephemeralcontainers", "patch"),
    (EVALUATIONS, "", "secrets", "get"),
    (EVALUATIONS, "", "serviceaccounts/token", "create"),
    (EVALUATIONS, "networking.k8s.io", "networkpolicies", "create"),
    (EVALUATIONS, "", "resourcequotas", "patch"),
    (PLATFORM, "", "secrets", "get"),
    (PLATFORM, "", "secrets", "list"),
    (PLATFORM, "", "pods/exec", "create"),
    (PLATFORM, "", "configmaps", "patch"),
    (PLATFORM, "apps", "deployments", "patch"),
    (PLATFORM, "", "serviceaccounts/token", "create"),
    (NODE, "", "pods", "create"),
    ("kube-system", "", "secrets", "get"),
    ("", "", "nodes/proxy", "get"),
    ("", "", "nodes", "patch"),
    ("", "", "namespaces", "patch"),
    ("", "", "users", "impersonate"),
    ("", "rbac.authorization.k8s.io", "clusterrolebindings", "create"),
    ("", "rbac.authorization.k8s.io", "clusterroles", "escalate"),
    ("", "admissionregistration.k8s.io", "validatingadmissionpolicies", "delete"),
    ("", "admissionregistration.k8s.io", "validatingadmissionpolicybindings", "patch"),
    ("", "node.k8s.io", "runtimeclasses", "create"),
    ("", "scheduling.k8s.io", "priorityclasses", "create"),
]


async def allowed(cluster: Cluster, questions: Iterable[tuple[str, tuple[str, str, str, str]]]) -> set[Any]:
    """Return the questions that the API server answers with yes."""
    questions = list(questions)
    at_once = asyncio.Semaphore(16)
    async with KubernetesApi(from_kubeconfig(cluster.kubeconfig)) as api:

        async def ask(name: str, what: tuple[str, str, str, str]) -> bool:
            namespace, group, resource, verb = what
            account_namespace, account = IDENTITIES[name]
            plain, _, subresource = resource.partition("/")
            attributes = {
                "namespace": namespace,
                "group": group,
                "resource": plain,
                "subresource": subresource,
                "verb": verb,
            }
            review = {
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SubjectAccessReview",
                "spec": {
                    "user": f"system:serviceaccount:{account_namespace}:{account}",
                    "groups": groups_of(account_namespace),
                    "resourceAttributes": attributes,
                },
            }
            async with at_once:
                answer = await api.review("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
            return bool(answer["status"]["allowed"])

        answers = await asyncio.gather(*(ask(*question) for question in questions))
    return {question for question, yes in zip(questions, answers, strict=True) if yes}


async def test_no_service_may_do_what_would_undo_the_isolation(guarded_cluster: Cluster) -> None:
    asked = [(name, what) for name in ("dispatcher", "monitor", "cleanup") for what in FORBIDDEN]
    assert await allowed(guarded_cluster, asked) == set()
    # The same way of asking finds what is allowed.
    control = ("dispatcher", (EVALUATIONS, "batch", "jobs", "create"))
    assert await allowed(guarded_cluster, [control]) == {control}


@pytest.mark.parametrize("name", ["api", "storage", "worker", "policies", "evaluation", "default"])
def test_who_never_calls_the_api_server_gets_no_token(guarded_cluster: Cluster, name: str) -> None:
    namespace, account = IDENTITIES[name]
    found = json.loads(
        guarded_cluster.kubectl("get", "serviceaccount", account, "--namespace", namespace, "-o", "json")
    )
    assert found["automountServiceAccountToken"] is False
