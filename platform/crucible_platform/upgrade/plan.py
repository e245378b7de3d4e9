"""Decides how a cluster gets to a later Kubernetes version: one minor at a time, and for each what comes before what. It asks nobody.

A plan is made from what the cluster is now, so an upgrade that stopped half way is resumed by planning again: what is done is not in the
new plan, and what is half done comes first. What could not be read is in the plan as unread; such a plan is never ready.

The order within a minor: add-ons that the new version would not accept go first, to one that both versions accept, since EKS holds an
upgrade back for an add-on that does not fit; then the control plane, then add-ons that only fit it, then the nodes. Nodes are raised
before the next minor begins: AWS' API reference has every managed node group at the cluster's version before the cluster may go on
(UpdateClusterVersion), and its user guide lets them lag by three. The stricter of the two is right in both cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from crucible_platform.place import PREFIX
from crucible_platform.upgrade.versions import (
    AL2_ENDED,
    EXTENDED_USD_PER_HOUR,
    HOURS_PER_MONTH,
    KUBELET_SKEW,
    NEWEST,
    NO_AL2_FROM,
    OLDEST_OF_STACKS,
    RELEASES,
    ROLLBACK_DAYS,
    STANDARD_USD_PER_HOUR,
    Minor,
    Support,
    is_al2,
    version_order,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import date

DOCS = "docs/upgrade.md"
# Where the stack's configuration has what a step changes.
VERSION_KEY = f"{PREFIX}:cluster.version"
ADDON_KEYS = {
    "eks-pod-identity-agent": f"{PREFIX}:cluster.add_ons.pod_identity_agent",
    "vpc-cni": f"{PREFIX}:cluster.add_ons.vpc_cni",
    "kube-proxy": f"{PREFIX}:cluster.add_ons.kube_proxy",
    "coredns": f"{PREFIX}:cluster.add_ons.coredns",
    "aws-ebs-csi-driver": f"{PREFIX}:cluster.add_ons.ebs_csi",
}

# An add-on -> a minor -> the versions of it that EKS offers there, the one to take first in front.
Compatible = Mapping[str, Mapping[Minor, tuple[str, ...]]]

# What others need comes before them: the network's role, a Pod's address, the way to Services, names. Those of others follow by name.
_ADDON_ORDER = tuple(ADDON_KEYS)
# It is of the control plane's minor here, and so never goes before it. Kubernetes would let it be three older, and never newer.
_FOLLOWS = "kube-proxy"
# "You can only update one minor version at a time": "Amazon VPC CNI", Amazon EKS user guide.
_ONE_MINOR_AT_A_TIME = frozenset({"vpc-cni"})
_AT_REST = "ACTIVE"
_PASSING = frozenset({"CREATING", "UPDATING", "DELETING", "PENDING"})


class Refusal(StrEnum):
    """Why there is no plan."""

    UNKNOWN_VERSION = "unknown_version"
    DOWNGRADE = "downgrade"
    SKIPPED_MINOR = "skipped_minor"
    NODES_AHEAD = "nodes_ahead"


class UpgradeRefusedError(Exception):
    """An upgrade that cannot be, however it is gone about: `reason` says why, `hint` what to do instead."""

    def __init__(self, reason: Refusal, message: str, hint: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.hint = hint


class Severity(StrEnum):
    """What a finding means for the minor that it is about."""

    BLOCKS = "blocks"
    WARNS = "warns"


class StepKind(StrEnum):
    """What a step changes."""

    ADDON = "add-on"
    NEW_NODES = "new nodes"
    CONTROL_PLANE = "control plane"
    NODES = "nodes"


class Undo(StrEnum):
    """Whether there is a way back from a step."""

    YES = "yes"
    LIMITED = "limited"
    NO = "no"


@dataclass(frozen=True)
class Addon:
    """An EKS add-on. `problems` is what EKS says of its health."""

    name: str
    version: str
    status: str = _AT_REST
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeGroup:
    """A managed node group. `release` is its image's, or the image itself if `ami_type` is CUSTOM."""

    name: str
    version: Minor
    ami_type: str
    release: str
    status: str = _AT_REST
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeprecatedUse:
    """An API that somebody has asked for in the last 30 days, and that `gone_in` no longer serves. `clients` are user agents."""

    usage: str
    gone_in: Minor | None
    replacement: str | None
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Insight:
    """What EKS has found about the cluster's readiness for a minor. `status` is PASSING, WARNING, ERROR or UNKNOWN."""

    name: str
    minor: Minor | None
    status: str
    reason: str
    advice: str = ""
    uses: tuple[DeprecatedUse, ...] = ()


@dataclass(frozen=True)
class Unread:
    """A part of the cluster that could not be read, why, and what to do."""

    part: str
    problem: str
    hint: str


@dataclass(frozen=True)
class ClusterState:
    """What a cluster is now.

    Attributes:
        extended_support: whether it enters extended support by itself; `None` where EKS does not say, which means that it does.
        unread: what of all this is missing, since it could not be read.
    """

    name: str
    region: str
    version: Minor
    status: str = _AT_REST
    addons: tuple[Addon, ...] = ()
    node_groups: tuple[NodeGroup, ...] = ()
    insights: tuple[Insight, ...] = ()
    extended_support: bool | None = None
    unread: tuple[Unread, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something to look at before a minor."""

    severity: Severity
    minor: Minor
    text: str
    hint: str


@dataclass(frozen=True)
class Step:
    """One change. `old` and `new` are versions, of what `names` names."""

    kind: StepKind
    minor: Minor
    names: tuple[str, ...]
    old: str
    new: str
    what: str
    why: str
    how: tuple[str, ...]
    undo: Undo
    way_back: str


@dataclass(frozen=True)
class Leg:
    """The way to one minor. The first leg of a plan is the cluster's own: it finishes what an earlier upgrade left."""

    minor: Minor
    support: Support
    usd_per_hour: float | None
    findings: tuple[Finding, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class UpgradePlan:
    """How a cluster gets to `target`. `staying` is what it costs to stay."""

    cluster: str
    region: str
    current: Minor
    target: Minor
    made_on: date
    staying: str
    legs: tuple[Leg, ...]
    unread: tuple[Unread, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every change, in order."""
        return tuple(step for leg in self.legs for step in leg.steps)

    @property
    def next_minor(self) -> Minor | None:
        """The minor that the control plane goes to next; `None` if it is at the target."""
        return self.current.after() if self.current < self.target else None

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """What keeps the cluster from its next minor, or from being left as it is."""
        due = self.next_minor or self.current
        return tuple(
            finding
            for leg in self.legs
            for finding in leg.findings
            if finding.severity is Severity.BLOCKS and leg.minor <= due
        )

    @property
    def ready(self) -> bool:
        """Whether the next minor, if there is one, can begin. Never if anything is unread."""
        return not self.blockers and not self.unread


def known(text: str) -> Minor:
    """Return a version that there is a release of.

    Raises:
        UpgradeRefusedError: it is none, or nothing is known of it.
    """
    try:
        minor = Minor.parse(text)
    except ValueError as error:
        raise UpgradeRefusedError(Refusal.UNKNOWN_VERSION, str(error), f"known are {_known()}") from None
    if minor not in RELEASES:
        raise UpgradeRefusedError(
            Refusal.UNKNOWN_VERSION,
            f"of {minor} nothing is known here; known are {_known()}",
            "read what it removes and asks of nodes, and add it to upgrade/versions.py",
        )
    return minor


def next_allowed(current: str, wanted: str) -> Minor:
    """Return the version that a configuration wants of a cluster that runs `current`, if it may be the next.

    Raises:
        UpgradeRefusedError: it is below the current one, further than the next minor, or nothing is known of it.
    """
    now, then = known(current), known(wanted)
    if then < now:
        raise _downgrade(now, then)
    if then > now.after():
        raise UpgradeRefusedError(
            Refusal.SKIPPED_MINOR,
            f"from {now} to {then} would skip {_list(_between(now, then))}; EKS goes up one minor at a time",
            f"set {VERSION_KEY} to {now.after()}, and plan the rest with `crucible-platform upgrade plan --target {then}`",
        )
    return then


def plan(state: ClusterState, target: Minor, compatible: Compatible, today: date) -> UpgradePlan:
    """Return the way from what a cluster is to `target`.

    Args:
        state: what it is now.
        target: where it is to be; its own version to see what an earlier upgrade left.
        compatible: what EKS offers of each add-on. One that is not in it has not been read.
        today: what is in support, and at what price, depends on it.

    Raises:
        UpgradeRefusedError: there is no such way.
    """
    known(str(state.version))
    known(str(target))
    if target < state.version:
        raise _downgrade(state.version, target)
    if ahead := [group.name for group in state.node_groups if group.version > state.version]:
        raise UpgradeRefusedError(
            Refusal.NODES_AHEAD,
            f"node groups {_list(ahead)} are newer than the control plane, {state.version}, which Kubernetes supports in no case",
            f"make node groups of {state.version} in their place, then plan again ({DOCS})",
        )
    legs = tuple(_Walk(state, target, compatible, today).legs())
    return UpgradePlan(
        state.name, state.region, state.version, target, today, _staying(state, today), legs, state.unread
    )


class _Walk:
    """Goes up the minors, remembering what each add-on and node group would be by then."""

    def __init__(self, state: ClusterState, target: Minor, compatible: Compatible, today: date) -> None:
        self.state = state
        self.target = target
        self.compatible = compatible
        self.today = today
        self.addons = {addon.name: addon.version for addon in sorted(state.addons, key=_addon_order)}
        self.nodes = {group.name: group.version for group in state.node_groups}
        # Below the first minor that has none, a group of Amazon Linux 2 is raised like any other.
        self.al2 = {group.name for group in state.node_groups if is_al2(group.ami_type) and target >= NO_AL2_FROM}

    def legs(self) -> Iterator[Leg]:
        at = self.state.version
        unfinished = [*self._fitting_addons(at, at), *self._new_nodes(at), *self._raised_nodes(at)]
        yield self._leg(at, unfinished, [*self._health(), *self._old_images()])
        for number in range(at.minor + 1, self.target.minor + 1):
            minor = Minor(at.major, number)
            before = [*self._fitting_addons(minor.after(-1), minor)]
            after = [self._control_plane(minor), *self._fitting_addons(minor, minor), *self._raised_nodes(minor)]
            findings = [*self._images_of_ones_own(minor)] if minor == max(NO_AL2_FROM, at.after()) else []
            if minor == at.after():
                findings += [*self._come_first([*unfinished, *before], minor), *self._unwatched(minor)]
            yield self._leg(minor, [*before, *after], findings)

    def _leg(self, minor: Minor, steps: list[Step], findings: list[Finding]) -> Leg:
        release, ahead = RELEASES[minor], minor > self.state.version
        support = release.support(self.today)
        return Leg(
            minor,
            support,
            usd_per_hour(support),
            (*findings, *self._insights(minor), *self._addons_without(minor), *self._out_of_support(minor)),
            tuple(f"{gone.api} of {_list(gone.kinds)}: use {gone.use}" for gone in release.removed if ahead),
            release.notes if ahead else (),
            tuple(steps),
        )

    # -- steps

    def _fitting_addons(self, control_plane: Minor, minor: Minor) -> Iterator[Step]:
        """Yield what makes every add-on fit `minor`, as far as that can be done while the control plane is at `control_plane`."""
        for name in self.addons:
            for new in self._hops(name, control_plane, minor):
                old, self.addons[name] = self.addons[name], new
                yield self._addon(name, old, new, control_plane, minor)

    def _hops(self, name: str, control_plane: Minor, minor: Minor) -> list[str]:
        here, fits = self._fits(name, control_plane), self._fits(name, minor)
        version = self.addons[name]
        both = [each for each in fits if each in here]
        if version in fits or not both:
            return []
        if name not in _ONE_MINOR_AT_A_TIME:
            return ([each for each in both if version_order(each) > version_order(version)] or both)[:1]
        hops: list[str] = []
        while version not in fits:
            own, order = _own_minor(version), version_order(version)
            later = [each for each in here if _own_minor(each) > own or (each in fits and version_order(each) > order)]
            # Where what is offered leaves out a minor of its own, or goes down only, there is no better way.
            nearest = [each for each in later if _own_minor(each) == min(map(_own_minor, later))] or both
            version = next((each for each in nearest if each in fits), max(nearest, key=version_order))
            hops.append(version)
        return hops

    def _fits(self, name: str, minor: Minor) -> tuple[str, ...]:
        offered = self.compatible.get(name, {}).get(minor, ())
        own = tuple(each for each in offered if _own_minor(each) == (minor.major, minor.minor))
        return own or offered if name == _FOLLOWS else offered

    def _addon(self, name: str, old: str, new: str, control_plane: Minor, minor: Minor) -> Step:
        if name == _FOLLOWS:
            why = f"it is of the control plane's minor, {minor}"
        elif new not in self._fits(name, minor):
            why = f"on the way to one for {minor}: {name} goes up one minor of its own at a time"
        elif control_plane < minor:
            why = f"EKS does not offer {old} for {minor}, and offers {new} for {control_plane} as well, so it can go first"
        else:
            why = f"EKS does not offer {old} for {minor}"
        undo, back = Undo.NO, f"{old} does not fit {control_plane}"
        if name == _FOLLOWS:
            undo, back = Undo.LIMITED, f"set {old} again, if the control plane goes back"
        elif old in self._fits(name, control_plane):
            undo, back = Undo.YES, f"set {old} again"
        return Step(
            StepKind.ADDON,
            minor,
            (name,),
            old,
            new,
            f"{name} {old} -> {new}",
            why,
            self._addon_set(name, new, minor),
            undo,
            back,
        )

    def _new_nodes(self, minor: Minor) -> Iterator[Step]:
        names = tuple(name for name in self.nodes if name in self.al2)
        if not names:
            return
        old = _list(sorted({str(self.nodes[name]) for name in names}))
        self.nodes.update(dict.fromkeys(names, minor))
        yield Step(
            StepKind.NEW_NODES,
            minor,
            names,
            old,
            str(minor),
            f"node groups of AL2023 in place of {_list(names)}, which are of Amazon Linux 2",
            f"there is no Amazon Linux 2 from {NO_AL2_FROM} on, a group cannot change its system, and none has had a fix since {AL2_ENDED}",
            (
                f"add a group of AL2023 beside each ({DOCS}), and pulumi up",
                *(f"kubectl cordon -l eks.amazonaws.com/nodegroup={name}" for name in names),
                *(
                    f"kubectl drain -l eks.amazonaws.com/nodegroup={name} --ignore-daemonsets --delete-emptydir-data"
                    for name in names
                ),
                "take the old groups out of the configuration, and pulumi up",
            ),
            Undo.LIMITED,
            "kubectl uncordon the old nodes, until their groups are removed",
        )

    def _raised_nodes(self, minor: Minor) -> Iterator[Step]:
        names = tuple(name for name, version in self.nodes.items() if version < minor)
        if not names:
            return
        old = _list(sorted({str(self.nodes[name]) for name in names}))
        self.nodes.update(dict.fromkeys(names, minor))
        yield Step(
            StepKind.NODES,
            minor,
            names,
            old,
            str(minor),
            f"nodes of {_list(names)} {old} -> {minor}",
            "every node group is at the control plane's version before the next minor begins; one zone follows another",
            self._up()
            if minor >= OLDEST_OF_STACKS
            else tuple(f"aws eks update-nodegroup-version {self._of} --nodegroup-name {name}" for name in names),
            Undo.LIMITED,
            f"AWS' guide to rollback takes groups back to {old}, and its API reference says that none goes back: do not count on it",
        )

    def _control_plane(self, minor: Minor) -> Step:
        old = minor.after(-1)
        if RELEASES[old].support(self.today) is Support.ENDED:
            undo, back = Undo.NO, f"EKS goes back to versions in support only, and {old} is not"
        elif RELEASES[old].support(self.today) is Support.UNKNOWN:
            undo, back = Undo.LIMITED, f"for {ROLLBACK_DAYS} days, if {old} is still in support ({DOCS})"
        else:
            command = self._raise(old)
            undo = Undo.LIMITED
            back = f"for {ROLLBACK_DAYS} days, once its nodes and add-ons fit {old} again: {command} ({DOCS})"
        proxy = self._hops(_FOLLOWS, minor, minor) if _FOLLOWS in self.addons else []
        return Step(
            StepKind.CONTROL_PLANE,
            minor,
            (self.state.name,),
            str(old),
            str(minor),
            f"control plane {old} -> {minor}",
            "EKS goes up one minor at a time",
            (
                self._set(VERSION_KEY, str(minor)),
                *(self._set(ADDON_KEYS[_FOLLOWS], each) for each in proxy),
                f"{self._up()[0]} --target '**aws:eks/cluster:Cluster::{self.state.name}'",
            )
            if minor >= OLDEST_OF_STACKS
            else (self._raise(minor),),
            undo,
            back,
        )

    def _stack(self) -> str:
        stack = self.state.name.removeprefix(f"{PREFIX}-")
        return f" -s {stack}" if stack != self.state.name else ""

    def _set(self, key: str, value: str) -> str:
        return f"pulumi config set{self._stack()} --path '{key}' {value}"

    def _addon_set(self, name: str, version: str, minor: Minor) -> tuple[str, ...]:
        """Return how an add-on gets a version on the way to a minor: by the configuration, if that may name both."""
        if name in ADDON_KEYS and minor >= OLDEST_OF_STACKS:
            return self._set(ADDON_KEYS[name], version), *self._up()
        return (
            f"aws eks update-addon {self._of} --addon-name {name} --addon-version {version} --resolve-conflicts PRESERVE",
        )

    @property
    def _of(self) -> str:
        return f"--region {self.state.region} --cluster-name {self.state.name}"

    def _raise(self, minor: Minor) -> str:
        return f"aws eks update-cluster-version --region {self.state.region} --name {self.state.name} --kubernetes-version {minor}"

    def _up(self) -> tuple[str, ...]:
        return (f"pulumi up{self._stack()}",)

    # -- findings

    def _health(self) -> Iterator[Finding]:
        state = self.state
        blocks = partial(Finding, Severity.BLOCKS, state.version)
        if state.status != _AT_REST:
            yield blocks(
                f"the cluster is {state.status}",
                "wait until it is ACTIVE" if state.status in _PASSING else "look in EKS",
            )
        parts: Iterable[Addon | NodeGroup] = (*state.addons, *state.node_groups)
        for part in parts:
            if part.status != _AT_REST or part.problems:
                said = "".join(f"; {problem}" for problem in part.problems)
                hint = "wait until it is ACTIVE" if part.status in _PASSING else "set that right first"
                yield blocks(f"{part.name} is {part.status}{said}", hint)
        for group in state.node_groups:
            if group.version < state.version.after(-KUBELET_SKEW):
                yield Finding(
                    Severity.WARNS,
                    state.version,
                    f"{group.name} is at {group.version}, more than {KUBELET_SKEW} minors behind the control plane: out of support",
                    "raise it before anything else",
                )

    def _insights(self, minor: Minor) -> Iterator[Finding]:
        for insight in self.state.insights:
            about = insight.minor or self.state.version.after()
            if insight.status == "PASSING" or about != minor:
                continue
            severity = Severity.BLOCKS if insight.status == "ERROR" else Severity.WARNS
            hint = insight.advice or "aws eks describe-insight says more"
            yield Finding(severity, minor, f"{insight.name}: {insight.reason}", hint)
            for use in insight.uses:
                gone = f"is not served from {use.gone_in} on" if use.gone_in else "goes away"
                asked = f"; asked for by {_list(use.clients)}" if use.clients else ""
                hint = f"use {use.replacement}" if use.replacement else "there is nothing in its place"
                yield Finding(severity, minor, f"{use.usage} {gone}{asked}", hint)

    def _unwatched(self, minor: Minor) -> Iterator[Finding]:
        read = not any(unread.part.startswith("insights") for unread in self.state.unread)
        if read and not any(insight.minor == minor for insight in self.state.insights):
            yield Finding(
                Severity.WARNS,
                minor,
                f"EKS has looked at nothing for {minor} yet, deprecated APIs included; that is not the same as having found nothing",
                f"aws eks start-insights-refresh --region {self.state.region} --cluster-name {self.state.name}, and check again",
            )

    def _come_first(self, steps: Iterable[Step], minor: Minor) -> Iterator[Finding]:
        for step in steps:
            yield Finding(Severity.BLOCKS, minor, f"to be done first: {step.what}", step.why)

    def _addons_without(self, minor: Minor) -> Iterator[Finding]:
        for name, version in self.addons.items():
            if name in self.compatible and version not in self._fits(name, minor):
                severity = Severity.BLOCKS if minor > self.state.version else Severity.WARNS
                hint = "take it out, or stay until there is one"
                yield Finding(severity, minor, f"EKS offers no version of {name} for {minor}", hint)

    def _old_images(self) -> Iterator[Finding]:
        groups = [group.name for group in self.state.node_groups if is_al2(group.ami_type)]
        if groups and not self.al2:
            yield Finding(
                Severity.WARNS,
                self.state.version,
                f"{_list(groups)}: of Amazon Linux 2, whose images have had no fix since {AL2_ENDED}",
                f"put groups of AL2023 in their place; {NO_AL2_FROM} needs that in any case",
            )

    def _images_of_ones_own(self, minor: Minor) -> Iterator[Finding]:
        if groups := [group.name for group in self.state.node_groups if group.ami_type == "CUSTOM"]:
            yield Finding(
                Severity.WARNS,
                minor,
                f"{_list(groups)}: of an image of your own; EKS does not say of what system",
                "see that it is not Amazon Linux 2, and name an image of each minor in the launch template",
            )

    def _out_of_support(self, minor: Minor) -> Iterator[Finding]:
        release = RELEASES[minor]
        support = release.support(self.today)
        if support is Support.ENDED and minor != self.state.version:
            yield Finding(
                Severity.WARNS,
                minor,
                f"its extended support ended on {release.extended_until}; AWS does not say whether it still upgrades to it",
                f"if EKS refuses it, wait for EKS' own upgrade to the oldest version in support, or move to a new cluster ({DOCS})",
            )
        if support is Support.EXTENDED and self.state.extended_support is False:
            yield Finding(
                Severity.WARNS,
                minor,
                "it is in extended support, and the cluster's upgrade policy is STANDARD: EKS upgrades it by itself",
                "go on at once, or set the policy to EXTENDED",
            )


def usd_per_hour(support: Support) -> float | None:
    """Return what a cluster costs in an hour, its nodes left out; `None` where that is not known."""
    return {Support.STANDARD: STANDARD_USD_PER_HOUR, Support.EXTENDED: EXTENDED_USD_PER_HOUR}.get(support)


def _staying(state: ClusterState, today: date) -> str:
    release = RELEASES[state.version]
    more = (EXTENDED_USD_PER_HOUR - STANDARD_USD_PER_HOUR) * HOURS_PER_MONTH
    match release.support(today):
        case Support.STANDARD if state.extended_support is False:
            return (
                f"{STANDARD_USD_PER_HOUR:.2f} USD an hour until {release.standard_until}, "
                "when EKS upgrades it by itself (its upgrade policy is STANDARD)"
            )
        case Support.STANDARD:
            return (
                f"{STANDARD_USD_PER_HOUR:.2f} USD an hour until {release.standard_until}, then {EXTENDED_USD_PER_HOUR:.2f}, "
                f"{more:.0f} USD a month more; from {release.extended_until} on EKS upgrades it by itself, whenever it likes"
            )
        case Support.EXTENDED if release.extended_until:
            left = (EXTENDED_USD_PER_HOUR - STANDARD_USD_PER_HOUR) * 24 * (release.extended_until - today).days
            return (
                f"{EXTENDED_USD_PER_HOUR:.2f} USD an hour since {release.standard_until}, {more:.0f} USD a month more than in standard support and "
                f"{left:.0f} USD until {release.extended_until}; from then on EKS upgrades it by itself, whenever it likes"
            )
        case Support.ENDED:
            return (
                f"its extended support ended on {release.extended_until}: no more fixes, and EKS upgrades the control plane by itself, "
                "whenever it likes, without telling, and without a way back"
            )
        case _:
            return "not known here: the table has no dates of it"


def _downgrade(now: Minor, then: Minor) -> UpgradeRefusedError:
    return UpgradeRefusedError(
        Refusal.DOWNGRADE,
        f"{then} is below {now}, which the cluster runs",
        f"EKS goes back by one minor, within {ROLLBACK_DAYS} days of an upgrade, and not through Pulumi: see {DOCS}",
    )


def _between(now: Minor, then: Minor) -> list[Minor]:
    return [Minor(now.major, minor) for minor in range(now.minor + 1, then.minor)]


def _known() -> str:
    return f"{min(RELEASES)} to {NEWEST}"


def _list(things: Iterable[object]) -> str:
    *most, last = [str(thing) for thing in things]
    return f"{', '.join(most)} and {last}" if most else last


def _addon_order(addon: Addon) -> tuple[int, str]:
    place = _ADDON_ORDER.index(addon.name) if addon.name in _ADDON_ORDER else len(_ADDON_ORDER)
    return place, addon.name


def _own_minor(version: str) -> tuple[int, ...]:
    return version_order(version)[:2]
