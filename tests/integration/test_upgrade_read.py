"""A cluster is read through boto3, planned and told; and AWS fails at every call of it, in every way, with nothing missing untold.

EKS is played by moto's server on loopback, a stand-in: requests are signed, addressed and retried for real, moto checks no signature and
no permission. moto has clusters and node groups. It has no add-ons, no versions of add-ons and no insights: those calls are answered by
`MissingCalls`, a stand-in of our own in the client, whose answers boto3 reads by EKS' own API model. Failures are put in at the same place.
None of this shows what AWS itself would say of a cluster.
"""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import date
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.awsrequest import AWSResponse  # type: ignore[import-untyped]
from botocore.exceptions import EndpointConnectionError, ReadTimeoutError  # type: ignore[import-untyped]
from moto.eks.responses import EKSResponse
from typer.testing import CliRunner

from crucible_platform.upgrade import read
from crucible_platform.upgrade.command import ExitCode, app, exit_code
from crucible_platform.upgrade.plan import Addon, Refusal, StepKind, UpgradePlan, plan
from crucible_platform.upgrade.read import ReadError, Reading, Reason, eks_client, read_cluster
from crucible_platform.upgrade.versions import Minor
from tests.support.aws import played_by_moto

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

REGION = "eu-central-1"
CLUSTER = "crucible-dev"
TODAY = date(2026, 12, 1)
TARGET = Minor(1, 36)
GROUPS = ("platform-eu-central-1a", "sandbox-eu-central-1a")
ADDONS = {"coredns": "v1.11.1-eksbuild.9", "kube-proxy": "v1.29.3-eksbuild.2", "vpc-cni": "v1.18.5-eksbuild.1"}
STANDS_IN_FOR = {
    "ListAddons": "list_addons",
    "DescribeAddon": "describe_addon",
    "DescribeAddonVersions": "describe_addon_versions",
    "ListInsights": "list_insights",
    "DescribeInsight": "describe_insight",
}
# In the order in which they are made.
CALLS = (
    "DescribeCluster",
    "ListAddons",
    "DescribeAddon",
    "DescribeAddonVersions",
    "ListNodegroups",
    "DescribeNodegroup",
    "ListInsights",
    "DescribeInsight",
)


class _Raw(io.BytesIO):
    def stream(self, **_: Any) -> Iterator[bytes]:
        yield self.read()


def answer(status: int, body: dict[str, Any], error: str = "") -> AWSResponse:
    headers = {"Content-Type": "application/json", **({"x-amzn-ErrorType": error} if error else {})}
    return AWSResponse("https://eks", status, headers, _Raw(json.dumps(body).encode()))


INSIGHTS: list[dict[str, Any]] = [
    {
        "id": "1",
        "name": "Deprecated APIs removed in Kubernetes v1.30",
        "category": "UPGRADE_READINESS",
        "kubernetesVersion": "1.30",
        "insightStatus": {"status": "PASSING", "reason": "No deprecated API usage detected within the last 30 days."},
    },
    {
        "id": "2",
        "name": "Deprecated APIs removed in Kubernetes v1.32",
        "category": "UPGRADE_READINESS",
        "kubernetesVersion": "1.32",
        "insightStatus": {"status": "WARNING", "reason": "Deprecated API usage detected within last 30 days."},
    },
]
DETAILS = {
    "recommendation": "Update manifests and API clients.",
    "categorySpecificSummary": {
        "deprecationDetails": [
            {
                "usage": "/apis/flowcontrol.apiserver.k8s.io/v1beta3/flowschemas",
                "replacedWith": "/apis/flowcontrol.apiserver.k8s.io/v1/flowschemas",
                "stopServingVersion": "1.32",
                "clientStats": [{"userAgent": "argocd/2.8\x1b[2J", "numberOfRequestsLast30Days": 41}],
            },
            {
                "usage": "/apis/flowcontrol.apiserver.k8s.io/v1beta3/prioritylevelconfigurations",
                "stopServingVersion": "1.32",
                "clientStats": [],
            },
        ]
    },
}


def offered(name: str) -> dict[str, Any]:
    """Return what EKS offers of an add-on: its own version for 1.29 to 1.32, and one for all minors, which is their default."""

    def fits(*minors: int, default: bool) -> list[dict[str, Any]]:
        return [{"clusterVersion": f"1.{each}", "defaultVersion": default} for each in minors]

    if name == "kube-proxy":
        versions = [(f"v1.{each}.3-eksbuild.2", fits(each, default=True)) for each in range(28, 38)]
    else:
        versions = [
            (ADDONS[name], fits(*range(29, 33), default=False)),
            ("v1.19.5-eksbuild.1", fits(*range(29, 37), default=True)),
        ]
    return {
        "addonName": name,
        "addonVersions": [{"addonVersion": version, "compatibilities": where} for version, where in versions],
    }


class MissingCalls:
    """STAND-IN for the calls that moto's EKS does not have. It lists two to a page, as AWS may."""

    def __init__(self, client: Any) -> None:
        for operation in STANDS_IN_FOR:
            client.meta.events.register(f"before-send.eks.{operation}", self)

    def __call__(self, request: Any, event_name: str, **_: Any) -> AWSResponse:
        operation = event_name.rpartition(".")[2]
        if operation == "ListInsights":
            assert json.loads(request.body)["filter"] == {"categories": ["UPGRADE_READINESS"]}
            second = json.loads(request.body).get("nextToken") == "second"
            page = {"insights": INSIGHTS[1:]} if second else {"insights": INSIGHTS[:1], "nextToken": "second"}
            return answer(200, page)
        if operation == "DescribeInsight":
            return answer(200, {"insight": {**INSIGHTS[1], **DETAILS}})
        if operation == "ListAddons":
            names, second = sorted(ADDONS), "nextToken=second" in request.url
            return answer(200, {"addons": names[2:]} if second else {"addons": names[:2], "nextToken": "second"})
        if operation == "DescribeAddonVersions":
            [name] = parse_qs(urlsplit(request.url).query)["addonName"]
            return answer(200, {"addons": [offered(name)]})
        name = urlsplit(request.url).path.rpartition("/")[2]
        addon = {"addonName": name, "addonVersion": ADDONS[name], "status": "ACTIVE", "health": {"issues": []}}
        return answer(200, {"addon": addon})


class Failure:
    """Has one call fail, for as long as it is not `over`."""

    def __init__(self, client: Any, operation: str, outcome: Callable[[str], AWSResponse]) -> None:
        self.operation = operation
        self.outcome = outcome
        self.over = False
        self.seen = 0
        client.meta.events.register_first(f"before-send.eks.{operation}", self)

    def __call__(self, **_: Any) -> AWSResponse | None:
        if self.over:
            return None
        self.seen += 1
        return self.outcome(self.operation)


Fail = Callable[[str, Callable[[str], AWSResponse]], Failure]


def throttled(_: str) -> AWSResponse:
    return answer(429, {"message": "Rate exceeded"}, "ThrottlingException")


def denied(operation: str) -> AWSResponse:
    said = f"User: arn:aws:sts::111111111111:assumed-role/reader/me is not authorized to perform: eks:{operation}"
    return answer(403, {"message": said}, "AccessDeniedException")


def silent(_: str) -> AWSResponse:
    raise ReadTimeoutError(endpoint_url="https://eks")


def away(_: str) -> AWSResponse:
    raise EndpointConnectionError(endpoint_url="https://eks")


def broken(_: str) -> AWSResponse:
    return answer(500, {"message": "Internal failure"}, "ServerException")


FAILURES: dict[Reason, Callable[[str], AWSResponse]] = {
    Reason.THROTTLED: throttled,
    Reason.TIMEOUT: silent,
    Reason.UNREACHABLE: away,
    Reason.DENIED: denied,
    Reason.UNEXPECTED: broken,
}


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for variable in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    empty = tmp_path_factory.mktemp("aws") / "none"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(empty))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(empty))


@pytest.fixture(scope="module")
def moto(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from played_by_moto(
        request, f"EKS is played by moto on loopback, and {', '.join(STANDS_IN_FOR)} by the test itself"
    )


@pytest.fixture(scope="module")
def cluster(moto: str) -> None:
    """A cluster of 1.29 with a group of AL2023 that is at 1.28 still, and one of Amazon Linux 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        client = eks_client(REGION, endpoint=moto)
        role = "arn:aws:iam::111111111111:role/crucible"
        client.create_cluster(
            name=CLUSTER, version="1.29", roleArn=role, resourcesVpcConfig={"subnetIds": ["subnet-1"]}
        )
        for name, version, ami_type in (
            (GROUPS[0], "1.29", "AL2_x86_64"),
            (GROUPS[1], "1.28", "AL2023_x86_64_STANDARD"),
        ):
            client.create_nodegroup(
                clusterName=CLUSTER,
                nodegroupName=name,
                version=version,
                amiType=ami_type,
                releaseVersion=f"{version}.15-20250920",
                nodeRole=role,
                subnets=["subnet-1"],
            )


@pytest.fixture(scope="module")
def client(moto: str, cluster: None) -> Any:
    """A client that tries once, and to which EKS has every call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        made = eks_client(REGION, endpoint=moto, attempts=1)
        # It signs with what it finds at its first call.
        made.list_clusters()
    MissingCalls(made)
    return made


@pytest.fixture
def fail(client: Any) -> Iterator[Fail]:
    """Has a call fail until the test's end."""
    failures: list[Failure] = []

    def fail(operation: str, outcome: Callable[[str], AWSResponse]) -> Failure:
        failures.append(Failure(client, operation, outcome))
        return failures[-1]

    yield fail
    for each in failures:
        each.over = True


def planned(reading: Reading) -> UpgradePlan:
    return plan(reading.state, TARGET, reading.compatible, TODAY)


def test_the_stand_in_answers_only_what_moto_has_not() -> None:
    assert not [call for call in STANDS_IN_FOR.values() if hasattr(EKSResponse, call)]


def test_a_cluster_is_read_with_all_that_a_plan_is_made_from(client: Any) -> None:
    reading = read_cluster(client, CLUSTER)
    state = reading.state
    assert (state.name, state.region, str(state.version), state.status) == (CLUSTER, REGION, "1.29", "ACTIVE")
    assert state.unread == ()
    assert state.addons == tuple(Addon(name, ADDONS[name]) for name in sorted(ADDONS))
    assert [(g.name, str(g.version), g.ami_type, g.release, g.status) for g in state.node_groups] == [
        (GROUPS[0], "1.29", "AL2_x86_64", "1.29.15-20250920", "ACTIVE"),
        (GROUPS[1], "1.28", "AL2023_x86_64_STANDARD", "1.28.15-20250920", "ACTIVE"),
    ]
    assert [(str(each.minor), each.status) for each in state.insights] == [("1.30", "PASSING"), ("1.32", "WARNING")]
    [use] = state.insights[1].uses
    assert (str(use.gone_in), use.clients) == ("1.32", ("argocd/2.8\x1b[2J (41 in 30 days)",))
    # The default comes first, and minors that the table does not have are left out.
    assert reading.compatible["coredns"][Minor(1, 30)] == ("v1.19.5-eksbuild.1", "v1.11.1-eksbuild.9")
    assert max(reading.compatible["kube-proxy"]) == TARGET


def test_what_was_read_is_planned_from_1_29_to_1_36(client: Any) -> None:
    found = planned(read_cluster(client, CLUSTER))
    assert [str(leg.minor) for leg in found.legs] == [f"1.{each}" for each in range(29, 37)]
    assert [step.kind for step in found.steps[:2]] == [StepKind.NEW_NODES, StepKind.NODES]
    ups = [(step.old, step.new) for step in found.steps if step.kind is StepKind.CONTROL_PLANE]
    assert ups == [(f"1.{each}", f"1.{each + 1}") for each in range(29, 36)]
    assert [step.what for step in found.steps if step.names == ("vpc-cni",)] == [
        "vpc-cni v1.18.5-eksbuild.1 -> v1.19.5-eksbuild.1"
    ]
    assert not found.ready
    assert exit_code(found) is ExitCode.NOT_READY


# -- AWS fails half way


def parts_told(reading: Reading) -> dict[str, set[str]]:
    """Return every part of the cluster that is either read or told as unread, by kind."""
    state, unread = reading.state, {each.part for each in reading.state.unread}

    def of(kind: str, listing: str, read_: set[str], all_: set[str]) -> set[str]:
        return (
            all_ if listing in unread else read_ | {each.removeprefix(kind) for each in unread if each.startswith(kind)}
        )

    versions = "versions of add-on "
    return {
        "add-ons": of("add-on ", "add-ons", {each.name for each in state.addons}, set(ADDONS)),
        "versions": of(versions, "add-ons", set(reading.compatible), set(ADDONS)),
        "node groups": of("node group ", "node groups", {each.name for each in state.node_groups}, set(GROUPS)),
        "insights": of("-", "insights", {each.name for each in state.insights}, {each["name"] for each in INSIGHTS}),
    }


@pytest.mark.parametrize("reason", FAILURES)
@pytest.mark.parametrize("operation", CALLS[1:])
def test_a_call_that_fails_is_told_with_all_that_it_cost(
    client: Any, fail: Fail, operation: str, reason: Reason
) -> None:
    whole = parts_told(read_cluster(client, CLUSTER))
    failure = fail(operation, FAILURES[reason])
    reading = read_cluster(client, CLUSTER)

    unread = reading.state.unread
    assert unread[0].problem.startswith(f"eks:{operation}: ")
    assert unread[0].hint
    assert parts_told(reading) == whole, "what is not in the state is told"
    if reason in {Reason.DENIED, Reason.UNEXPECTED}:
        assert all(each.problem.startswith(f"eks:{operation}: ") for each in unread), (
            "other calls are made all the same"
        )
        assert len(unread) == failure.seen
    else:
        assert failure.seen == 1, "nothing is asked of AWS any more"
        assert all(each.problem.startswith(f"not asked for, since eks:{operation}: ") for each in unread[1:])
    if reason is Reason.DENIED:
        assert unread[0].hint == f"allow eks:{operation} to whom you are logged in as"

    found = planned(reading)
    assert (found.unread, found.ready, exit_code(found)) == (unread, False, ExitCode.UNREAD)

    failure.over = True
    assert read_cluster(client, CLUSTER).state.unread == (), "reading again is all that it takes"


@pytest.mark.parametrize("reason", FAILURES)
def test_without_the_clusters_version_there_is_no_plan(client: Any, fail: Fail, reason: Reason) -> None:
    fail("DescribeCluster", FAILURES[reason])
    with pytest.raises(ReadError, match=r"^eks:DescribeCluster: ") as failed:
        read_cluster(client, CLUSTER)
    assert (failed.value.reason, failed.value.call) == (reason, "eks:DescribeCluster")
    assert failed.value.hint


def test_a_cluster_that_is_not_there_is_told_by_name(client: Any) -> None:
    with pytest.raises(ReadError, match="No cluster found for name: other") as failed:
        read_cluster(client, "other")
    assert failed.value.reason is Reason.MISSING


def test_throttling_is_waited_out_for_as_many_attempts_as_there_are(moto: str, cluster: None) -> None:
    patient = eks_client(REGION, endpoint=moto, attempts=2)
    MissingCalls(patient)
    failure = Failure(patient, "DescribeNodegroup", throttled)
    first = read_cluster(patient, CLUSTER).state.unread[0]
    assert failure.seen == 2
    assert first.problem == "eks:DescribeNodegroup: throttled, 2 times in a row: Rate exceeded"

    def throttled_once(_: str) -> AWSResponse:
        once.over = True
        return throttled("")

    once = Failure(patient, "ListAddons", throttled_once)
    failure.over = True
    assert read_cluster(patient, CLUSTER).state.unread == ()


def test_an_answer_that_is_not_eks_own_is_told_and_not_guessed_at(client: Any, fail: Fail) -> None:
    fail("DescribeAddon", lambda _: answer(200, {"addon": {"addonName": "coredns"}}))
    state = read_cluster(client, CLUSTER).state
    assert state.addons == ()
    assert state.unread[0].problem.startswith("eks:DescribeAddon: its answer is not what EKS' API has: KeyError(")


def test_an_eks_that_never_answers_costs_the_time_that_was_set_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        client = eks_client(REGION, endpoint=f"http://127.0.0.1:{port}", attempts=1, read_timeout=0.2)
        with pytest.raises(ReadError, match=rf"no answer after 1 attempt from http://127\.0\.0\.1:{port}") as failed:
            read_cluster(client, CLUSTER)
    assert failed.value.reason is Reason.TIMEOUT


def test_an_eks_that_is_not_there_is_out_of_reach() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as gone:
        port = gone.getsockname()[1]
    client = eks_client(REGION, endpoint=f"http://127.0.0.1:{port}", attempts=1)
    with pytest.raises(ReadError, match="out of reach after 1 attempt") as failed:
        read_cluster(client, CLUSTER)
    assert failed.value.reason is Reason.UNREACHABLE


def test_who_is_not_logged_in_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ReadError) as failed:
        read_cluster(eks_client(REGION), CLUSTER)
    assert failed.value.reason is Reason.NO_CREDENTIALS
    assert failed.value.hint == "log in to the stack's account, and check again"


# -- the command


@pytest.fixture
def run(client: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(read, "eks_client", lambda _: client)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, [*arguments[:1], "--cluster", CLUSTER, "--region", REGION, *arguments[1:]])

    return run


def test_a_configuration_that_skips_a_minor_is_refused_before_eks_has_to(run: Callable[..., Any]) -> None:
    done = run("check", "--configured", "1.31")
    assert done.exit_code == ExitCode.NOT_READY
    assert done.stderr.startswith("refused: from 1.29 to 1.31 would skip 1.30; EKS goes up one minor at a time")
    assert "would skip" not in run("check", "--configured", "1.30").stderr


def test_the_command_shows_the_plan_and_ends_as_it_says(run: Callable[..., Any]) -> None:
    done = run("plan")
    assert done.exit_code == ExitCode.NOT_READY
    assert done.stdout.startswith("crucible-dev in eu-central-1: 1.29 -> 1.36, ")
    assert "control plane 1.35 -> 1.36" in done.stdout
    assert "asked for by argocd/2.8\\x1b[2J (41 in 30 days)" in done.stdout, "a user agent commands no terminal"
    as_json = json.loads(run("plan", "--json").stdout)
    assert [leg["minor"] for leg in as_json["legs"]] == [f"1.{each}" for each in range(29, 37)]


def test_the_command_checks_the_next_minor_alone(run: Callable[..., Any]) -> None:
    done = run("check", "--target", "1.30")
    assert done.exit_code == ExitCode.NOT_READY
    assert done.stdout.startswith("not ready for 1.30: 1 thing to do first, 0 parts unread")
    assert f"to be done first: nodes of {GROUPS[1]} 1.28 -> 1.29" in done.stdout
    as_json = json.loads(run("check", "--json").stdout)
    assert (as_json["ready"], as_json["next"], as_json["target"]) == (False, "1.30", "1.36")


def test_the_command_ends_otherwise_for_what_it_could_not_read(run: Callable[..., Any], fail: Fail) -> None:
    failure = fail("ListInsights", denied)
    done = run("check")
    assert done.exit_code == ExitCode.UNREAD
    assert "unread   insights: eks:ListInsights: denied" in done.stdout
    assert "allow eks:ListInsights" in done.stdout

    failure.over = True
    fail("DescribeCluster", denied)
    done = run("plan")
    assert done.exit_code == ExitCode.UNREAD
    assert done.stderr.startswith("could not be read: eks:DescribeCluster: denied")
    as_json = json.loads(run("plan", "--json").stdout)
    assert (as_json["outcome"], as_json["reason"]) == ("could not be read", Reason.DENIED)


@pytest.mark.parametrize(("target", "reason"), [("1.37", Refusal.UNKNOWN_VERSION), ("1.x", Refusal.UNKNOWN_VERSION)])
def test_the_command_refuses_in_words_and_with_its_exit_code(
    run: Callable[..., Any], target: str, reason: Refusal
) -> None:
    done = run("plan", "--target", target)
    assert done.exit_code == ExitCode.NOT_READY
    assert done.stderr.startswith("refused: ")
    assert json.loads(run("check", "--target", target, "--json").stdout)["reason"] == reason


def test_the_command_over_what_moto_has_alone_says_what_is_unread(
    moto: str, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stand-in of ours: EKS without add-ons and insights, as a proxy in between might make of it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_EKS", moto)
    done = CliRunner().invoke(app, ["check", "--cluster", CLUSTER, "--region", REGION])
    assert done.exit_code == ExitCode.UNREAD
    assert "unread   add-ons: eks:ListAddons: " in done.stdout
    assert "unread   insights: eks:ListInsights: " in done.stdout
    assert "unread   node group" not in done.stdout
