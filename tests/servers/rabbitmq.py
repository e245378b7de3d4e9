"""A RabbitMQ cluster of real nodes, which tests may kill, cut off, alarm and start again.

Nodes find each other through a list in their configuration and start side by side, so a cluster of three takes hardly longer
than one node. They know each other by name (`rabbit-1`, ...), from a hosts file of their own, and listen on addresses of
their own, always at the same ports.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self
from urllib.parse import quote

import httpx

from tests.servers.network import make_network
from tests.servers.process import ServerError, ServerProcess, ServerSpec, server_root
from tests.support.waits import wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from tests.servers.certificates import Authority
    from tests.servers.network import Network

ADMIN = "admin"
AMQP_PORT, AMQPS_PORT, MANAGEMENT_PORT, PROMETHEUS_PORT = 5672, 5671, 15672, 15692
# How long a node is silent, in seconds, until the others take it for gone; RabbitMQ's own 60 would make each cut take a minute.
NET_TICK_SECONDS = 5
START_SECONDS = 60
SETTLE_SECONDS = 60
DISK_FREE_LIMIT = "50MB"
# Where a node sees its configuration, its data and its certificate.
_CONFIG, _DATA, _CERTIFICATES = "/run/config", "/run/data", "/run/certificates"
_CERTIFICATES_FOLDER = "certificates"
# Both ends show a certificate for the name by which the other knows them.
_PEER_TLS = (Path(__file__).parent / "peers.config").read_text(encoding="ascii")
_PLUGINS = ("rabbitmq_management", "rabbitmq_prometheus")


Alarm = Literal["disk", "memory"]
_RAISE: Mapping[Alarm, Sequence[str]] = {
    "disk": ("set_disk_free_limit", str(10**15)),
    "memory": ("set_vm_memory_high_watermark", "absolute", "1"),
}
_CLEAR: Mapping[Alarm, Sequence[str]] = {
    "disk": ("set_disk_free_limit", DISK_FREE_LIMIT),
    "memory": ("set_vm_memory_high_watermark", "0.4"),
}


@dataclass(frozen=True)
class ClusterSetup:
    """What the nodes of a cluster have in common."""

    root: Path
    network: Network
    numbers: Sequence[int]
    password: str
    cookie: str

    def hostname(self, number: int) -> str:
        """Return the name by which the other nodes know one."""
        return f"rabbit-{number}"

    def node_name(self, number: int) -> str:
        """Return what RabbitMQ calls a node; before the host's name too it differs, for nodes that share a network."""
        return f"rabbit{number}@{self.hostname(number)}"


class Ask(Protocol):
    """Calls the management API of a node; `path` is what follows `/api/`."""

    def __call__(self, node: RabbitNode, method: str, path: str, body: object = None) -> Any: ...


class RabbitNode:
    """One node. Its data stays when it is stopped or killed."""

    def __init__(self, setup: ClusterSetup, number: int, folder: Path, *, tls: bool, ask: Ask) -> None:
        self._setup = setup
        self._folder = folder
        self._tls = tls
        self._ask = ask
        self._process: ServerProcess | None = None
        self.number = number
        self.hostname = setup.hostname(number)
        self.name = setup.node_name(number)
        self.address = setup.network.client_address(number)

    @property
    def management_url(self) -> str:
        """The management API of this node, with the administrator's credentials."""
        return f"http://{ADMIN}:{self._setup.password}@{self.address}:{MANAGEMENT_PORT}"

    @property
    def prometheus_url(self) -> str:
        """RabbitMQ's own metrics of this node."""
        return f"http://{self.address}:{PROMETHEUS_PORT}/metrics"

    @property
    def log(self) -> str:
        """Everything that the node wrote, of all its lives."""
        return (self._folder / "log").read_text(errors="replace")

    @property
    def certificates(self) -> Path:
        """The folder of its certificate and authority (`Authority.issue_into`); a node reads them when it starts."""
        return self._folder / _CERTIFICATES_FOLDER

    def alive(self) -> bool:
        """Tell whether it has a process."""
        return self._process is not None and self._process.alive()

    def launch(self) -> None:
        """Start its process where it has none, and return without waiting for it to serve."""
        if self.alive():
            return
        self._write_configuration()
        network = self._setup.network
        binds = {_CONFIG: self._folder / "config", "/etc/hosts": self._folder / "config" / "hosts"}
        if self._tls:
            binds[_CERTIFICATES] = self.certificates
        spec = ServerSpec(
            command=["/usr/lib/rabbitmq/bin/rabbitmq-server"],
            root=self._setup.root,
            log=self._folder / "log",
            hostname=self.hostname,
            environment=self._environment(),
            binds=binds,
            writable={_DATA: self._folder / "data"},
            own_network=network.own_namespaces,
        )
        self._process = ServerProcess(spec, lambda pid: network.connect(self.number, pid))

    def start(self) -> None:
        """Start it and wait until it serves clients."""
        self.launch()

        def serving() -> bool:
            self.check_alive()
            self._ask(self, "GET", f"health/checks/port-listener/{AMQP_PORT}")
            return True

        wait_until(
            serving, timeout=START_SECONDS, poll=0.1, describe=f"{self.name} to serve", tolerate=(httpx.HTTPError,)
        )

    def has_on_disk(self, queue: str) -> bool:
        """Tell whether the node's list of the quorum queues that it holds, as it is on disk, has this one."""
        lists = (self._folder / "data").glob("nodes/*/quorum/*/names.dets")
        return any(queue.encode() in found.read_bytes() for found in lists)

    def check_alive(self) -> None:
        """Raise, with the end of its log, if it has no process.

        Raises:
            AssertionError: it has none.
        """
        assert self.alive(), f"{self.name} does not run; its log ends:\n{self.log[-3000:]}"

    def _environment(self) -> dict[str, str]:
        # Three nodes share few processors with what they serve: one scheduler each, which does not spin while it waits.
        light = "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none +SDio 4 +A 4"
        own = self._setup.network.peer_address(self.number).replace(".", ",")
        distribution = f"-kernel inet_dist_use_interface {{{own}}}"
        if self._tls:
            # Peers are dialled before the code path is complete.
            (ssl,) = self._setup.root.glob("usr/lib/erlang/lib/ssl-*/ebin")
            inside = f"/{ssl.relative_to(self._setup.root)}"
            distribution += f" -pa {inside} -proto_dist inet_tls -ssl_dist_optfile {_CONFIG}/peers.config"
        return {
            "HOME": _DATA,
            "LANG": "C.UTF-8",
            # Leaves no shell between the server and the signals that it is sent.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self._setup.network.peer_port(self.number)),
            "ERL_EPMD_PORT": str(self._setup.network.names_port),
            "RABBITMQ_CONFIG_FILE": f"{_CONFIG}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{_CONFIG}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{_DATA}/nodes",
            "RABBITMQ_LOG_BASE": f"{_DATA}/log",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{light} {distribution} -kernel net_ticktime {NET_TICK_SECONDS}",
            "RABBITMQ_CTL_ERL_ARGS": f"+S 1:1 +sbwt none {distribution}",
        }

    def _write_configuration(self) -> None:
        config, data = self._folder / "config", self._folder / "data"
        for folder in (config, data):
            folder.mkdir(exist_ok=True)
        (config / "rabbitmq.conf").write_text("".join(f"{key} = {value}\n" for key, value in self._settings().items()))
        (config / "enabled_plugins").write_text(f"[{','.join(_PLUGINS)}].\n")
        (config / "peers.config").write_text(_PEER_TLS)
        peers = {self._setup.hostname(n): self._setup.network.peer_address(n) for n in self._setup.numbers}
        hosts = {"localhost": "127.0.0.1"} | peers
        (config / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        cookie = data / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(self._setup.cookie)
            cookie.chmod(0o400)

    def _settings(self) -> dict[str, object]:
        setup = self._setup
        settings: dict[str, object] = {
            "listeners.tcp.1": f"{self.address}:{AMQP_PORT}",
            "management.tcp.ip": self.address,
            "management.tcp.port": MANAGEMENT_PORT,
            "prometheus.tcp.ip": self.address,
            "prometheus.tcp.port": PROMETHEUS_PORT,
            "loopback_users": "none",
            "default_user": ADMIN,
            "default_pass": setup.password,
            "cluster_formation.peer_discovery_backend": "classic_config",
            "cluster_formation.target_cluster_size_hint": len(setup.numbers),
            # What people and tests look at is a second old, not five.
            "collect_statistics_interval": 1000,
            "disk_free_limit.absolute": DISK_FREE_LIMIT,
            "raft.wal_max_size_bytes": 16 * 1024**2,
            "log.console": "true",
            "log.console.level": "info",
        }
        settings |= {
            f"cluster_formation.classic_config.nodes.{number}": setup.node_name(number) for number in setup.numbers
        }
        if self._tls:
            settings |= {
                "listeners.ssl.1": f"{self.address}:{AMQPS_PORT}",
                "ssl_options.cacertfile": f"{_CERTIFICATES}/authority.pem",
                "ssl_options.certfile": f"{_CERTIFICATES}/certificate.pem",
                "ssl_options.keyfile": f"{_CERTIFICATES}/key.pem",
                "ssl_options.verify": "verify_peer",
                "ssl_options.fail_if_no_peer_cert": "false",
            }
        return settings

    def stop(self) -> None:
        """Stop it as an operator does."""
        if self._process is not None:
            self._process.stop()

    def kill(self) -> None:
        """End it at once, as a power cut does."""
        if self._process is not None:
            self._process.kill()

    def ctl(self, *arguments: str, timeout: float = 60) -> str:
        """Run rabbitmqctl on the node and return what it prints.

        Raises:
            ServerError: it failed.
        """
        if self._process is None or not self.alive():
            raise ServerError(f"{self.name} does not run")
        done = self._process.run("/usr/lib/rabbitmq/bin/rabbitmqctl", "--quiet", *arguments, timeout=timeout)
        if done.returncode != 0:
            raise ServerError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()


class RabbitCluster:
    """A cluster for as long as its `with` block lasts. All that it keeps is in its folder."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 3,
        tls: Authority | None = None,
        root: str = "servers",
        network: Network | None = None,
    ) -> None:
        """Describe a cluster; the block's beginning starts it.

        Args:
            folder: where configuration, data and logs go.
            nodes: how many.
            tls: signs the certificates with which nodes talk to each other and to clients (on port 5671, beside 5672).
            root: which of `scripts/server-root`'s root file systems to run.
            network: where the nodes live, closed with the cluster; unset: the best that this machine has.
        """
        self._folder = folder
        self._numbers = range(1, nodes + 1)
        self._root = root
        self._tls = tls
        self._alarms: dict[Alarm, RabbitNode] = {}
        self._network = network
        self._names: ServerProcess | None = None
        self._http = httpx.Client(timeout=10)
        self.password = secrets.token_hex(8)
        self.nodes: list[RabbitNode] = []

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start every node and wait until they are one cluster."""
        self._network = self._network or make_network()
        setup = ClusterSetup(
            root=server_root(self._root),
            network=self._network,
            numbers=self._numbers,
            password=self.password,
            cookie=secrets.token_hex(20),
        )
        for number in self._numbers:
            folder = self._folder / f"rabbit-{number}"
            folder.mkdir(parents=True)
            if self._tls is not None:
                identities = setup.hostname(number), setup.network.client_address(number), "localhost"
                self._tls.issue_into(folder / _CERTIFICATES_FOLDER, *identities)
            self.nodes.append(RabbitNode(setup, number, folder, tls=self._tls is not None, ask=self.ask))
        if not self.can_be_cut:
            self._names = self._start_name_server(setup)
        for node in self.nodes:
            node.launch()
        self.await_healthy()

    def _start_name_server(self, setup: ClusterSetup) -> ServerProcess:
        """Start the one epmd of nodes that share a network; it would otherwise be, and end with, the first node's."""
        addresses = ",".join(setup.network.peer_address(number) for number in self._numbers)
        port = str(setup.network.names_port)
        return ServerProcess(
            ServerSpec(
                command=["/usr/bin/epmd", "-address", addresses, "-port", port],
                root=setup.root,
                log=self._folder / "epmd.log",
                hostname="epmd",
            )
        )

    def close(self) -> None:
        """End every node at once and leave nothing behind but the folder."""
        for node in self.nodes:
            node.kill()
        if self._names is not None:
            self._names.kill()
        if self._network is not None:
            self._network.close()
        self._http.close()

    @property
    def can_be_cut(self) -> bool:
        """Whether nodes have networks of their own."""
        return self._network is not None and self._network.own_namespaces

    @property
    def management_url(self) -> str:
        """The management API of the first node that runs, with the administrator's credentials."""
        return self._living().management_url

    def url(
        self,
        *,
        user: str = ADMIN,
        password: str | None = None,
        vhost: str = "/",
        nodes: Sequence[RabbitNode] | None = None,
        tls: bool = False,
    ) -> str:
        """Return the AMQP URLs of the nodes (all, unless some are given), joined by commas."""
        scheme, port = ("amqps", AMQPS_PORT) if tls else ("amqp", AMQP_PORT)
        secret = quote(self.password if password is None else password, safe="")
        return ",".join(
            f"{scheme}://{user}:{secret}@{node.address}:{port}/{quote(vhost, safe='')}"
            for node in (self.nodes if nodes is None else nodes)
        )

    def _living(self) -> RabbitNode:
        for node in self.nodes:
            if node.alive():
                return node
        raise ServerError("no node of the cluster runs")

    def ask(self, node: RabbitNode, method: str, path: str, body: object = None) -> Any:
        """Call the management API of one node; `path` is what follows `/api/`."""
        answer = self._http.request(
            method,
            f"http://{node.address}:{MANAGEMENT_PORT}/api/{path}",
            auth=(ADMIN, self.password),
            json=body,
            timeout=10,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def manage(self, method: str, path: str, body: object = None) -> Any:
        """Call the management API of a node that runs; `path` is what follows `/api/`."""
        return self.ask(self._living(), method, path, body)

    def new_vhost(self) -> str:
        """Make a virtual host for a test to have to itself, and return its name."""
        name = f"test-{secrets.token_hex(6)}"
        self.make_vhost(name)
        return name

    def make_vhost(self, name: str) -> None:
        """Make a virtual host in which the administrator may do everything."""
        self.manage("PUT", f"vhosts/{name}")
        self.manage("PUT", f"permissions/{name}/{ADMIN}", {"configure": ".*", "write": ".*", "read": ".*"})

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with all that is in it."""
        self.manage("DELETE", f"vhosts/{name}")

    def node_named(self, name: str) -> RabbitNode:
        """Return the node that RabbitMQ calls by this name."""
        return next(node for node in self.nodes if node.name == name)

    def leader_of(self, queue: str, vhost: str) -> RabbitNode:
        """Return the node that leads a quorum queue."""

        def leader() -> str | None:
            found = self.manage("GET", f"queues/{quote(vhost, safe='')}/{quote(queue, safe='')}")
            name: str | None = found.get("leader")
            return name

        name = wait_until(leader, timeout=SETTLE_SECONDS, poll=0.1, describe=f"{queue} to have a leader")
        assert name is not None
        return self.node_named(name)

    def await_on_disk(self, queue: str, vhost: str) -> None:
        """Wait until every node has written down that it holds a quorum queue.

        RabbitMQ does so seconds after a queue is declared (Ra keeps the list in a dets file). A queue that all nodes lose
        their power before comes back empty, whatever was confirmed.
        """
        name = f"{vhost}_{queue}"
        wait_until(
            lambda: all(node.has_on_disk(name) for node in self.nodes),
            timeout=SETTLE_SECONDS,
            poll=0.1,
            describe=f"{queue} to be on the disk of every node",
        )

    def cut_off(self, *nodes: RabbitNode, clients: bool = True) -> None:
        """Part these nodes from the others and, if `clients`, from this machine; among themselves they still talk."""
        assert self._network is not None
        self._network.cut_off([node.number for node in nodes], clients=clients)

    def heal(self) -> None:
        """Connect everything again."""
        assert self._network is not None
        self._network.heal()

    def set_alarm(self, alarm: Alarm) -> None:
        """Have a node say that its disk or memory is short, which blocks publishers to every node."""
        node = self._living()
        self._alarms[alarm] = node
        node.ctl(*_RAISE[alarm])
        wait_until(lambda: self._alarmed(node), timeout=SETTLE_SECONDS, poll=0.1, describe=f"the {alarm} alarm")

    def clear_alarms(self) -> None:
        """Undo `set_alarm`; a node that was started again since has undone it."""
        for alarm, node in self._alarms.items():
            if node.alive():
                node.ctl(*_CLEAR[alarm])
        self._alarms.clear()

    def _alarmed(self, node: RabbitNode) -> bool:
        """Tell whether a node knows of an alarm of any node."""
        try:
            self.ask(node, "GET", "health/checks/alarms")
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                return True
            raise
        return False

    def why_unhealthy(self) -> str | None:
        """Return what is wrong with the cluster, or None."""
        for node in self.nodes:
            if not node.alive():
                return f"{node.name} does not run"
            try:
                running = {peer["name"] for peer in self.ask(node, "GET", "nodes") if peer["running"]}
                self.ask(node, "GET", f"health/checks/port-listener/{AMQP_PORT}")
                alarmed = self._alarmed(node)
            except httpx.HTTPError as error:
                return f"{node.name}: {error}"
            if missed := {peer.name for peer in self.nodes} - running:
                return f"{node.name} does not see {', '.join(sorted(missed))}"
            if alarmed:
                return f"{node.name} knows of an alarm"
        return None

    def await_healthy(self) -> None:
        """Wait until every node runs, sees every other, serves clients and has no alarm."""

        def healthy() -> bool:
            for node in self.nodes:
                node.check_alive()
            if why := self.why_unhealthy():
                raise ServerError(why)
            return True

        wait_until(
            healthy, timeout=SETTLE_SECONDS, poll=0.2, describe="the cluster to be healthy", tolerate=(ServerError,)
        )

    def restore(self) -> None:
        """Bring back what a test cut off, killed or alarmed; takes a moment where nothing is wrong."""
        self.clear_alarms()
        self.heal()
        for node in self.nodes:
            node.launch()
        self.await_healthy()
