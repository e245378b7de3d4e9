"""The way to a later Kubernetes version: no minor is skipped, nothing is left behind or goes ahead, and what cannot be is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date, timedelta
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crucible_platform.section import ROOT
from crucible_platform.upgrade.command import ExitCode, exit_code, jsonable, told, told_verdict, verdict
from crucible_platform.upgrade.plan import (
    Addon,
    ClusterState,
    Compatible,
    DeprecatedUse,
    Insight,
    NodeGroup,
    Refusal,
    Severity,
    Step,
    StepKind,
    Undo,
    Unread,
    UpgradePlan,
    UpgradeRefusedError,
    known,
    next_allowed,
    plan,
)
from crucible_platform.upgrade.versions import (
    KUBELET_SKEW,
    NEWEST,
    NO_AL2_FROM,
    OLDEST_OF_STACKS,
    RELEASES,
    Minor,
    Support,
    is_al2,
    version_order,
)

pytestmark = pytest.mark.unit

TODAY = date(2026, 12, 1)
MINORS = sorted(RELEASES)
FIRST = MINORS[0]
AL2023 = "AL2023_x86_64_STANDARD"


def minor(text: str) -> Minor:
    return Minor.parse(text)


def offers(*rows: tuple[str, str, str]) -> dict[Minor, tuple[str, ...]]:
    """Return what EKS offers for each minor, of rows of a version and the first and last minor that it is for."""
    return {at: tuple(version for version, first, last in rows if minor(first) <= at <= minor(last)) for at in MINORS}


# Shaped as what EKS offers: kube-proxy of each minor and of three before it, vpc-cni and coredns for several minors each.
OFFERED: Compatible = {
    "vpc-cni": offers(
        ("v1.21.1-eksbuild.1", "1.30", "1.36"),
        ("v1.20.4-eksbuild.1", "1.30", "1.36"),
        ("v1.19.5-eksbuild.1", "1.29", "1.35"),
        ("v1.18.5-eksbuild.1", "1.29", "1.32"),
        ("v1.17.1-eksbuild.1", "1.29", "1.30"),
        ("v1.16.4-eksbuild.2", "1.29", "1.29"),
    ),
    "kube-proxy": {
        at: tuple(f"v{at.after(-older)}.3-eksbuild.2" for older in range(KUBELET_SKEW + 1)) for at in MINORS
    },
    "coredns": offers(
        ("v1.12.4-eksbuild.1", "1.33", "1.36"),
        ("v1.11.4-eksbuild.2", "1.29", "1.34"),
        ("v1.11.1-eksbuild.9", "1.29", "1.31"),
    ),
    # None of its versions is for both 1.30 and 1.31.
    "aws-ebs-csi-driver": offers(("v1.40.0-eksbuild.1", "1.31", "1.36"), ("v1.35.0-eksbuild.1", "1.29", "1.30")),
}
OLD = ClusterState(
    name="crucible-dev",
    region="eu-central-1",
    version=FIRST,
    addons=(
        Addon("coredns", "v1.11.1-eksbuild.9"),
        Addon("aws-ebs-csi-driver", "v1.35.0-eksbuild.1"),
        Addon("kube-proxy", "v1.29.3-eksbuild.2"),
        Addon("vpc-cni", "v1.16.4-eksbuild.2"),
    ),
    node_groups=(
        NodeGroup("platform-a", FIRST, AL2023, "1.29.15-20250920"),
        NodeGroup("sandbox-a", FIRST, AL2023, "1.29.15-20250920"),
    ),
    insights=(Insight("Deprecated APIs removed in Kubernetes v1.30", minor("1.30"), "PASSING", "None was detected."),),
)


def planned(state: ClusterState = OLD, target: str = "1.36", today: date = TODAY) -> UpgradePlan:
    return plan(state, minor(target), OFFERED, today)


def after(state: ClusterState, step: Step) -> ClusterState:
    """Return what a cluster is once a step is done."""
    match step.kind:
        case StepKind.CONTROL_PLANE:
            return replace(state, version=minor(step.new))
        case StepKind.ADDON:
            [name] = step.names
            addons = (replace(each, version=step.new) if each.name == name else each for each in state.addons)
            return replace(state, addons=tuple(addons))
        case StepKind.NODES | StepKind.NEW_NODES:
            new = step.kind is StepKind.NEW_NODES
            groups = (
                replace(each, version=minor(step.new), ami_type=AL2023 if new else each.ami_type)
                if each.name in step.names
                else each
                for each in state.node_groups
            )
            return replace(state, node_groups=tuple(groups))


def texts(found: UpgradePlan, severity: Severity = Severity.BLOCKS) -> list[str]:
    return [finding.text for leg in found.legs for finding in leg.findings if finding.severity is severity]


# -- what is known of versions


def test_versions_are_compared_as_numbers() -> None:
    assert minor("1.9") < minor("1.30")
    assert minor("1.30.4-20240625") == minor("v1.30") == minor("1.30")
    assert (
        version_order("v1.9.0-eksbuild.1") < version_order("v1.18.5-eksbuild.1") < version_order("v1.18.5-eksbuild.10")
    )


@pytest.mark.parametrize("text", ["", "1", "one", "1.30x", "x1.30"])
def test_what_names_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no version such as 1\.30"):
        minor(text)


def test_the_table_has_every_minor_from_its_first_to_its_last_in_order_of_time() -> None:
    assert [str(each) for each in MINORS] == [f"1.{number}" for number in range(29, 37)]
    assert list(RELEASES) == MINORS
    for release in RELEASES.values():
        assert release.source
        dates = (release.released, release.standard_until, release.extended_until)
        assert all(dates), "a row whose dates were all found"
        assert list(dates) == sorted(dates)  # type: ignore[type-var]
    for one, next_ in pairwise(RELEASES.values()):
        assert one.released < next_.released  # type: ignore[operator]


def test_a_minor_whose_dates_are_not_known_promises_nothing() -> None:
    undated = replace(RELEASES[NEWEST], standard_until=None)
    assert undated.support(TODAY) is Support.UNKNOWN


def test_support_changes_on_the_day_that_the_calendar_names() -> None:
    release = RELEASES[minor("1.34")]
    assert release.support(date(2026, 12, 1)) is Support.STANDARD
    assert release.support(date(2026, 12, 2)) is Support.EXTENDED
    assert release.support(date(2027, 12, 1)) is Support.EXTENDED
    assert release.support(date(2027, 12, 2)) is Support.ENDED


@pytest.mark.parametrize(
    ("ami_type", "al2"), [("AL2_x86_64", True), ("AL2_ARM_64", True), (AL2023, False), ("CUSTOM", False)]
)
def test_amazon_linux_2_is_told_from_2023(ami_type: str, al2: bool) -> None:
    assert is_al2(ami_type) is al2


# -- the whole way


def test_from_1_29_to_1_36_every_step_is_there_in_order() -> None:
    wanted = """
        add-on 1.30: vpc-cni v1.16.4-eksbuild.2 -> v1.17.1-eksbuild.1
        control plane 1.30: control plane 1.29 -> 1.30
        add-on 1.30: kube-proxy v1.29.3-eksbuild.2 -> v1.30.3-eksbuild.2
        nodes 1.30: nodes of platform-a and sandbox-a 1.29 -> 1.30
        add-on 1.31: vpc-cni v1.17.1-eksbuild.1 -> v1.18.5-eksbuild.1
        control plane 1.31: control plane 1.30 -> 1.31
        add-on 1.31: kube-proxy v1.30.3-eksbuild.2 -> v1.31.3-eksbuild.2
        add-on 1.31: aws-ebs-csi-driver v1.35.0-eksbuild.1 -> v1.40.0-eksbuild.1
        nodes 1.31: nodes of platform-a and sandbox-a 1.30 -> 1.31
        add-on 1.32: coredns v1.11.1-eksbuild.9 -> v1.11.4-eksbuild.2
        control plane 1.32: control plane 1.31 -> 1.32
        add-on 1.32: kube-proxy v1.31.3-eksbuild.2 -> v1.32.3-eksbuild.2
        nodes 1.32: nodes of platform-a and sandbox-a 1.31 -> 1.32
        add-on 1.33: vpc-cni v1.18.5-eksbuild.1 -> v1.19.5-eksbuild.1
        control plane 1.33: control plane 1.32 -> 1.33
        add-on 1.33: kube-proxy v1.32.3-eksbuild.2 -> v1.33.3-eksbuild.2
        nodes 1.33: nodes of platform-a and sandbox-a 1.32 -> 1.33
        control plane 1.34: control plane 1.33 -> 1.34
        add-on 1.34: kube-proxy v1.33.3-eksbuild.2 -> v1.34.3-eksbuild.2
        nodes 1.34: nodes of platform-a and sandbox-a 1.33 -> 1.34
        add-on 1.35: coredns v1.11.4-eksbuild.2 -> v1.12.4-eksbuild.1
        control plane 1.35: control plane 1.34 -> 1.35
        add-on 1.35: kube-proxy v1.34.3-eksbuild.2 -> v1.35.3-eksbuild.2
        nodes 1.35: nodes of platform-a and sandbox-a 1.34 -> 1.35
        add-on 1.36: vpc-cni v1.19.5-eksbuild.1 -> v1.20.4-eksbuild.1
        control plane 1.36: control plane 1.35 -> 1.36
        add-on 1.36: kube-proxy v1.35.3-eksbuild.2 -> v1.36.3-eksbuild.2
        nodes 1.36: nodes of platform-a and sandbox-a 1.35 -> 1.36
    """
    assert [f"{step.kind} {step.minor}: {step.what}" for step in planned().steps] == [
        line.strip() for line in wanted.strip().splitlines()
    ]


def test_every_step_says_why_how_and_whether_there_is_a_way_back() -> None:
    for step in planned().steps:
        assert step.why
        assert step.how
        assert step.way_back


def test_the_control_plane_is_raised_alone_and_with_a_configuration_that_is_right() -> None:
    step = next(step for step in planned().steps if step.kind is StepKind.CONTROL_PLANE and step.new == "1.36")
    first, proxy, up = step.how
    assert first == "pulumi config set -s dev --path 'crucible:cluster.version' 1.36"
    # The stack's configuration has kube-proxy of the control plane's minor, or none at all is made.
    assert proxy.startswith("pulumi config set -s dev --path 'crucible:cluster.add_ons.kube_proxy' v1.36.")
    assert up == "pulumi up -s dev --target '**aws:eks/cluster:Cluster::crucible-dev'"


def test_below_what_a_configuration_may_name_no_step_is_one_of_it() -> None:
    for step in planned().steps:
        pulumi = [line for line in step.how if line.startswith("pulumi")]
        if step.minor < OLDEST_OF_STACKS:
            assert not pulumi, step
        elif step.kind in (StepKind.CONTROL_PLANE, StepKind.NODES):
            assert pulumi == list(step.how), step


def test_a_cluster_of_another_name_and_an_add_on_of_others_have_commands_too() -> None:
    addon = Addon("datadog", "v1.0.0-eksbuild.1")
    state = replace(OLD, name="other", addons=(addon,))
    found = plan(state, minor("1.30"), {"datadog": offers(("v1.1.0-eksbuild.1", "1.29", "1.36"))}, TODAY)
    first, second, *_ = found.steps
    [command] = first.how
    assert command.startswith("aws eks update-addon --region eu-central-1 --cluster-name other --addon-name datadog ")
    assert command.endswith("--addon-version v1.1.0-eksbuild.1 --resolve-conflicts PRESERVE")
    assert second.how == (
        "aws eks update-cluster-version --region eu-central-1 --name other --kubernetes-version 1.30",
    )


def test_what_a_minor_no_longer_serves_is_told_with_the_minor() -> None:
    removed = {str(leg.minor): leg.removed for leg in planned().legs if leg.removed}
    assert removed == {
        "1.32": (
            "flowcontrol.apiserver.k8s.io/v1beta3 of FlowSchema and PriorityLevelConfiguration: use flowcontrol.apiserver.k8s.io/v1",
        )
    }


def test_the_way_back_from_a_control_plane_is_seven_days_and_none_to_what_is_out_of_support() -> None:
    ways = {step.new: (step.undo, step.way_back) for step in planned().steps if step.kind is StepKind.CONTROL_PLANE}
    assert ways["1.32"] == (Undo.NO, "EKS goes back to versions in support only, and 1.31 is not")
    undo, way = ways["1.33"]
    assert undo is Undo.LIMITED
    assert way.startswith("for 7 days, once its nodes and add-ons fit 1.32 again: aws eks update-cluster-version")
    assert "--name crucible-dev --kubernetes-version 1.32" in way


def test_a_way_back_that_was_there_is_gone_once_its_version_is_out_of_support() -> None:
    def way(today: date) -> Undo:
        return next(s.undo for s in planned(today=today).steps if s.kind is StepKind.CONTROL_PLANE)

    assert way(date(2026, 3, 22)) is Undo.LIMITED
    assert way(date(2026, 3, 23)) is Undo.NO


# -- add-ons


def test_an_add_on_that_fits_already_is_left_alone() -> None:
    state = replace(OLD, addons=(Addon("coredns", "v1.11.4-eksbuild.2"),))
    assert not [step for step in planned(state, "1.34").steps if step.kind is StepKind.ADDON]


def test_an_add_on_goes_before_the_control_plane_only_to_what_both_versions_take() -> None:
    steps = [step for step in planned(target="1.31").steps if step.minor == minor("1.31")]
    up = next(index for index, step in enumerate(steps) if step.kind is StepKind.CONTROL_PLANE)
    assert [step.names[0] for step in steps[:up]] == ["vpc-cni"]
    assert [step.names[0] for step in steps[up + 1 :]] == ["kube-proxy", "aws-ebs-csi-driver", "platform-a"]


def test_what_others_need_goes_before_them() -> None:
    names = ("zeta", "coredns", "alpha", "vpc-cni", "eks-pod-identity-agent", "aws-ebs-csi-driver")
    state = replace(OLD, addons=tuple(Addon(name, "v1.0.0-eksbuild.1") for name in names))
    offered = {name: offers(("v1.1.0-eksbuild.1", "1.29", "1.36")) for name in names}
    found = plan(state, FIRST, offered, TODAY)
    assert [step.names[0] for step in found.steps] == [
        "eks-pod-identity-agent",
        "vpc-cni",
        "coredns",
        "aws-ebs-csi-driver",
        "alpha",
        "zeta",
    ]


def test_the_network_add_on_skips_no_minor_of_its_own() -> None:
    offered = {
        "vpc-cni": {
            FIRST: (
                "v1.19.2-eksbuild.1",
                "v1.19.5-eksbuild.1",
                "v1.18.5-eksbuild.1",
                "v1.18.1-eksbuild.1",
                "v1.17.1-eksbuild.1",
            ),
            minor("1.30"): ("v1.19.2-eksbuild.1", "v1.19.5-eksbuild.1"),
        }
    }
    state = replace(OLD, addons=(Addon("vpc-cni", "v1.16.4-eksbuild.2"),))
    steps = [step.new for step in plan(state, minor("1.30"), offered, TODAY).steps if step.kind is StepKind.ADDON]
    # At 1.29, any of those offered there will do; then the way to one for 1.30, the one that EKS has for its default.
    assert steps == ["v1.17.1-eksbuild.1", "v1.18.5-eksbuild.1", "v1.19.2-eksbuild.1"]


def test_an_add_on_is_not_taken_down_where_something_newer_fits() -> None:
    offered = {"coredns": {FIRST: (), minor("1.30"): ("v1.10.0-eksbuild.1", "v1.12.0-eksbuild.1")}}
    state = replace(OLD, addons=(Addon("coredns", "v1.11.0-eksbuild.1"),))
    [step] = [step for step in plan(state, minor("1.30"), offered, TODAY).steps if step.kind is StepKind.ADDON]
    assert (step.new, step.undo) == ("v1.12.0-eksbuild.1", Undo.NO)


def test_an_add_on_that_eks_offers_nothing_of_blocks_the_minor() -> None:
    offered = {**OFFERED, "coredns": offers(("v1.11.1-eksbuild.9", "1.29", "1.29"))}
    found = plan(OLD, minor("1.30"), offered, TODAY)
    assert "EKS offers no version of coredns for 1.30" in texts(found)
    assert not found.ready


# -- nodes


def test_nodes_that_lag_are_raised_before_the_control_plane_goes_on() -> None:
    lagging = replace(OLD.node_groups[0], version=minor("1.27"))
    found = planned(replace(OLD, node_groups=(lagging, OLD.node_groups[1])))
    first = found.steps[0]
    assert (first.kind, first.names, first.old, first.new) == (StepKind.NODES, ("platform-a",), "1.27", "1.29")
    assert "to be done first: nodes of platform-a 1.27 -> 1.29" in texts(found)
    assert not found.ready


def test_nodes_that_are_too_old_for_the_control_plane_are_told() -> None:
    def warned(version: str) -> list[str]:
        group = replace(OLD.node_groups[0], version=minor(version))
        return [text for text in texts(planned(replace(OLD, node_groups=(group,))), Severity.WARNS) if "behind" in text]

    assert not warned("1.26")
    assert warned("1.25") == ["platform-a is at 1.25, more than 3 minors behind the control plane: out of support"]


@pytest.mark.parametrize("ami_type", ["AL2_x86_64", "AL2_x86_64_GPU", "AL2_ARM_64"])
def test_amazon_linux_2_is_replaced_before_anything_goes_where_there_is_none(ami_type: str) -> None:
    old = replace(OLD.node_groups[0], ami_type=ami_type)
    found = planned(replace(OLD, node_groups=(old, OLD.node_groups[1])))
    first = found.steps[0]
    assert (first.kind, first.names, first.new) == (StepKind.NEW_NODES, ("platform-a",), "1.29")
    assert "there is no Amazon Linux 2 from 1.33 on" in first.why
    assert "kubectl cordon -l eks.amazonaws.com/nodegroup=platform-a" in first.how
    assert not found.ready
    assert [step for step in found.steps if step.kind is StepKind.NEW_NODES] == [first]


def test_amazon_linux_2_may_stay_below_1_33_with_a_warning() -> None:
    state = replace(OLD, node_groups=(replace(OLD.node_groups[0], ami_type="AL2_x86_64"),))
    found = planned(state, "1.32")
    assert not [step for step in found.steps if step.kind is StepKind.NEW_NODES]
    assert "platform-a: of Amazon Linux 2, whose images have had no fix since 2025-11-26" in texts(
        found, Severity.WARNS
    )


def test_nodes_of_amazon_linux_2_that_stayed_behind_at_1_33_are_replaced_and_not_raised() -> None:
    group = NodeGroup("platform-a", minor("1.32"), "AL2_x86_64", "1.32.9-20251120")
    state = ClusterState("crucible-dev", "eu-central-1", NO_AL2_FROM, node_groups=(group,))
    assert [step.kind for step in planned(state, "1.33").steps] == [StepKind.NEW_NODES]


@pytest.mark.parametrize(("version", "at"), [("1.29", "1.33"), ("1.34", "1.35")])
def test_an_image_of_ones_own_is_to_be_looked_at(version: str, at: str) -> None:
    group = NodeGroup("gpu", minor(version), "CUSTOM", "ami-1")
    found = planned(replace(OLD, version=minor(version), addons=(), node_groups=(group,)))
    [leg] = [leg for leg in found.legs if any("image of your own" in finding.text for finding in leg.findings)]
    assert str(leg.minor) == at


# -- what EKS found, and what was not read


def insight(status: str, at: str | None = "1.30", uses: tuple[DeprecatedUse, ...] = ()) -> Insight:
    return Insight("Deprecated APIs", minor(at) if at else None, status, "They are used.", "Use others.", uses)


@pytest.mark.parametrize(
    ("status", "blocks", "warns"), [("PASSING", 0, 0), ("WARNING", 0, 1), ("UNKNOWN", 0, 1), ("ERROR", 1, 0)]
)
def test_an_insight_blocks_as_eks_would(status: str, blocks: int, warns: int) -> None:
    found = planned(replace(OLD, insights=(insight(status),)))
    counted = [
        sum(text.startswith("Deprecated APIs:") for text in texts(found, severity))
        for severity in (Severity.BLOCKS, Severity.WARNS)
    ]
    assert counted == [blocks, warns]


def test_an_insight_about_a_later_minor_does_not_keep_the_next_from_beginning() -> None:
    fit = ClusterState("crucible-dev", "eu-central-1", minor("1.34"), insights=(insight("PASSING", "1.35"),))
    assert planned(fit).ready
    later = replace(fit, insights=(*fit.insights, insight("ERROR", "1.36")))
    assert planned(later).ready
    assert "Deprecated APIs: They are used." in texts(planned(later))
    now = replace(fit, insights=(insight("ERROR", None),))
    assert [finding.text for finding in planned(now).blockers] == ["Deprecated APIs: They are used."]


def test_who_still_asks_for_an_api_that_goes_is_named() -> None:
    use = DeprecatedUse("/apis/a/v1beta1/things", minor("1.30"), "/apis/a/v1/things", ("argocd/2.8 (41 in 30 days)",))
    found = planned(replace(OLD, insights=(insight("ERROR", uses=(use,)),)))
    [finding] = [each for each in found.blockers if each.text.startswith("/apis")]
    assert finding.text == "/apis/a/v1beta1/things is not served from 1.30 on; asked for by argocd/2.8 (41 in 30 days)"
    assert finding.hint == "use /apis/a/v1/things"


def test_no_insight_is_not_taken_for_a_good_one() -> None:
    found = planned(replace(OLD, insights=()))
    assert any("EKS has looked at nothing for 1.30 yet" in text for text in texts(found, Severity.WARNS))


@pytest.mark.parametrize("status", ["UPDATING", "FAILED", "PENDING"])
def test_nothing_begins_while_the_cluster_is_not_at_rest(status: str) -> None:
    found = planned(replace(OLD, status=status))
    assert f"the cluster is {status}" in texts(found)
    assert not found.ready


def test_an_ill_add_on_or_node_group_blocks_with_its_own_words() -> None:
    addon = Addon("coredns", "v1.12.4-eksbuild.1", "DEGRADED", ("InsufficientNumberOfReplicas: none is ready",))
    group = NodeGroup("platform-a", NEWEST, AL2023, "", "UPDATING")
    found = planned(ClusterState("crucible-dev", "eu-central-1", NEWEST, addons=(addon,), node_groups=(group,)))
    assert [(each.text, each.hint) for each in found.blockers] == [
        ("coredns is DEGRADED; InsufficientNumberOfReplicas: none is ready", "set that right first"),
        ("platform-a is UPDATING", "wait until it is ACTIVE"),
    ]
    assert exit_code(found) is ExitCode.NOT_READY


FIT = ClusterState("crucible-dev", "eu-central-1", minor("1.35"), insights=(insight("PASSING", "1.36"),))


def test_a_plan_with_anything_unread_is_never_ready_and_names_it() -> None:
    assert (planned(FIT).ready, exit_code(planned(FIT))) == (True, ExitCode.READY)
    found = planned(replace(FIT, unread=(Unread("add-on coredns", "eks:DescribeAddon: denied", "allow it"),)))
    assert not found.ready
    assert exit_code(found) is ExitCode.UNREAD
    for lines in (told(found), told_verdict(found)):
        assert "  unread   add-on coredns: eks:DescribeAddon: denied" in list(lines)
    assert verdict(found)["unread"] == [
        {"part": "add-on coredns", "problem": "eks:DescribeAddon: denied", "hint": "allow it"}
    ]


def test_an_add_on_whose_offers_were_not_read_is_not_said_to_have_none() -> None:
    state = replace(FIT, addons=(Addon("coredns", "v1.12.4-eksbuild.1"),))
    assert not texts(plan(state, NEWEST, {}, TODAY))


# -- what is refused


@pytest.mark.parametrize(
    ("current", "target", "reason", "message", "hint"),
    [
        ("1.30", "1.29", Refusal.DOWNGRADE, "1.29 is below 1.30, which the cluster runs", "within 7 days"),
        (
            "1.28",
            "1.30",
            Refusal.UNKNOWN_VERSION,
            "of 1.28 nothing is known here; known are 1.29 to 1.36",
            "versions.py",
        ),
        (
            "1.30",
            "1.37",
            Refusal.UNKNOWN_VERSION,
            "of 1.37 nothing is known here; known are 1.29 to 1.36",
            "versions.py",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_words(
    current: str, target: str, reason: Refusal, message: str, hint: str
) -> None:
    with pytest.raises(UpgradeRefusedError) as refused:
        planned(replace(OLD, version=minor(current), node_groups=()), target)
    assert (refused.value.reason, str(refused.value)) == (reason, message)
    assert hint in refused.value.hint


def test_nodes_that_are_newer_than_the_control_plane_are_refused() -> None:
    groups = tuple(replace(group, version=minor("1.30")) for group in OLD.node_groups)
    with pytest.raises(UpgradeRefusedError, match="node groups platform-a and sandbox-a are newer") as refused:
        planned(replace(OLD, node_groups=groups))
    assert refused.value.reason is Refusal.NODES_AHEAD
    assert "make node groups of 1.29 in their place" in refused.value.hint


@pytest.mark.parametrize(("current", "wanted"), [("1.29", "1.29"), ("1.29", "1.30"), ("1.35", "1.36")])
def test_a_configuration_may_stay_or_go_up_by_one(current: str, wanted: str) -> None:
    assert next_allowed(current, wanted) == minor(wanted)


def test_a_configuration_that_skips_a_minor_is_refused_and_told_the_next() -> None:
    with pytest.raises(UpgradeRefusedError) as refused:
        next_allowed("1.29", "1.32")
    assert refused.value.reason is Refusal.SKIPPED_MINOR
    assert str(refused.value) == "from 1.29 to 1.32 would skip 1.30 and 1.31; EKS goes up one minor at a time"
    assert refused.value.hint.startswith("set crucible:cluster.version to 1.30,")


@pytest.mark.parametrize(
    ("current", "wanted", "reason"),
    [
        ("1.30", "1.29", Refusal.DOWNGRADE),
        ("1.30", "next", Refusal.UNKNOWN_VERSION),
        ("1.28", "1.29", Refusal.UNKNOWN_VERSION),
        ("1.36", "1.37", Refusal.UNKNOWN_VERSION),
    ],
)
def test_a_configuration_that_goes_down_or_nowhere_known_is_refused(current: str, wanted: str, reason: Refusal) -> None:
    with pytest.raises(UpgradeRefusedError) as refused:
        next_allowed(current, wanted)
    assert refused.value.reason is reason


@given(st.sampled_from(MINORS), st.sampled_from(MINORS))
@settings(max_examples=64, deadline=None)
def test_no_configuration_that_is_let_through_skips_or_goes_down(current: Minor, wanted: Minor) -> None:
    try:
        next_allowed(str(current), str(wanted))
    except UpgradeRefusedError:
        assert wanted not in (current, current.after())
    else:
        assert wanted in (current, current.after())


# -- what holds for whatever a cluster is


@st.composite
def clusters(draw: st.DrawFn) -> tuple[ClusterState, Minor]:
    version = draw(st.sampled_from(MINORS))
    groups = draw(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([AL2023, "AL2_x86_64", "CUSTOM"])), max_size=3))
    addons = [
        Addon(name, draw(st.sampled_from(sorted({each for of in OFFERED[name].values() for each in of}))))
        for name in draw(st.lists(st.sampled_from(sorted(OFFERED)), unique=True))
    ]
    state = replace(
        OLD,
        version=version,
        addons=tuple(addons),
        node_groups=tuple(
            NodeGroup(f"group-{index}", version.after(-lag), system, "") for index, (lag, system) in enumerate(groups)
        ),
    )
    return state, draw(st.sampled_from([each for each in MINORS if each >= version]))


@given(clusters(), st.integers(0, 1500))
@settings(max_examples=80, deadline=None)
def test_no_plan_skips_a_minor_or_leaves_a_node_where_kubernetes_does_not_support_it(
    asked: tuple[ClusterState, Minor], days: int
) -> None:
    state, target = asked
    for step in plan(state, target, OFFERED, date(2025, 1, 1) + timedelta(days)).steps:
        done = after(state, step)
        assert done != state
        assert done.version in (state.version, state.version.after())
        if step.kind is StepKind.CONTROL_PLANE:
            assert all(group.version == state.version for group in state.node_groups), "EKS asks it of managed groups"
        if step.kind is StepKind.NODES:
            assert not [
                group.name
                for group in state.node_groups
                if group.name in step.names and is_al2(group.ami_type) and done.version >= NO_AL2_FROM
            ], "there is no image to raise it to"
        assert all(group.version <= done.version for group in done.node_groups)
        state = done
    assert state.version == target
    assert all(group.version == target for group in state.node_groups)
    assert all(addon.version in OFFERED[addon.name][target] for addon in state.addons)
    assert not plan(state, target, OFFERED, TODAY).steps


@given(clusters(), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_an_upgrade_that_stopped_anywhere_is_resumed_where_it_stopped(
    asked: tuple[ClusterState, Minor], done: int
) -> None:
    state, target = asked
    steps = plan(state, target, OFFERED, TODAY).steps
    for step in steps[:done]:
        state = after(state, step)
    left = plan(state, target, OFFERED, TODAY).steps
    assert [step.what for step in left] == [step.what for step in steps[done:]]


def test_node_groups_of_which_one_was_raised_are_resumed_with_the_other() -> None:
    half = replace(
        OLD,
        version=minor("1.30"),
        node_groups=(
            replace(OLD.node_groups[0], version=minor("1.30")),
            replace(OLD.node_groups[1], status="UPDATING"),
        ),
    )
    found = planned(half, "1.30")
    nodes = [step for step in found.steps if step.kind is StepKind.NODES]
    assert [(step.names, step.old, step.new) for step in nodes] == [(("sandbox-a",), "1.29", "1.30")]
    assert [each.text for each in found.blockers] == ["sandbox-a is UPDATING"]


# -- what is told


@pytest.mark.parametrize(
    ("version", "today", "extended", "says"),
    [
        (
            "1.36",
            TODAY,
            None,
            "0.10 USD an hour until 2027-08-02, then 0.60, 365 USD a month more; from 2028-08-02 on EKS",
        ),
        ("1.36", TODAY, False, "0.10 USD an hour until 2027-08-02, when EKS upgrades it by itself"),
        (
            "1.33",
            TODAY,
            True,
            "0.60 USD an hour since 2026-07-29, 365 USD a month more than in standard support and 2880 USD until",
        ),
        (
            "1.29",
            TODAY,
            None,
            "its extended support ended on 2026-03-23: no more fixes, and EKS upgrades the control plane by",
        ),
    ],
)
def test_what_staying_costs_is_told(version: str, today: date, extended: bool | None, says: str) -> None:
    state = replace(FIT, version=minor(version), extended_support=extended)
    assert planned(state, version, today).staying.startswith(says)


def test_a_stop_in_extended_support_is_told_where_the_policy_does_not_allow_it() -> None:
    found = planned(replace(FIT, version=minor("1.32"), extended_support=False))
    told_of = [str(leg.minor) for leg in found.legs if any("STANDARD" in each.text for each in leg.findings)]
    assert told_of == ["1.32", "1.33"]


def test_a_minor_that_is_out_of_support_is_told_on_the_way() -> None:
    ended = [str(leg.minor) for leg in planned().legs if any("support ended" in each.text for each in leg.findings)]
    assert ended == ["1.30", "1.31"]


def test_a_plan_is_told_to_people_step_by_step() -> None:
    found = planned()
    lines = list(told(found))
    assert lines[0] == "crucible-dev in eu-central-1: 1.29 -> 1.36, 28 steps"
    assert lines[1].startswith("staying at 1.29: ")
    assert "to 1.34 (support: standard, 0.10 USD an hour)" in lines
    assert "   2. control plane 1.29 -> 1.30" in lines
    assert "  28. nodes of platform-a and sandbox-a 1.35 -> 1.36" in lines
    assert lines[-1] == "not ready for 1.30: 1 thing to do first, 0 parts unread"
    assert not [line for line in lines if "\n" in line]


@pytest.mark.parametrize(
    ("state", "target", "says"),
    [
        (
            replace(FIT, version=NEWEST, insights=()),
            "1.36",
            "nothing to do: crucible-dev is at 1.36, with all that belongs to it",
        ),
        (FIT, "1.36", "ready for 1.36"),
        (
            replace(FIT, node_groups=(NodeGroup("a", minor("1.34"), AL2023, ""),)),
            "1.35",
            "ready, with 1 step left at 1.35",
        ),
    ],
)
def test_a_verdict_says_what_can_begin(state: ClusterState, target: str, says: str) -> None:
    found = planned(state, target)
    assert list(told_verdict(found)) == [says]
    assert exit_code(found) is ExitCode.READY


def test_programs_get_the_same_plan_as_people() -> None:
    found = planned()
    read_back = json.loads(json.dumps(jsonable(found)))
    assert (read_back["current"], read_back["target"], read_back["made_on"]) == ("1.29", "1.36", "2026-12-01")
    assert sum(len(leg["steps"]) for leg in read_back["legs"]) == len(found.steps)
    assert json.loads(json.dumps(verdict(found)))["next"] == "1.30"
    assert known("1.30") == minor("1.30")


def test_the_guide_shows_what_the_program_says() -> None:
    guide = (ROOT / "docs" / "upgrade.md").read_text(encoding="utf-8")
    state = replace(OLD, node_groups=(replace(OLD.node_groups[0], ami_type="AL2_x86_64"), OLD.node_groups[1]))
    said = list(told(planned(state)))
    shown = guide.partition("```text\n")[2].partition("\n```")[0].splitlines()
    cut = shown.index("...")
    assert shown[:cut] == said[:cut]
    assert shown[-1] == said[-1]
    for each, release in RELEASES.items():
        assert f"| {each} | {release.released} | {release.standard_until} | {release.extended_until} |" in guide
