"""The watch file, and what identifies work."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components._runtime import registry_tags as tag
from defense_core.bundle import untrained_bundle
from defense_core.errors import ConfigError, PolicyError
from pipelines.triggers.keys import WorkKey, source_digest
from pipelines.triggers.watch import parse_watch, read_watch, run_name
from tests.triggers.fakes import WATCH, entry, watch


def changed(**fields):
    content = copy.deepcopy(WATCH)
    content["rules"] = [{**content["rules"][0], **fields}]
    return content


def test_first_rule_that_names_the_model_counts():
    rules = watch()
    assert rules.rule("vision-a").plan.clean == "s3://data/clean.npz"
    assert rules.rule("other").plan.clean == "s3://data/other.npz"
    assert parse_watch(changed(), beside=Path()).rule("Vision-a") is None


def test_run_is_of_the_version_and_goes_where_the_rule_says():
    rules = watch()
    key = rules.key(entry("vision-a", "7"))
    assert isinstance(key, WorkKey)
    assert rules.plan(key).model == "models:/vision-a/7"
    settings = rules.run_settings(key)
    assert (settings.evidence, settings.model_name, settings.alias, settings.name) == (
        "s3://quarantine/evidence", "quarantined", "champion", "",
    )  # fmt: skip


def test_a_plan_takes_what_a_run_takes():
    scan = {"fpr": 0.01, "budget_s": 300}
    rules = parse_watch(
        changed(plan={"clean": "s3://d/c.npz", "pool": "s3://d/pool.json", "scan": scan, "methods": ["fip"]}),
        beside=Path(),
    )
    plan = rules.plan(rules.key(entry("vision-a", "7")))
    assert (plan.pool, plan.scan, plan.methods) == ("s3://d/pool.json", scan, ("fip",))


def test_controls_are_kept_where_the_file_says():
    rules = parse_watch({**WATCH, "controls": "s3://quarantine/controls"}, beside=Path())
    assert rules.settings_of(rules.rules[0]).controls == "s3://quarantine/controls"
    assert watch().settings_of(watch().rules[0]).controls == ""


@pytest.mark.parametrize(("name", "reason"), [("a@b", "unaddressable"), ("x" * 251, "unaddressable")])
def test_version_that_no_address_can_name_is_left_alone(name, reason):
    assert watch().key(entry(name)) == reason


def test_own_is_told_by_model_and_tags_together():
    own = dict.fromkeys((tag.DECISION, tag.IDENTITY, tag.SOURCE_DIGEST, tag.FILES_DIGEST), "x")
    assert watch().key(entry("quarantined", tags=own)) == "own"
    assert isinstance(watch().key(entry("vision-a", tags=own)), WorkKey)


@pytest.mark.parametrize("field", ["source", "run_id", "creation_timestamp"])
def test_source_digest_depends_on_every_field(field):
    other = entry(**{field: 5 if field == "creation_timestamp" else "other"})
    assert source_digest(other) != source_digest(entry())
    assert source_digest(entry(tags={"a": "b"}, aliases=("x",))) == source_digest(entry())


def test_policy_file_beside_the_watch_file_is_read(tmp_path):
    (tmp_path / "own.yaml").write_text((Path("pipelines/policies/strict.yaml")).read_text())
    (tmp_path / "watch.yaml").write_text(json.dumps(changed(plan={"clean": "s3://d/c.npz", "policy": "own.yaml"})))
    found = read_watch(tmp_path / "watch.yaml")
    assert found.rules[0].policy_digest == watch().rules[1].policy_digest


@pytest.mark.parametrize(
    "content",
    [
        {}, {"evidence": "s3://e"}, {"evidence": "s3://e", "rules": []},
        {**WATCH, "more": 1}, {**WATCH, "evidence": ""},
        {**WATCH, "rules": {}}, {**WATCH, "rules": ["x"]},
        changed(models=[]), changed(models="vision-*"), changed(register="a/b"), changed(alias="latest"),
        changed(alias="v1"), changed(plan={}), changed(plan={"clean": "s3://c", "model": "models:/x/1"}),
        changed(plan={"clean": "s3://c", "seeds": 1}), changed(plan={"clean": "s3://c", "policy": "no-such-policy"}),
        changed(plan={"clean": "s3://c", "policy": {"x": 1}}), changed(plan={"clean": "s3://c", "policy": 7}),
        changed(plan={"clean": "s3://c", "methods": []}),
    ],
)  # fmt: skip
def test_malformed_watch_files_are_refused(content):
    with pytest.raises((ConfigError, PolicyError)):
        parse_watch(content, beside=Path())


@given(st.text(min_size=1, max_size=300), st.integers(1, 10**9 - 1), st.integers(0, 99))
def test_run_names_suit_every_model(model, version, round_):
    key = WorkKey("m", str(version), "sha256:s", "sha256:p")
    name = run_name(
        WorkKey(model, str(version), "sha256:s", "sha256:p"), f"{key.digest}.{round_}" if round_ else key.digest
    )
    assert len(name) <= 100
    assert name.isascii()
    assert name[0].isalnum()
    assert key.digest.removeprefix("sha256:")[:32] in name


def test_the_example_of_the_docs_is_usable_and_describes_its_network_whole():
    page = (Path(__file__).resolve().parents[2] / "docs" / "hooks.md").read_text("utf-8")
    example = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    (rule,) = parse_watch(example, beside=Path()).rules
    assert untrained_bundle(rule.plan.spec).spec.num_classes == 10
