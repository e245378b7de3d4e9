"""Compares what the broker has with what the code says, and names every difference with what to do about it.

`observe` asks the broker, `differences` compares and is pure, `apply` makes what is missing. Nothing here ever deletes
anything or changes what exists otherwise than by a user's permissions, tags and password.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crucible.broker.definitions import (
    exchange_body,
    password_fits,
    password_hash,
    password_variable,
    permission_body,
    queue_body,
    user_body,
)
from crucible.broker.management import Request
from crucible.broker.topology import (
    MEMBERS,
    MINIMUM_VERSION,
    NAMESPACES,
    PLUGINS,
    USERS,
    Binding,
    Exchange,
    Queue,
    Topology,
    User,
    new_enough,
    topology,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crucible.broker.management import Management
    from crucible.settings import BrokerSettings

_APPLY = "run `crucible broker apply`"
# How a difference says that a whole object is missing, or that there is one too many.
MISSING, THERE, NONE = "missing", "there", "none"
Found = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One thing that the broker has otherwise than the code says."""

    where: str
    """Which object, such as `queue evaluations.small`."""
    what: str
    """Which of its properties."""
    wanted: Any
    found: Any
    remedy: str
    request: Request | None = field(default=None, compare=False, repr=False)
    """The request that resolves it, where that destroys nothing."""

    def __str__(self) -> str:
        if self.found == MISSING:
            return f"{self.where}: {self.what} is missing; {self.remedy}"
        if (self.wanted, self.found) == (NONE, THERE):
            return f"{self.where}: {self.what} is there and not wanted; {self.remedy}"
        return f"{self.where}: {self.what} is {_shown(self.found)}, wanted {_shown(self.wanted)}; {self.remedy}"


@dataclass(frozen=True)
class Observed:
    """What a broker says about itself and one of its virtual hosts."""

    version: str
    vhost: bool
    nodes: list[Found] = field(default_factory=list)
    alarms: list[Found] = field(default_factory=list)
    exchanges: dict[str, Found] = field(default_factory=dict)
    queues: dict[str, Found] = field(default_factory=dict)
    bindings: list[Found] = field(default_factory=list)
    users: dict[str, Found] = field(default_factory=dict)
    permissions: dict[str, Found] = field(default_factory=dict)
    topic_permissions: list[Found] = field(default_factory=list)
    policies: list[Found] = field(default_factory=list)
    operator_policies: list[Found] = field(default_factory=list)


def observe(api: Management, vhost: str) -> Observed:
    """Ask the broker for all that is compared.

    Raises:
        BrokerError: it does not answer, or the user may not ask.
    """
    version = str(api.get("overview")["rabbitmq_version"])
    users = {found["name"]: found for found in api.get("users")}
    nodes = api.get("nodes")
    alarms = api.check("alarms").get("alarms", [])
    if api.find("vhosts", vhost) is None:
        return Observed(version, vhost=False, nodes=nodes, alarms=alarms, users=users)
    return Observed(
        version,
        vhost=True,
        nodes=nodes,
        alarms=alarms,
        exchanges={found["name"]: found for found in api.get("exchanges", vhost)},
        queues={found["name"]: found for found in api.get("queues", vhost)},
        bindings=api.get("bindings", vhost),
        users=users,
        permissions={found["user"]: found for found in api.get("vhosts", vhost, "permissions")},
        topic_permissions=api.get("vhosts", vhost, "topic-permissions"),
        policies=api.get("policies", vhost),
        operator_policies=api.get("operator-policies", vhost),
    )


def differences(
    observed: Observed, settings: BrokerSettings, vhost: str, *, members: int = MEMBERS
) -> list[Difference]:
    """Return every difference, in the order in which they can be resolved.

    Args:
        observed: what the broker has.
        settings: what the queues' arguments are made from.
        vhost: the virtual host of both.
        members: how many nodes must hold a copy of each queue.
    """
    wanted = topology(settings)
    found = [*_cluster(observed)]
    if not observed.vhost:
        request = Request("PUT", ("vhosts", vhost), {"default_queue_type": "quorum"})
        found.append(Difference(f"virtual host {vhost}", "the virtual host", THERE, MISSING, _APPLY, request))
    for exchange in wanted.exchanges:
        found += _exchange(exchange, observed.exchanges.get(exchange.name), vhost)
    for queue in wanted.queues:
        found += _queue(queue, observed.queues.get(queue.name), vhost, members)
    found += _policies(wanted, observed, vhost)
    found += _bindings(wanted.bindings, observed, vhost)
    found += _extra(observed, {found.name for found in wanted.exchanges}, {found.name for found in wanted.queues})
    for user in USERS:
        found += _user(user, observed, vhost)
    found += _strangers(observed, vhost)
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else repr(value)


def _cluster(observed: Observed) -> Iterator[Difference]:
    if not new_enough(observed.version):
        remedy = "upgrade: earlier ones do not order replicated queues by priority"
        yield Difference("broker", "version", f"{MINIMUM_VERSION} or later", observed.version, remedy)
    for node in observed.nodes:
        where = f"node {node['name']}"
        if not node.get("running"):
            yield Difference(where, "state", "running", "down", "start it, or `rabbitmqctl forget_cluster_node` it")
            continue
        if "enabled_plugins" not in node:
            remedy = "ask again if it has just started; else there: `rabbitmq-plugins enable rabbitmq_management`"
            yield Difference(where, "statistics", THERE, MISSING, remedy)
            continue
        for plugin in PLUGINS:
            if plugin not in node["enabled_plugins"]:
                yield Difference(where, f"plugin {plugin}", "on", "off", f"there: `rabbitmq-plugins enable {plugin}`")
    for alarm in observed.alarms:
        where, resource = f"node {alarm['node']}", alarm["resource"]
        remedy = f"free {resource} there: no node accepts messages meanwhile"
        yield Difference(where, f"{resource} alarm", "off", "on", remedy)


def _exchange(wanted: Exchange, found: Found | None, vhost: str) -> Iterator[Difference]:
    where = f"exchange {wanted.name}"
    body = exchange_body(wanted.type)
    if found is None:
        request = Request("PUT", ("exchanges", vhost, wanted.name), body)
        yield Difference(where, "the exchange", THERE, MISSING, _APPLY, request)
        return
    remedy = (
        f"an exchange cannot be changed: delete it (management page, or DELETE /api/exchanges/{vhost}/{wanted.name}), "
        "then `crucible broker apply`; storage keeps what is submitted meanwhile"
    )
    yield from _properties(where, body, found, remedy)
    yield from _arguments(where, body["arguments"], found["arguments"], remedy)


def _queue(wanted: Queue, found: Found | None, vhost: str, members: int) -> Iterator[Difference]:
    where = f"queue {wanted.name}"
    body = queue_body(wanted.arguments)
    if found is None:
        request = Request("PUT", ("queues", vhost, wanted.name), body)
        yield Difference(where, "the queue", THERE, MISSING, _APPLY, request)
        return
    remedy = (
        f"a queue cannot be changed: `rabbitmqctl delete_queue -p {vhost} {wanted.name}`, then `crucible broker apply`; "
        "nothing is lost, storage publishes again what waits"
    )
    yield from _properties(where, {"durable": True, "auto_delete": False, "exclusive": False}, found, remedy)
    yield from _arguments(where, wanted.arguments, found["arguments"], remedy)
    kind = str(wanted.arguments["x-queue-type"])
    if found.get("type") != kind:
        yield Difference(where, "type", kind, found.get("type"), remedy)
    holders, online = found.get("members", []), found.get("online", [])
    if len(holders) < members:
        grow = f"with {members} nodes in the cluster: `rabbitmq-queues grow NODE all --vhost-pattern '^{vhost}$'`"
        yield Difference(where, "members", f"{members} or more", len(holders), grow)
    for node in sorted(set(holders) - set(online)):
        yield Difference(where, f"member on {node}", "online", "offline", "start that node, or move the member away")


def _properties(where: str, wanted: Found, found: Found, remedy: str) -> Iterator[Difference]:
    for name, value in wanted.items():
        if name != "arguments" and found.get(name) != value:
            yield Difference(where, name, value, found.get(name), remedy)


def _arguments(where: str, wanted: Mapping[str, Any], found: Found, remedy: str) -> Iterator[Difference]:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            yield Difference(where, f"argument {name}", wanted.get(name, "unset"), found.get(name, "unset"), remedy)


def _policies(wanted: Topology, observed: Observed, vhost: str) -> Iterator[Difference]:
    """Name each policy that applies to something of ours. Its definition, and not the object, says so at once."""
    objects = [("exchange", found.name, {"all", "exchanges"}) for found in wanted.exchanges]
    objects += [("queue", found.name, {"all", "queues", "quorum_queues"}) for found in wanted.queues]
    for kind, policies, command in (
        ("policy", observed.policies, "clear_policy"),
        ("operator policy", observed.operator_policies, "clear_operator_policy"),
    ):
        for policy in policies:
            for thing, name, scopes in objects:
                if policy["apply-to"] in scopes and re.search(policy["pattern"], name):
                    remedy = (
                        "it overrides what the code says: "
                        f"`rabbitmqctl {command} -p {vhost} {policy['name']}`, or narrow its pattern"
                    )
                    yield Difference(f"{thing} {name}", kind, NONE, policy["name"], remedy)


def _bindings(wanted: tuple[Binding, ...], observed: Observed, vhost: str) -> Iterator[Difference]:
    ours = {queue for queue in observed.queues if queue.startswith(NAMESPACES)}
    there = {
        Binding(found["source"], found["destination"], found["routing_key"])
        for found in observed.bindings
        # Every queue has one to the default exchange, which has no name.
        if found["source"].startswith(NAMESPACES) or (found["source"] and found["destination"] in ours)
    }
    for binding in (*wanted, *sorted(there - set(wanted), key=str)):
        where = f"binding {binding.exchange} -> {binding.queue} ({binding.routing_key})"
        if binding not in there:
            request = Request(
                "POST",
                ("bindings", vhost, "e", binding.exchange, "q", binding.queue),
                {"routing_key": binding.routing_key, "arguments": {}},
            )
            yield Difference(where, "the binding", THERE, MISSING, _APPLY, request)
        elif binding not in wanted:
            remedy = "it copies messages to where the code does not expect them: remove it, unless it is a tap of yours"
            yield Difference(where, "the binding", NONE, THERE, remedy)


def _extra(observed: Observed, exchanges: set[str], queues: set[str]) -> Iterator[Difference]:
    for kind, names, wanted in (("exchange", observed.exchanges, exchanges), ("queue", observed.queues, queues)):
        for name in sorted(names):
            if name.startswith(NAMESPACES) and name not in wanted:
                remedy = "the code does not know it: delete it if nobody needs it, or rename it out of our names"
                yield Difference(f"{kind} {name}", f"the {kind}", NONE, THERE, remedy)


def _user(wanted: User, observed: Observed, vhost: str) -> Iterator[Difference]:
    where = f"user {wanted.name}"
    found = observed.users.get(wanted.name)
    if found is None:
        remedy = f"set {password_variable(wanted)} (or with _FILE) and run `crucible broker apply`"
        yield Difference(where, "the user", THERE, MISSING, remedy)
        return
    tags = _tags(found)
    if tags != set(wanted.tags):
        body = {
            "password_hash": found["password_hash"],
            "hashing_algorithm": found["hashing_algorithm"],
            "tags": list(wanted.tags),
        }
        yield Difference(
            where, "tags", sorted(wanted.tags), sorted(tags), _APPLY, Request("PUT", ("users", wanted.name), body)
        )
    permissions = observed.permissions.get(wanted.name, {})
    body = permission_body(wanted)
    request = Request("PUT", ("permissions", vhost, wanted.name), body)
    for action, expression in body.items():
        if permissions.get(action) != expression:
            yield Difference(where, f"may {action}", expression, permissions.get(action, "nothing"), _APPLY, request)
    for topic in observed.topic_permissions:
        if topic["user"] == wanted.name:
            remedy = f"`rabbitmqctl clear_topic_permissions -p {vhost} {wanted.name} {topic['exchange']}`"
            yield Difference(where, f"topic permission on {topic['exchange']}", NONE, "some", remedy)


def _tags(user: Found) -> set[str]:
    tags = user["tags"]
    # A list since 3.9; words joined by commas before.
    return set(filter(None, tags.split(","))) if isinstance(tags, str) else set(tags)


def _strangers(observed: Observed, vhost: str) -> Iterator[Difference]:
    """Name who else may enter, but for administrators."""
    known = {user.name for user in USERS}
    for name in sorted(set(observed.permissions) - known):
        if "administrator" not in _tags(observed.users.get(name, {"tags": []})):
            remedy = f"if it is not meant: `rabbitmqctl clear_permissions -p {vhost} {name}`"
            yield Difference(f"user {name}", "permissions", NONE, "some", remedy)


# --- apply ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """What was made, and what only a person can resolve."""

    done: list[str]
    remaining: list[Difference]


def apply(
    api: Management, settings: BrokerSettings, vhost: str, passwords: Mapping[str, str], *, members: int = MEMBERS
) -> Applied:
    """Make what is missing, set users and permissions, and return what is left. Calling it again changes nothing.

    Raises:
        BrokerError: the broker does not answer, or refuses.
    """
    done: list[str] = []
    observed = observe(api, vhost)
    for request, what in _user_requests(observed, passwords):
        api.send(request)
        done.append(what)
    # A new virtual host and new users change what else is missing.
    observed = observe(api, vhost)
    sent: list[Request] = []
    for difference in differences(observed, settings, vhost, members=members):
        if difference.request is not None and difference.request not in sent:
            api.send(difference.request)
            sent.append(difference.request)
            done.append(f"{difference.where}: {_deed(difference)}")
    return Applied(done, differences(observe(api, vhost), settings, vhost, members=members))


def _deed(difference: Difference) -> str:
    return "made" if difference.found == MISSING else "set as the code says"


def _user_requests(observed: Observed, passwords: Mapping[str, str]) -> Iterator[tuple[Request, str]]:
    """Yield a request for each user whose password is given and not the one in force."""
    for user in USERS:
        password, found = passwords.get(user.name), observed.users.get(user.name)
        if password is None or (found is not None and password_fits(password, found["password_hash"])):
            continue
        body = user_body(user, password_hash(password))
        yield (
            Request("PUT", ("users", user.name), body),
            f"user {user.name}: {'made' if found is None else 'password set'}",
        )
