"""Forget the connections that a node tracks for some addresses, so that what is open must pass the policies again.

Calico's rules accept what belongs to an established connection before they look at any policy. Once the kernel does not know the
connection any more, its next packet counts as a new one, and the policy of the quarantine drops it.

Speaks ctnetlink (linux/netfilter/nfnetlink_conntrack.h) with the standard library alone, since images carry no `conntrack`.

    cut_connections.py ADDRESS...      exit code 1 if some are left
"""

from __future__ import annotations

import ipaddress
import itertools
import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NETLINK_NETFILTER = 12
SUBSYS_CTNETLINK = 1 << 8
CT_GET, CT_DELETE = SUBSYS_CTNETLINK | 1, SUBSYS_CTNETLINK | 2
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
NLMSG_ERROR, NLMSG_DONE = 2, 3
TUPLE_ORIG, TUPLE_REPLY, ZONE = 1, 2, 18
TUPLE_IP = 1
TYPE_MASK = 0x3FFF  # without the flags for nested and network byte order
ENOENT = 2
# Calico has a new label in force within 0.2 s; until then new connections come up, so it is done again and again for this long.
SECONDS = 3.0
PAUSE = 0.1

# What identifies a connection to the kernel: family, and the attributes that it sent, as they came.
Connection = tuple[int, bytes]


def attributes(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield type, payload and the whole of each netlink attribute."""
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        padded = (length + 3) & ~3
        yield kind & TYPE_MASK, data[at + 4 : at + length], data[at : at + padded].ljust(padded, b"\0")
        at += padded


def addresses_of(entry: bytes) -> set[bytes]:
    """Return the addresses of both directions of a tracked connection."""
    return {
        address
        for kind, pair, _ in attributes(entry)
        if kind in {TUPLE_ORIG, TUPLE_REPLY}
        for part, tuple_ip, _ in attributes(pair)
        if part == TUPLE_IP
        for _, address, _ in attributes(tuple_ip)
    }


class Conntrack:
    """The connections that this network namespace tracks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.bind((0, 0))
        self._numbers = itertools.count(1)

    def _send(self, kind: int, flags: int, family: int, payload: bytes = b"") -> Iterator[tuple[int, bytes]]:
        number = next(self._numbers)
        header = struct.pack("=IHHII", 20 + len(payload), kind, flags | REQUEST, number, 0)
        self._socket.send(header + struct.pack("=BBH", family, 0, 0) + payload)
        while True:
            data = self._socket.recv(1 << 20)
            while data:
                length, answer, _, answered, _ = struct.unpack_from("=IHHII", data)
                if answered == number:
                    yield answer, data[16:length]
                data = data[(length + 3) & ~3 :]

    def of(self, wanted: set[bytes]) -> list[Connection]:
        """Return the connections that involve one of the addresses."""
        found = []
        for family in (socket.AF_INET, socket.AF_INET6):
            for answer, body in self._send(CT_GET, DUMP, family):
                if answer in {NLMSG_DONE, NLMSG_ERROR}:
                    break
                if addresses_of(body[4:]) & wanted:
                    kept = b"".join(whole for kind, _, whole in attributes(body[4:]) if kind in {TUPLE_ORIG, ZONE})
                    found.append((family, kept))
        return found

    def forget(self, connection: Connection) -> None:
        """Have the kernel forget one; that it is gone already is as good.

        Raises:
            OSError: it refuses.
        """
        family, which = connection
        for answer, body in self._send(CT_DELETE, ACK, family, which):
            if answer == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", body)
                if code not in {0, -ENOENT}:
                    raise OSError(-code, "the kernel does not forget a connection")
                return


def main(addresses: list[str]) -> int:
    """Cut all connections of some addresses."""
    wanted = {ipaddress.ip_address(address).packed for address in addresses}
    table = Conntrack()
    cut, last = 0, 0.0
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        found = table.of(wanted)
        for connection in found:
            table.forget(connection)
        if found:
            cut, last = cut + len(found), time.monotonic() - began
        time.sleep(PAUSE)  # noqa: TID251 - the kernel tells of new connections only by being asked
    left = len(table.of(wanted))
    sys.stdout.write(f"{cut} connections of {', '.join(addresses)} cut, the last after {last:.1f} s; {left} left\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
