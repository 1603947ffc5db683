"""Keys: where the signing key is, what it may be, and who a verifier trusts.

A key is an ECDSA key on P-256, P-384 or P-521 in PEM, which is what both libraries that sign here take.
Nothing of a private key is ever logged, put into evidence or into an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime.certificates import CODE_SIGNING, is_for_code_signing
from defense_core.errors import ConfigError, OutputExists, StorageError
from defense_core.files import reading, sha256_file

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

KEY_VARIABLE = "QUARANTINE_SIGNING_KEY"
"""Path of the private key, PEM. Only the sign step reads it."""
CERTIFICATE_VARIABLE = "QUARANTINE_SIGNING_CERTIFICATE"
"""Path of its certificate, PEM: the signing certificate first, then the intermediate ones."""
PUBLIC_KEY_VARIABLE = "QUARANTINE_PUBLIC_KEY"
"""Path of the public key, PEM, whose signature on a release the promote step lets pass."""
CHAIN_VARIABLE = "QUARANTINE_CERTIFICATE_CHAIN"
"""Path of the root and intermediate certificates, PEM, instead of that key."""
SIGNER_VARIABLE = "QUARANTINE_SIGNER"
"""With that chain: common or alternative name that the signer's certificate must have; empty: any for code signing."""
PRIVATE_NAME, PUBLIC_NAME = "signing.key", "signing.pub"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
MAX_KEY_BYTES = 1 << 16

_KIND = "an ECDSA key on P-256, P-384 or P-521 in PEM"
_KEYGEN = "Make a pair with `quarantine keygen --out DIR`"


@dataclass(frozen=True)
class SigningKey:
    """A private key that can be used.

    Attributes:
        path: where it lies; model-signing reads it from there.
        key_id: of the public key, as DSSE signatures name it.
        certificate: path of the certificates; ``None`` for a bare key.
    """

    path: Path
    key_id: str
    certificate: Path | None = None
    signer: CryptoSigner = field(repr=False, compare=False, kw_only=True)

    @property
    def public_pem(self) -> str:
        """The public half, PEM."""
        return str(self.signer.public_key.keyval["public"])


@dataclass(frozen=True)
class KeyPair:
    """A new key pair: the private file has mode 0600."""

    private: Path
    public: Path
    key_id: str


@dataclass(frozen=True)
class TrustedSigner:
    """Whose signatures a verifier accepts; exactly one of the two, and there is no default.

    Attributes:
        public_key: path of a public key, PEM.
        certificate_chain: path of the root and intermediate certificates, PEM, that the signer's certificate
            must lead to. That must be for code signing.
        signer: common or alternative name that the signer's certificate must have; empty: any.
    """

    public_key: Path | None = None
    certificate_chain: Path | None = None
    signer: str = ""

    def __post_init__(self) -> None:
        if (self.public_key is None) == (self.certificate_chain is None):
            raise ConfigError(
                "nobody was named whose signature would count",
                expected="one of a public key and a certificate chain",
                got="both" if self.public_key is not None else "neither",
                hint="Give --public-key FILE, or --certificate-chain FILE; there is no default",
            )
        if self.signer and self.certificate_chain is None:
            raise ConfigError(
                "a signer is named for a public key",
                expected="a certificate chain: a key has one holder",
                got=self.signer,
                hint=f"Leave --signer and {SIGNER_VARIABLE} out",
            )

    def mark(self) -> str:
        """Says by content who is trusted, for what is remembered: another key may be put at the same path."""
        path = self.public_key or self.certificate_chain
        try:
            return f"{self!r} {sha256_file(Path(str(path)))}"
        except OSError:
            return f"{self!r} unreadable"  # nothing verifies by it either

    def check(self) -> None:
        """Read what is trusted. Raises ConfigError if it cannot be used."""
        if self.public_key is not None:
            load_public_key(self.public_key)
        if self.certificate_chain is not None:
            _certificates(self.certificate_chain)


def signing_key_from_environment(environment: Mapping[str, str] | None = None) -> SigningKey | None:
    """The key that ``QUARANTINE_SIGNING_KEY`` names; ``None`` where it names none.

    Raises:
        ConfigError: it names something that cannot sign.
    """
    values = os.environ if environment is None else environment
    path, certificate = values.get(KEY_VARIABLE, ""), values.get(CERTIFICATE_VARIABLE, "")
    if not path:
        return None
    return load_signing_key(Path(path), Path(certificate) if certificate else None)


def trusted_signer_from_environment(environment: Mapping[str, str] | None = None) -> TrustedSigner | None:
    """Whom ``QUARANTINE_PUBLIC_KEY`` or ``QUARANTINE_CERTIFICATE_CHAIN`` names; ``None`` where neither names anybody.

    ``QUARANTINE_SIGNER`` names one holder of a certificate under that chain.

    Raises:
        ConfigError: both are set, or what they name cannot be used, or a signer is named without a chain.
    """
    values = os.environ if environment is None else environment
    key, chain, signer = (values.get(name, "") for name in (PUBLIC_KEY_VARIABLE, CHAIN_VARIABLE, SIGNER_VARIABLE))
    if key and chain:
        raise ConfigError(
            "two are named whose signature would count",
            expected=f"one of {PUBLIC_KEY_VARIABLE} and {CHAIN_VARIABLE}",
            got="both",
            hint="Unset the one that did not sign",
        )
    if not key and not chain and not signer:
        return None
    trusted = TrustedSigner(Path(key) if key else None, Path(chain) if chain else None, signer)
    trusted.check()
    return trusted


def load_signing_key(path: Path, certificate: Path | None = None) -> SigningKey:
    """Read a private key, and check that ``certificate``, if given, is of the same key.

    Raises:
        ConfigError: no such file, no PEM, a public key, an encrypted key, a key of another kind.
    """
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    path, data = Path(path), _read(Path(path), "signing key")
    if b"PRIVATE KEY-----" not in data:
        got = "a public key" if b"PUBLIC KEY-----" in data else "something else"
        raise _unusable("signing key", path, "a private key in PEM", got)
    try:
        private = load_pem_private_key(data, None)
    except TypeError as error:
        # Without the cause: its text may quote the file.
        raise _unusable("signing key", path, "a private key without passphrase", "an encrypted one") from error
    except ValueError:
        raise _unusable("signing key", path, _KIND, "a damaged file") from None
    if not isinstance(private, EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise _unusable("signing key", path, _KIND, _kind(private))
    if certificate is not None:
        leaf = _certificates(certificate)[0]
        if leaf.public_key() != private.public_key():
            raise _unusable("certificate", certificate, "the certificate of the signing key", "one of another key")
        if not is_for_code_signing(leaf):
            raise _unusable("certificate", certificate, CODE_SIGNING, "one for other uses")
    signer = CryptoSigner(private)
    return SigningKey(path, str(signer.public_key.keyid), certificate, signer=signer)


def load_public_key(path: Path) -> SSlibKey:
    """The public key that signatures are checked with. Raises ConfigError."""
    return parse_public_key(_read(Path(path), "public key"), str(path))


def parse_public_key(data: bytes, where: str) -> SSlibKey:
    """A public key from PEM; ``where`` names it in messages. Raises ConfigError."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY-----" in data:
        raise _unusable("public key", where, "a public key", "a private one, which verifiers must never be given")
    try:
        public = load_pem_public_key(data)
    except (ValueError, TypeError) as error:
        raise _unusable("public key", where, _KIND, "no public key") from error
    return key_of(public, where)


def key_of(public: Any, where: str) -> SSlibKey:
    """``public`` as the DSSE library takes it. Raises ConfigError for a key of another kind."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from securesystemslib.signer import SSlibKey

    if not isinstance(public, EllipticCurvePublicKey) or public.curve.name not in CURVES:
        raise _unusable("public key", where, _KIND, _kind(public))
    return SSlibKey.from_crypto(public)


def generate_key_pair(folder: Path) -> KeyPair:
    """Write a new ECDSA P-256 pair into ``folder``: ``signing.key`` (mode 0600) and ``signing.pub``.

    Raises:
        OutputExists: a key is there already; it is never overwritten.
        StorageError: the folder cannot be written.
    """
    from securesystemslib.signer import CryptoSigner

    private, public = Path(folder) / PRIVATE_NAME, Path(folder) / PUBLIC_NAME
    signer = CryptoSigner.generate_ecdsa()
    public_pem = signer.public_key.keyval["public"].encode()
    try:
        for path in (private, public):
            if path.exists():
                raise OutputExists(
                    f"{path} exists", expected="a folder without keys", got="a key", hint="Choose another --out"
                )
        private.parent.mkdir(parents=True, exist_ok=True)
        with _new_file(private, signer.private_bytes, 0o600), _new_file(public, public_pem, 0o644):
            pass
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}", got=os.strerror(error.errno or 0), hint="Choose another --out"
        ) from error
    return KeyPair(private, public, str(signer.public_key.keyid))


def existing_or_new_pair(folder: Path) -> KeyPair:
    """The pair that an earlier call left in ``folder``, or a new one.

    Raises:
        ConfigError: the keys there are no pair.
        OutputExists, StorageError: as :func:`generate_key_pair`.
    """
    private, public = Path(folder) / PRIVATE_NAME, Path(folder) / PUBLIC_NAME
    with reading(folder, StorageError, "a folder for keys"):
        both = private.is_file() and public.is_file()
    if not both:
        return generate_key_pair(folder)
    key = load_signing_key(private)
    if load_public_key(public).keyid != key.key_id:
        raise _unusable("public key", public, f"the public half of {private}", "one of another key")
    return KeyPair(private, public, key.key_id)


@contextmanager
def _new_file(path: Path, data: bytes, mode: int) -> Iterator[None]:
    """Write a file that must not be there; it is taken away again if that, or the block, fails."""
    # The mode is there from the first byte on: a key that was readable for a moment is no secret.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(handle)
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _read(path: Path, what: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(MAX_KEY_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be read", expected=_KIND, got=os.strerror(error.errno or 0), hint=_KEYGEN
        ) from error


def _certificates(path: Path) -> list[Any]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(Path(path), "certificate"))
    except ValueError as error:
        raise _unusable("certificate", path, "certificates in PEM", "something else") from error


def _unusable(what: str, path: object, expected: str, got: str) -> ConfigError:
    return ConfigError(f"{what} {path} is not usable", expected=expected, got=got, hint=_KEYGEN)


def _kind(key: object) -> str:
    name = type(key).__name__.removesuffix("PrivateKey").removesuffix("PublicKey")
    curve = getattr(key, "curve", None)
    return f"a key on {curve.name}" if curve is not None else f"a key of the kind {name}"
