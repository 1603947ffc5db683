"""Bodies: MLflow's own events, and everything else."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines.triggers.payload import IGNORED, Malformed, Notice, parse_notice
from tests.triggers.fakes import event


def test_mlflows_own_examples_are_understood():
    from mlflow.entities.webhook import WebhookAction, WebhookEntity, WebhookEvent
    from mlflow.webhooks.types import get_example_payload_for_event

    def parsed(entity: str, action: str) -> Notice | None:
        kind = WebhookEvent(WebhookEntity(entity), WebhookAction(action))
        data = get_example_payload_for_event(kind)
        return parse_notice(json.dumps({"entity": entity, "action": action, "timestamp": "t", "data": data}).encode())

    assert parsed("model_version", "created") == Notice("example_model", "1")
    assert parsed("model_version_alias", "created") == Notice("example_model", "1")
    assert [parsed(*kind) for kind in sorted(IGNORED)] == [None] * len(IGNORED)


def test_source_and_tags_of_the_payload_are_not_in_the_notice():
    body = event(source="s3://evil/model", tags={"quarantine.decision": "allow"})
    assert parse_notice(body) == Notice("vision-a", "1")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b"9" * 10_000, b'{"a":' * 5000,
        event(entity="run"), event(action="exploded"), event(entity="prompt"),
        event(entity=["model_version"]), event(entity=None), event(action={"a": 1}),
        json.dumps({"entity": "model_version", "action": "created"}).encode(),
        json.dumps({"entity": "model_version", "action": "created", "data": [1]}).encode(),
        event(model=""), event(model=None), event(model=7), event(model="x" * 257), event(model="a/b"),
        event(model="a:b"),
        event(model="a\x00b"), event(model="a\nb"), event(model="\ud800"),
        event(version=""), event(version="0"), event(version="-1"), event(version="1.0"), event(version="01"),
        event(version=1), event(version=None), event(version="1" * 10), event(version="１"), event(version="1 "),
        event(entity="model_version_tag", action="set", version="x"),
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused(body):
    with pytest.raises(Malformed):
        parse_notice(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b'{"entity": NaN}')
def test_anything_else_is_malformed_and_nothing_worse(body):
    with pytest.raises(Malformed):
        parse_notice(body)


@settings(max_examples=300, deadline=None)
@given(name=json_values, version=json_values)
def test_what_is_let_through_is_a_name_and_a_number(name, version):
    body = json.dumps({"entity": "model_version", "action": "created", "data": {"name": name, "version": version}})
    try:
        notice = parse_notice(body.encode())
    except Malformed:
        return
    assert notice is not None
    assert notice.model.encode("utf-8")
    assert 0 < int(notice.version) < 10**9
