"""Reads from EKS what a plan is made from. Whatever fails is told by name, and what was read until then is kept.

Nothing here changes anything, and all of it is bounded: each call in time and attempts, and no call follows one that found AWS
throttling or out of reach, since the rest would only wait as long. A call that is denied costs its own part and no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import boto3  # type: ignore[import-untyped]
from botocore.config import Config  # type: ignore[import-untyped]
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    TokenRetrievalError,
    UnauthorizedSSOTokenError,
)
from botocore.exceptions import ConnectionError as NoConnectionError

from crucible_platform.upgrade.plan import Addon, ClusterState, DeprecatedUse, Insight, NodeGroup, Unread
from crucible_platform.upgrade.versions import RELEASES, Minor, version_order

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 20.0
# The first included. botocore waits between them, at random and up to 20 s (its retry mode "standard").
ATTEMPTS = 5

_THROTTLED = frozenset({"Throttling", "ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded"})
_DENIED = frozenset({"AccessDenied", "AccessDeniedException", "UnauthorizedOperation"})
_MISSING = frozenset({"ResourceNotFoundException"})
_BAD_CREDENTIALS = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidClientTokenId",
        "InvalidSignatureException",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)


class Reason(StrEnum):
    """Why something could not be read."""

    THROTTLED = "throttled"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    DENIED = "denied"
    NO_CREDENTIALS = "no_credentials"
    MISSING = "missing"
    UNEXPECTED = "unexpected"


# After these the next call would fare no better.
_FINAL = frozenset({Reason.THROTTLED, Reason.TIMEOUT, Reason.UNREACHABLE, Reason.NO_CREDENTIALS})


class ReadError(Exception):
    """A call that failed for good: `call` is its IAM action, `reason` what happened, `hint` what to do."""

    def __init__(self, call: str, reason: Reason, message: str, hint: str) -> None:
        super().__init__(f"{call}: {message}")
        self.call = call
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class Reading:
    """A cluster, and what EKS offers of each add-on that it has, the version to take first in front."""

    state: ClusterState
    compatible: Mapping[str, Mapping[Minor, tuple[str, ...]]]


def eks_client(
    region: str, *, endpoint: str | None = None, attempts: int = ATTEMPTS, read_timeout: float = READ_TIMEOUT_S
) -> Any:
    """Return a client of EKS whose every call ends.

    Args:
        region: such as eu-central-1.
        endpoint: where EKS is, if not at AWS.
        attempts: at most for each call, the first included.
        read_timeout: seconds for each attempt's answer.
    """
    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout,
        retries={"mode": "standard", "total_max_attempts": attempts},
    )
    # Of a session of its own: the default one would keep the credentials that it found first.
    return boto3.Session().client("eks", region_name=region, endpoint_url=endpoint, config=config)


def read_cluster(client: Any, name: str) -> Reading:
    """Return a cluster as far as it can be read; what cannot is in the state's `unread`.

    Raises:
        ReadError: not even the cluster's version can be read, without which there is nothing to plan.
    """
    return _Reader(client, name).read()


class _Reader:
    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name
        self.unread: list[Unread] = []
        self.stopped_by: ReadError | None = None

    def read(self) -> Reading:
        cluster = self._call("describe_cluster", _cluster, {"name": self.name})
        of_cluster = {"clusterName": self.name}
        names = self._try("add-ons", "list_addons", lambda found: found.get("addons", []), of_cluster) or []
        addons = [
            self._try(f"add-on {each}", "describe_addon", _addon, {**of_cluster, "addonName": each}) for each in names
        ]
        offered = {
            each: self._try(f"versions of add-on {each}", "describe_addon_versions", _offered, {"addonName": each})
            for each in names
        }
        names = self._try("node groups", "list_nodegroups", lambda found: found.get("nodegroups", []), of_cluster) or []
        groups = [
            self._try(f"node group {each}", "describe_nodegroup", _group, {**of_cluster, "nodegroupName": each})
            for each in names
        ]
        state = ClusterState(
            name=self.name,
            region=self.client.meta.region_name,
            version=cluster.version,
            status=cluster.status,
            addons=tuple(addon for addon in addons if addon),
            node_groups=tuple(group for group in groups if group),
            insights=self._insights(),
            extended_support=cluster.extended_support,
            unread=tuple(self.unread),
        )
        return Reading(state, {each: versions for each, versions in offered.items() if versions is not None})

    def _insights(self) -> tuple[Insight, ...]:
        arguments = {"clusterName": self.name, "filter": {"categories": ["UPGRADE_READINESS"]}}
        listed = self._try("insights", "list_insights", lambda found: found.get("insights", []), arguments) or []
        insights = []
        for summary in listed:
            insight = _insight(summary)
            if insight.status != "PASSING":
                which = {"clusterName": self.name, "id": summary["id"]}
                whole = self._try(
                    f"insight {insight.name}", "describe_insight", lambda found: _insight(found["insight"]), which
                )
                insight = whole or insight
            insights.append(insight)
        return tuple(insights)

    def _try(self, part: str, operation: str, take: Callable[[Any], T], arguments: dict[str, Any]) -> T | None:
        """Return what a call answers, or note its part as unread."""
        if self.stopped_by:
            self.unread.append(Unread(part, f"not asked for, since {self.stopped_by}", self.stopped_by.hint))
            return None
        try:
            return self._call(operation, take, arguments)
        except ReadError as error:
            self.unread.append(Unread(part, str(error), error.hint))
            if error.reason in _FINAL:
                self.stopped_by = error
            return None

    def _call(self, operation: str, take: Callable[[Any], T], arguments: dict[str, Any]) -> T:
        call = f"eks:{self.client.meta.method_to_api_mapping[operation]}"
        try:
            if self.client.can_paginate(operation):
                found = self.client.get_paginator(operation).paginate(**arguments).build_full_result()
            else:
                found = getattr(self.client, operation)(**arguments)
        except (ClientError, BotoCoreError) as error:
            raise _told(call, error, self.client.meta) from error
        try:
            return take(found)
        except (KeyError, TypeError, ValueError) as error:
            message = f"its answer is not what EKS' API has: {error!r}"
            raise ReadError(call, Reason.UNEXPECTED, message, "see whether boto3 is up to date") from error


def _told(call: str, error: ClientError | BotoCoreError, meta: Any) -> ReadError:
    if isinstance(error, ClientError):
        return _refused(call, error)
    if isinstance(
        error, NoCredentialsError | PartialCredentialsError | TokenRetrievalError | UnauthorizedSSOTokenError
    ):
        return ReadError(call, Reason.NO_CREDENTIALS, str(error), "log in to the stack's account, and check again")
    attempts = meta.config.retries["total_max_attempts"]
    tried = f"after {attempts} attempt{'s' * (attempts > 1)}"
    if isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        message = f"no answer {tried} from {meta.endpoint_url}"
        return ReadError(call, Reason.TIMEOUT, message, "nothing was changed: check again once AWS answers")
    if isinstance(error, HTTPClientError | NoConnectionError):
        message = f"{meta.endpoint_url} is out of reach {tried}: {error}"
        return ReadError(
            call, Reason.UNREACHABLE, message, "see that the region is right, and that this machine reaches AWS"
        )
    return ReadError(call, Reason.UNEXPECTED, str(error), "see whether boto3 is up to date")


def _refused(call: str, error: ClientError) -> ReadError:
    said = error.response.get("Error", {})
    code, message = said.get("Code", ""), said.get("Message", "") or "no more was said"
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code in _THROTTLED or status == 429:
        attempts = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
        return ReadError(
            call,
            Reason.THROTTLED,
            f"throttled, {attempts} times in a row: {message}",
            "nothing was changed: check again in a minute",
        )
    if code in _BAD_CREDENTIALS:
        return ReadError(
            call, Reason.NO_CREDENTIALS, f"{code}: {message}", "log in to the stack's account, and check again"
        )
    if code in _DENIED or status == 403:
        return ReadError(call, Reason.DENIED, f"denied: {message}", f"allow {call} to whom you are logged in as")
    if code in _MISSING:
        return ReadError(call, Reason.MISSING, message, "see that name, region and account are right")
    return ReadError(
        call, Reason.UNEXPECTED, f"{code}: {message}", "nothing was changed: check again; if it stays, ask AWS"
    )


@dataclass(frozen=True)
class _Cluster:
    version: Minor
    status: str
    extended_support: bool | None


def _cluster(found: Any) -> _Cluster:
    cluster = found["cluster"]
    policy = cluster.get("upgradePolicy", {}).get("supportType")
    return _Cluster(Minor.parse(cluster["version"]), cluster["status"], policy and policy == "EXTENDED")


def _addon(found: Any) -> Addon:
    addon = found["addon"]
    return Addon(addon["addonName"], addon["addonVersion"], addon["status"], _problems(addon))


def _group(found: Any) -> NodeGroup:
    group = found["nodegroup"]
    return NodeGroup(
        group["nodegroupName"],
        Minor.parse(group["version"]),
        group.get("amiType", "CUSTOM"),
        group.get("releaseVersion", ""),
        group["status"],
        _problems(group),
    )


def _problems(found: Any) -> tuple[str, ...]:
    issues = found.get("health", {}).get("issues", [])
    return tuple(f"{issue.get('code')}: {issue.get('message')}" for issue in issues)


def _offered(found: Any) -> dict[Minor, tuple[str, ...]]:
    """Return each minor's versions: the one that EKS has for its default there, then the others from the newest on."""
    versions: dict[Minor, dict[str, bool]] = {minor: {} for minor in RELEASES}
    for addon in found.get("addons", []):
        for offer in addon["addonVersions"]:
            for fit in offer["compatibilities"]:
                of_minor = versions.get(Minor.parse(fit["clusterVersion"]))
                if of_minor is not None:
                    of_minor[offer["addonVersion"]] = fit.get("defaultVersion", False)
    return {
        minor: tuple(sorted(of, key=lambda version: (of[version], version_order(version)), reverse=True))
        for minor, of in versions.items()
    }


def _insight(found: Any) -> Insight:
    status = found.get("insightStatus", {})
    about = found.get("kubernetesVersion")
    details = found.get("categorySpecificSummary", {}).get("deprecationDetails", [])
    return Insight(
        found["name"],
        Minor.parse(about) if about else None,
        status.get("status", "UNKNOWN"),
        status.get("reason", "EKS gives no reason"),
        found.get("recommendation", ""),
        # EKS lists every API that the minor removes; those that somebody asks for have clients.
        tuple(_use(detail) for detail in details if detail.get("clientStats")),
    )


def _use(detail: Any) -> DeprecatedUse:
    gone_in = detail.get("stopServingVersion")
    return DeprecatedUse(
        detail["usage"],
        Minor.parse(gone_in) if gone_in else None,
        detail.get("replacedWith"),
        tuple(
            f"{client['userAgent']} ({client['numberOfRequestsLast30Days']} in 30 days)"
            for client in detail["clientStats"]
        ),
    )
