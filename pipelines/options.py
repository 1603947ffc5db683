"""Command-line options that several commands share, and what they are parsed into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from components._runtime.plan import MAX_SEED
from defense_core.errors import ConfigError
from defense_core.files import reading
from defense_core.limits import LoadLimits
from pipelines.yaml_files import parse_yaml, read_mapping, read_yaml

POLICIES = Path(__file__).resolve().parent / "policies"

Model = Annotated[
    str, typer.Option("--model", help="A bundle folder, or a state dict (.safetensors, .pt, .pth, .pt2).")
]
Architecture = Annotated[
    str,
    typer.Option(
        help="Name of the network, or package.module:factory of your own code; not needed for a bundle.",
        rich_help_panel="Model",
    ),
]
ArchitectureArgs = Annotated[
    str, typer.Option(help="Its arguments, JSON: '{\"width\": 16}'.", rich_help_panel="Model", metavar="JSON")
]
InputSize = Annotated[
    str, typer.Option(help="Channels, height, width: 3,32,32.", rich_help_panel="Model", metavar="C,H,W")
]
Mean = Annotated[
    str, typer.Option(help="Mean per channel, of [0, 1] pixels.", rich_help_panel="Model", metavar="A,B,C")
]
Std = Annotated[str, typer.Option(help="Standard deviation per channel.", rich_help_panel="Model", metavar="A,B,C")]
ClassNames = Annotated[str, typer.Option(help="Names of the classes, comma-separated.", rich_help_panel="Model")]
Augment = Annotated[
    str,
    typer.Option(
        help="Transform that keeps labels, used while tuning: none, crop or crop_flip. Default: crop.",
        rich_help_panel="Model",
    ),
]
TrustedModule = Annotated[
    list[str],
    typer.Option(help="Your module whose factories may build the network; repeatable.", rich_help_panel="Model"),
]
MaxBytes = Annotated[int, typer.Option(help="Largest artifact, bytes.", rich_help_panel="Limits")]
MaxParameters = Annotated[int, typer.Option(help="Largest network, parameters.", rich_help_panel="Limits")]
LoadTimeout = Annotated[
    float, typer.Option("--load-timeout-s", help="Longest time to read it, seconds.", rich_help_panel="Limits")
]
Sha256 = Annotated[
    str, typer.Option(help="Digest that the artifact must have: sha256:<hex>.", rich_help_panel="Limits")
]
ApproverKeys = Annotated[
    list[str],
    typer.Option(
        "--approver-key",
        help="Whose approvals count: a name and a public key, PEM; repeatable.",
        metavar="NAME=PUBKEY",
    ),
]
Signer = Annotated[
    str,
    typer.Option(
        envvar="QUARANTINE_SIGNER",
        help="With --certificate-chain: common or alternative name of the signer's certificate; default: any "
        "for code signing.",
        show_default=False,
    ),
]
Clean = Annotated[str, typer.Option(help="Clean set: .parquet, .npz or an image folder.")]
Test = Annotated[str, typer.Option(help="Test set that figures are quoted on; default: a fifth of the clean set.")]
Probes = Annotated[list[Path], typer.Option("--probe", help="Trigger specification, YAML; repeatable.")]
Seed = Annotated[int, typer.Option(help="Seed of the splits and of the method.", min=0, max=MAX_SEED)]
RecordedSeed = Annotated[
    int,
    typer.Option(
        help="Only recorded: what a scan draws is fixed, so that nobody can repeat it until it passes.",
        min=0,
        max=MAX_SEED,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
SigningKey = Annotated[
    Path | None,
    typer.Option(help="Private key, PEM, that signs the release; default: as QUARANTINE_SIGNING_KEY says."),
]
NodePoolsFile = Annotated[
    str,
    typer.Option(
        "--node-pools", help="Where and as whom each step runs: gke, eks, bare_metal, or a file.", metavar="FILE"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Settings = Annotated[list[str], typer.Option("--set", help="One setting: n=0.15; repeatable.", metavar="KEY=VALUE")]
PoolFile = Annotated[
    str, typer.Option("--pool", help="Calibration pool; default: the one that comes along for this kind of model.")
]
Controls = Annotated[
    str,
    typer.Option(
        "--controls",
        help="Folder or s3://bucket/prefix that keeps positive controls: one of the same work is not made again.",
    ),
]
ScanSettings = Annotated[
    list[str],
    typer.Option("--scan-set", help="Of the backdoor scan: fpr=0.1, budget_s=60; repeatable.", metavar="KEY=VALUE"),
]

DEFAULT_LIMITS = LoadLimits()


def parse_settings(
    settings: list[str], base: Mapping[str, Any] | None = None, *, option: str = "--set"
) -> dict[str, Any]:
    """``--set key=value`` on top of a configuration file's mapping; ``a.b=1`` reaches into ``a``.

    Raises:
        ConfigError: no ``=``, or a value that is no YAML.
    """
    result: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in (base or {}).items()
    }
    for setting in settings:
        path, found, text = setting.partition("=")
        if not found or not path:
            raise ConfigError(f"{option} is malformed", expected="KEY=VALUE", got=repr(setting))
        target = result
        *parents, key = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{option} is malformed", expected=f"{parent} to be a mapping", got=repr(setting))
        target[key] = parse_yaml(text, f"{option} {path}")
    return result


def read_probes(paths: list[Path]) -> tuple[Mapping[str, Any], ...]:
    """Trigger specifications from YAML files that hold one mapping or a list of them.

    The file of a learned trigger (``path``) is relative to the specification that names it.

    Raises:
        ConfigError: a file cannot be read, or holds none or something else.
    """
    probes: list[Mapping[str, Any]] = []
    for path in paths:
        content = read_yaml(path)
        if content == []:
            raise ConfigError(f"{path} is malformed", expected="a probe, or a list of probes", got="an empty list")
        for probe in content if isinstance(content, list) else [content]:
            if not isinstance(probe, dict):
                raise ConfigError(
                    f"{path} is malformed", expected="a probe, or a list of probes", got=type(probe).__name__
                )
            probes.append(beside(path, probe))
    return tuple(probes)


def beside(specification: Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """``content`` with its ``path``, if it has one, seen from the folder of ``specification``."""
    named = content.get("path")
    return {**content, "path": str(specification.parent / named)} if isinstance(named, str) else content


def read_policy(name: str, beside: Path = Path()) -> dict[str, Any]:
    """A policy by the name of a shipped one (strict, standard, observe) or by its file, relative to ``beside``.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    shipped = POLICIES / f"{name}.yaml"
    with reading(name, ConfigError, "the name of a shipped policy, or a policy file"):
        is_shipped, is_there = "/" not in name and shipped.is_file(), (beside / name).exists()
    if is_shipped:
        return read_mapping(shipped)
    if not is_there:
        known = ", ".join(sorted(path.stem for path in POLICIES.glob("*.yaml")))
        raise ConfigError(f"there is no policy {name}", expected=f"{known}, or a policy file", got=repr(name)[:160])
    return read_mapping(beside / name)


def optional_mapping(text: str) -> dict[str, Any]:
    """A YAML file's mapping; empty for an option that was not given."""
    return read_mapping(Path(text)) if text else {}


def optional_path(text: str) -> Path | None:
    """A path, or ``None`` for an option that was not given."""
    return Path(text) if text else None


def approvers(given: list[str]) -> dict[str, Any]:
    """Public keys by name, from ``NAME=PUBKEY``. Raises ConfigError: one is not usable, or has two names."""
    from components._runtime.approvals import require_distinct
    from components._runtime.signing_keys import load_public_key

    keys = {name: load_public_key(path) for name, path in approver_files(given).items()}
    require_distinct(keys)
    return keys


def approver_files(given: list[str]) -> dict[str, Path]:
    """Files of public keys by name, from ``NAME=PUBKEY``. Raises ConfigError."""
    named: dict[str, Path] = {}
    for each in given:
        name, found, path = each.partition("=")
        if not found or not name.strip() or not path or name in named:
            raise ConfigError("--approver-key is malformed", expected="NAME=PUBKEY, each name once", got=repr(each))
        named[name] = Path(path)
    return named
