"""The sweep: which aliases it finds drifted, and where it moves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection
from defense_core.errors import StorageError
from pipelines.sweep_aliases import AliasMove, Journal
from pipelines.sweep_memory import SweepMemory
from tests.integration.releases import interposed
from tests.pipelines.sweep.fixtures import (
    aliases,
    named,
    one_policy,
    swept,
)
from tests.pipelines.sweep.registry import DAY_S, NOW_S, decided, incoming, policy, policy_mapping


def test_a_moved_alias_is_reported_and_without_enforce_stays(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str]
) -> None:
    report = swept(connection, memory)
    assert named(report, "drift") == [("clean", drifted["stranger"])]
    assert report.moves == ()
    assert aliases(connection)["champion"] == drifted["stranger"]


def test_enforce_moves_it_to_the_last_allowed_version_and_touches_no_other_alias(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    report = swept(connection, memory, journal=journal)
    assert [(each.state, each.target) for each in report.moves] == [("moved", drifted["second"])]
    assert aliases(connection) == {"champion": drifted["second"], "canary": drifted["stranger"]}
    lines = [json.loads(line) for line in journal.path.read_text().splitlines()]
    assert [line["state"] for line in lines] == ["intended", "moved"]
    assert {(line["origin"], line["target"]) for line in lines} == {(drifted["stranger"], drifted["second"])}
    assert swept(connection, memory, journal=journal).found["drift"] == 0


def test_enforce_removes_an_alias_that_nothing_covers(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision", 2)
    connection.client.set_registered_model_alias("vision", "champion", "2")
    report = swept(connection, memory, journal=Journal(tmp_path / "journal.jsonl"))
    assert [each.state for each in report.moves] == ["removed"]
    assert aliases(connection, "vision") == {}


def test_a_stricter_policy_makes_drift_unless_the_former_one_is_accepted(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1")
    report = swept(connection, memory, one_policy(policy(0.6)))
    assert named(report, "drift") == [("clean", "1")]
    accepting = one_policy(policy(0.6), accepted=frozenset({policy().digest}))
    report = swept(connection, memory, accepting, journal=Journal(tmp_path / "journal.jsonl"))
    assert (report.found["drift"], report.found["undecided"], report.moves) == (0, 1, ())


@pytest.mark.parametrize("forgery", ["tags", "evidence", "superseded"])
def test_an_allow_that_its_evidence_does_not_give_covers_nothing(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path, forgery: str
) -> None:
    allowed = decided(connection, tmp_path, "clean")
    client = connection.client
    if forgery == "tags":  # a stranger's version with every tag of an allowed one
        (tmp_path / "stranger").mkdir()
        (tmp_path / "stranger" / "model.onnx").write_bytes(b"a stranger's")
        stranger = incoming(connection, "clean", source=(tmp_path / "stranger").as_uri())[0]
        for key, value in client.get_model_version("clean", allowed).tags.items():
            client.set_model_version_tag("clean", stranger, key, value)
        client.set_registered_model_alias("clean", "champion", stranger)
    elif forgery == "evidence":
        (path,) = (tmp_path / "mlflow").rglob("evidence/evaluate.tsbd.json")
        path.write_text(path.read_text().replace('"images":200', '"images":201'))
    else:
        client.set_model_version_tag("clean", allowed, tag.SUPERSEDED_BY, "9")
    report = swept(connection, memory)
    assert report.found["drift"] == 1, report.findings


def test_what_somebody_moves_meanwhile_stays(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    def meanwhile(number: int, name: str, when: str) -> None:
        if (name, when) == ("get_registered_model", "before"):
            connection.client.set_registered_model_alias("clean", "champion", drifted["first"])

    report = swept(interposed(connection, meanwhile), memory, journal=Journal(tmp_path / "journal.jsonl"))
    assert [each.state for each in report.moves] == ["overtaken"]
    assert aliases(connection)["champion"] == drifted["first"]


def test_a_journal_that_cannot_be_written_moves_nothing(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "journal").mkdir()
    with pytest.raises(StorageError, match="journal"):
        swept(connection, memory, journal=Journal(tmp_path / "journal"))
    assert aliases(connection)["champion"] == drifted["stranger"]


def test_credentials_that_cannot_read_evidence_decide_nothing(
    connection: MlflowConnection,
    memory: SweepMemory,
    drifted: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from components._runtime import registered_decisions
    from defense_core.errors import AccessDenied

    def refused(*_: Any, **__: Any) -> None:
        raise AccessDenied("cannot download", hint="Check the credentials")

    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])
    monkeypatch.setattr(registered_decisions, "download_version", refused)
    report = swept(connection, memory, journal=Journal(tmp_path / "journal.jsonl"))
    assert (report.exit_code, report.found["unknown"], report.moves) == (2, 1, ())
    assert aliases(connection)["champion"] == drifted["second"]


def test_evidence_of_a_shape_that_nobody_thought_of_hides_no_other_version(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from components._runtime import registered_decisions

    def broken(*_: Any, **__: Any) -> None:
        raise OverflowError("int too large to convert to float")

    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])
    monkeypatch.setattr(registered_decisions, "replay_decision", broken)
    report = swept(connection, memory)
    assert (report.exit_code, report.found["unknown"]) == (2, 1)


def test_a_store_that_is_not_mounted_takes_no_alias_away(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])
    journal, store = Journal(tmp_path / "journal.jsonl"), tmp_path / "mlflow" / "mlartifacts"
    store.rename(tmp_path / "elsewhere")
    store.mkdir()  # the mount point
    report = swept(connection, memory, journal=journal)
    assert (report.exit_code, report.found["unknown"], report.moves) == (2, 1, ())
    assert "Mount the volume" in " ".join(each.why for each in report.findings)
    assert aliases(connection)["champion"] == drifted["second"]
    store.rmdir()
    (tmp_path / "elsewhere").rename(store)
    assert swept(connection, memory, journal=journal).found["unknown"] == 0


def test_an_alias_whose_place_cannot_be_found_out_stays_and_the_sweep_says_so(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    store = tmp_path / "mlflow" / "mlartifacts"
    store.rename(tmp_path / "elsewhere")
    report = swept(connection, memory, journal=Journal(tmp_path / "journal.jsonl"))
    assert (report.found["drift"], report.found["unknown"], report.exit_code) == (1, 0, 2)
    assert [each.state for each in report.moves] == ["undecided"]
    assert aliases(connection)["champion"] == drifted["stranger"]


def test_a_renewed_decision_is_a_version_of_its_own_and_settles_the_finding(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    aged, later = one_policy(policy(max_age_days=30)), NOW_S + 31 * DAY_S
    incoming(connection, "vision")
    by: dict[str, Any] = {"origin": "models:/vision/1", "by": policy_mapping(max_age_days=30)}
    first = decided(connection, tmp_path, "clean", **by)
    assert decided(connection, tmp_path, "clean", **by) == first  # young decisions are final
    assert swept(connection, memory, aged, now_s=later).found["aged"] == 1
    second = decided(connection, tmp_path, "clean", at="2026-12-22T03:00:00+00:00", **by)
    assert second != first
    assert decided(connection, tmp_path, "clean", at="2026-12-22T03:00:00+00:00", **by) == second
    assert connection.client.get_model_version("clean", first).tags[tag.SUPERSEDED_BY] == second
    assert aliases(connection)["champion"] == second
    assert swept(connection, memory, aged, now_s=later).exit_code == 0


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    move = AliasMove("clean", "champion", "3", "2", "why", "intended")
    journal.write(move)
    with journal.path.open("ab") as file:
        file.write(b'{"alias": "cham')
    journal.write(move)
    journal.write(move)
    first, cut, *further = journal.path.read_text().splitlines()
    assert (cut, len(further)) == ('{"alias": "cham', 2)
    assert {json.loads(line)["origin"] for line in (first, *further)} == {"3"}
