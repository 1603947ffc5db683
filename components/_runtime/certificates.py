"""Certificates of signers: what they are for, and whose they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from defense_core.errors import EvidenceMismatch

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

CODE_SIGNING = "a certificate with the extended key usage code signing"


def is_for_code_signing(certificate: Certificate) -> bool:
    """Whether its issuer gave it out for signing code; certificates of servers and people sign under the same root."""
    from cryptography import x509

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False
    return x509.oid.ExtendedKeyUsageOID.CODE_SIGNING in usage


def names_of(certificate: Certificate) -> list[str]:
    """Common names of the subject, and its alternative names: hosts, mail addresses and URIs."""
    from cryptography import x509

    found = [str(each.value) for each in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    try:
        others = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return found
    kinds = (x509.DNSName, x509.RFC822Name, x509.UniformResourceIdentifier)
    return found + [str(value) for kind in kinds for value in others.get_values_for_type(kind)]


def require_signer(certificate: Certificate, name: str, where: str) -> None:
    """Refuse a signer's certificate that is for something else, or of somebody else.

    Args:
        name: common or alternative name that it must have; empty: any.
        where: names the signature in messages.

    Raises:
        EvidenceMismatch: it is not for code signing, or has other names.
    """
    names = names_of(certificate)
    got = ", ".join(names)[:200] or "a certificate without names"
    if not is_for_code_signing(certificate):
        raise EvidenceMismatch(
            f"{where} is signed with a certificate for other uses",
            expected=CODE_SIGNING,
            got=got,
        )
    if name and name not in names:
        raise EvidenceMismatch(
            f"{where} is signed by somebody else under the same root",
            expected=name,
            got=got,
        )
