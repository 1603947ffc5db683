"""``quarantine promote`` and ``submit-promotion``: a run that ended at its decision goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components._runtime.approvals import sign_approval
from components._runtime.signing_keys import (
    KeyPair,
    TrustedSigner,
    generate_key_pair,
    load_public_key,
    load_signing_key,
    parse_public_key,
)
from components._runtime.verification import verify_release
from components._runtime.verification_promotion import check_promotion
from defense_core.verdict import Verdict
from pipelines import cluster_options, promotion_options
from pipelines.compile import GOLDEN, PROMOTE_NAME
from pipelines.submit import Package
from tests.finished_chain import decide_again, make_chain, make_release
from tests.pipelines.commands import Call
from tests.pipelines.kfp_server.http_server import KfpServer
from tests.small_model import POLICY, make_inputs

UNDECIDED = {**POLICY, "name": "careful", "require": {"positive_control": True, "signatures": ["model"]}}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, KeyPair]:
    root = tmp_path_factory.mktemp("keys")
    return {name: generate_key_pair(root / name) for name in ("signer", "ada")}


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, KeyPair]) -> Path:
    """The release of an undecided run."""
    root = tmp_path_factory.mktemp("former")
    chain = make_chain(make_inputs(root / "inputs"), root / "chain")
    decide_again(chain, UNDECIDED)
    make_release(chain, root / "release", keys["signer"].private)
    return root / "release"


@pytest.fixture
def approval(former: Path, keys: dict[str, KeyPair], tmp_path: Path) -> Path:
    decision = json.loads((former / "evidence" / "decision.json").read_text())
    said = {"rule": "require.positive_control", "identity": "ada", "reason": "Looked at it."}
    about = {"evidence": decision["evidence_digest"], "policy": decision["policy_digest"]}
    key = load_signing_key(keys["ada"].private)
    (tmp_path / "approval.json").write_bytes(sign_approval(key, **said, approved_at=decision["decided_at"], **about))
    return tmp_path / "approval.json"


def test_a_key_may_have_a_comment_that_is_no_utf_8(keys: dict[str, KeyPair], tmp_path: Path) -> None:
    commented = tmp_path / "ada.pub"
    commented.write_bytes(b"Schl\xfcssel von Ada\n" + keys["ada"].public.read_bytes())
    order = promotion_options.promotion_order(
        release="models:/net/1",
        approval=[],
        approver_key=[f"ada={commented}"],
        public_key=commented,
        register="",
        alias="champion",
    )
    assert order.request.given.keys()["ada"].keyid == keys["ada"].key_id
    assert parse_public_key(order.request.public_key.encode(), "given").keyid == keys["ada"].key_id


def words(keys: dict[str, KeyPair], *approvals: Path) -> list[object]:
    given = [word for path in approvals for word in ("--approval", path)]
    return [*given, "--approver-key", f"ada={keys['ada'].public}", "--public-key", keys["signer"].public]


def test_an_approved_run_is_promoted_on_this_machine(
    former: Path, approval: Path, keys: dict[str, KeyPair], quarantine: Call, tmp_path: Path
) -> None:
    answer = quarantine(
        *("promote", "--release", former, "--register", "digits", "--out", tmp_path / "work", "--json"),
        *("--signing-key", keys["signer"].private),
        *words(keys, approval),
    )
    assert answer.code == 0, answer.err + answer.out
    facts = json.loads(answer.out)
    assert (facts["decision"], facts["failed_step"]) == ("allow", None)
    assert facts["promotion"]["alias_moved"]
    steps = {path.stem for path in Path(facts["evidence"]).glob("*.json")}
    assert {"reopen", "fetch", "gate", "sign", "promote", "attest", "promotion", "report"} <= steps
    statement = Path(facts["statement"])
    found = verify_release(
        Path(facts["release"]),
        TrustedSigner(public_key=keys["signer"].public),
        approvers={"ada": load_public_key(keys["ada"].public)},
        further=lambda check: check_promotion(check, statement.read_bytes(), statement.name),
    )
    assert found.verdict is Verdict.PASS, found.differences
    page = Path(facts["report"]).read_text()
    assert "Looked at it." in page


def test_what_is_wrong_ends_before_anything_runs(
    former: Path, approval: Path, keys: dict[str, KeyPair], quarantine: Call, tmp_path: Path
) -> None:
    begun = ("promote", "--release", former, "--out", tmp_path / "work")
    for given, says in (
        (words(keys, approval), "--register"),
        ([*words(keys, tmp_path / "none.json"), "--register", "d"], "cannot be read"),
        (["--approval", approval, "--register", "d"], "nobody whose approval counts"),
        (["--approver-key", f"ada={tmp_path / 'none'}", "--register", "d"], "cannot be read"),
    ):
        answer = quarantine(*begun, *given)
        assert answer.code == 3, answer
        assert says in answer.err
    assert not (tmp_path / "work").exists()


def test_a_promote_run_is_submitted_to_a_cluster(
    former: Path,
    approval: Path,
    keys: dict[str, KeyPair],
    quarantine: Call,
    kfp: KfpServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KFP_ENDPOINT", kfp.endpoint)
    data = (GOLDEN / PROMOTE_NAME).read_bytes()
    compiled = {PROMOTE_NAME: ("model-quarantine-promote", data, "")}
    monkeypatch.setattr(promotion_options, "compiled", lambda pools, namespace, file: compiled[file])
    job = ("submit-promotion", "--release", "models:/digits/1", "--evidence", "s3://records/evidence", "--no-wait")
    answer = quarantine(*job, "--name", "n", "--json", *words(keys, approval))
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["pipeline_version"] == Package("", data).version_name
    (run,) = kfp.cluster.records["runs"].values()
    parameters = run["runtime_config"]["parameters"]
    assert parameters["release"] == "models:/digits/1"
    assert json.loads(parameters["approvals"]) == [approval.read_text()]
    assert json.loads(parameters["approvers"]) == {"ada": keys["ada"].public.read_text()}
    assert json.loads(parameters["run"])["model_name"] == "digits", "by default where the former version is"
    folder = quarantine(*job[:2], former, *job[3:], "--register", "digits", *words(keys))
    assert folder.code == 3
    assert "not reachable from a cluster" in folder.err


def test_the_cluster_is_given_the_pipeline_that_was_asked_for() -> None:
    name, data, _ = cluster_options.compiled("", "", PROMOTE_NAME)
    assert name == "model-quarantine-promote"
    assert data == (GOLDEN / PROMOTE_NAME).read_bytes()
