"""A certificate authority and a signer's certificate, made in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files: the root, the signer's certificate, and the signer's private key."""

    root: Path
    certificate: Path
    key: Path


def make_certificates(
    folder: Path, *, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.CODE_SIGNING, hosts: Sequence[str] = ()
) -> Certificates:
    """A new authority in ``folder`` and one certificate that it issued, for signing code if not said otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    authority, signer = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = _certificate(authority, "root", "root", is_authority=True).sign(authority, hashes.SHA256())
    drafted = _certificate(signer, "signer", "root", is_authority=False)
    drafted = drafted.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts])
        drafted = drafted.add_extension(names, critical=False)
    leaf = drafted.sign(authority, hashes.SHA256())
    paths = Certificates(folder / "root.pem", folder / "signer.pem", folder / "signer.key")
    paths.root.write_bytes(root.public_bytes(Encoding.PEM))
    paths.certificate.write_bytes(leaf.public_bytes(Encoding.PEM))
    paths.key.write_bytes(signer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def _certificate(
    key: ec.EllipticCurvePrivateKey, name: str, issuer: str, *, is_authority: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
    )
