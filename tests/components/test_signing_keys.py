"""Keys: what may sign, who may be trusted, and that nothing of a private key gets out."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from components._runtime.signing_keys import (
    CERTIFICATE_VARIABLE,
    CHAIN_VARIABLE,
    KEY_VARIABLE,
    PUBLIC_KEY_VARIABLE,
    SIGNER_VARIABLE,
    TrustedSigner,
    existing_or_new_pair,
    generate_key_pair,
    load_public_key,
    load_signing_key,
    signing_key_from_environment,
    trusted_signer_from_environment,
)
from defense_core.errors import ConfigError, OutputExists, StorageError
from tests.certificates import make_certificates


def pem(key: object, passphrase: bytes = b"") -> bytes:
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)  # type: ignore[attr-defined,no-any-return]


def public_pem(key: object) -> bytes:
    return key.public_key().public_bytes(  # type: ignore[attr-defined,no-any-return]
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )


def test_a_new_pair_belongs_together_and_only_its_owner_reads_the_private_file(tmp_path: Path) -> None:
    pair = generate_key_pair(tmp_path / "keys")
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert load_signing_key(pair.private).key_id == load_public_key(pair.public).keyid == pair.key_id
    assert b"PRIVATE" not in pair.public.read_bytes()


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    pair = generate_key_pair(tmp_path)
    before = pair.private.read_bytes()
    with pytest.raises(OutputExists, match=r"signing\.key exists"):
        generate_key_pair(tmp_path)
    assert pair.private.read_bytes() == before
    assert existing_or_new_pair(tmp_path) == pair


@pytest.mark.parametrize("failing", [1, 2])
def test_a_full_disk_leaves_no_half_of_a_pair(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            generate_key_pair(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert existing_or_new_pair(tmp_path).private.is_file()


def test_keys_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    pair, other = generate_key_pair(tmp_path / "one"), generate_key_pair(tmp_path / "other")
    pair.public.write_bytes(other.public.read_bytes())
    with pytest.raises(ConfigError, match="one of another key"):
        existing_or_new_pair(tmp_path / "one")


@pytest.mark.parametrize("make", [generate_key_pair, existing_or_new_pair])
def test_a_folder_that_may_not_be_entered(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **options: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(StorageError, match="Permission denied"):
        make(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError):
        generate_key_pair(tmp_path / "file" / "keys")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_the_curves_that_both_libraries_take(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    key = ec.generate_private_key(curve)
    (tmp_path / "k").write_bytes(pem(key))
    (tmp_path / "p").write_bytes(public_pem(key))
    assert load_signing_key(tmp_path / "k").key_id == load_public_key(tmp_path / "p").keyid


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (pem(ec.generate_private_key(ec.SECP256R1()), b"secret"), "encrypted"),
        (pem(ed25519.Ed25519PrivateKey.generate()), "Ed25519"),
        (pem(rsa.generate_private_key(65537, 2048)), "RSA"),
        (pem(ec.generate_private_key(ec.SECP256K1())), "secp256k1"),
        (public_pem(ec.generate_private_key(ec.SECP256R1())), "a public key"),
        (pem(ec.generate_private_key(ec.SECP256R1()))[:90] + b"\n-----END PRIVATE KEY-----\n", "damaged"),
        (b"", "something else"),
        (b"\x00\xff" * 100, "something else"),
    ],
    ids=["encrypted", "ed25519", "rsa", "other-curve", "public", "damaged", "empty", "binary"],
)
def test_what_cannot_sign_is_refused_by_kind(tmp_path: Path, data: bytes, got: str) -> None:
    (tmp_path / "k.pem").write_bytes(data)
    with pytest.raises(ConfigError, match="not usable") as caught:
        load_signing_key(tmp_path / "k.pem")
    assert got in str(caught.value.got)
    assert "keygen" in str(caught.value)


def test_an_error_about_a_key_holds_nothing_of_it(tmp_path: Path) -> None:
    data = pem(ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "k.pem").write_bytes(data[:100] + b"!" + data[101:])
    with pytest.raises(ConfigError) as caught:
        load_signing_key(tmp_path / "k.pem")
    secret = data.decode().splitlines()[1][:40]
    assert secret not in repr(caught.value)
    assert secret not in str(caught.value)
    assert caught.value.__cause__ is None
    (tmp_path / "k.pem").write_bytes(data)
    assert secret not in repr(load_signing_key(tmp_path / "k.pem"))


@pytest.mark.parametrize("kind", ["private", "missing", "rsa", "text"])
def test_what_cannot_be_trusted(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "key.pub"
    if kind != "missing":
        made = {
            "private": pem(ec.generate_private_key(ec.SECP256R1())),
            "rsa": public_pem(rsa.generate_private_key(65537, 2048)),
            "text": b"ssh-ed25519 AAAA",
        }
        path.write_bytes(made[kind])
    with pytest.raises(ConfigError, match=r"key\.pub") as caught:
        TrustedSigner(public_key=path).check()
    assert ("never be given" in str(caught.value)) == (kind == "private")


@pytest.mark.parametrize("both", [True, False])
def test_a_verifier_is_told_whom_to_trust(tmp_path: Path, both: bool) -> None:
    path = tmp_path / "x" if both else None
    with pytest.raises(ConfigError, match="no default"):
        TrustedSigner(public_key=path, certificate_chain=path)


def test_the_environment_names_the_key(tmp_path: Path) -> None:
    pair = generate_key_pair(tmp_path)
    assert signing_key_from_environment({}) is None
    assert signing_key_from_environment({KEY_VARIABLE: ""}) is None
    found = signing_key_from_environment({KEY_VARIABLE: str(pair.private)})
    assert found is not None
    assert (found.key_id, found.certificate) == (pair.key_id, None)
    with pytest.raises(ConfigError, match="cannot be read"):
        signing_key_from_environment({KEY_VARIABLE: str(tmp_path / "gone.pem")})


def test_a_certificate_must_be_of_the_key(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "a")
    other = make_certificates(tmp_path / "b")
    environment = {KEY_VARIABLE: str(made.key), CERTIFICATE_VARIABLE: str(made.certificate)}
    found = signing_key_from_environment(environment)
    assert found is not None
    assert found.certificate == made.certificate
    with pytest.raises(ConfigError, match="of another key"):
        load_signing_key(made.key, other.certificate)
    with pytest.raises(ConfigError, match="certificates in PEM"):
        load_signing_key(made.key, made.key)


def test_whom_promotion_trusts_comes_from_the_environment(tmp_path: Path) -> None:
    pair, chain = generate_key_pair(tmp_path / "pair"), make_certificates(tmp_path / "certificates").root
    assert trusted_signer_from_environment({}) is None
    assert trusted_signer_from_environment({PUBLIC_KEY_VARIABLE: "", CHAIN_VARIABLE: ""}) is None
    by_key = trusted_signer_from_environment({PUBLIC_KEY_VARIABLE: str(pair.public)})
    assert by_key == TrustedSigner(public_key=pair.public)
    by_chain = trusted_signer_from_environment({CHAIN_VARIABLE: str(chain)})
    assert by_chain == TrustedSigner(certificate_chain=chain)
    by_name = trusted_signer_from_environment({CHAIN_VARIABLE: str(chain), SIGNER_VARIABLE: "ci"})
    assert by_name == TrustedSigner(certificate_chain=chain, signer="ci")
    with pytest.raises(ConfigError, match="for a public key"):
        trusted_signer_from_environment({PUBLIC_KEY_VARIABLE: str(pair.public), SIGNER_VARIABLE: "ci"})
    with pytest.raises(ConfigError, match="nobody was named"):
        trusted_signer_from_environment({SIGNER_VARIABLE: "ci"})
    with pytest.raises(ConfigError, match="one of QUARANTINE_PUBLIC_KEY and QUARANTINE_CERTIFICATE_CHAIN"):
        trusted_signer_from_environment({PUBLIC_KEY_VARIABLE: str(pair.public), CHAIN_VARIABLE: str(chain)})
    with pytest.raises(ConfigError, match="never be given"):
        trusted_signer_from_environment({PUBLIC_KEY_VARIABLE: str(pair.private)})
    with pytest.raises(ConfigError, match="cannot be read"):
        trusted_signer_from_environment({CHAIN_VARIABLE: str(tmp_path / "gone.crt")})
