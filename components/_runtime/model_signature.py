"""The OpenSSF model signature over a release folder: every file in it except the signature itself.

Signing and verification are model-signing's. Here stands only what it leaves open: which files are covered
(all, also those that git would ignore), which serialisation is accepted, and that the signature file is the
one that was written, byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime.certificates import require_signer
from components._runtime.signing_keys import SigningKey, TrustedSigner, key_of, load_public_key
from components._runtime.small_files import read_small
from defense_core.errors import EvidenceMismatch

if TYPE_CHECKING:
    from model_signing.manifest import Manifest
    from securesystemslib.signer import SSlibKey

SIGNATURE = "model.sig"
PREDICATE = "https://model_signing/signature/v1.0"
SERIALIZATION = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class SignedFiles:
    """What a model signature says.

    Attributes:
        files: digest by name of every file that was signed.
        key: whose key it was, for the envelopes beside it.
    """

    files: Mapping[str, str]
    key: SSlibKey


def sign_folder(folder: Path, key: SigningKey) -> None:
    """Write ``model.sig`` over everything that is in ``folder``."""
    from model_signing import signing

    config = signing.Config().set_hashing_config(_hashing())
    if key.certificate is None:
        config.use_elliptic_key_signer(private_key=key.path)
    else:
        config.use_certificate_signer(
            private_key=key.path, signing_certificate=key.certificate, certificate_chain=[key.certificate]
        )
    config.sign(folder, folder / SIGNATURE)


def measure(folder: Path, files: list[Path]) -> Manifest:
    """Hash ``files`` below ``folder``, each once and several at a time, as a signature would."""
    return _hashing().hash(folder, files_to_hash=files)


def digests(measured: Manifest) -> dict[str, str]:
    """The digest by name of what was measured."""
    found = {each.identifier: each.digest.digest_hex for each in measured.resource_descriptors()}
    return {name: f"sha256:{value}" for name, value in found.items()}


def verify_folder(folder: Path, measured: Manifest, trusted: TrustedSigner) -> SignedFiles:
    """What ``model.sig`` says, after it was checked that ``trusted`` signed it.

    Whether the files are those that were signed is the caller's comparison; nothing is hashed again.

    Raises:
        EvidenceMismatch: no signature, not the bytes that were written, signed by somebody else or with a certificate
            for other uses, or over another kind of list.
        ConfigError: the key or chain that is trusted is not usable.
    """
    bundle = _bundle(folder / SIGNATURE)
    _verify(folder, measured, trusted)
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    predicate = statement.get("predicate", {})
    if statement.get("predicateType") != PREDICATE or predicate.get("serialization") != SERIALIZATION:
        raise EvidenceMismatch(
            f"{SIGNATURE} covers another kind of list",
            expected=f"SHA-256 of every file except {SIGNATURE}",
            got=str(predicate.get("serialization"))[:200],
        )
    files = {str(each["name"]): f"{each['algorithm']}:{each['digest']}" for each in predicate["resources"]}
    return SignedFiles(files, _signer(bundle, trusted))


def signer_hint(folder: Path) -> str:
    """What ``model.sig`` says of its signer, unchecked: the key's hash, or ``certificate``; empty without one."""
    if not (folder / SIGNATURE).is_file():
        return ""
    material = _bundle(folder / SIGNATURE)["verificationMaterial"]
    return str(material["publicKey"]["hint"]) if "publicKey" in material else "certificate"


def _hashing() -> Any:
    from model_signing import hashing

    # The library leaves out .git and the like by default: a place for files that nobody signed.
    config = hashing.Config().use_file_serialization(chunk_size=CHUNK_BYTES)
    return config.set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


class _Measured:
    """A hashing configuration that answers with what was measured before."""

    def __init__(self, measured: Manifest) -> None:
        self.measured = measured
        self.reached = False

    def hash(self, model_path: Path, *, files_to_hash: Any = None) -> Manifest:
        # The library asks only after the signature itself was found to be good.
        self.reached = True
        return self.measured

    def add_ignored_paths(self, *, model_path: Path, paths: Any) -> None:
        """A signature does not decide what is left out."""


def _verify(folder: Path, measured: Manifest, trusted: TrustedSigner) -> None:
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying
    from OpenSSL import crypto

    config = verifying.Config()
    if trusted.public_key is not None:
        load_public_key(trusted.public_key)
        config.use_elliptic_key_verifier(public_key=trusted.public_key)
    else:
        config.use_certificate_verifier(certificate_chain=[trusted.certificate_chain])
    answers: Any = _Measured(measured)
    try:
        config.set_hashing_config(answers).verify(folder, folder / SIGNATURE)
    except InvalidSignature as error:
        raise _refused(trusted, "a signature over something else, or of another key") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if not answers.reached:
            raise _refused(trusted, str(error).strip()[:200] or type(error).__name__) from error
        # The signature is good and the files are others: the caller names each of them.
    except (crypto.Error, crypto.X509StoreContextError) as error:
        raise _refused(trusted, f"a certificate that does not lead there: {error}"[:200]) from error


def _refused(trusted: TrustedSigner, got: str) -> EvidenceMismatch:
    return EvidenceMismatch(
        f"{SIGNATURE} is not signed by whom you trust",
        expected=f"a signature of {trusted.public_key or trusted.certificate_chain}",
        got=got,
    )


def _bundle(path: Path) -> dict[str, Any]:
    """The parsed signature file, which must be exactly what the library writes: nothing unsigned has room in it."""
    try:
        data = read_small(path)
    except FileNotFoundError as error:
        raise EvidenceMismatch(
            f"{SIGNATURE} is missing",
            expected="a signed release",
            got="no signature",
            hint="Nobody vouches for this folder",
        ) from error
    try:
        bundle = json.loads(data)
        exact = _is_exact(bundle) and json.dumps(bundle, separators=(",", ":"), ensure_ascii=False).encode() == data
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvidenceMismatch(f"{SIGNATURE} is not readable", expected="a signature bundle", got=error) from error
    if not exact:
        raise EvidenceMismatch(
            f"{SIGNATURE} was rewritten", expected="the bytes that were written when signing", got="others"
        )
    parsed: dict[str, Any] = bundle
    return parsed


def _is_exact(bundle: Any) -> bool:
    material, envelope = bundle["verificationMaterial"], bundle["dsseEnvelope"]
    (signature,) = envelope["signatures"]
    texts = [envelope["payload"], signature["sig"]]
    if "publicKey" in material:
        whose = set(material) == {"publicKey", "tlogEntries"} and set(material["publicKey"]) == {"hint"}
    else:
        certificates = material["x509CertificateChain"]["certificates"]
        whose = set(material) == {"x509CertificateChain", "tlogEntries"}
        texts += [each["rawBytes"] for each in certificates if set(each) == {"rawBytes"}]
        whose = whose and len(texts) == 2 + len(certificates)
    return (
        whose
        and set(bundle) == {"mediaType", "verificationMaterial", "dsseEnvelope"}
        and set(envelope) == {"payload", "payloadType", "signatures"}
        and not material["tlogEntries"]
        and set(signature) <= {"sig", "keyid"}
        and not signature.get("keyid")
        and all(_is_canonical_base64(text) for text in texts)
    )


def _is_canonical_base64(text: str) -> bool:
    try:
        return base64.b64encode(base64.b64decode(text, validate=True)).decode() == text
    except binascii.Error:
        return False


def _signer(bundle: Mapping[str, Any], trusted: TrustedSigner) -> SSlibKey:
    """The key of the signature that was just found to be good, after a look at whose certificate it is."""
    from cryptography import x509

    if trusted.public_key is not None:
        return load_public_key(trusted.public_key)
    raw = bundle["verificationMaterial"]["x509CertificateChain"]["certificates"][0]["rawBytes"]
    leaf = x509.load_der_x509_certificate(base64.b64decode(raw))
    # The library takes any certificate that may sign at all: a server's, say, of the same company.
    require_signer(leaf, trusted.signer, SIGNATURE)
    return key_of(leaf.public_key(), SIGNATURE)
