"""Promotion into a registry: what moves the alias, what never does, and what a crash leaves."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components._runtime import registered_files
from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.model_versions import quarantine
from components._runtime.promotion import Promotion, promote
from components._runtime.registered_files import resolve_model_uri
from components._runtime.registered_sources import require_allowed_source
from components._runtime.registry_prompts import PROMPT_TAG
from components._runtime.release import Release
from components._runtime.tracking import open_run
from defense_core.config import digest
from defense_core.errors import (
    ArtifactTooLarge,
    ConfigError,
    DigestMismatch,
    RegistryConflict,
    RegistryUnavailable,
    SourceNotFound,
    UnsafeArtifact,
)
from defense_core.files import sha256_file
from defense_core.verdict import Verdict
from tests.integration import mlflow_stores
from tests.integration.mlflow_stores import MlflowServer
from tests.integration.releases import IDENTITY, Kill, digest_of, interposed, make_onnx, make_release

NAME = "digits"
OTHER = replace(IDENTITY, source=digest_of("another source"))


def promoted(
    connection: MlflowConnection, release: Release, verdict: Verdict = Verdict.PASS, **changes: Any
) -> Promotion:
    run = open_run(connection, changes.pop("run_key", "pipeline-1"), name="pipeline")
    wishes = {"name": NAME, "run": run, "identity": IDENTITY, "verdict": verdict, "policy": "standard", **changes}
    return promote(connection, release, **wishes)


def alias_of(connection: MlflowConnection, name: str = NAME, alias: str = "champion") -> str | None:
    return mlflow_stores.alias_of(connection, name, alias)


def tags_of(connection: MlflowConnection, version: str, name: str = NAME) -> dict[str, str]:
    return dict(connection.client.get_model_version(name, version).tags)


def versions_of(connection: MlflowConnection, name: str = NAME) -> list[str]:
    return sorted(str(version.version) for version in connection.client.search_model_versions(f"name = '{name}'"))


def stored_files(connection: MlflowConnection, version: str, name: str = NAME) -> Path:
    source = connection.client.get_model_version(name, version).source
    return Path(source.removeprefix("file://"))


# -- decisions -------------------------------------------------------------------------


def test_a_new_version_must_hold_the_decision_that_was_made_again(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    release = make_release(tmp_path)
    (release.folder / "evidence" / "decision.json").write_text("{}")
    with pytest.raises(RegistryConflict, match="another decision"):
        promoted(mlflow_sqlite, release, decision_digest=digest_of("another"))
    (version,) = mlflow_sqlite.client.search_model_versions("")
    assert (version.tags[tag.DECISION], version.tags[tag.REASON]) == (tag.QUARANTINED, tag.BYTES_DIFFER)
    assert not dict(mlflow_sqlite.client.get_registered_model(version.name).aliases)


def test_allow_registers_everything_and_moves_the_alias(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    release = make_release(tmp_path / "release")
    result = promoted(mlflow_sqlite, release, tags={"team": "vision"})
    assert (result.version, result.decision, result.reason) == ("1", "allow", "")
    assert (result.alias_version, result.alias_moved, result.reused, result.quarantined) == ("1", True, False, False)
    assert alias_of(mlflow_sqlite) == "1"
    tags = tags_of(mlflow_sqlite, "1")
    assert tags[tag.ONNX_DIGEST] == release.onnx_digest
    assert tags[tag.BUNDLE_DIGEST] == release.bundle_digest
    assert tags[tag.SOURCE_DIGEST] == IDENTITY.source
    assert tags[tag.IDENTITY] == IDENTITY.digest == result.identity
    assert tags[tag.EVIDENCE_DIGEST] == result.evidence_digest
    assert (tags[tag.DECISION], tags[tag.POLICY], tags["team"]) == ("allow", "standard", "vision")
    files = stored_files(mlflow_sqlite, "1")
    assert sorted(path.relative_to(files).as_posix() for path in files.rglob("*") if path.is_file()) == [
        "MLmodel",
        "bundle/bundle.json",
        "bundle/model.safetensors",
        "evidence/evaluate.tsbd.json",
        "evidence/fetch.json",
        "model.onnx",
        "requirements.txt",
    ]


@pytest.mark.parametrize(
    ("verdict", "reason"), [(Verdict.FAIL, "denied"), (Verdict.UNKNOWN, "undecided")], ids=["deny", "unknown"]
)
def test_anything_but_allow_is_quarantined_and_the_alias_stays(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, verdict: Verdict, reason: str
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "old"))
    result = promoted(mlflow_sqlite, make_release(tmp_path / "new", weights=b"new"), verdict, identity=OTHER)
    assert (result.version, result.decision, result.reason) == ("2", "quarantined", reason)
    assert (result.alias_version, result.alias_moved, result.quarantined) == ("1", False, True)
    assert alias_of(mlflow_sqlite) == "1"
    assert tags_of(mlflow_sqlite, "2")[tag.DECISION] == "quarantined"
    assert tags_of(mlflow_sqlite, "2")[tag.REASON] == reason


def test_first_version_denied_leaves_no_alias(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    result = promoted(mlflow_sqlite, make_release(tmp_path / "release"), Verdict.FAIL)
    assert result.alias_version is None
    assert alias_of(mlflow_sqlite) is None


def test_allow_moves_the_alias_from_an_older_version(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "old"))
    result = promoted(mlflow_sqlite, make_release(tmp_path / "new", weights=b"new"), identity=OTHER)
    assert result.alias_moved
    assert alias_of(mlflow_sqlite) == "2"
    assert tags_of(mlflow_sqlite, "1")[tag.DECISION] == "allow"


def test_the_bytes_are_checked_and_the_decision_tagged_before_the_alias_moves(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    calls: list[str] = []
    tags: dict[str, str] = {}

    def watch(number: int, name: str, when: str) -> None:
        if when == "before":
            calls.append(name)
            if name == "set_registered_model_alias":
                tags.update(tags_of(mlflow_sqlite, "1"))

    promoted(interposed(mlflow_sqlite, watch), make_release(tmp_path / "release"))
    order = ["log_artifacts", "create_model_version", "get_model_version_download_uri", "set_registered_model_alias"]
    assert [calls.index(name) for name in order] == sorted(calls.index(name) for name in order)
    assert tags[tag.DECISION] == "allow"


# -- doing it again --------------------------------------------------------------------


@pytest.mark.parametrize("verdict", list(Verdict), ids=str)
def test_same_identity_gives_the_same_version(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, verdict: Verdict
) -> None:
    first = promoted(mlflow_sqlite, make_release(tmp_path / "a"), verdict)
    again = promoted(mlflow_sqlite, make_release(tmp_path / "b", note="an hour later"), verdict, run_key="pipeline-2")
    assert (again.reused, again.alias_moved) == (True, False)
    assert (again.version, again.decision, again.evidence_digest) == (
        first.version,
        first.decision,
        first.evidence_digest,
    )
    assert versions_of(mlflow_sqlite) == ["1"]


def test_a_tag_that_hides_what_was_decided_does_not_get_it_decided_again(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    release = make_release(tmp_path / "release")
    promoted(mlflow_sqlite, release, Verdict.FAIL)
    mlflow_sqlite.client.set_model_version_tag(NAME, "1", PROMPT_TAG, "true")
    with pytest.raises(RegistryConflict, match="version 1"):
        promoted(mlflow_sqlite, release)
    assert alias_of(mlflow_sqlite) is None
    mlflow_sqlite.client.delete_model_version_tag(NAME, "1", PROMPT_TAG)
    assert versions_of(mlflow_sqlite) == ["1"]


@pytest.mark.parametrize("part", ["source", "config", "policy"])
def test_each_part_of_the_identity_makes_a_version(mlflow_sqlite: MlflowConnection, tmp_path: Path, part: str) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"))
    other = replace(IDENTITY, **{part: digest_of("changed")})
    assert promoted(mlflow_sqlite, make_release(tmp_path / "b"), identity=other).version == "2"


def test_old_work_done_again_does_not_take_the_alias_back(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "old"))
    promoted(mlflow_sqlite, make_release(tmp_path / "new", weights=b"new"), identity=OTHER)
    again = promoted(mlflow_sqlite, make_release(tmp_path / "old again"))
    assert (again.version, again.alias_moved, again.alias_version) == ("1", False, "2")


def test_a_second_alias_is_set_on_the_same_version(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"))
    again = promoted(mlflow_sqlite, make_release(tmp_path / "b"), alias="challenger")
    assert (again.reused, again.alias_moved) == (True, True)
    assert (alias_of(mlflow_sqlite), alias_of(mlflow_sqlite, alias="challenger")) == ("1", "1")


@pytest.mark.parametrize(
    ("first", "second"), [(Verdict.FAIL, Verdict.PASS), (Verdict.PASS, Verdict.FAIL), (Verdict.PASS, Verdict.UNKNOWN)]
)
def test_a_decision_is_final(mlflow_sqlite: MlflowConnection, tmp_path: Path, first: Verdict, second: Verdict) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"), first)
    before = (alias_of(mlflow_sqlite), tags_of(mlflow_sqlite, "1"))
    with pytest.raises(RegistryConflict, match="decided otherwise"):
        promoted(mlflow_sqlite, make_release(tmp_path / "b"), second)
    assert (alias_of(mlflow_sqlite), tags_of(mlflow_sqlite, "1")) == before
    assert versions_of(mlflow_sqlite) == ["1"]


def test_unknown_is_superseded_by_a_decision(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"), Verdict.UNKNOWN)
    result = promoted(mlflow_sqlite, make_release(tmp_path / "b", note="now with evidence"))
    assert (result.version, result.alias_moved) == ("2", True)
    old = tags_of(mlflow_sqlite, "1")
    assert (old[tag.DECISION], old[tag.REASON], old[tag.SUPERSEDED_BY]) == ("quarantined", "undecided", "2")
    assert promoted(mlflow_sqlite, make_release(tmp_path / "c")).version == "2"


def test_same_identity_with_other_bytes_is_refused(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"))
    with pytest.raises(RegistryConflict, match="another model"):
        promoted(mlflow_sqlite, make_release(tmp_path / "b", weights=b"not repeatable"))
    assert versions_of(mlflow_sqlite) == ["1"]
    assert tags_of(mlflow_sqlite, "1")[tag.DECISION] == "allow"


# -- crashes ---------------------------------------------------------------------------


def test_a_kill_anywhere_leaves_the_alias_and_the_next_run_completes(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    """After every single call of the sequence, and before the first; each in a registered model of its own."""
    release = make_release(tmp_path / "new", weights=b"new")
    client = mlflow_sqlite.client
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    wishes: dict[str, Any] = {"run": run, "verdict": Verdict.PASS, "policy": "standard", "identity": IDENTITY}

    def prepare(name: str) -> None:
        client.create_registered_model(name)
        client.create_model_version(name, source=tmp_path.as_uri())
        client.set_registered_model_alias(name, "champion", "1")

    seen: list[str] = []

    def record(number: int, name: str, when: str) -> None:
        if when == "before":
            seen.append(name)

    prepare("whole")
    promote(interposed(mlflow_sqlite, record), release, name="whole", **wishes)
    assert {"log_artifacts", "create_model_version", "set_model_version_tag", "set_registered_model_alias"} <= set(seen)
    alias_call = seen.index("set_registered_model_alias") + 1

    for fatal in range(len(seen) + 1):

        def kill(number: int, name: str, when: str, fatal: int = fatal) -> None:
            if (number, when) == (fatal, "after") or fatal == 0:
                raise Kill(name)

        name = f"killed-{fatal}"
        prepare(name)
        with pytest.raises(Kill):
            promote(interposed(mlflow_sqlite, kill), release, name=name, **wishes)
        assert alias_of(mlflow_sqlite, name) == ("2" if fatal >= alias_call else "1"), (fatal, seen[fatal - 1])
        result = promote(mlflow_sqlite, release, name=name, **wishes)
        assert (result.version, result.decision, result.alias_version) == ("2", "allow", "2")
        assert versions_of(mlflow_sqlite, name) == ["1", "2"]
        assert tags_of(mlflow_sqlite, "2", name)[tag.ALIAS_PREFIX + "champion"] == "set"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_promotion_that_is_completed_late_takes_no_alias_from_a_newer_version(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, when: str
) -> None:
    """Killed right before or after the alias was set; then a newer version is promoted."""

    def kill(number: int, name: str, now: str) -> None:
        if (name, now) == ("set_registered_model_alias", when):
            raise Kill(name)

    promoted(mlflow_sqlite, make_release(tmp_path / "old"))
    late = make_release(tmp_path / "late", weights=b"late")
    with pytest.raises(Kill):
        promoted(interposed(mlflow_sqlite, kill), late, identity=OTHER)
    newer = replace(IDENTITY, source=digest_of("a newer source"))
    promoted(mlflow_sqlite, make_release(tmp_path / "newer", weights=b"newer"), identity=newer)
    assert alias_of(mlflow_sqlite) == "3"
    for _ in range(2):
        result = promoted(mlflow_sqlite, late, identity=OTHER)
        assert (result.version, result.alias_moved, result.alias_version, result.alias_before) == ("2", False, "3", "1")
    tags = tags_of(mlflow_sqlite, "2")
    assert (tags[tag.ALIAS_PREFIX + "champion"], tags[tag.BEFORE_PREFIX + "champion"]) == ("set", "1")
    assert tags_of(mlflow_sqlite, "3")[tag.BEFORE_PREFIX + "champion"] == ("1" if when == "before" else "2")


def test_a_first_promotion_that_was_killed_at_its_alias_goes_on(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    def kill(number: int, name: str, when: str) -> None:
        if (name, when) == ("set_registered_model_alias", "before"):
            raise Kill(name)

    release = make_release(tmp_path / "only")
    with pytest.raises(Kill):
        promoted(interposed(mlflow_sqlite, kill), release)
    assert tags_of(mlflow_sqlite, "1")[tag.BEFORE_PREFIX + "champion"] == tag.NO_VERSION
    assert promoted(mlflow_sqlite, release).alias_moved
    assert alias_of(mlflow_sqlite) == "1"


def test_ctrl_c_while_the_bytes_are_checked_leaves_the_alias(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "old"))

    def interrupted(folder: Path) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registered_files, "folder_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            promoted(mlflow_sqlite, make_release(tmp_path / "new", weights=b"new"), identity=OTHER)
    assert alias_of(mlflow_sqlite) == "1"
    assert tags_of(mlflow_sqlite, "2")[tag.DECISION] == "pending"
    result = promoted(mlflow_sqlite, make_release(tmp_path / "again", weights=b"new"), identity=OTHER)
    assert (result.version, result.reused, alias_of(mlflow_sqlite)) == ("2", True, "2")


def test_a_pending_version_with_other_evidence_is_abandoned(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    def kill(number: int, name: str, when: str) -> None:
        if (name, when) == ("create_model_version", "after"):
            raise Kill(name)

    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    wishes: dict[str, Any] = {"name": NAME, "run": run, "identity": IDENTITY, "verdict": Verdict.PASS, "policy": "p"}
    with pytest.raises(Kill):
        promote(interposed(mlflow_sqlite, kill), make_release(tmp_path / "a"), **wishes)
    result = promote(mlflow_sqlite, make_release(tmp_path / "b", note="measured again"), **wishes)
    assert (result.version, result.alias_version) == ("2", "2")
    assert tags_of(mlflow_sqlite, "1")[tag.REASON] == "abandoned"


def test_a_twin_created_at_the_same_moment_gives_way(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    release = make_release(tmp_path / "release")
    run = open_run(mlflow_sqlite, "pipeline-1", name="pipeline")
    wishes: dict[str, Any] = {"name": NAME, "run": run, "identity": IDENTITY, "verdict": Verdict.PASS, "policy": "p"}
    twins: list[Promotion] = []

    def overtake(number: int, name: str, when: str) -> None:
        if (name, when) == ("create_model_version", "before"):
            twins.append(promote(mlflow_sqlite, release, **wishes))

    late = promote(interposed(mlflow_sqlite, overtake), release, **wishes)
    assert (twins[0].version, late.version, late.reused) == ("1", "1", True)
    assert versions_of(mlflow_sqlite) == ["1"]
    assert alias_of(mlflow_sqlite) == "1"


# -- bytes that are not the promised ones ----------------------------------------------


@pytest.mark.parametrize(
    ("victim", "action"),
    [
        ("model.onnx", "change"),
        ("bundle/model.safetensors", "change"),
        ("evidence/fetch.json", "change"),
        ("MLmodel", "change"),
        ("model.onnx", "delete"),
        ("code/evil.py", "add"),
        ("", "delete"),
    ],
)
def test_bytes_altered_between_upload_and_alias_are_refused(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, victim: str, action: str
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "old"))

    def tamper(number: int, name: str, when: str) -> None:
        if (name, when) != ("create_model_version", "after"):
            return
        path = stored_files(mlflow_sqlite, "2") / victim
        if action == "delete":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"altered")

    release = make_release(tmp_path / "new", weights=b"new")
    with pytest.raises(RegistryConflict, match="not those of the evidence"):
        promoted(interposed(mlflow_sqlite, tamper), release, identity=OTHER)
    assert alias_of(mlflow_sqlite) == "1"
    tags = tags_of(mlflow_sqlite, "2")
    assert (tags[tag.DECISION], tags[tag.REASON]) == ("quarantined", "bytes_differ")
    with pytest.raises(RegistryConflict, match="damaged"):
        promoted(mlflow_sqlite, release, identity=OTHER)
    assert alias_of(mlflow_sqlite) == "1"


def test_a_version_that_another_run_finds_damaged_meanwhile_is_not_called_allowed(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    seen: list[str] = []

    def meanwhile(number: int, name: str, when: str) -> None:
        if (name, when) == ("get_model_version_download_uri", "after") and not seen:
            seen.append(name)
            version = mlflow_sqlite.client.get_model_version(NAME, "1")
            quarantine(mlflow_sqlite, version, tag.BYTES_DIFFER)

    with pytest.raises(RegistryConflict, match="was found damaged"):
        promoted(interposed(mlflow_sqlite, meanwhile), make_release(tmp_path / "release"))
    assert seen
    assert alias_of(mlflow_sqlite) is None
    assert tags_of(mlflow_sqlite, "1")[tag.REASON] == tag.BYTES_DIFFER


def test_damage_after_promotion_is_found_by_the_next_run(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"))
    (stored_files(mlflow_sqlite, "1") / "model.onnx").write_bytes(b"backdoored later")
    with pytest.raises(RegistryConflict, match=r"model\.onnx changed"):
        promoted(mlflow_sqlite, make_release(tmp_path / "b"))
    assert tags_of(mlflow_sqlite, "1")[tag.REASON] == "bytes_differ"


def test_a_version_beside_files_that_a_rewritten_tag_covers_gets_no_further_alias(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "a"))
    files = stored_files(mlflow_sqlite, "1")
    (files / "code").mkdir()
    (files / "code" / "evil.py").write_text("print('loaded with the model')")
    covered = digest(dict(registered_files.folder_manifest(files)))
    mlflow_sqlite.client.set_model_version_tag(NAME, "1", tag.FILES_DIGEST, covered)
    with pytest.raises(RegistryConflict, match=r"beside other files.*code/evil\.py"):
        promoted(mlflow_sqlite, make_release(tmp_path / "b"), alias="challenger")
    assert alias_of(mlflow_sqlite, alias="challenger") is None
    assert tags_of(mlflow_sqlite, "1")[tag.DECISION] == "allow"
    # An older layout is no damage where no alias is asked for.
    again = promoted(mlflow_sqlite, make_release(tmp_path / "c"))
    assert (again.reused, again.alias_moved, again.alias_version) == (True, False, "1")


def test_local_files_that_contradict_the_evidence_are_not_registered(
    mlflow_sqlite: MlflowConnection, tmp_path: Path
) -> None:
    release = make_release(tmp_path / "release")
    (release.folder / "model.onnx").write_bytes(b"another export")
    with pytest.raises(DigestMismatch, match=r"model\.onnx changed"):
        promoted(mlflow_sqlite, release)
    assert mlflow_sqlite.client.search_registered_models() == []


# -- usage -----------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v1", "V22", "", "1", "two words", "a/b"])
def test_reserved_and_malformed_aliases_are_refused(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, alias: str
) -> None:
    with pytest.raises(ConfigError, match="alias"):
        promoted(mlflow_sqlite, make_release(tmp_path / "release"), alias=alias)
    assert mlflow_sqlite.client.search_registered_models() == []


@pytest.mark.parametrize("name", ["", "a/b", "a:b", "it's", "x" * 129])
def test_unusable_model_names_are_refused(mlflow_sqlite: MlflowConnection, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="registered model"):
        promoted(mlflow_sqlite, make_release(tmp_path / "release"), name=name)


def test_own_tags_cannot_be_set_by_the_caller(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reserved"):
        promoted(mlflow_sqlite, make_release(tmp_path / "release"), Verdict.FAIL, tags={"quarantine.decision": "allow"})


# -- the way in ------------------------------------------------------------------------


def test_a_version_and_an_alias_resolve_to_the_same_bytes(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    release = make_release(tmp_path / "release")
    promoted(mlflow_sqlite, release)
    by_version = resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "by version", max_bytes=1 << 20)
    by_alias = resolve_model_uri(mlflow_sqlite, f"models:/{NAME}@champion", tmp_path / "by alias", max_bytes=1 << 20)
    assert by_version.manifest["model.onnx"] == release.onnx_digest
    assert sha256_file(by_version.path / "bundle" / "bundle.json") == release.bundle_digest
    assert by_alias.digest == by_version.digest
    version = mlflow_sqlite.client.get_model_version(NAME, "1")
    artifacts = mlflow_sqlite.client.get_run(version.run_id).info.artifact_uri
    assert by_version.address.startswith(artifacts), "where the bytes lay, not the run that the entry names"
    assert by_alias.uri == "models:/digits/1"


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("models:/digits/7", SourceNotFound),
        ("models:/digits@nobody", SourceNotFound),
        ("models:/nothing/1", SourceNotFound),
        ("models:/digits/latest", ConfigError),
        ("models:/digits/Production", ConfigError),
        ("models:/digits", ConfigError),
        ("runs:/abc/model", ConfigError),
    ],
)
def test_addresses_that_name_nothing(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, uri: str, error: type[Exception]
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "release"))
    with pytest.raises(error):
        resolve_model_uri(mlflow_sqlite, uri, tmp_path / "out", max_bytes=1 << 20)
    assert not (tmp_path / "out").exists()


def test_a_version_larger_than_the_limit_is_refused_before_the_download(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "release", weights=b"w" * 100_000))
    downloaded: list[object] = []
    monkeypatch.setattr(registered_files, "_download", lambda *arguments: downloaded.append(arguments))
    with pytest.raises(ArtifactTooLarge, match="at most 50000 bytes"):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=50_000)
    assert downloaded == []
    assert not (tmp_path / "out").exists()


def test_a_version_whose_files_are_gone_is_not_found(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "release"))
    shutil.rmtree(stored_files(mlflow_sqlite, "1"))
    with pytest.raises(SourceNotFound, match="no files"):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=1 << 20)


def test_a_store_that_is_not_mounted_does_not_answer(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    promoted(mlflow_sqlite, make_release(tmp_path / "release"))
    experiment = stored_files(mlflow_sqlite, "1").parents[2]
    experiment.rename(tmp_path / "unmounted")
    with pytest.raises(RegistryUnavailable, match="Mount the volume"):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=1 << 20)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "path",
    ["../../../../etc", "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc", "..%2f..%2f..%2f..%2fetc", "%252e%252e/etc", "a#b", "a?b"],
)
def test_a_path_out_of_a_runs_files_is_refused(path: str, mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    client = mlflow_sqlite.client
    run = client.create_run(client.create_experiment("another"))
    client.create_registered_model(NAME)
    client.create_model_version(NAME, source=f"runs:/{run.info.run_id}/{path}", run_id=run.info.run_id)
    with pytest.raises(UnsafeArtifact):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=1 << 20)


@pytest.mark.parametrize("source", ["http://127.0.0.1:9/model", "ftp://127.0.0.1/model", "dbfs:/model"])
def test_a_source_that_must_not_be_fetched_is_refused(
    mlflow_sqlite: MlflowConnection, tmp_path: Path, source: str
) -> None:
    mlflow_sqlite.client.create_registered_model(NAME)
    mlflow_sqlite.client.create_model_version(NAME, source=source)
    with pytest.raises(UnsafeArtifact, match="may not be read"):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=1 << 20)


def test_a_link_in_the_store_is_not_followed_out_of_it(mlflow_sqlite: MlflowConnection, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("not yours")
    promoted(mlflow_sqlite, make_release(tmp_path / "release"))
    (stored_files(mlflow_sqlite, "1") / "bundle" / "link").symlink_to(secret)
    with pytest.raises(UnsafeArtifact):
        resolve_model_uri(mlflow_sqlite, f"models:/{NAME}/1", tmp_path / "out", max_bytes=1 << 20)
    assert not (tmp_path / "out").exists()


# -- a real server ---------------------------------------------------------------------


def server_settings(server: MlflowServer, **changes: Any) -> MlflowSettings:
    return MlflowSettings(tracking_uri=server.uri, experiment="tests", timeout_s=20, **changes)


def test_server_promotes_and_serves_the_model(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    import mlflow
    import numpy as np

    connection = connect(server_settings(mlflow_server))
    release = make_release(tmp_path / "release", onnx=make_onnx())
    result = promoted(connection, release, name="served")
    assert (result.version, result.alias_moved) == ("1", True)
    assert result.source.startswith("mlflow-artifacts:")
    assert promoted(connection, release, name="served").reused
    resolved = resolve_model_uri(connection, "models:/served@champion", tmp_path / "in", max_bytes=1 << 20)
    assert resolved.manifest["model.onnx"] == release.onnx_digest

    mlflow.set_tracking_uri(mlflow_server.uri)
    mlflow.set_registry_uri(mlflow_server.uri)
    try:
        model = mlflow.pyfunc.load_model("models:/served@champion")
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    images = np.random.default_rng(0).random((5, 3, 2, 2), dtype=np.float32)
    np.testing.assert_array_equal(model.predict(images)["logits"], images.reshape(5, 12))


def test_server_artifacts_altered_behind_its_back_are_refused(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    connection = connect(server_settings(mlflow_server))

    def tamper(number: int, name: str, when: str) -> None:
        if (name, when) == ("create_model_version", "after"):
            for path in mlflow_server.artifacts.rglob("registered/*/model.onnx"):
                if path.read_bytes() == b"to be altered":
                    path.write_bytes(b"altered")

    with pytest.raises(RegistryConflict, match=r"model\.onnx changed"):
        promoted(interposed(connection, tamper), make_release(tmp_path / "new", onnx=b"to be altered"), name="altered")
    assert alias_of(connection, "altered") is None


def test_server_goes_away_in_the_middle_and_comes_back(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    patient = connect(server_settings(mlflow_server))
    promoted(patient, make_release(tmp_path / "old"), name="shaky")
    hasty = connect(MlflowSettings(tracking_uri=mlflow_server.uri, experiment="tests", timeout_s=1, max_retries=0))
    release = make_release(tmp_path / "new", weights=b"new")

    def vanish(number: int, name: str, when: str) -> None:
        if (name, when) == ("create_model_version", "after"):
            mlflow_server.freeze()

    try:
        with pytest.raises(RegistryUnavailable) as caught:
            promoted(interposed(hasty, vanish), release, name="shaky", identity=OTHER)
    finally:
        mlflow_server.thaw()
    assert caught.value.exit_code == 2
    patient = connect(server_settings(mlflow_server))
    assert alias_of(patient, "shaky") == "1"
    assert tags_of(patient, "2", "shaky")[tag.DECISION] == "pending"
    result = promoted(patient, release, name="shaky", identity=OTHER)
    assert (result.version, result.reused, alias_of(patient, "shaky")) == ("2", True, "2")


def test_server_does_not_let_a_registry_entry_name_local_files(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    connection = connect(server_settings(mlflow_server))
    with pytest.raises(UnsafeArtifact, match="may not be read"):
        require_allowed_source((tmp_path / "etc").as_uri(), connection.settings, "models:/x/1")
