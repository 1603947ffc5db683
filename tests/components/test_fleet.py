"""The fleet, read from folders and from a registry; model cards; the commands that write the pages."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from components._runtime import fleet
from components._runtime import registry_tags as tag
from components._runtime.evidence import write_evidence
from components._runtime.fleet import folder_versions, registry_versions, report_of_folder
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.model_card import MAX_CHARACTERS, model_card
from components._runtime.promotion import promote
from components._runtime.registry_prompts import PROMPT_TAG
from components._runtime.release import EVIDENCE_FOLDER, Identity, Parts, Release, stage
from components._runtime.tracking import open_run
from components.gate_promotion.step import gate_promotion
from defense_core.errors import AccessDenied, ConfigError, EvidenceMissing, QuarantineError, SourceNotFound
from defense_core.files import sha256_bytes, sha256_file
from defense_core.report import build_report
from defense_core.report_fleet import build_fleet
from defense_core.verdict import Verdict
from pipelines import cli
from pipelines.report_cli import app
from tests.unit.report_records import sha, whole_run

POLICY: dict[str, Any] = {
    "schema": 1,
    "name": "lenient",
    "promote": True,
    "rules": [
        {
            "id": "acc",
            "evidence": "evaluate.selected",
            "value": "acc.value",
            "min": 0.5,
            "severity": "block",
            "why": "Half of the images at least.",
        }
    ],
}


def write_run(folder: Path, evidence: Mapping[str, Mapping[str, Any]]) -> Path:
    for name, each in evidence.items():
        write_evidence(folder / f"{name}.json", each)
    return folder


# -- folders ---------------------------------------------------------------------------


def promoted_run(version: str, started: str, *, alias_version: str) -> dict[str, dict[str, Any]]:
    evidence = whole_run()
    for each in evidence.values():
        each["environment"]["started"] = started
    evidence["promote"]["results"] |= {"version": version, "alias_version": alias_version}
    return evidence


def test_every_run_below_a_folder_is_a_row_and_the_newest_promotion_has_the_alias(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "evidence" / "run-1", promoted_run("4", "2026-11-01T00:00:00+00:00", alias_version="4"))
    write_run(tmp_path / "b", promoted_run("5", "2026-11-02T00:00:00+00:00", alias_version="5"))
    write_run(tmp_path / "c", {"fetch": whole_run()["fetch"]})
    rows = {(row.model, row.version): row for row in folder_versions(tmp_path)}
    assert set(rows) == {("digits", "4"), ("digits", "5"), ("digits.pt", "")}
    assert rows["digits", "5"].aliases == ("champion",)
    assert rows["digits", "4"].aliases == rows["digits.pt", ""].aliases == ()
    assert rows["digits.pt", ""].outcome == "incomplete"
    assert build_fleet(rows.values()).drift == ()


def test_an_alias_belongs_to_the_newest_promotion_not_to_the_newest_run(tmp_path: Path) -> None:
    """Version 4 was approved and promoted after version 5, whose run began later."""
    waited = promoted_run("4", "2026-11-01T00:00:00+00:00", alias_version="4")
    waited["promote"]["environment"]["started"] = "2026-11-03T00:00:00+00:00"
    write_run(tmp_path / "a", waited)
    write_run(tmp_path / "b", promoted_run("5", "2026-11-02T00:00:00+00:00", alias_version="5"))
    rows = {row.version: row for row in folder_versions(tmp_path)}
    assert (rows["4"].aliases, rows["5"].aliases) == (("champion",), ())
    assert rows["4"].started == "2026-11-01T00:00:00+00:00"


@pytest.mark.parametrize("data", ["[" * 200_000, "{", "[]", "null"])
def test_a_damaged_promotion_gives_no_alias(data: str, tmp_path: Path) -> None:
    write_run(tmp_path / "a", promoted_run("4", "2026-11-01T00:00:00+00:00", alias_version="4"))
    (tmp_path / "a" / "promote.json").write_text(data)
    (row,) = folder_versions(tmp_path)
    assert (row.version, row.aliases) == ("", ())


def locked(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    """From here on ``Path.<method>`` is refused for what is called ``name``, as for an account without permission."""
    real = getattr(Path, method)

    def refusing(path: Path, *given: Any, **named: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *given, **named)

    monkeypatch.setattr(Path, method, refusing)


@pytest.mark.parametrize("command", ["report", "fleet"])
@pytest.mark.parametrize(
    ("name", "method"),
    [("decision.json", "is_file"), ("decision.json", "open"), ("fetch.json", "open")],
)
def test_what_may_not_be_read_is_a_typed_error(
    command: str, name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    evidence = whole_run()
    del evidence["gate"], evidence["promote"]
    gate_promotion(evidence, POLICY, folder)
    locked(monkeypatch, name, method)
    result = CliRunner().invoke(app, [command, "--evidence", str(folder), "--out", str(tmp_path / "page.html")])
    assert isinstance(result.exception, QuarantineError), result
    assert result.exception.exit_code == 3
    assert f"{name} cannot be read" in str(result.exception)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "words",
    [(), ("--evidence", "a", "--compare", "", "b"), ("--evidence", "a", "--compare", "a", "b"), ("--compare", "a", "")],
)
def test_a_report_is_of_one_run_or_of_two(words: tuple[str, ...], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["report", *words, "--out", str(tmp_path / "page.html")])
    assert isinstance(result.exception, ConfigError), result
    assert "nothing to report on" in str(result.exception)


def test_records_without_a_decision_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", {"fetch": whole_run()["fetch"]})
    locked(monkeypatch, "fetch.json", "open")
    for read in (report_of_folder, folder_versions):
        with pytest.raises(AccessDenied, match=r"fetch\.json cannot be read"):
            read(tmp_path / "run")
    locked(monkeypatch, tmp_path.name, "iterdir")
    with pytest.raises(AccessDenied, match="cannot be read"):
        folder_versions(tmp_path)


def test_a_decision_that_does_not_replay_is_a_row_that_says_so(tmp_path: Path) -> None:
    evidence = whole_run()
    del evidence["gate"], evidence["promote"]
    gate_promotion(evidence, POLICY, tmp_path / "decided")
    assert report_of_folder(tmp_path / "decided").outcome == "allow"
    path = tmp_path / "decided" / "decision.json"
    path.write_text(path.read_text().replace('"min"', '"max"').replace("0.97", "0.98"))
    (row,) = folder_versions(tmp_path)
    assert row.outcome == "no evidence"
    assert "is not what its policy and evidence give" in row.headline
    (drift,) = build_fleet([row]).drift
    assert drift.why == row.headline
    path.unlink()
    (tmp_path / "decided" / "policy.json").unlink()
    for file in (tmp_path / "decided").glob("*.json"):
        file.write_text("{")
    assert build_fleet(folder_versions(tmp_path)).drift == ()


def test_evidence_of_a_shape_that_nobody_thought_of_is_a_row_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "a", whole_run())

    def broken(*args: object, **kwargs: object) -> None:
        raise KeyError("a key that every step writes")

    monkeypatch.setattr(fleet, "build_report", broken)
    (row,) = folder_versions(tmp_path)
    assert row.outcome == "no evidence"
    assert "cannot be judged: KeyError" in row.headline


def test_a_folder_without_evidence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for function in (folder_versions, report_of_folder):
        with pytest.raises(EvidenceMissing, match="no evidence"):
            function(tmp_path / "empty")


# -- registry --------------------------------------------------------------------------


def register(connection: MlflowConnection, folder: Path, name: str, *, floor: float = 0.5, **scan: Any) -> str:
    """A release of arbitrary bytes with the evidence of a whole run; the version's number."""
    policy = {**POLICY, "rules": [{**POLICY["rules"][0], "min": floor}]}
    (folder / "bundle").mkdir(parents=True)
    (folder / "bundle" / "model.safetensors").write_bytes(b"weights")
    description = {"input_size": [1, 8, 8], "files": {"model.safetensors": sha256_bytes(b"weights")}}
    (folder / "bundle" / "bundle.json").write_text(json.dumps(description))
    (folder / "model.onnx").write_bytes(b"onnx")
    onnx, bundle = sha256_file(folder / "model.onnx"), sha256_file(folder / "bundle" / "bundle.json")
    evidence = {name: each for name, each in whole_run().items() if name not in ("gate", "promote")}
    told = json.dumps(evidence).replace(sha("onnx"), onnx).replace(sha("purified"), bundle)
    evidence = {**json.loads(told), **scan}
    gate = gate_promotion(evidence, policy, folder / "decided")
    (folder / "release").mkdir()
    stage(Parts(folder / "model.onnx", folder / "bundle", folder / "decided"), folder / "release")
    done = promote(
        connection,
        Release(folder / "release", onnx_digest=onnx, bundle_digest=bundle),
        name=name,
        run=open_run(connection, f"{name}-{floor}", name="run"),
        identity=Identity(source=sha("source"), config=sha("config"), policy=gate["results"]["policy_digest"]),
        verdict=Verdict(gate["verdict"]),
        policy=policy["name"],
        description=model_card(report_of_folder(folder / "release" / EVIDENCE_FOLDER)),
    )
    return done.version


def test_registered_versions_are_read_from_their_evidence(connection: MlflowConnection, tmp_path: Path) -> None:
    allowed = register(connection, tmp_path / "1", "fleet")
    denied = register(connection, tmp_path / "2", "fleet", floor=0.999)
    rows = {row.version: row for row in registry_versions(connection, ["fleet"])}
    assert (rows[allowed].outcome, rows[denied].outcome) == ("allow", "deny")
    assert rows[allowed].aliases == ("champion",)
    assert rows[allowed].accuracy.value == pytest.approx(0.97)
    assert build_fleet(rows.values()).drift == ()


def test_an_alias_moved_by_hand_is_drift(connection: MlflowConnection, tmp_path: Path) -> None:
    register(connection, tmp_path / "1", "moved")
    denied = register(connection, tmp_path / "2", "moved", floor=0.999)
    connection.client.set_registered_model_alias("moved", "champion", denied)
    fleet = build_fleet(registry_versions(connection, ["moved"]))
    (drift,) = fleet.drift
    assert drift.where == f"moved, version {denied}"
    assert "The alias champion points at it, and no allow decision covers it: Denied" in drift.why


@pytest.mark.parametrize("name", [tag.DECISION, tag.POLICY, tag.ONNX_DIGEST, tag.EVIDENCE_DIGEST])
def test_an_edited_tag_is_drift(name: str, connection: MlflowConnection, tmp_path: Path) -> None:
    model = "edited-" + name.removeprefix("quarantine.")
    version = register(connection, tmp_path, model)
    connection.client.set_model_version_tag(model, version, name, "quarantined")
    assert [each.why for each in build_fleet(registry_versions(connection, [model])).drift if name in each.why]


def test_a_version_that_never_went_through_is_drift_once_it_is_served(connection: MlflowConnection) -> None:
    connection.client.create_registered_model('stranger\'s "own"')
    made = connection.client.create_model_version('stranger\'s "own"', source="s3://elsewhere/model")
    (row,) = registry_versions(connection, ['stranger\'s "own"'])
    assert row.outcome == "no evidence"
    assert build_fleet([row]).drift == ()
    connection.client.set_registered_model_alias(made.name, "production", made.version)
    (drift,) = build_fleet(registry_versions(connection, [made.name])).drift
    assert "never went through quarantine" in drift.why


def test_a_version_whose_evidence_was_changed_or_removed_covers_nothing(
    connection: MlflowConnection, tmp_path: Path
) -> None:
    version = register(connection, tmp_path, "tampered")
    source = Path(connection.client.get_model_version("tampered", version).source.removeprefix("file://"))
    path = source / EVIDENCE_FOLDER / "evaluate.tsbd.json"
    path.write_text(path.read_text().replace('"successes":194', '"successes":195'))
    (row,) = registry_versions(connection, ["tampered"])
    assert row.outcome == "no evidence"
    connection.client.delete_registered_model_alias("tampered", "champion")
    (drift,) = build_fleet(registry_versions(connection, ["tampered"])).drift
    assert drift.where == f"tampered, version {version}"
    assert "is not what its policy and evidence give" in drift.why
    connection.client.set_registered_model_alias("tampered", "champion", version)
    for file in (source / EVIDENCE_FOLDER).iterdir():
        file.unlink()
    (drift,) = build_fleet(registry_versions(connection, ["tampered"])).drift
    assert "champion" in drift.why


@pytest.mark.parametrize("tagged", ["model", "version"])
def test_a_model_that_a_tag_hides_is_a_row_that_says_so(tagged: str, connection: MlflowConnection) -> None:
    name = f"hidden-by-its-{tagged}"
    connection.client.create_registered_model(name)
    made = connection.client.create_model_version(name, source="s3://elsewhere/model")
    connection.client.set_registered_model_alias(name, "production", made.version)
    if tagged == "version":
        connection.client.set_model_version_tag(name, made.version, PROMPT_TAG, "true")
    else:
        connection.client.set_registered_model_tag(name, PROMPT_TAG, "true")
    for asked in ([], [name]):
        (row,) = [each for each in registry_versions(connection, asked) if each.model == name]
        assert row.outcome == "no evidence"
        (drift,) = build_fleet([row]).drift
        assert PROMPT_TAG in drift.why


def test_all_models_are_listed_without_names(connection: MlflowConnection, tmp_path: Path) -> None:
    register(connection, tmp_path, "listed")
    assert ("listed", ("champion",)) in {(row.model, row.aliases) for row in registry_versions(connection)}


# -- model card and tags ---------------------------------------------------------------


def test_a_version_carries_its_model_card_and_the_scans_verdict(connection: MlflowConnection, tmp_path: Path) -> None:
    scan = {**whole_run()["evaluate.before"], "name": "scan", "step": "scan", "verdict": "UNKNOWN"}
    version = connection.client.get_model_version("carded", register(connection, tmp_path / "1", "carded", scan=scan))
    assert version.tags[tag.SCAN] == "unknown"
    assert "met all" in version.description
    assert "| TSBD (chosen) | patch | 97.0" in version.description.replace("\u00a0", " ")
    assert "### What this does not show" in version.description
    assert "model card" in connection.client.get_registered_model("carded").description
    plain = connection.client.get_model_version("plain", register(connection, tmp_path / "2", "plain"))
    assert plain.tags[tag.SCAN] == "none"


def test_a_model_card_is_short_and_its_strangers_words_are_words() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"]["architecture"] = {"name": "<img src=x>[click](javascript:x)|`"}
    evidence["fetch"]["results"]["uri"] = "s3://a/`b`" + "c" * 9000
    for probe in evidence["evaluate.tsbd"]["results"]["probes"]:
        probe["name"] = "x|y" + "z" * 500
    card = model_card(build_report(evidence))
    assert len(card) <= MAX_CHARACTERS
    assert not re.search(r"(?<!\\)[<\[]", card)
    assert "s3://a/'b'" in card


# -- commands --------------------------------------------------------------------------


def test_the_commands_write_pages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "one", whole_run())
    write_run(tmp_path / "runs" / "two", {"fetch": whole_run()["fetch"]})
    page = tmp_path / "page.html"
    for arguments, words in (
        (["report", "--evidence", str(run)], "Allowed: the model"),
        (["report", "--compare", str(run), str(tmp_path / "runs" / "two")], "The runs ended differently"),
        (["fleet", "--evidence", str(tmp_path / "runs")], "No drift: 2 versions of 2 models"),
    ):
        done = CliRunner().invoke(app, [*arguments, "--out", str(page)], catch_exceptions=False)
        assert (done.exit_code, words in done.output) == (0, True), done.output
        assert words in page.read_text()
        as_json = CliRunner().invoke(app, [*arguments, "--out", str(page), "--json"], catch_exceptions=False)
        assert words in json.loads(as_json.output)["headline"]


def test_a_fleet_of_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", whole_run())
    arguments = ["fleet", "--evidence", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]
    assert CliRunner().invoke(app, [*arguments, "--model", "digits"]).exit_code == 0
    (tmp_path / "page.html").unlink()
    with pytest.raises(SourceNotFound, match=r"there is no run of typo below .*: expected one of digits, got typo"):
        CliRunner().invoke(app, [*arguments, "--model", "digits", "--model", "typo"], catch_exceptions=False)
    assert not (tmp_path / "page.html").exists()


def test_every_command_that_a_report_gives_is_one_that_there_is() -> None:
    evidence = whole_run()
    evidence["fetch"]["results"] |= {"mean": [0.5], "std": [0.25]}
    known = get_command(cli.app).commands  # type: ignore[attr-defined]
    given = [shlex.split(each.line.replace("\\\n", " ")) for each in build_report(evidence).commands]
    ours = [words for words in given if words[0] == "quarantine"]
    assert {words[1] for words in ours} == {"run", "gate", "verify"}
    for words in ours:
        options = {option for parameter in known[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def test_drift_is_exit_code_1(connection: MlflowConnection, tmp_path: Path) -> None:
    version = register(connection, tmp_path / "1", "drifted")
    connection.client.set_model_version_tag("drifted", version, tag.DECISION, "quarantined")
    arguments = ["fleet", "--tracking-uri", connection.settings.tracking_uri, "--model", "drifted"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "fleet.html")], catch_exceptions=False)
    assert done.exit_code == 1
    assert "Drift in 1 place" in (tmp_path / "fleet.html").read_text()
