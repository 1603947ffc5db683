"""Gate: policy and evidence in, decision out. Offline, without torch, the same inputs give the same decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components._runtime.approvals import SignedApproval
from components._runtime.decision_files import decision_bytes, replay_decision, write_decision
from components._runtime.evidence import (
    POLICY,
    Clock,
    compose,
    is_absent,
    read_evidence,
    read_folder,
    repeats,
    started_of,
)
from components._runtime.plan import parse_json
from defense_core.config import to_mapping
from defense_core.errors import ConfigError, EvidenceMismatch
from defense_core.files import atomic_directory, sha256_bytes
from defense_core.policy import Decision, decide, parse_policy
from defense_core.policy_time import is_after, parse_time


def decide_given(
    paths: Sequence[Path],
    policy: str,
    out: Path,
    *,
    former: Path | None,
    optional: Sequence[Path] = (),
    approvals: Sequence[SignedApproval],
    earlier: Mapping[str, Any] | None = None,
    reopened: Path | None = None,
) -> dict[str, Any]:
    """Decide on what a component was given: evidence files and a policy, or the folder of a former decision.

    Args:
        paths: evidence files.
        optional: evidence files of steps of which nothing may have been asked: an empty one is left out.
        policy: JSON.
        out: folder that becomes the decision.
        former: a decision that the new one takes the place of, on the same evidence and by the same policy.
        earlier: evidence ``gate`` that an earlier attempt of the same run left.
        reopened: file of evidence ``reopen`` of a promote run, which says when that began.

    Raises:
        ConfigError: ``policy`` is no JSON.
        EvidenceMismatch: two files hold evidence of the same name.
        as :func:`gate_promotion`.
    """
    if former is not None:
        stated = parse_json((former / POLICY).read_text("utf-8"), POLICY)
        # The evidence is of the former run. Where nothing says when this one began, no earlier time counts.
        since = started_of(read_evidence(reopened)) if reopened is not None else None
        earlier = earlier if since is not None else None
        return gate_promotion(
            read_folder(former), stated, out, approvals=approvals, supersedes=former, earlier=earlier, since=since
        )
    evidence: dict[str, Mapping[str, Any]] = {}
    for path in (*paths, *(path for path in optional if not is_absent(path))):
        found = read_evidence(path)
        name = str(found["name"])
        if name in evidence:
            raise EvidenceMismatch(
                f"there are two files of evidence {name}", expected="one a step", got=path, hint="Give those of one run"
            )
        evidence[name] = found
    return gate_promotion(evidence, parse_json(policy, "policy"), out, approvals=approvals, earlier=earlier)


def gate_promotion(
    evidence: Mapping[str, Mapping[str, Any]],
    policy: Mapping[str, Any],
    out: Path | None = None,
    *,
    at: str | None = None,
    approvals: Sequence[SignedApproval] = (),
    supersedes: Path | None = None,
    earlier: Mapping[str, Any] | None = None,
    since: str | None = None,
) -> dict[str, Any]:
    """Apply ``policy`` to ``evidence``.

    Args:
        evidence: evidence mappings by name, e.g. from :func:`components._runtime.evidence.read_folder`.
        policy: what a policy file says.
        out: folder that becomes the decision with all that it rests on: one ``<name>.json`` for
            each evidence and the gate's own, ``policy.json`` and ``decision.json``; ``None``: nothing is written.
            A folder that holds something is refused: a decision is never edited, only superseded.
        at: time of the decision, ISO 8601 with a zone; ``None``: now. It stands in the decision.
        approvals: of people, whose signatures were checked; the same file given twice is one.
        supersedes: folder of an earlier decision about the same artifact that this one takes the place of.
        earlier: evidence ``gate`` that an earlier attempt of the same run left. Where it came to the same decision,
            that is made again at the time that it states instead of now: a step that is tried again says the same.
        since: when this run began; ``None``: when the fetch in ``evidence`` did. Before that nothing was decided in
            it, whatever ``earlier`` states: exceptions and approvals that expired since would count again.

    Returns:
        Evidence ``gate``: ``results`` is the decision (``outcome``: allow, deny, unknown or observe;
        ``findings``: one a rule), ``verdict`` its verdict.

    Raises:
        PolicyError: the policy is malformed.
        EvidenceMismatch: an evidence file is damaged; an approval, or the superseded decision, is about something else.
        StorageError: ``out`` holds something.
    """
    clock = Clock.start()
    parsed = parse_policy(policy)
    former = None if supersedes is None else replay_decision(supersedes).decision
    approvals = list({signed.envelope: signed for signed in approvals}.values())
    given: dict[str, Any] = {
        "approvals": [signed.approval for signed in approvals],
        "supersedes": None if former is None else sha256_bytes(decision_bytes(former)),
    }
    decision = decide(parsed, evidence, at=at or clock.started, **given)
    if at is None and earlier is not None:
        began = since if since is not None else started_of(evidence.get("fetch", {}))
        decision = _as_before(earlier, decision, began, lambda moment: decide(parsed, evidence, at=moment, **given))
    if former is not None and former.subject.source != decision.subject.source:
        raise EvidenceMismatch(
            f"{supersedes} is a decision about another artifact",
            expected=decision.subject.source,
            got=former.subject.source,
            hint="A decision takes the place of an earlier one about the same artifact only",
        )
    gate = compose(
        "gate",
        clock,
        inputs=_inputs(decision),
        outputs=_outputs(decision),
        results=to_mapping(decision),
        verdict=decision.verdict,
        findings=decision.findings,
    )
    if at is None and earlier is not None and repeats(earlier, gate):
        gate = dict(earlier)  # the store keeps the first, and the release holds what the store does
    if out is not None:
        with atomic_directory(out) as folder:
            write_decision(folder, {**evidence, "gate": gate}, policy, decision, approvals)
    return gate


def _inputs(decision: Decision) -> dict[str, str | None]:
    return {
        "source": decision.subject.source,
        "model": decision.subject.model,
        "onnx": decision.subject.onnx,
        "policy": decision.policy_digest,
        "evidence": decision.evidence_digest,
    }


def _outputs(decision: Decision) -> dict[str, str]:
    return {"decision": sha256_bytes(decision_bytes(decision))}


def _as_before(
    earlier: Mapping[str, Any], now: Decision, began: str | None, again: Callable[[str], Decision]
) -> Decision:
    """The decision that ``earlier`` speaks of, if it is about the same and comes out the same; ``now`` otherwise.

    Only its time is taken from the record, and only one between ``began``, when the run did, and now; what follows
    from it is decided again.
    """
    results = earlier.get("results")
    stated = results.get("decided_at") if isinstance(results, Mapping) else None
    if earlier.get("inputs") != _inputs(now) or now.decided_at is None:
        return now
    try:
        moment = parse_time(stated, "decided_at")
        passed = not is_after(moment, parse_time(now.decided_at, "decided_at"))
        in_this_run = not is_after(parse_time(began, "started"), moment)
        former = again(str(stated)) if passed and in_this_run else now
    except (ConfigError, EvidenceMismatch):
        # No time, or one before the approvals: nothing that this gate has written. The store refuses what differs.
        return now
    return former if earlier.get("outputs") == _outputs(former) else now
