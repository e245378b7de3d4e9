"""How every connection to Redis is encrypted, whether it carries events or, as the broker that is being left, messages."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crucible.settings import BrokerSettings


def redis_tls(settings: BrokerSettings) -> dict[str, Any]:
    """Return the TLS options of redis-py: the server's certificate must be trusted and bear its host's name."""
    files = {
        "ssl_ca_certs": settings.ca_file,
        "ssl_certfile": settings.cert_file,
        "ssl_keyfile": settings.key_file,
    }
    return {
        **{name: str(path) for name, path in files.items() if path is not None},
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
        "ssl_min_version": ssl.TLSVersion.TLSv1_2,
    }
