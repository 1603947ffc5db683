"""The sweep: its memory, failures at every point, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.registered_decisions import Coverage, coverage
from components._runtime.registry_prompts import PROMPT_SOURCE, PROMPT_TAG
from components._runtime.signing_keys import TrustedSigner, generate_key_pair
from defense_core.errors import ConfigError, QuarantineError, RegistryUnavailable, StorageError
from pipelines.sweep import SweepSettings, open_memory
from pipelines.sweep_aliases import Journal
from pipelines.sweep_cli import app as sweep_app
from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_scope import Scope
from pipelines.triggers.queue import Queue
from tests.integration.releases import interposed
from tests.pipelines.sweep.fixtures import (
    aliases,
    counted,
    named,
    swept,
)
from tests.pipelines.sweep.registry import DAY_S, NOW_S, decided, forget_new_tags, incoming, policy, policy_mapping


def test_the_next_sweep_lists_what_changed_and_finds_the_same_without_its_memory(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        incoming(connection, name, 2)
    decided(connection, tmp_path, "clean", origin="models:/a/1")
    now_s = NOW_S + 3650 * DAY_S  # far after the registry's own clock: nothing counts as just changed
    assert swept(connection, memory, now_s=now_s).listed == 4
    incoming(connection, "b")
    connection.client.delete_model_version("c", "1")
    watched, calls = counted(connection)
    report = swept(watched, memory, now_s=now_s)
    assert (report.full, report.listed) == (False, 2)
    assert calls.count("search_model_versions") == 2  # small models are asked for together; and for prompts
    assert "list_artifacts" not in calls
    assert named(report, "undecided") == [("a", "2"), ("b", "1"), ("b", "2"), ("b", "3"), ("c", "2")]
    fresh = open_memory(connection, None)
    assert swept(connection, fresh, now_s=now_s).findings == report.findings
    fresh.close()
    assert swept(connection, memory, now_s=now_s + 8 * DAY_S).full


def test_a_model_that_changed_just_now_is_listed_again(connection: MlflowConnection, memory: SweepMemory) -> None:
    incoming(connection, "vision")
    now_s = connection.client.get_registered_model("vision").last_updated_timestamp / 1000
    swept(connection, memory, now_s=now_s)
    assert swept(connection, memory, now_s=now_s + 1).listed == 1


@pytest.mark.parametrize("damage", ["truncated", "emptied", "a damaged page", "another registry"])
def test_a_memory_that_is_of_no_use_is_made_anew(connection: MlflowConnection, tmp_path: Path, damage: str) -> None:
    incoming(connection, "vision", 2)
    path = tmp_path / "memory.db"
    first = open_memory(connection, path)
    swept(connection, first)
    first.close()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "a damaged page":
        path.write_bytes(path.read_bytes()[:100] + b"no database" * 1000)
    else:
        SweepMemory.open(path, "http://127.0.0.1:1").close()
    again = open_memory(connection, path)
    report = swept(connection, again)
    again.close()
    assert (report.full, report.found["undecided"]) == (True, 2)


def test_another_database_is_not_taken_for_a_memory_and_deleted(connection: MlflowConnection, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no memory of a sweep"):
        open_memory(connection, tmp_path / "mlflow" / "mlflow.db")
    assert connection.client.search_registered_models() == []


def test_a_file_of_the_users_is_not_taken_for_a_damaged_memory(connection: MlflowConnection, tmp_path: Path) -> None:
    watch = tmp_path / "watch.yaml"
    watch.write_text("models: [vision]\n")
    with pytest.raises(ConfigError, match="a file that is no database"):
        open_memory(connection, watch)
    assert watch.read_text() == "models: [vision]\n"


def test_two_sweeps_on_one_memory_do_not_mix(connection: MlflowConnection, memory: SweepMemory, tmp_path: Path) -> None:
    other = open_memory(connection, tmp_path / "memory.db")
    other.database.execute("PRAGMA busy_timeout = 50")
    with memory.reading(), pytest.raises(StorageError, match="one sweep at a time"):
        swept(connection, other)
    other.close()


class Down(Exception):
    """Stands for the moment at which the server goes away."""


def test_mlflow_that_goes_away_at_any_call_leaves_nothing_half_done(
    connection: MlflowConnection, queue: Queue, drifted: dict[str, str], tmp_path: Path
) -> None:
    incoming(connection, "vision", 2)
    decided(connection, tmp_path, "zebra")  # promoted and covered, and looked at last
    watched, calls = counted(connection)
    memory = open_memory(connection, tmp_path / "count.db")
    swept(watched, memory)
    whole = memory.counts()
    memory.close()

    def away(at: int) -> Callable[[int, str, str], None]:
        def hook(number: int, name: str, when: str) -> None:
            if number >= at and when == "before":
                raise ConnectionError("connection refused")

        return hook

    assert len(calls) >= 5
    for at in range(1, len(calls) + 1):
        memory = open_memory(connection, tmp_path / f"memory-{at}.db")
        journal = Journal(tmp_path / f"journal-{at}.jsonl")
        with pytest.raises(RegistryUnavailable) as caught:
            swept(interposed(connection, away(at)), memory, queue=queue, journal=journal)
        assert caught.value.exit_code == 2
        assert memory.counts() in ((0, 0), whole)
        assert not journal.path.exists()
        assert sum(queue.counts().values()) == 0
        assert aliases(connection)["champion"] == drifted["stranger"]
        # The same memory goes on when the server is back.
        assert {kind: count for kind, count in swept(connection, memory).found.items() if count} == {
            "undecided": 3,
            "drift": 1,
        }
        memory.close()


def test_what_was_read_of_promoted_versions_outlives_a_sweep_that_breaks_off(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import sweep as sweeping

    names = ["a", "b", "c"]
    for name in names:
        decided(connection, tmp_path, name, origin=f"s3://in/{name}")
    asked: list[str] = []

    def breaking(connection: MlflowConnection, version: Any, **how: Any) -> Any:
        asked.append(version.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return coverage(connection, version, **how)

    monkeypatch.setattr(sweeping, "coverage", breaking)
    monkeypatch.setattr(sweeping, "BATCH_ALIASES", 1)
    with pytest.raises(KeyboardInterrupt):
        swept(connection, memory)
    swept(connection, memory, now_s=NOW_S + DAY_S)
    assert asked == ["a", "b", "c", "c"]
    swept(connection, memory, now_s=NOW_S + 7 * DAY_S)  # a and b are a week old, c is not
    assert asked == ["a", "b", "c", "c", "a", "b"]


def test_versions_are_verified_one_at_a_time(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import sweep as sweeping

    for name in ("a", "b", "c", "d"):
        decided(connection, tmp_path, name, origin=f"s3://in/{name}")
    together, most, lock = [0], [0], threading.Lock()

    def judged(*_: Any, **__: Any) -> Coverage:
        with lock:
            together[0] += 1
            most[0] = max(most[0], together[0])
        time.sleep(0.05)
        with lock:
            together[0] -= 1
        return Coverage("", "Verified and allowed.")

    generate_key_pair(tmp_path / "keys")
    monkeypatch.setattr(sweeping, "coverage", judged)
    swept(connection, memory, settings=SweepSettings(trusted=TrustedSigner(tmp_path / "keys" / "signing.pub")))
    assert most == [1]
    swept(connection, memory, settings=SweepSettings(full_after_s=0))
    assert most[0] > 1, "evidence alone is read a few at a time"


def test_mlflow_that_goes_away_before_an_alias_is_moved_leaves_it_and_the_next_sweep_moves_it(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path
) -> None:
    def away(number: int, name: str, when: str) -> None:
        if name == "set_registered_model_alias" and when == "before":
            raise ConnectionError("connection refused")

    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(RegistryUnavailable):
        swept(interposed(connection, away), memory, journal=journal)
    assert aliases(connection)["champion"] == drifted["stranger"]
    swept(connection, memory, journal=journal)
    assert aliases(connection)["champion"] == drifted["second"]
    states = [json.loads(line)["state"] for line in journal.path.read_text().splitlines()]
    assert states == ["intended", "intended", "moved"]


def test_a_queue_that_does_not_answer_is_a_typed_error(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue
) -> None:
    incoming(connection, "vision")
    with queue.engine.begin() as open_queue:
        open_queue.exec_driver_sql("DROP TABLE work")
    with pytest.raises(StorageError, match="cannot enqueue") as caught:
        swept(connection, memory, queue=queue)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "source", ["wasbs://models@account.blob.core.windows.net/1", "abfss://models@account.dfs.core.windows.net/1"]
)
def test_a_store_whose_client_is_not_installed_hides_no_other_version(
    connection: MlflowConnection, memory: SweepMemory, drifted: dict[str, str], tmp_path: Path, source: str
) -> None:
    (elsewhere,) = incoming(connection, "clean", source=source)
    for key, value in connection.client.get_model_version("clean", drifted["first"]).tags.items():
        connection.client.set_model_version_tag("clean", elsewhere, key, value)
    connection.client.set_registered_model_alias("clean", "champion", elsewhere)
    connection.client.set_registered_model_alias("clean", "canary", drifted["stranger"])
    scope = Scope(policy=policy(), aliases=("champion", "canary"))
    report = swept(connection, memory, scope, journal=Journal(tmp_path / "journal.jsonl"))
    assert (named(report, "unknown"), named(report, "drift")) == (
        [("clean", elsewhere)],
        [("clean", drifted["stranger"])],
    )
    assert "No module named 'azure" in report.findings[1].why
    assert aliases(connection)["champion"] == elsewhere


@pytest.mark.parametrize("earlier", [False, True], ids=["with its tags", "of an earlier release"])
def test_an_error_that_nobody_foresaw_is_of_its_own_version(
    connection: MlflowConnection,
    memory: SweepMemory,
    drifted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    earlier: bool,
) -> None:
    from components._runtime import registered_decisions

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("a client's mistake")

    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])
    if earlier:
        forget_new_tags(connection, "clean", drifted["first"])
    monkeypatch.setattr(registered_decisions, "download_version", broken)
    report = swept(connection, memory)
    assert named(report, "unknown") == [("clean", drifted["second"])]
    assert "KeyError" in next(each.why for each in report.findings if each.kind == "unknown")
    assert "a client's mistake" in caplog.text


def test_names_that_filters_cannot_hold_are_listed_too(connection: MlflowConnection, memory: SweepMemory) -> None:
    names = {"it's", "Vision", "vision", "100%", r"a\tb", r"q\x41", "end\\", """both'and\""""}
    for name in names:
        incoming(connection, name, 2)
    report = swept(connection, memory)
    assert report.versions == 2 * len(names)
    assert {model for model, _ in named(report, "undecided")} == names


@pytest.mark.parametrize("tagged", ["model", "version", "both"])
def test_a_model_that_is_tagged_as_a_prompt_does_not_stay_unseen(
    connection: MlflowConnection, memory: SweepMemory, tagged: str
) -> None:
    incoming(connection, "hidden", 2)
    if tagged in ("version", "both"):
        connection.client.set_model_version_tag("hidden", "1", PROMPT_TAG, "true")
    if tagged in ("model", "both"):
        connection.client.set_registered_model_tag("hidden", PROMPT_TAG, "true")
    report = swept(connection, memory)
    assert (named(report, "unknown"), report.exit_code) == ([("hidden", "")], 2)


def test_a_prompt_is_left_alone_unless_a_model_lies_between_its_versions(
    connection: MlflowConnection, memory: SweepMemory
) -> None:
    for name, models in (("greeting", ()), ("smuggler", ("2",))):
        for number in incoming(connection, name, 3, source=PROMPT_SOURCE):
            if number not in models:
                connection.client.set_model_version_tag(name, number, PROMPT_TAG, "true")
        connection.client.set_registered_model_tag(name, PROMPT_TAG, "true")
    assert named(swept(connection, memory), "unknown") == [("smuggler", "")]


def test_a_model_of_more_than_a_page_is_listed_whole(
    connection: MlflowConnection, memory: SweepMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components._runtime import registry_listing

    monkeypatch.setattr(registry_listing, "PAGE_VERSIONS", 3)
    monkeypatch.setattr(registry_listing, "PAGE_MODELS", 1)
    incoming(connection, "vision", 7)
    incoming(connection, "speech", 2)
    assert swept(connection, memory).found["undecided"] == 9


def run(connection: MlflowConnection, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(sweep_app, ["--tracking-uri", connection.settings.tracking_uri, *arguments])
    if isinstance(done.exception, QuarantineError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.output


def test_exit_codes_and_json(connection: MlflowConnection, tmp_path: Path, drifted: dict[str, str]) -> None:
    by = tmp_path / "policy.yaml"
    by.write_text(json.dumps(policy_mapping()))
    code, output = run(connection, "--policy", str(by), "--json")
    report = json.loads(output)
    assert code == report["exit_code"] == 1
    assert report["found"] == {"undecided": 1, "aged": 0, "fruitless": 0, "drift": 0, "unknown": 0}
    code, output = run(connection, "--policy", str(by), "--alias", "champion")
    assert code == 1
    assert "1 undecided, 1 drift" in output
    assert "champion" in output
    assert run(connection, "--policy", str(by), "--alias", "champion", "--exit-zero")[0] == 0
    store = tmp_path / "mlflow" / "mlartifacts"
    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])
    store.rename(tmp_path / "elsewhere")
    assert run(connection, "--policy", str(by), "--alias", "champion", "--exit-zero")[0] == 2
    code, output = run(connection, "--policy", str(by), "--alias", "champion", "--exit-unknown", "4", "--json")
    assert (code, json.loads(output)["exit_code"]) == (4, 2)
    (tmp_path / "elsewhere").rename(store)
    connection.client.delete_model_version("clean", drifted["stranger"])
    code, output = run(connection, "--policy", str(by), "--alias", "champion", "--queue", f"sqlite:///{tmp_path}/q.db")
    assert code == 0
    assert "nothing found" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got neither"),
        (["--policy", "standard", "--watch", "w.yaml"], "got both"),
        (["--policy", "standrad"], "expected observe, standard, strict, or a policy file"),
        (["--policy", "standard", "--alias", "v1"], "reserved by MLflow"),
        (["--policy", "observe", "--alias", "champion"], "a policy that only observes"),
        (["--policy", "standard", "--approver-key", "ada=ada.pub"], "--approver-key is for --public-key"),
        (["--policy", "standard", "--public-key", "a.pub", "--certificate-chain", "a.pem"], "got both"),
        (["--policy", "standard", "--certificate-chain", "missing.pem"], "missing.pem"),
        (["--policy", "standard", "--signer", "ci"], "expected one of a public key and a certificate chain"),
        (["--policy", "standard", "--enforce"], "--journal FILE or --memory FILE"),
        (["--policy", "standard", "--enforce", "--journal", "a.db", "--memory", "./a.db"], "two files"),
        (["--policy", "standard", "--queue", "mysql://host/db"], "queue's address is not usable"),
        (["--policy", "standard", "--queue", "postgresql+psycopg://u:p@ss:word@host/db"], "got ValueError"),
        (["--policy", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_usage_is_exit_code_three(connection: MlflowConnection, arguments: list[str], message: str) -> None:
    code, output = run(connection, *arguments)
    assert (code, message in output) == (3, True), output


def test_a_registry_that_does_not_answer_is_exit_code_two() -> None:
    done = CliRunner().invoke(sweep_app, ["--tracking-uri", "http://127.0.0.1:9", "--policy", "standard"])
    assert isinstance(done.exception, RegistryUnavailable)
    assert done.exception.exit_code == 2


def test_a_whole_sweep_imports_no_torch(connection: MlflowConnection, drifted: dict[str, str], tmp_path: Path) -> None:
    connection.client.set_registered_model_alias("clean", "champion", drifted["second"])  # its evidence is read
    program = (
        "import sys; from pipelines import cli\n"
        "code = cli.app(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit(10 + code if 'torch' not in sys.modules else 99)"
    )
    arguments = ["sweep", "--tracking-uri", connection.settings.tracking_uri, "--policy", "standard"]
    further = ["--alias", "champion", "--queue", f"sqlite:///{tmp_path / 'queue.db'}", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, *further], check=False, timeout=200, stdout=subprocess.DEVNULL
    )
    assert done.returncode == 11, "99: it imported torch, half a gigabyte that the hooks image does not have"
