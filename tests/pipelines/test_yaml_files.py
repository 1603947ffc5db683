"""YAML that people write: plain data, numbers as JSON has them, no key twice, nothing that runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from defense_core.errors import EXIT_USAGE, ConfigError
from pipelines.model_options import tuned_spec
from pipelines.options import parse_settings, read_policy, read_probes
from pipelines.yaml_files import MAX_BYTES, parse_yaml, read_mapping, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("0.15", 0.15),
        ("1e-3", 1e-3),
        ("5E-4", 5e-4),
        ("-1.5e+3", -1500.0),
        ("1e3", 1000.0),
        (".5e1", 5.0),
        ("[1e-3, 2e-3]", [1e-3, 2e-3]),
        ('{"lr": 1e-2}', {"lr": 0.01}),
        ("null", None),
        ("true", True),
        ("v2", "v2"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("'1e-3'", "1e-3"),
        ("1e-3x", "1e-3x"),
        ("", None),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_whole_numbers_stay_whole() -> None:
    assert type(parse_yaml("10", "here")) is int
    assert math.isinf(parse_yaml(".inf", "here"))


@pytest.mark.parametrize("text", ["!!bool maybe", '!!int ""', "!!timestamp x", '!!float ""'])
def test_values_that_do_not_fit_their_tag_are_malformed(text: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.yaml is malformed"):
        parse_yaml(text, "policy.yaml")


@pytest.mark.parametrize(
    "text",
    ["{a: 1, a: 2}", "a: 1\nb: 2\na: 1\n", "{x: {a: 1, a: 1}}", "{1: a, 1: b}", '{"a": 1, a: 2}', "[{a: 1, a: 2}]"],
)
def test_repeated_keys_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"repeated key (a|1)") as caught:
        parse_yaml(text, "policy.yaml")
    assert "policy.yaml is malformed" in str(caught.value)
    assert "line" in str(caught.value)


@pytest.mark.parametrize("text", ["2027-01-31", "2024-99-99", "2027-01-31T12:00:00Z", "2001-12-14 21:59:43.10 -5"])
def test_days_and_times_stay_text(text: str) -> None:
    assert parse_yaml(f"expires: {text}", "here") == {"expires": text}


def test_the_same_key_in_two_mappings_is_no_repetition() -> None:
    assert parse_yaml("[{a: 1}, {a: 2}]", "here") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    "text",
    ["{", "a: b: c", "\t- x", "{[1]: 2}", "{{}: 1}", "? [a]\n: 1", "a: *unknown", "[" * 20_000, "\x00"],
)
def test_what_cannot_be_read_is_a_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="here is malformed: expected YAML or JSON, got") as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.mkdir [CANARY]",
        "!!python/name:os.system",
        "!!python/object/new:os.mkdir {args: [CANARY]}",
        "x: !unknown 3",
    ],
)
def test_no_tag_runs_anything(text: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        parse_yaml(text.replace("CANARY", str(canary)), "here")
    assert not canary.exists()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "numbers.yaml").write_text("1: a\n")
    (tmp_path / "empty.yaml").write_text("")
    for name in ("absent.yaml", "binary.yaml", "large.yaml", ".", "list.yaml", "numbers.yaml", "empty.yaml"):
        with pytest.raises(ConfigError, match=r"cannot be read|too large|expected a mapping with text keys") as caught:
            read_mapping(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert caught.value.exit_code == EXIT_USAGE


def test_json_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"lr": 1e-3, "n": null, "text": "ü"}')
    assert read_yaml(tmp_path / "a.json") == {"lr": 1e-3, "n": None, "text": "ü"}


# -- what the command line makes of it -----------------------------------------------------


def test_settings_go_on_top_of_a_file_and_leave_it_alone() -> None:
    base: dict[str, Any] = {"lr": 0.1, "tsbd": {"n": 0.1}}
    found = parse_settings(["lr=1e-3", "tsbd.n=0.2", "tsbd.m=0.5", "nft.epochs=3", "n_grid=[0.1, 0.2]"], base)
    assert found == {"lr": 1e-3, "tsbd": {"n": 0.2, "m": 0.5}, "nft": {"epochs": 3}, "n_grid": [0.1, 0.2]}
    assert base == {"lr": 0.1, "tsbd": {"n": 0.1}}


def test_a_value_may_hold_an_equals_sign_or_be_empty() -> None:
    assert parse_settings(["name=a=b", "n="]) == {"name": "a=b", "n": None}


@pytest.mark.parametrize("setting", ["lr", "=1", "", "lr={", "a.b=1"])
def test_malformed_settings(setting: str) -> None:
    with pytest.raises(ConfigError, match="malformed"):
        parse_settings([setting], {"a": 3})


def test_model_options_say_only_what_was_given() -> None:
    assert tuned_spec() == {}
    assert tuned_spec(
        architecture_args='{"width": 8, "num_classes": 4}', input_size="3, 32, 32", class_names="a, b"
    ) == {
        "architecture_args": {"width": 8, "num_classes": 4},
        "num_classes": 4,
        "input_size": [3, 32, 32],
        "class_names": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("architecture_args", "[1]"),
        ("architecture_args", "{"),
        ("input_size", "3x32x32"),
        ("input_size", "3,32.5,32"),
        ("mean", "a,b"),
        ("std", "0.5,,0.5"),
    ],
)
def test_malformed_model_options_are_named(option: str, value: str) -> None:
    with pytest.raises(ConfigError, match="--" + option.replace("_", "-")):
        tuned_spec(**{option: value})


def test_probe_files_hold_one_or_many(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("{kind: badnets, size: 2}")
    (tmp_path / "two.yaml").write_text("- {kind: blended}\n- {kind: badnets}\n")
    found = read_probes([tmp_path / "one.yaml", tmp_path / "two.yaml"])
    assert [probe["kind"] for probe in found] == ["badnets", "blended", "badnets"]
    (tmp_path / "bad.yaml").write_text("- badnets\n")
    with pytest.raises(ConfigError, match="a probe, or a list of probes"):
        read_probes([tmp_path / "bad.yaml"])
    (tmp_path / "none.yaml").write_text("[]\n")
    with pytest.raises(ConfigError, match="a probe, or a list of probes, got an empty list"):
        read_probes([tmp_path / "one.yaml", tmp_path / "none.yaml"])


def test_shipped_policies_go_by_name_and_others_by_path(tmp_path: Path) -> None:
    assert {read_policy(name)["name"] for name in ("strict", "standard", "observe")} == {
        "strict",
        "standard",
        "observe",
    }
    (tmp_path / "mine.yaml").write_text("{name: mine}")
    assert read_policy(str(tmp_path / "mine.yaml")) == {"name": "mine"}
    with pytest.raises(ConfigError, match="there is no policy lenient: expected observe, standard, strict"):
        read_policy("lenient")
