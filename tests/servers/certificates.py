"""Certificates for the tests' servers: an authority of their own, and what a wrong server or another's authority would show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import trustme

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class CertificateFiles:
    """A certificate with its key, and the authority that a peer of it should trust, as PEM files."""

    certificate: Path
    key: Path
    authority: Path


class Authority:
    """Signs certificates. Two authorities do not know each other."""

    def __init__(self) -> None:
        self._ca = trustme.CA()

    def issue_into(self, folder: Path, *identities: str) -> CertificateFiles:
        """Sign a certificate for these host names and addresses, and write it with all that goes with it into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        files = CertificateFiles(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")
        issued = self._ca.issue_cert(*identities)
        files.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        files.key.write_bytes(issued.private_key_pem.bytes())
        files.key.chmod(0o600)
        self._ca.cert_pem.write_to_path(str(files.authority))
        return files
