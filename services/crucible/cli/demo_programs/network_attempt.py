"""Tries every way out of the sandbox over the network, and ends well only if each one was refused.

Standard input names further addresses to try, as `host port`, one a line: the platform that runs this, for one.
"""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

PATIENCE = 1.0
# "example.com" asked for its address (RFC 1035): a name server that hears this answers it.
DNS_QUESTION = bytes.fromhex("cafe01000001000000000000") + b"\x07example\x03com\x00\x00\x01\x00\x01"
# Services of the host that containers have been broken out through.
HOST_SOCKETS = ["/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/dbus/system_bus_socket", "/dev/log"]


def tcp(host: str, port: int) -> None:
    socket.create_connection((host, port), PATIENCE).close()


def udp(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.settimeout(PATIENCE)
        sender.sendto(DNS_QUESTION, (host, port))
        sender.recv(512)


def dns(name: str) -> None:
    socket.getaddrinfo(name, 443)


def raw(host: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sender:
        sender.settimeout(PATIENCE)
        # An ICMP echo request with its checksum.
        sender.sendto(bytes.fromhex("0800f7ff00000000"), (host, 0))
        sender.recv(512)


def unix(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(PATIENCE)
        client.connect(path)


attempts: list[tuple[Callable[..., None], list[Any]]] = [
    (tcp, ["1.1.1.1", 443]),
    (tcp, ["2606:4700:4700::1111", 443]),
    (tcp, ["169.254.169.254", 80]),
    (udp, ["8.8.8.8", 53]),
    (udp, ["2001:4860:4860::8888", 53]),
    (dns, ["example.com"]),
    (dns, ["kubernetes.default.svc"]),
    (raw, ["1.1.1.1"]),
    *((unix, [path]) for path in HOST_SOCKETS),
]
for line in sys.stdin:
    host, port = line.split()
    attempts.append((tcp, [host, int(port)]))

succeeded = 0
for attempt, target in attempts:
    label = f"{attempt.__name__} {' '.join(map(str, target))}"
    try:
        attempt(*target)
    except OSError as error:
        print(f"refused    {label}: {error}")
    else:
        succeeded += 1
        print(f"SUCCEEDED  {label}")
sys.stdout.flush()
os._exit(1 if succeeded else 0)
