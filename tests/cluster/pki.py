"""The certificates of a cluster: two authorities, who each component is, and the kubeconfigs that say so."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
from typing import TYPE_CHECKING

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VALID_FOR = dt.timedelta(days=30)
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def _name(common_name: str, organization: str | None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if organization:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(attributes)


def _key_pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, issuer_key: Key) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # A node's clock is the host's, but a moment of another day is not worth a failure.
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not authority,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


class Authority:
    """Signs certificates; kept as two PEM files so that a node can be added later."""

    def __init__(self, folder: Path, name: str) -> None:
        """Read the authority of this name, or make it if there is none."""
        self.certificate_file = folder / f"{name}.crt"
        key_file = folder / f"{name}.key"
        if key_file.exists():
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise TypeError(f"{key_file} is not the key of an authority of ours")
            self._key = key
            self._certificate = x509.load_pem_x509_certificate(self.certificate_file.read_bytes())
            return
        self._key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(f"crucible-cluster-{name}", None)
        self._certificate = (
            _builder(subject, subject, self._key, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(authority=True), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.certificate_file.write_bytes(self.certificate_pem)
        write_private(key_file, _key_pem(self._key))

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(
        self, common_name: str, *, organization: str | None = None, names: Sequence[str] = ()
    ) -> tuple[bytes, bytes]:
        """Return a certificate and its key in PEM, good for both ends of a connection; `names` are host names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = (
            _builder(_name(common_name, organization), self._certificate.subject, key, self._key)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(name) for name in names]), critical=False
            )
        certificate = builder.sign(self._key, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)

    def issue_into(
        self,
        folder: Path,
        file_name: str,
        common_name: str,
        *,
        organization: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        """`issue`, into two files."""
        certificate, key = self.issue(common_name, organization=organization, names=names)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{file_name}.crt").write_bytes(certificate)
        write_private(folder / f"{file_name}.key", key)

    def kubeconfig(
        self, server: str, common_name: str, *, organization: str | None = None, cluster_name: str = "cluster"
    ) -> bytes:
        """Return a kubeconfig with everything in it: the address, the authority and a new client certificate."""
        certificate, key = self.issue(common_name, organization=organization)
        cluster = {"server": server, "certificate-authority-data": _base64(self.certificate_pem)}
        user = {"client-certificate-data": _base64(certificate), "client-key-data": _base64(key)}
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": cluster_name, "cluster": cluster}],
                "users": [{"name": common_name, "user": user}],
                "contexts": [{"name": cluster_name, "context": {"cluster": cluster_name, "user": common_name}}],
                "current-context": cluster_name,
            },
            sort_keys=False,
        ).encode()


def make_signing_key(folder: Path, name: str) -> None:
    """Make the key pair by which the API server signs and checks the tokens of service accounts."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    write_private(folder / f"{name}.key", _key_pem(key))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)


def write_private(file: Path, content: bytes) -> None:
    """Write a file that only its owner may read."""
    file.touch(mode=0o600)
    file.write_bytes(content)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
