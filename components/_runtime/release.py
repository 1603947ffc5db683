"""What is registered as a model version: its files, their digests, and the identity of the work.

Layout of a version::

    model.onnx             the exported model, byte for byte
    MLmodel                so that mlflow.pyfunc.load_model("models:/name@champion") works
    requirements.txt       what that needs
    bundle/                model.safetensors, bundle.json
    evidence/              one JSON file per step, policy.json and decision.json
    evidence/attestations/ a signed statement per step
    evidence/bom/          the bill of materials
    model.sig              the signature over all of the above

The last three are in signed releases only, except the bill of materials.

``MLmodel`` is written here, not by ``mlflow.onnx.save_model``: that parses and serialises the model
again (other bytes than those whose parity was measured) and adds times and random identifiers. This
one depends on the bundle alone, so the same model gives the same version, byte for byte.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.approvals import FOLDER as APPROVALS
from components._runtime.evidence import FAILED, PROMOTION, REPORT_DATA
from components._runtime.model_signature import SIGNATURE
from components._runtime.registered_files import Manifest, folder_manifest, manifest_differences
from components._runtime.small_files import read_small
from defense_core.config import digest
from defense_core.errors import ConfigError, CorruptArtifact, DigestMismatch, SourceNotFound
from defense_core.files import sha256_bytes, write_atomic

ONNX_NAME = "model.onnx"
BUNDLE_FOLDER = "bundle"
EVIDENCE_FOLDER = "evidence"
ATTESTATIONS = "evidence/attestations"
BOM_FOLDER, ML_BOM = "evidence/bom", "ml-bom.cdx.json"
MLMODEL, REQUIREMENTS_NAME = "MLmodel", "requirements.txt"
REQUIREMENTS = "mlflow>=3\nnumpy\nonnx>=1.17\nonnxruntime>=1.20\n"


@dataclass(frozen=True)
class Identity:
    """What was asked for; the same identity gives the same model version.

    Attributes:
        source: digest of the fetched artifact.
        config: digest of the whole configuration.
        policy: digest of the policy.
    """

    source: str
    config: str
    policy: str

    def __post_init__(self) -> None:
        for field, value in (("source", self.source), ("config", self.config), ("policy", self.policy)):
            _require_digest(f"identity's {field}", value)

    @property
    def digest(self) -> str:
        """One digest over the three."""
        return digest(self)


@dataclass(frozen=True)
class Parts:
    """What a release is made of.

    Attributes:
        onnx_path: the exported model, one file.
        bundle_dir: the chosen bundle.
        evidence_dir: the decision's folder: one JSON file per step, policy, decision and approvals.
    """

    onnx_path: Path
    bundle_dir: Path
    evidence_dir: Path


@dataclass(frozen=True)
class Release:
    """A folder that is to be registered, and what the evidence says of it.

    Attributes:
        folder: exactly the files of the version.
        onnx_digest: SHA-256 of the ONNX file, from the export's evidence.
        bundle_digest: the bundle's digest, from the selection's evidence.
    """

    folder: Path
    onnx_digest: str
    bundle_digest: str


def stage(parts: Parts, folder: Path) -> None:
    """Lay out a version, unsigned, in the empty ``folder``.

    Raises:
        SourceNotFound: a file or folder is not there.
        CorruptArtifact: the bundle's description is not readable.
    """
    for path in (parts.onnx_path, parts.bundle_dir / "bundle.json", parts.evidence_dir):
        if not path.exists():
            raise SourceNotFound(f"{path} is missing", expected="a finished step", got="nothing", hint="Rerun the step")
    shutil.copyfile(parts.onnx_path, folder / ONNX_NAME)
    shutil.copytree(parts.bundle_dir, folder / BUNDLE_FOLDER, symlinks=True)
    _copy_decision(parts.evidence_dir, folder / EVIDENCE_FOLDER)
    description = _bundle_description(folder / BUNDLE_FOLDER / "bundle.json")
    write_atomic(folder / MLMODEL, _mlmodel(description))
    write_atomic(folder / REQUIREMENTS_NAME, REQUIREMENTS.encode())


def _copy_decision(source: Path, target: Path) -> None:
    """Copy what a decision consists of and nothing that lies beside it: whatever is in a release is signed."""
    target.mkdir()
    if (source / APPROVALS).is_dir():
        (target / APPROVALS).mkdir()
    for path in sorted([*source.glob("*.json"), *(source / APPROVALS).glob("*")]):
        plain = path.is_file() or path.is_symlink()
        if plain and path.name not in (REPORT_DATA, PROMOTION) and not path.name.endswith(FAILED):
            # A link stays one, and is refused with the release.
            shutil.copyfile(path, target / path.relative_to(source), follow_symlinks=False)


def check_release(release: Release) -> Manifest:
    """Hash every file of a release and compare with the evidence; the digest of every file.

    Raises:
        SourceNotFound: a file or folder is not there.
        DigestMismatch: the ONNX file, the bundle or what is served around them is not what the evidence gives.
        CorruptArtifact: the bundle's description is not readable.
        EvidenceMismatch: it is too large.
        UnsafeArtifact: it holds a link.
    """
    _require_digest("ONNX digest", release.onnx_digest)
    _require_digest("bundle digest", release.bundle_digest)
    manifest = folder_manifest(release.folder)
    description = _bundle_description(release.folder / BUNDLE_FOLDER / "bundle.json")
    differences = evidence_differences(release, manifest, description)
    if differences:
        raise DigestMismatch(
            "files to be registered are not those of the evidence",
            expected=f"ONNX {release.onnx_digest}, bundle {release.bundle_digest}",
            got="; ".join(differences),
            hint="Rerun the steps from select on; nothing was registered",
        )
    return manifest


def evidence_differences(release: Release, manifest: Manifest, description: Mapping[str, Any]) -> list[str]:
    """What in ``manifest`` contradicts the evidence, or is beside it: any file but evidence and signature."""
    return manifest_differences(served_files(release, description), without_evidence(manifest))


def served_files(release: Release, description: Mapping[str, Any]) -> dict[str, str]:
    """The digest of every file that a version has beside its evidence and signature.

    Args:
        description: what ``bundle.json`` says.
    """
    listed = {f"{BUNDLE_FOLDER}/{name}": str(value) for name, value in dict(description.get("files", {})).items()}
    return {
        **listed,
        f"{BUNDLE_FOLDER}/bundle.json": release.bundle_digest,
        ONNX_NAME: release.onnx_digest,
        MLMODEL: sha256_bytes(_mlmodel(description)),
        REQUIREMENTS_NAME: sha256_bytes(REQUIREMENTS.encode()),
    }


def evidence_digest(manifest: Manifest) -> str:
    """One digest over the evidence files of a version: their names and contents."""
    return digest({name: value for name, value in manifest.items() if part_of(name) == EVIDENCE_FOLDER})


def model_files(manifest: Manifest) -> dict[str, str]:
    """The model itself: the ONNX file and the bundle."""
    return {name: value for name, value in manifest.items() if name == ONNX_NAME or part_of(name) == BUNDLE_FOLDER}


def without_evidence(manifest: Manifest) -> dict[str, str]:
    """The files that do not change when the same work is done again: times do, and so do signatures."""
    return {name: value for name, value in manifest.items() if part_of(name) != EVIDENCE_FOLDER and name != SIGNATURE}


def part_of(name: str) -> str:
    """The top folder of a version's file, or an empty string."""
    return name.split("/", maxsplit=1)[0] if "/" in name else ""


def _bundle_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(read_small(path).decode("utf-8"))
    except FileNotFoundError as error:
        raise SourceNotFound(
            f"{path} is missing", expected="a release", got="no bundle", hint="Rerun the step"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(
            f"{path.name} is not readable", expected="JSON", got=str(error), hint="Rerun the step that wrote it"
        ) from error
    if not isinstance(description, dict):
        raise CorruptArtifact(f"{path.name} is not readable", expected="a JSON object", got=type(description).__name__)
    size = description.get("input_size", [])
    sized = isinstance(size, list) and all(type(side) is int for side in size)
    if not sized or not isinstance(description.get("files", {}), dict):
        raise CorruptArtifact(
            f"{path.name} is not readable",
            expected="files as a JSON object, and input_size as a list of whole numbers",
            got=f"{description.get('files')!r:.80}, {size!r:.80}",
        )
    return description


def _mlmodel(description: Mapping[str, Any]) -> bytes:
    import yaml

    shape = [-1, *description.get("input_size", [])]
    inputs = [{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": shape}}]
    model = {
        "flavors": {
            "onnx": {"data": ONNX_NAME, "code": None},
            "python_function": {"data": ONNX_NAME, "loader_module": "mlflow.onnx"},
        },
        "signature": {"inputs": json.dumps(inputs), "outputs": None, "params": None},
    }
    return yaml.safe_dump(model, sort_keys=True).encode()


def _require_digest(what: str, value: str) -> None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", value):
        raise ConfigError(
            f"{what} is not a digest",
            expected="sha256: and 64 hexadecimal digits",
            got=repr(value),
            hint="Recompute it",
        )
