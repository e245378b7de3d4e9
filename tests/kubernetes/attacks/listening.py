"""Answers on TCP and UDP whoever gets through, and says who did: another evaluation, or a program of a node, that is being attacked."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable

LIVES_SECONDS = 600.0
_told: set[str] = set()


def tell(what: str) -> None:
    """Print a line, once."""
    if what not in _told:
        _told.add(what)
        print(what, flush=True)


def answer_tcp(server: socket.socket) -> None:
    """Accept, and give back what comes on each connection for as long as it comes."""
    while True:
        connection, who = server.accept()
        tell(f"reached over TCP by {who[0]}")
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    try:
        while data := connection.recv(2000):
            connection.sendall(data)
    except OSError:
        return


def answer_udp(server: socket.socket) -> None:
    """Give every datagram back, and tell of each sender or, for those that carry one, each word."""
    while True:
        data, who = server.recvfrom(2000)
        tell(f"heard {data.decode()}" if data.startswith(b"word-") else f"reached over UDP by {who[0]}")
        try:
            server.sendto(data, who)
        except OSError:
            continue


def open_socket(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """Open a server's socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    server.bind((host, port))
    if kind is socket.SOCK_STREAM:
        server.listen(64)
    return server


def serve(hosts: list[str], tcp: list[int], udp: list[int]) -> None:
    """Listen, each socket in a thread of its own."""
    kinds: list[tuple[list[int], socket.SocketKind, Callable[[socket.socket], None]]] = [
        (tcp, socket.SOCK_STREAM, answer_tcp),
        (udp, socket.SOCK_DGRAM, answer_udp),
    ]
    for ports, kind, answer in kinds:
        for host in hosts:
            for port in ports:
                threading.Thread(target=answer, args=(open_socket(host, port, kind),), daemon=True).start()


def main() -> None:
    """Listen where standard input says: `hosts`, and for each the ports `tcp` and `udp`."""
    asked = json.load(sys.stdin)
    serve(asked["hosts"], asked["tcp"], asked["udp"])
    print("listening", flush=True)
    time.sleep(LIVES_SECONDS)
