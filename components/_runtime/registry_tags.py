"""Tags that this project writes on model versions, all in one place.

Tags are a cache for people and for searches. Any writer of the registry can change them, so no
decision rests on them alone: digests are compared with downloaded bytes, and the signed truth is in
the evidence. ``quarantine verify`` compares every tag with it.

===============================  ================================================================
tag                              value
===============================  ================================================================
``quarantine.decision``          ``pending``, ``allow`` or ``quarantined``
``quarantine.reason``            on quarantined versions: ``denied``, ``undecided``,
                                 ``bytes_differ`` or ``abandoned``
``quarantine.policy``            the policy's name
``quarantine.policy_digest``     digest of what the policy says
``quarantine.decided_at``        time of the decision, ISO 8601
``quarantine.origin``            ``models:/name/version`` that the source was read from; absent for other sources
``quarantine.origin.<digest>``   the same of a further version with equal bytes, and when it came to this decision;
                                 ``<digest>``: the first 16 digits of the address's
``quarantine.scan``              verdict of the backdoor scan: ``pass``, ``fail``, ``unknown``, or
                                 ``none`` where there was none
``quarantine.identity``          digest of (source, config, policy) digests
``quarantine.source_digest``     of the artifact that was fetched
``quarantine.onnx_digest``       of ``model.onnx``
``quarantine.bundle_digest``     of ``bundle/bundle.json``
``quarantine.evidence_digest``   over names and contents of ``evidence/``
``quarantine.files_digest``      over names and contents of the whole version
``quarantine.alias.<alias>``     ``set`` once this version was given that alias, for good: it is never given it again
``quarantine.before.<alias>``    the version that had that alias before, or ``none``
``quarantine.superseded_by``     on versions that are undecided, whose decision grew too old, or was
                                 superseded by name: the version that has the later decision
===============================  ================================================================
"""

from __future__ import annotations

DECISION = "quarantine.decision"
REASON = "quarantine.reason"
POLICY = "quarantine.policy"
POLICY_DIGEST = "quarantine.policy_digest"
DECIDED_AT = "quarantine.decided_at"
ORIGIN = "quarantine.origin"
ORIGIN_PREFIX = "quarantine.origin."
SCAN = "quarantine.scan"
IDENTITY = "quarantine.identity"
SOURCE_DIGEST = "quarantine.source_digest"
ONNX_DIGEST = "quarantine.onnx_digest"
BUNDLE_DIGEST = "quarantine.bundle_digest"
EVIDENCE_DIGEST = "quarantine.evidence_digest"
FILES_DIGEST = "quarantine.files_digest"
ALIAS_PREFIX = "quarantine.alias."
BEFORE_PREFIX = "quarantine.before."
SUPERSEDED_BY = "quarantine.superseded_by"

SINCE_SWEEP = (POLICY_DIGEST, DECIDED_AT, ORIGIN)
"""Absent on versions that earlier releases registered; never wrong where present."""

NOT_SCANNED = "none"
PENDING = "pending"
ALLOW = "allow"
QUARANTINED = "quarantined"

DENIED = "denied"
UNDECIDED = "undecided"
BYTES_DIFFER = "bytes_differ"
ABANDONED = "abandoned"

ALIAS_SET = "set"
NO_VERSION = "none"

MODEL_DESCRIPTION = (
    "Versions of this model passed through Model Quarantine. The description of each version is its model card; "
    "`quarantine verify models:/NAME/VERSION` checks it against the signed evidence."
)
"""Description of a registered model that this project creates; one that is there stays as it is."""
