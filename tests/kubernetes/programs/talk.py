"""Keep one TCP connection open and talk over it; print a line for each answer, and one when there are no more.

talk.py HOST:PORT
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading

host, _, port = sys.argv[1].rpartition(":")
connection = socket.create_connection((host, int(port)), timeout=10)
pause = threading.Event()
try:
    for number in itertools.count(1):
        connection.sendall(b"x")
        if not connection.recv(1):
            break
        print(f"answer {number}", flush=True)
        pause.wait(0.1)
except OSError as error:
    print(f"no more: {error}", flush=True)
pause.wait()
