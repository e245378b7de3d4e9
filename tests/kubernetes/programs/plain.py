"""Say what a server answers to one who speaks AMQP, Redis' protocol or Erlang's in plain text.

plain.py HOST:PORT amqp|redis|erlang
"""

from __future__ import annotations

import socket
import sys

GREETINGS = {
    "amqp": b"AMQP\x00\x00\x09\x01",
    "redis": b"PING\r\n",
    # "My name is x@y", as version 6 of the distribution's handshake has it.
    "erlang": b"\x00\x12N\x00\x00\x00\x0d\x07\xdf\x7f\xbd\x00\x00\x00\x01\x00\x03x@y",
}

host, _, port = sys.argv[1].rpartition(":")
with socket.create_connection((host, int(port)), timeout=10) as connection:
    connection.sendall(GREETINGS[sys.argv[2]])
    connection.settimeout(5)
    try:
        print(repr(connection.recv(64)))
    except OSError as error:
        print(type(error).__name__)
