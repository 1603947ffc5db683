"""``quarantine verify`` and ``quarantine keygen``: check a release again, offline; make a key pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense_core.errors import ConfigError
from pipelines import options as o
from pipelines import panels

if TYPE_CHECKING:
    from components._runtime.verification_files import Check

app = typer.Typer()


@app.command(rich_help_panel=panels.EVIDENCE)
def verify(
    release: Annotated[str, typer.Argument(help="Release folder, or models:/name/3 or models:/name@alias.")],
    public_key: Annotated[
        Path | None, typer.Option(help="Public key, PEM, of the signer; there is no default.", show_default=False)
    ] = None,
    certificate_chain: Annotated[
        Path | None,
        typer.Option(help="Or: certificates, PEM, that the signer's must lead to.", show_default=False),
    ] = None,
    signer: o.Signer = "",
    policy: Annotated[
        str, typer.Option(help="strict, standard, observe, or a policy file: it must have decided by this one.")
    ] = "",
    approver_key: o.ApproverKeys = [],
    promotion: Annotated[
        str,
        typer.Option(help="Statement of a folder's promotion, promotion.json; models:/ brings its own."),
    ] = "",
    as_json: o.AsJson = False,
) -> None:
    """Check a release again: every file, signature and statement, and the decision itself."""
    from components._runtime.signing_keys import TrustedSigner
    from components._runtime.verification import verify_release
    from defense_core.policy import parse_policy
    from pipelines.console import print_json
    from pipelines.summary import print_verification, verification_facts

    trusted = TrustedSigner(public_key, certificate_chain, signer)
    trusted.check()
    expected = parse_policy(o.read_policy(policy)) if policy else None
    approvers = o.approvers(approver_key)
    if release.startswith("models:"):
        if promotion:
            raise ConfigError(
                "--promotion is for a folder", expected="one of the two", got=f"{promotion} and {release}"
            )
        from components._runtime.journal import open_connection
        from components._runtime.verification_registry import verify_registered

        connection = open_connection(create=False)
        verified = verify_registered(connection, release, trusted, policy=expected, approvers=approvers)
    else:
        further = _promotion_check(promotion) if promotion else (lambda check: None)
        verified = verify_release(Path(release), trusted, policy=expected, approvers=approvers, further=further)
    if as_json:
        print_json(verification_facts(verified))
    else:
        print_verification(verified)
    raise typer.Exit(verified.verdict.exit_code)


def _promotion_check(promotion: str) -> Callable[[Check], None]:
    from components._runtime.verification_promotion import check_promotion

    try:
        envelope = Path(promotion).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--promotion {promotion} cannot be read", expected="a signed statement", got=error.strerror
        ) from error
    return lambda check: check_promotion(check, envelope, promotion)


@app.command(rich_help_panel=panels.EVIDENCE)
def keygen(
    out: Annotated[Path, typer.Option(help="Folder for signing.key (mode 0600) and signing.pub.")],
    as_json: o.AsJson = False,
) -> None:
    """Make an ECDSA P-256 key pair to sign releases with."""
    from components._runtime.signing_keys import KEY_VARIABLE, generate_key_pair
    from pipelines.console import out as console
    from pipelines.console import print_json

    pair = generate_key_pair(out)
    if as_json:
        print_json({"private_key": str(pair.private), "public_key": str(pair.public), "key_id": pair.key_id})
        return
    console.print(f"private key: {pair.private}  (keep it; name it by --signing-key or {KEY_VARIABLE})", markup=False)
    console.print(f"public key:  {pair.public}  (give it to whoever verifies)", markup=False)
    console.print(f"key id:      {pair.key_id}", markup=False)
