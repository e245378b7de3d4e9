"""Who delivers, from where, and what they may do; and the way in for when nothing else works.

GitHub proves by OIDC which job of which branch or environment it is, so there is no key to keep or to lose. Three roles, each for one kind of
job: `plan` looks, `images` pushes images, `up` changes what is there. `up` is strong, since it makes roles. So it neither makes one that is as
strong as itself, nor touches what is made here, nor says who enters the cluster, nor makes or deletes one: people do that, by their own
roles, and so they do the first `pulumi up`. A fourth, `break-glass`, is for people: with a second factor, for an hour, and not unnoticed.

The account has a trail of CloudTrail that records management events, without which there are no alarms. It is not made here: an
organisation has one for all of its accounts, or should.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any

import pulumi
import pulumi_aws as aws
from pydantic import AfterValidator, Field

from crucible_platform.cluster import ADMIN_POLICY
from crucible_platform.delivery_rights import TRAIL, changes, log_groups, never, no_data, pushes, reads
from crucible_platform.delivery_rights import state as state_rights
from crucible_platform.encryption import key
from crucible_platform.iam import VERSION, Allow, Deny, Role, policy
from crucible_platform.section import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crucible_platform.place import Place
    from crucible_platform.registry import Registry

GITHUB = "token.actions.githubusercontent.com"
# What aws-actions/configure-aws-credentials asks GitHub to make its tokens out to.
AUDIENCE = "sts.amazonaws.com"
BREAK_GLASS, TRAIL_RULE = "break-glass", "trail"
OWN_ROLES = (BREAK_GLASS, "images", "plan", "up")
RULES = (BREAK_GLASS, TRAIL_RULE)
# Without a condition, for the topic and for its key: EventBridge fulfils none where it publishes to a topic, and the alarm would be dropped
# unseen ("Troubleshooting Amazon EventBridge", user guide).
_EVENTS: dict[str, Any] = {"Principal": {"Service": "events.amazonaws.com"}}

# `owner/name`, or `owner@1/name@2` for a repository of after 15 July 2026, which has its numbers in its subject ("Immutable subject claims",
# "OpenID Connect", GitHub docs).
_REPOSITORY = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+|[A-Za-z0-9-]+@[0-9]+/[A-Za-z0-9._-]+@[0-9]+")
_USER = re.compile(r"[\w+=,.@-]+(/[\w+=,.@-]+)*")


def _user_names(users: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [each for each in users if not _USER.fullmatch(each)]:
        raise ValueError(
            f"{wrong[0]!r} is no user's name; write that, with its path before it if it has one, and no ARN"
        )
    return users


class DeliveryConfig(Section):
    """What GitHub's jobs may do, and from which branch."""

    branch: str = Field(
        default="main",
        pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$",
        description="Branch that is delivered: images are pushed, and `pulumi up` runs, from no other",
    )
    environment: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="GitHub environment that `pulumi up` runs in; without it, the one that is called as the stack. Who approves is said there",
    )
    up_hours: int = Field(
        default=2,
        ge=1,
        le=12,
        description="How long a job of `pulumi up` may take, hours. An upgrade of the cluster is the longest",
    )
    makes_provider: bool = Field(
        default=True,
        description="Whether GitHub is made known to the account. An account knows it once: `false` if something else has seen to it, "
        f"with the audience {AUDIENCE}",
    )


class BreakGlass(Section):
    """Who may take over when nothing else works."""

    users: Annotated[tuple[str, ...], AfterValidator(_user_names)] = Field(
        default=(),
        description="IAM users of the account, which are there already, each with a second factor: names, with their path if they have one. "
        "Users, since a role, and so a single sign-on, shows AWS no second factor. None: there is no such way in",
    )


class StateBackend(Section):
    """Where Pulumi keeps its state, if that is a bucket of the account. It is made before all else, by hand, and is in no stack."""

    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$", description="The bucket's name")
    key_arn: str = Field(
        pattern=r"^arn:aws:kms:[a-z0-9-]+:[0-9]{12}:key/[a-z0-9-]+$",
        description="The KMS key that its objects, and secrets in them, are encrypted with",
    )


def subject(repository: str, what: str) -> str:
    """Return what GitHub calls a kind of job.

    Args:
        repository: `owner/name`, or `owner@1/name@2` if its subjects have numbers.
        what: such as `pull_request`.

    Raises:
        ValueError: it is no repository, but for instance a pattern of them.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(
            f"{repository!r} is no repository; write owner/name, or owner@1/name@2 as its OIDC settings show it"
        )
    return f"repo:{repository}:{what}"


class DeliveryAccess(pulumi.ComponentResource):
    """GitHub's roles, the one for emergencies, and the alarms.

    Attributes:
        plan_role_arn: for jobs of pull requests, and for those that look for drift.
        up_role_arn: for jobs of the environment, from the branch.
        images_role_arn: for jobs of the branch.
        break_glass_role_arn: for people; None if there are none.
        alarm_topic_arn: where one is told of what should not happen.
    """

    def __init__(
        self,
        config: DeliveryConfig,
        place: Place,
        *,
        organisation: str,
        repository: str,
        alarm_email: str,
        registry: Registry,
        cluster_name: pulumi.Input[str],
        break_glass: BreakGlass,
        state: StateBackend | None = None,
        opts: pulumi.ResourceOptions | None = None,
    ) -> None:
        """Make them.

        Args:
            config: what the stack says of it.
            place: where.
            organisation: its short name, which buckets begin with.
            repository: on GitHub, as `subject` has it.
            alarm_email: who is told; AWS asks there first whether that is wanted.
            registry: whose repositories `images` pushes to.
            cluster_name: of the cluster that `break-glass` administers.
            break_glass: who may take that role.
            state: where Pulumi's state is; None if it is not in the account.
            opts: the provider.

        Raises:
            ValueError: `repository` is none.
        """
        super().__init__("crucible:delivery_access:DeliveryAccess", place.name, None, opts)
        self._place = place
        self._below = pulumi.ResourceOptions(parent=self)
        self._github = f"arn:aws:iam::{place.account}:oidc-provider/{GITHUB}"
        self._trusted: list[pulumi.Resource] = []
        if config.makes_provider:
            known = aws.iam.OpenIdConnectProvider(
                f"{place.name}-github", url=f"https://{GITHUB}", client_id_lists=[AUDIENCE], opts=self._below
            )
            self._trusted.append(known)
        own_key = key("access", place, description="Encrypts alarms of access", used_by=_EVENTS, opts=self._below)
        topic = self._topic(own_key, alarm_email)
        # By itself, and not in each of the roles: there it would be too long.
        self._reads = aws.iam.Policy(
            f"{place.name}-reads",
            name=f"{place.name}-reads",
            description="Lets see how everything is set up, and nothing that is kept",
            policy=policy(*reads(place, organisation)),
            opts=self._below,
        )
        branch = f"refs/heads/{config.branch}"
        of_branch = subject(repository, f"ref:{branch}")

        plan = self._plan([subject(repository, "pull_request"), of_branch], state)
        # The environment alone would trust any branch that GitHub lets into it. AWS knows this claim, too, since January 2026.
        environment = subject(repository, f"environment:{config.environment or place.stack}")
        up = self._role(
            "up",
            self._by_github([environment], {f"{GITHUB}:ref": branch}),
            *changes(place, organisation),
            *(state_rights(state.bucket, state.key_arn, writes=True) if state else ()),
            *self._never(topic.arn, [own_key.arn, *([state.key_arn] if state else [])]),
            sees=True,
            hours=config.up_hours,
            description="Lets jobs of the environment change what is there, short of who may do what",
        )
        images = self._role(
            "images",
            self._by_github([of_branch]),
            *pushes(list(registry.arns.values())),
            description="Lets jobs of the branch push images",
        )
        emergency = self._break_glass(break_glass, cluster_name)
        self._alarms(topic, emergency)

        self.plan_role_arn = plan.arn
        self.up_role_arn = up.arn
        self.images_role_arn = images.arn
        self.break_glass_role_arn = emergency.arn if emergency else None
        self.alarm_topic_arn = topic.arn
        self.register_outputs({"up_role_arn": self.up_role_arn})

    def _role(
        self,
        name: str,
        trust: dict[str, Any],
        *statements: Allow | Deny,
        description: str,
        sees: bool = False,
        hours: int = 1,
    ) -> Role:
        """Make a role; one that sees is let see how everything is set up."""
        full = f"{self._place.name}-{name}"
        made = Role(
            full,
            name=full,
            description=description,
            assume_role_policy=json.dumps({"Version": VERSION, "Statement": [{"Effect": "Allow", **trust}]}),
            max_session_duration=hours * 3600,
            # IAM takes no trust in what is not there.
            opts=pulumi.ResourceOptions(parent=self, depends_on=self._trusted),
        )
        rights = aws.iam.RolePolicy(full, name=full, role=made.name, policy=policy(*statements), opts=self._below)
        made.policies = (rights,)
        if sees:
            attached = aws.iam.RolePolicyAttachment(
                f"{full}-reads", role=made.name, policy_arn=self._reads.arn, opts=self._below
            )
            made.policies += (attached,)
        return made

    # -- for GitHub

    def _by_github(self, subjects: list[str], claims: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return the trust in these jobs, each named in full."""
        return {
            "Principal": {"Federated": self._github},
            "Action": "sts:AssumeRoleWithWebIdentity",
            "Condition": {
                "StringEquals": {f"{GITHUB}:aud": AUDIENCE, f"{GITHUB}:sub": subjects, **(claims or {})},
            },
        }

    def _plan(self, subjects: list[str], state: StateBackend | None) -> Role:
        """Make the role that looks. What its jobs do is said by whoever opens a pull request, so it sees no data but Pulumi's state."""
        return self._role(
            "plan",
            self._by_github(subjects),
            *(state_rights(state.bucket, state.key_arn, writes=False) if state else ()),
            *no_data(
                objects=[f"arn:aws:s3:::{state.bucket}/*"] if state else [], keys=[state.key_arn] if state else []
            ),
            sees=True,
            description="Lets jobs of pull requests see what would change",
        )

    def _never(self, topic: pulumi.Input[str], keys: list[pulumi.Input[str]]) -> Iterator[Deny]:
        """Return what keeps `up` from all that is made here."""
        place = self._place
        iam = f"arn:aws:iam::{place.account}"
        roles = [f"{iam}:role/{place.name}-{each}" for each in OWN_ROLES]
        return never(
            own=[*roles, f"{iam}:policy/{place.name}-reads", self._github],
            rules=[place.arn("events", f"rule/{place.name}-{each}") for each in RULES],
            topic=topic,
            keys=keys,
        )

    # -- for people

    def _break_glass(self, who: BreakGlass, cluster_name: pulumi.Input[str]) -> Role | None:
        """Make the role that administers the cluster and sees how all else is set up. What is wrong on AWS, the account's admins put right."""
        if not who.users:
            return None
        place = self._place
        made = self._role(
            BREAK_GLASS,
            {
                "Principal": {"AWS": [f"arn:aws:iam::{place.account}:user/{each}" for each in who.users]},
                "Action": "sts:AssumeRole",
                "Condition": {
                    "Bool": {"aws:MultiFactorAuthPresent": "true"},
                    # EventBridge sees a call in the region where it was made: from any other, the role would be taken unnoticed.
                    "StringEquals": {"aws:RequestedRegion": place.region},
                },
            },
            Allow(["logs:FilterLogEvents", "logs:GetLogEvents"], log_groups(place)),
            Allow(["logs:DescribeLogStreams"], ["*"]),
            *no_data(),
            sees=True,
            description="For emergencies: administers the cluster for an hour. Taking it raises an alarm",
        )
        full = f"{place.name}-{BREAK_GLASS}"
        entry = aws.eks.AccessEntry(
            full, cluster_name=cluster_name, principal_arn=made.arn, type="STANDARD", opts=self._below
        )
        aws.eks.AccessPolicyAssociation(
            full,
            cluster_name=cluster_name,
            principal_arn=made.arn,
            policy_arn=f"arn:aws:eks::aws:cluster-access-policy/{ADMIN_POLICY}",
            access_scope=aws.eks.AccessPolicyAssociationAccessScopeArgs(type="cluster"),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[entry]),
        )
        return made

    # -- alarms

    def _topic(self, own_key: aws.kms.Key, email: str) -> aws.sns.Topic:
        name = f"{self._place.name}-access"
        topic = aws.sns.Topic(name, name=name, kms_master_key_id=own_key.arn, opts=self._below)
        publish = {"Effect": "Allow", **_EVENTS, "Action": "sns:Publish", "Resource": self._place.arn("sns", name)}
        aws.sns.TopicPolicy(
            name, arn=topic.arn, policy=json.dumps({"Version": VERSION, "Statement": [publish]}), opts=self._below
        )
        aws.sns.TopicSubscription(name, topic=topic.arn, protocol="email", endpoint=email, opts=self._below)
        return topic

    def _alarms(self, topic: aws.sns.Topic, emergency: Role | None) -> None:
        if emergency:
            taken = {"eventName": ["AssumeRole"], "requestParameters": {"roleArn": [emergency.arn]}}
            self._alarm(BREAK_GLASS, "sts", taken, topic)
        self._alarm(TRAIL_RULE, "cloudtrail", {"eventName": list(TRAIL)}, topic)

    def _alarm(self, name: str, service: str, calls: Mapping[str, Any], topic: aws.sns.Topic) -> None:
        """Tell of calls of a service, those that were refused included."""
        full = f"{self._place.name}-{name}"
        rule = aws.cloudwatch.EventRule(
            full,
            name=full,
            description=f"Tells of {', '.join(calls['eventName'])}",
            event_pattern=pulumi.Output.json_dumps(
                {
                    "source": [f"aws.{service}"],
                    "detail-type": ["AWS API Call via CloudTrail"],
                    "detail": {"eventSource": [f"{service}.amazonaws.com"], **calls},
                }
            ),
            # One that is merely enabled sees no call that CloudTrail takes for reading, and AssumeRole is among those ("Receiving read-only
            # management events from AWS services", Amazon EventBridge user guide).
            state="ENABLED_WITH_ALL_CLOUDTRAIL_MANAGEMENT_EVENTS",
            opts=self._below,
        )
        aws.cloudwatch.EventTarget(
            full,
            rule=rule.name,
            arn=topic.arn,
            input_transformer=aws.cloudwatch.EventTargetInputTransformerArgs(
                input_paths={
                    "who": "$.detail.userIdentity.arn",
                    "what": "$.detail.eventName",
                    "when": "$.detail.eventTime",
                    "where": "$.detail.sourceIPAddress",
                },
                input_template=json.dumps(f"{full}: <who> called <what> at <when> from <where>"),
            ),
            opts=self._below,
        )
