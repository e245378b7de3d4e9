"""What there is to attack on a node: a program that listens on all its addresses, the cloud's metadata address, a machine outside the
cluster, and a key in the kernel. Runs with the node's own network and all privileges, on test clusters alone.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import json
import os
import signal
import socket
import struct
import sys
import time

from tests.kubernetes.attacks.listening import LIVES_SECONDS, serve

METADATA = "169.254.169.254"
RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE = 20, 21, 24
# On a busy machine an answer may take a while.
ANSWER_SECONDS = 5
# NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE
FLAGS = 0x1 | 0x4 | 0x400 | 0x100
# The numbers of add_key(2) and keyctl(2) by machine.
ADD_KEY, KEYCTL = (217, 219) if os.uname().machine == "aarch64" else (248, 250)
USER_KEYRING = -4
KEYCTL_SETPERM = 5
ALL_PERMISSIONS = 0x3F3F3F3F


def attribute(kind: int, value: bytes) -> bytes:
    """Return a netlink attribute of four bytes."""
    return struct.pack("HH4s", 8, kind, value)


def netlink(message: int, body: bytes) -> None:
    """Change something of the node's network; that it is so already is as good."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as kernel:
        kernel.send(struct.pack("IHHII", 16 + len(body), message, FLAGS, 1, 0) + body)
        code = -struct.unpack("i", kernel.recv(4096)[16:20])[0]
    if code not in (0, errno.EEXIST):
        raise OSError(code, os.strerror(code))


def hold_address(address: str) -> None:
    """Give the loopback interface an address, so that the node answers for it, for as long as this program lives."""
    body = struct.pack("BBBBI", socket.AF_INET, 32, 0, 0, socket.if_nametoindex("lo"))
    body += attribute(2, socket.inet_aton(address))
    netlink(RTM_NEWADDR, body)
    atexit.register(netlink, RTM_DELADDR, body)


def route(address: str, gateway: str) -> None:
    """Send what is for an address through another node."""
    body = struct.pack("BBBBBBBBI", socket.AF_INET, 32, 0, 0, 254, 4, 0, 1, 0)
    netlink(RTM_NEWROUTE, body + attribute(1, socket.inet_aton(address)) + attribute(5, socket.inet_aton(gateway)))


def metadata_answers() -> bool:
    """Tell whether the node has a metadata service of its own."""
    try:
        with socket.create_connection((METADATA, 80), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False


def keep_key(name: str, user: int) -> None:
    """Keep a key in a user's keyring; it stays for as long as a process of that user does."""
    child = os.fork()
    if child:
        return
    os.setresuid(user, user, user)
    libc = ctypes.CDLL(None, use_errno=True)
    key = libc.syscall(ADD_KEY, b"user", name.encode(), b"secret", 6, USER_KEYRING)
    libc.syscall(KEYCTL, KEYCTL_SETPERM, key, ALL_PERMISSIONS)
    time.sleep(LIVES_SECONDS)
    os._exit(0)


def main() -> None:
    """Be attacked as standard input says."""
    # So that what was put on the node is taken off again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    asked = json.load(sys.stdin)
    node = os.environ["NODE_ADDRESS"]
    if node == asked["gateway"]:
        hold_address(asked["outside"])
    else:
        route(asked["outside"], asked["gateway"])
    if not metadata_answers():
        hold_address(METADATA)
        serve([METADATA], [80], [])
    for user in asked["users"]:
        keep_key(asked["key"], user)
    serve(["0.0.0.0", "::"], [asked["host_port"]], [asked["host_udp_port"]])
    print("listening", flush=True)
    time.sleep(LIVES_SECONDS)
