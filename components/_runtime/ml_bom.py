"""ML-BOM of a model version: CycloneDX 1.6, made from the run's evidence and from nothing else.

The same evidence gives the same bytes: the serial number is derived from the content, the time is the
one at which the last step of the evidence began. The model that goes out is the component that the
document describes; the model that came in is its ancestor, with the figures it had before.

=======================  ==========================================================================
in the document          from
=======================  ==========================================================================
``metadata.component``   select, export, evaluate of the chosen method, purify of the chosen method
``pedigree.ancestors``   fetch, evaluate.before
``components``           the ONNX file and the files of the bundle that the evidence names by digest
``modelCard``            see :mod:`components._runtime.ml_bom_card`
``externalReferences``   the SBOM of the image that ran the steps, where its digest is known
=======================  ==========================================================================
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from components._runtime.ml_bom_card import Evidences, incoming_card, model_card, prop
from components._runtime.release import ML_BOM
from defense_core import __version__
from defense_core.config import canonical_json, digest, require
from defense_core.errors import ConfigError, EvidenceMissing
from defense_core.evidence import DIGEST
from defense_core.files import sha256_file, write_atomic
from defense_core.report_text import at, text

SPEC_VERSION = "1.6"
IMAGE_SBOM_DIGEST = "QUARANTINE_IMAGE_SBOM_SHA256"
"""Environment variable: digest of the image's dependency SBOM, ``sha256:<hex>``."""
IMAGE_SBOM_URI = "QUARANTINE_IMAGE_SBOM_URI"
"""Environment variable: where that SBOM is; without it, its file name beside the image."""
IMAGE_SBOM = "QUARANTINE_IMAGE_SBOM"
"""Environment variable, set in the project's images: path of the SBOM inside the image that runs."""
_DEFAULT_SBOM_URI = "image.cdx.json"
_NAMESPACE = uuid.UUID("5b0a3a3e-5d5c-5a0b-9a53-0f6c5f1c6a10")
_MODEL, _SOURCE, _ONNX = "model", "source-model", "model.onnx"


@dataclass(frozen=True)
class ImageSbom:
    """The dependency SBOM of the image that ran the steps.

    Attributes:
        digest: ``sha256:<hex>`` of its bytes.
        uri: where it is.
    """

    digest: str
    uri: str = _DEFAULT_SBOM_URI

    def __post_init__(self) -> None:
        require(bool(DIGEST.fullmatch(self.digest)), IMAGE_SBOM_DIGEST, "sha256: and 64 hex digits", self.digest)
        require(bool(self.uri) and self.uri.isprintable() and " " not in self.uri, IMAGE_SBOM_URI, "a URI", self.uri)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ImageSbom | None:
        """As :data:`IMAGE_SBOM_DIGEST` and :data:`IMAGE_SBOM_URI` say, or else the file that :data:`IMAGE_SBOM` names.

        ``None`` where no digest is known.

        Raises:
            ConfigError: the digest or the address is malformed, or the file cannot be read.
        """
        variables = os.environ if environment is None else environment
        known, uri = variables.get(IMAGE_SBOM_DIGEST, ""), variables.get(IMAGE_SBOM_URI, "")
        if known:
            return cls(known, uri or _DEFAULT_SBOM_URI)
        inside = variables.get(IMAGE_SBOM, "")
        return cls(_file_digest(Path(inside)), uri or Path(inside).absolute().as_uri()) if inside else None


def ml_bom(evidence: Evidences, *, image_sbom: ImageSbom | None = None) -> bytes:
    """The ML-BOM as canonical JSON with a final line break.

    Args:
        evidence: evidence mappings by name. Parts that a run did not reach are left out; only ``fetch``
            has to be there, since without it no model is known.
        image_sbom: linked as an external reference where given.

    Raises:
        EvidenceMissing: no evidence ``fetch`` with a digest of what came in.
    """
    source = _hex(at(evidence, "fetch", "inputs", "source"))
    if not source:
        raise EvidenceMissing(
            "no ML-BOM can be made",
            expected="evidence fetch with the digest of the fetched model",
            got=", ".join(sorted(map(str, evidence))) or "no evidence",
            hint="Run the pipeline up to fetch",
        )
    files = _files(evidence)
    document: dict[str, Any] = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": _metadata(evidence, _model(evidence, source)),
        "components": files,
        "dependencies": [
            {"ref": _MODEL, "dependsOn": [_SOURCE]},
            {"ref": _SOURCE},
            *({"ref": file["bom-ref"], "dependsOn": [_MODEL]} for file in files),
        ],
    }
    if image_sbom is not None:
        document["externalReferences"] = [_sbom_reference(image_sbom)]
    document["serialNumber"] = f"urn:uuid:{uuid.uuid5(_NAMESPACE, digest(document))}"
    return canonical_json(document) + b"\n"


def write_ml_bom(folder: Path, evidence: Evidences, *, environment: Mapping[str, str] | None = None) -> Path:
    """Write :data:`~components._runtime.release.ML_BOM` into ``folder``, whole or not at all; its path.

    Args:
        environment: where the image's SBOM is named; by default this process's environment.

    Raises:
        EvidenceMissing: as :func:`ml_bom`.
        ConfigError: the environment names the SBOM by a malformed digest.
        StorageError: the folder cannot be written.
    """
    path = Path(folder) / ML_BOM
    write_atomic(path, ml_bom(evidence, image_sbom=ImageSbom.from_environment(environment)))
    return path


# -- the document ----------------------------------------------------------------------


def _metadata(evidence: Evidences, model: dict[str, Any]) -> dict[str, Any]:
    versions = {text(at(each, "environment", "version"), 40) for each in evidence.values()} - {""}
    tools = [
        {"type": "application", "name": "model-quarantine", "version": version}
        for version in sorted(versions or {__version__})
    ]
    metadata: dict[str, Any] = {"tools": {"components": tools}, "component": model}
    times = [each for each in (_time(each) for each in evidence.values()) if each]
    if times:
        metadata["timestamp"] = max(times)
    return metadata


def _time(evidence: Mapping[str, Any]) -> str:
    """When a step began; empty where that is not a time."""
    started = text(at(evidence, "environment", "started"), 40)
    try:
        return started if datetime.fromisoformat(started).tzinfo is not None else ""
    except ValueError:
        return ""


def _model(evidence: Evidences, source: str) -> dict[str, Any]:
    """The component that the document describes."""
    chosen = _hex(at(evidence, "select", "outputs", "model"))
    fetched = _hex(at(evidence, "fetch", "outputs", "model"))
    name = text(at(evidence, "promote", "results", "name"), 128) or _file_name(evidence)
    model: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": name,
        "description": "Image classifier after quarantine"
        if chosen
        else "Image classifier in quarantine; no purified model was chosen",
        "pedigree": {"ancestors": [_incoming(evidence, source)]},
        "modelCard": model_card(evidence),
        "properties": _decision(evidence),
    }
    model |= _licences(evidence)
    if version := text(at(evidence, "promote", "results", "version"), 40):
        model["version"] = version
    if identifies := chosen or fetched:
        # The digest of bundle.json, which lists the digest of every other file of the model.
        model["hashes"] = [_hash(identifies)]
        model["properties"].append(prop("quarantine:hash_of", "bundle.json"))
    return model


def _incoming(evidence: Evidences, source: str) -> dict[str, Any]:
    fetch = at(evidence, "fetch", "results")
    found: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": _SOURCE,
        "name": _file_name(evidence),
        "description": "The model as it was fetched, before anything was done to it",
        "hashes": [_hash(source)],
        "modelCard": incoming_card(evidence),
        "properties": [
            prop(f"quarantine:{key}", value) for key in ("uri", "bytes") if (value := text(at(fetch, key), 2000))
        ],
    }
    found |= _licences(evidence)
    if version := text(at(fetch, "version_id"), 200):
        found["version"] = version
    return found


def _licences(evidence: Evidences) -> dict[str, Any]:
    """The licence of the model that came in, which what is made of it keeps; nothing where it is unknown."""
    expression = text(at(evidence, "fetch", "results", "licence"), 500)
    return {"licenses": [{"expression": expression, "acknowledgement": "declared"}]} if expression else {}


def _files(evidence: Evidences) -> list[dict[str, Any]]:
    onnx = _hex(at(evidence, "export", "outputs", "onnx") or at(evidence, "export", "results", "sha256"))
    if not onnx:
        return []
    opset = text(at(evidence, "export", "results", "opset"), 10) or "unknown"
    return [
        {
            "type": "file",
            "bom-ref": _ONNX,
            "name": _ONNX,
            "mime-type": "application/octet-stream",
            "description": f"The model as ONNX, opset {opset}",
            "hashes": [_hash(onnx)],
        }
    ]


def _decision(evidence: Evidences) -> list[dict[str, str]]:
    gate = at(evidence, "gate", "results")
    named = {
        "decision": at(gate, "outcome") or "none",
        "policy": at(gate, "policy_name"),
        "policy_digest": at(gate, "policy_digest"),
        "evidence_digest": at(gate, "evidence_digest"),
        "identity": at(evidence, "fetch", "results", "identity"),
    }
    return [prop(f"quarantine:{name}", said) for name, value in named.items() if (said := text(value, 200))]


def _file_digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise ConfigError(
            f"the image's SBOM {path} cannot be read",
            expected=f"the file that {IMAGE_SBOM} names",
            got=type(error).__name__,
            hint="Use an image that `make images` built, or unset the variable",
        ) from error


def _sbom_reference(sbom: ImageSbom) -> dict[str, Any]:
    return {
        "type": "bom",
        "url": sbom.uri,
        "comment": "Dependencies of the image that ran the steps",
        "hashes": [_hash(_hex(sbom.digest))],
    }


def _file_name(evidence: Evidences) -> str:
    address = text(at(evidence, "fetch", "results", "uri"), 1000)
    return address.split("?", maxsplit=1)[0].rstrip("/").rpartition("/")[2] or "model"


def _hash(hex_digits: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": hex_digits}


def _hex(value: Any) -> str:
    return value.removeprefix("sha256:") if isinstance(value, str) and DIGEST.fullmatch(value) else ""
