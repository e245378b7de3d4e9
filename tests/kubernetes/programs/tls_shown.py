"""Say what each of some servers shows who connects by TLS and trusts AUTHORITY alone: its certificate's serial number, or the error.

tls_shown.py AUTHORITY NAME HOST:PORT...     NAME is the name that the certificate must bear; `-` means each one's own
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
from contextlib import suppress

authority, name, *servers = sys.argv[1:]
context = ssl.create_default_context(cafile=authority)
shown = {}
for server in servers:
    host, _, port = server.rpartition(":")
    try:
        with (
            socket.create_connection((host, int(port)), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=host if name == "-" else name) as connection,
        ):
            certificate = connection.getpeercert() or {}
            # With TLS 1.3 a server that wants to see a certificate says so only now. Who speaks first is the client, so that
            # one that takes us waits.
            connection.settimeout(2)
            with suppress(TimeoutError):
                connection.recv(1)
            shown[server] = str(certificate["serialNumber"])
    except OSError as error:
        shown[server] = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
print(json.dumps(shown))
