"""What a model version is made of, and how it is compared with the evidence; MLflow is not needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from components._runtime.bundle_files import listed_files
from components._runtime.evidence import read_evidence
from components._runtime.registered_files import folder_manifest, manifest_differences
from components._runtime.release import Identity, check_release, evidence_digest, model_files, stage, without_evidence
from components._runtime.small_files import MAX_EVIDENCE_BYTES
from defense_core.errors import (
    ConfigError,
    CorruptArtifact,
    DigestMismatch,
    EvidenceMismatch,
    SourceNotFound,
    UnsafeArtifact,
)
from tests.integration.releases import IDENTITY, digest_of, make_parts, make_release


def staged(folder: Path, **changes: Any) -> tuple[Path, dict[str, str]]:
    release = make_release(folder, **changes)
    return release.folder, dict(check_release(release))


def test_the_same_release_gives_the_same_bytes(tmp_path: Path) -> None:
    assert staged(tmp_path / "a")[1] == staged(tmp_path / "b")[1]


def test_other_evidence_changes_the_evidence_digest_only(tmp_path: Path) -> None:
    first = staged(tmp_path / "a")[1]
    second = staged(tmp_path / "b", note="later")[1]
    assert evidence_digest(first) != evidence_digest(second)
    assert without_evidence(first) == without_evidence(second)
    assert manifest_differences(first, second) == ["evidence/fetch.json changed"]


def test_the_model_description_is_valid_for_mlflow(tmp_path: Path) -> None:
    out, manifest = staged(tmp_path)
    description = yaml.safe_load((out / "MLmodel").read_text())
    assert description["flavors"]["python_function"]["loader_module"] == "mlflow.onnx"
    assert json.loads(description["signature"]["inputs"])[0]["tensor-spec"]["shape"] == [-1, 3, 2, 2]
    assert set(model_files(manifest)) == {"model.onnx", "bundle/bundle.json", "bundle/model.safetensors"}


@pytest.mark.parametrize(
    ("victim", "difference"),
    [
        ("bundle/model.safetensors", "bundle/model.safetensors changed"),
        ("bundle/extra.py", "bundle/extra.py unexpected"),
        ("code/extra.py", "code/extra.py unexpected"),
        ("model.onnx", "model.onnx changed"),
        ("MLmodel", "MLmodel changed"),
        ("requirements.txt", "requirements.txt changed"),
    ],
)
def test_what_contradicts_the_evidence_is_named(tmp_path: Path, victim: str, difference: str) -> None:
    release = make_release(tmp_path)
    (release.folder / victim).parent.mkdir(exist_ok=True)
    (release.folder / victim).write_bytes(b"spoilt")
    with pytest.raises(DigestMismatch) as caught:
        check_release(release)
    assert caught.value.got == difference


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    release = replace(make_release(tmp_path), bundle_digest=digest_of("another"))
    with pytest.raises(DigestMismatch, match=r"bundle/bundle\.json changed"):
        check_release(release)


@pytest.mark.parametrize("victim", ["exported.onnx", "bundle/bundle.json", "evidence"])
def test_a_missing_part_is_named(tmp_path: Path, victim: str) -> None:
    parts = make_parts(tmp_path / "in")
    path = tmp_path / "in" / victim
    path.rename(tmp_path / "away")
    (tmp_path / "out").mkdir()
    with pytest.raises(SourceNotFound, match=path.name):
        stage(parts, tmp_path / "out")


def test_a_release_without_bundle_is_none(tmp_path: Path) -> None:
    release = make_release(tmp_path)
    (release.folder / "bundle" / "bundle.json").unlink()
    with pytest.raises(SourceNotFound, match=r"bundle\.json"):
        check_release(release)


@pytest.mark.parametrize("text", ["not json", "[1, 2]"])
def test_an_unreadable_bundle_description(tmp_path: Path, text: str) -> None:
    parts = make_parts(tmp_path / "in")
    (parts.bundle_dir / "bundle.json").write_text(text)
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptArtifact, match=r"bundle\.json"):
        stage(parts, tmp_path / "out")


@pytest.mark.parametrize(
    "description",
    [{"input_size": 5}, {"input_size": [1, "\ud800"]}, {"input_size": [[1]]}, {"files": [1, 2]}, {"files": "x"}],
)
def test_a_bundle_description_of_another_shape(description: dict[str, Any], tmp_path: Path) -> None:
    release = make_release(tmp_path)
    (release.folder / "bundle" / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(CorruptArtifact, match=r"bundle\.json"):
        check_release(release)


def test_a_file_that_is_too_large_to_be_evidence_is_not_read(tmp_path: Path) -> None:
    release = make_release(tmp_path)
    for name in ("bundle/bundle.json", "evidence/fetch.json"):
        with (release.folder / name).open("wb") as stream:
            stream.truncate(MAX_EVIDENCE_BYTES + 1)
    for read in (lambda: check_release(release), lambda: listed_files(release.folder / "bundle")):
        with pytest.raises(EvidenceMismatch, match="too large"):
            read()
    with pytest.raises(EvidenceMismatch, match="too large"):
        read_evidence(release.folder / "evidence" / "fetch.json")


def test_what_lies_beside_the_evidence_is_not_released(tmp_path: Path) -> None:
    parts = make_parts(tmp_path / "in")
    evidence = parts.evidence_dir
    (evidence / "approvals").mkdir()
    (evidence / "more").mkdir()
    beside = ("notes.txt", "report.json", "promotion.json", "scan.failed.json", "more/fetch.json")
    for name in (*beside, "approvals/0.json"):
        (evidence / name).write_text("{}")
    (tmp_path / "out").mkdir()
    stage(parts, tmp_path / "out")
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out" / "evidence").rglob("*.*")}
    assert names == {"evidence/fetch.json", "evidence/evaluate.tsbd.json", "evidence/approvals/0.json"}


def test_a_link_is_never_registered(tmp_path: Path) -> None:
    release = make_release(tmp_path)
    (release.folder / "evidence" / "keys.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeArtifact, match=r"keys\.json"):
        check_release(release)


def test_manifests_name_every_difference(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    manifest = folder_manifest(tmp_path)
    assert set(manifest) == {"sub/a", "b"}
    other = {"sub/a": digest_of("x"), "c": digest_of("c")}
    assert manifest_differences(manifest, other) == ["b missing", "c unexpected", "sub/a changed"]
    assert manifest_differences(manifest, manifest) == []


@pytest.mark.parametrize("value", ["", "sha256:", "abc", "sha256:" + "A" * 64, "md5:" + "0" * 64])
@pytest.mark.parametrize("field", ["source", "config", "policy"])
def test_an_identity_is_made_of_digests(field: str, value: str) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(IDENTITY, **{field: value})


def test_identities_differ_in_every_field() -> None:
    others = [replace(IDENTITY, **{field: digest_of("other")}) for field in ("source", "config", "policy")]
    assert len({IDENTITY.digest, *(other.digest for other in others)}) == 4
    same = Identity(source=IDENTITY.source, config=IDENTITY.config, policy=IDENTITY.policy)
    assert same.digest == IDENTITY.digest
