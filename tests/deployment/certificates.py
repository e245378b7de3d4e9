"""An authority of the installation's own and what it signs for its servers, each made once and renewed before it ends.

On AWS cert-manager does this; the Secrets have the same names and keys, so that nothing that uses them knows the difference.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import trustme
from cryptography import x509

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# A certificate is for so long, and another is made when less than so much is left of it.
VALID, RENEWED_BEFORE = timedelta(days=365), timedelta(days=120)

Content = dict[str, str]


def authority(present: Mapping[str, str]) -> Content:
    """Return the authority's Secret: that which is there, or a new one.

    Args:
        present: `tls.crt` and `tls.key` in PEM, or nothing.
    """
    if present.keys() >= {"tls.crt", "tls.key"}:
        return dict(present)
    made = trustme.CA()
    certificate = made.cert_pem.bytes().decode()
    return {"ca.crt": certificate, "tls.crt": certificate, "tls.key": made.private_key_pem.bytes().decode()}


def certificate(
    of: Content, names: Sequence[str], present: Mapping[str, str], *, now: datetime | None = None
) -> Content:
    """Return a server's Secret: that which is there if it will do, or a new one.

    Args:
        of: the authority's Secret.
        names: by which clients and the server's own peers call it.
        present: `ca.crt`, `tls.crt` and `tls.key` in PEM, or nothing.
        now: by which it is judged; this moment if unset.
    """
    now = now or datetime.now(UTC)
    if present.get("ca.crt") == of["ca.crt"] and _will_do(present["tls.crt"], names, now):
        return dict(present)
    signer = trustme.CA.from_pem(of["tls.crt"].encode(), of["tls.key"].encode())
    issued = signer.issue_cert(*names, not_after=now + VALID)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return {"ca.crt": of["ca.crt"], "tls.crt": chain.decode(), "tls.key": issued.private_key_pem.bytes().decode()}


def _will_do(pem: str, names: Sequence[str], now: datetime) -> bool:
    found = x509.load_pem_x509_certificate(pem.encode())
    bears = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    named = set(bears.get_values_for_type(x509.DNSName))
    return named == set(names) and found.not_valid_after_utc - now > RENEWED_BEFORE
