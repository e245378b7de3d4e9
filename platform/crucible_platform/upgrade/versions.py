"""What is known of each Kubernetes minor on EKS: its dates, what it no longer serves, and what it asks of nodes.

Every row names where it is from. A date that was not found is `None`, and a minor whose removals nobody has read is not in the table at
all: a plan through it would promise what was not looked at. To add one, read the two pages named in `CALENDAR` and `DEPRECATIONS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

CALENDAR = "https://docs.aws.amazon.com/eks/latest/userguide/kubernetes-versions.html#kubernetes-release-calendar"
DEPRECATIONS = "https://kubernetes.io/docs/reference/using-api/deprecation-guide/"

# USD for a cluster and hour, list price: "Amazon EKS extended support for Kubernetes versions pricing", AWS containers blog.
STANDARD_USD_PER_HOUR = 0.10
EXTENDED_USD_PER_HOUR = 0.60
# 365 days of 24 hours, over twelve months.
HOURS_PER_MONTH = 730

# A kubelet may be this much older than the API server, from 1.28 on, and never newer: https://kubernetes.io/releases/version-skew-policy/
KUBELET_SKEW = 3
# "Roll back a cluster to a previous Kubernetes version", Amazon EKS user guide; AWS has it since July 2026.
ROLLBACK_DAYS = 7
# From this minor on AWS has made no image of Amazon Linux 2, and for earlier ones it ended on that day: "Amazon Linux 2 AMI deprecation",
# Amazon EKS user guide; https://github.com/awslabs/amazon-eks-ami/issues/2545
AL2_ENDED = date(2025, 11, 26)


@dataclass(frozen=True, order=True)
class Minor:
    """A minor version of Kubernetes, such as 1.30. It is compared as numbers: as text, 1.9 would come after 1.30."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the version that a text names; what follows the minor, as in 1.30.4-20240625, is left out.

        Raises:
            ValueError: it names none.
        """
        found = re.match(r"v?(\d+)\.(\d+)(?![0-9A-Za-z])", text)
        if not found:
            raise ValueError(f"{text!r} is no version such as 1.30")
        return cls(int(found[1]), int(found[2]))

    def after(self, steps: int = 1) -> Minor:
        """Return the minor that is so many steps later, or earlier if negative."""
        return Minor(self.major, self.minor + steps)

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


NO_AL2_FROM = Minor(1, 33)


@dataclass(frozen=True)
class RemovedApi:
    """An API version that a minor no longer serves."""

    api: str
    kinds: tuple[str, ...]
    use: str


class Support(StrEnum):
    """What AWS does for a minor on a day."""

    STANDARD = "standard"
    EXTENDED = "extended"
    ENDED = "ended"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Release:
    """A minor on EKS.

    Attributes:
        released: when EKS had it.
        standard_until: the day on which extended support, and its price, begins (UTC).
        extended_until: the day from which EKS upgrades a control plane by itself, whenever it likes.
        removed: what its API server no longer serves.
        notes: what else to look at before going there, in EKS' own release notes.
        source: where the dates are from, besides `CALENDAR`.
    """

    minor: Minor
    released: date | None
    standard_until: date | None
    extended_until: date | None
    source: str
    removed: tuple[RemovedApi, ...] = ()
    notes: tuple[str, ...] = ()

    def support(self, on: date) -> Support:
        """Return what AWS does for it on a day."""
        if self.standard_until is None or self.extended_until is None:
            return Support.UNKNOWN
        if on < self.standard_until:
            return Support.STANDARD
        return Support.EXTENDED if on < self.extended_until else Support.ENDED


_GUIDE = "amazon-eks-user-guide, latest/ug/versioning/kubernetes-versions.adoc"
_FLOW_CONTROL = ("FlowSchema", "PriorityLevelConfiguration")

_RELEASES = (
    Release(
        Minor(1, 29),
        date(2024, 1, 23),
        date(2025, 3, 23),
        date(2026, 3, 23),
        source=_GUIDE,
        removed=(RemovedApi("flowcontrol.apiserver.k8s.io/v1beta2", _FLOW_CONTROL, "flowcontrol.apiserver.k8s.io/v1"),),
    ),
    Release(
        Minor(1, 30),
        date(2024, 5, 23),
        date(2025, 7, 23),
        date(2026, 7, 23),
        source=_GUIDE,
        notes=(
            "the cluster's role must be allowed ec2:DescribeAvailabilityZones",
            "new node groups are of AL2023 unless told otherwise",
        ),
    ),
    Release(
        Minor(1, 31),
        date(2024, 9, 26),
        date(2025, 11, 26),
        date(2026, 11, 26),
        source=_GUIDE,
        notes=("the kubelet no longer knows --keep-terminated-pod-volumes; take it out of launch templates",),
    ),
    Release(
        Minor(1, 32),
        date(2025, 1, 23),
        date(2026, 3, 23),
        date(2027, 3, 23),
        source=_GUIDE,
        removed=(RemovedApi("flowcontrol.apiserver.k8s.io/v1beta3", _FLOW_CONTROL, "flowcontrol.apiserver.k8s.io/v1"),),
        notes=("without credentials only /healthz, /livez and /readyz answer; a probe of anything else gets 401",),
    ),
    Release(
        Minor(1, 33),
        date(2025, 5, 29),
        date(2026, 7, 29),
        date(2027, 7, 29),
        source=_GUIDE,
        notes=("the Endpoints API is deprecated and warns; read EndpointSlices",),
    ),
    Release(
        Minor(1, 34),
        date(2025, 10, 2),
        date(2026, 12, 2),
        date(2027, 12, 2),
        source=_GUIDE,
        notes=(
            "nodes come with containerd 2.1: its runtime plugin is io.containerd.cri.v1.runtime, and gVisor's drop-in must name that one",
            "AppArmor is deprecated",
        ),
    ),
    Release(
        Minor(1, 35),
        date(2026, 1, 28),
        date(2027, 3, 27),
        date(2028, 3, 27),
        source="https://endoflife.date/amazon-eks",
        notes=(
            "the kubelet does not start on a node with cgroup v1; AL2023 has v2 unless it was told otherwise",
            "the kubelet no longer knows --pod-infra-container-image; take it out of custom images",
            "it is the last minor for containerd 1.x",
        ),
    ),
    Release(
        Minor(1, 36),
        date(2026, 6, 2),
        date(2027, 8, 2),
        date(2028, 8, 2),
        source="AWS What's New of June 2026; the end of extended support from aws-samples, which read the calendar on 2026-08-06",
        notes=(
            "nodes need containerd 2",
            "the kubelet refuses Pods with a gitRepo volume; use an init container",
            "SELinux labels of volumes are set by mounting; look at volumes that privileged and other Pods share",
        ),
    ),
)

# What `Pulumi.<stack>.yaml` may name. Older ones have nodes with containerd 1, which does not read what platform/node_config/sandbox.yaml tells
# it; a cluster of one is another tool's, and is raised with the AWS command line until it is here.
OLDEST_OF_STACKS = Minor(1, 34)

RELEASES: Mapping[Minor, Release] = MappingProxyType({release.minor: release for release in _RELEASES})
NEWEST = max(RELEASES)


def is_al2(ami_type: str) -> bool:
    """Tell whether an EKS AMI type is of Amazon Linux 2. Of `CUSTOM` nobody can tell from the API."""
    return ami_type.startswith("AL2_")


def version_order(version: str) -> tuple[int, ...]:
    """Return what orders versions such as v1.18.1-eksbuild.3: their numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
