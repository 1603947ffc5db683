"""Options that several commands share: where they stand in a command, and what they are made into."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from components._runtime.plan import DEFAULT_METHODS, Loading, Plan
from defense_core.limits import LoadLimits
from defense_core.purify import METHODS
from pipelines.model_options import ESSENTIAL, loading_of, pinned_loading, tuned_spec
from pipelines.option_groups import takes
from pipelines.plan_options import Request, run_request

Width = Annotated[int, typer.Option(help="Across the box.")]
PlainWidth = Annotated[int, typer.Option(help="In millimetres.")]
Height = Annotated[int, typer.Option(help="Of the box.")]


def box(*, width: Width = 1, height: Height = 2, name: str = "") -> tuple[int, int, str]:
    return width, height, name


def help_of(command: Any, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(command)
    found = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert found.exit_code == 0, found.output
    return found.output


def test_a_groups_options_stand_where_its_result_stands() -> None:
    @takes(box, into="made")
    def command(*, first: str = "", made: tuple[int, int, str], last: str = "") -> None: ...

    text = help_of(command)
    places = [text.index(option) for option in ("--first", "--width", "--height", "--name", "--last")]
    assert places == sorted(places)


def test_a_name_in_both_is_given_to_both() -> None:
    @takes(box, into="made")
    def command(*, made: tuple[int, int, str], name: str = "mine") -> Any:
        return made, name

    assert command(width=3) == ((3, 2, "mine"), "mine")
    assert command(name="yours") == ((1, 2, "yours"), "yours")


def test_a_command_may_require_an_option_and_tell_it_in_other_words() -> None:
    @takes(box, into="made", required=["height"], instead={"width": PlainWidth})
    def command(*, made: tuple[int, int, str]) -> Any:
        return made

    text = help_of(command)
    assert "In millimetres." in text
    assert "Across the box." not in text
    assert text.index("--height") < text.index("--width")
    with pytest.raises(TypeError, match="height"):
        command(width=1)
    assert command(height=5) == (1, 5, "")


def test_a_group_may_take_a_group() -> None:
    @takes(box, into="inner")
    def crate(*, inner: tuple[int, int, str], lid: bool = False) -> Any:
        return inner, lid

    @takes(crate, into="made", required=["width"])
    def command(*, made: Any) -> Any:
        return made

    assert command(width=7, lid=True) == ((7, 2, ""), True)
    with pytest.raises(TypeError, match="width"):
        command(lid=True)


def test_an_untrained_network_needs_its_essentials() -> None:
    @takes(tuned_spec, into="spec", required=ESSENTIAL)
    def command(*, spec: dict[str, Any]) -> Any:
        return spec

    given = {"architecture": "small_cnn", "input_size": "1,8,8", "mean": "0.5", "std": "0.2"}
    assert command(**given, augment="none") == {
        "architecture": "small_cnn",
        "input_size": [1, 8, 8],
        "mean": [0.5],
        "std": [0.2],
        "augment": "none",
    }
    for name in ESSENTIAL:
        with pytest.raises(TypeError, match=name):
            command(**{key: value for key, value in given.items() if key != name})


def test_loading_says_limits_trust_and_the_digest() -> None:
    digest = "sha256:" + "0" * 64
    limits = LoadLimits(max_bytes=10, timeout_s=2.0)
    assert loading_of(trusted_module=["mine"], max_bytes=10, load_timeout_s=2.0) == Loading("", ("mine",), limits)
    assert pinned_loading(sha256=digest, max_bytes=10, load_timeout_s=2.0) == Loading(digest, (), limits)


def test_a_request_is_a_plan_but_for_its_sources() -> None:
    @takes(run_request, into="request")
    def command(*, model: str, clean: str, request: Request, seed: int = 0) -> Any:
        return request, request.plan(model=model, clean=clean, seed=seed)

    request, plan = command(
        model="s3://models/a.pt",
        clean="s3://data/clean.npz",
        policy="strict",
        methods="tsbd, fine_tuning",
        test="s3://data/test.npz",
        settings=["tsbd.n=0.2"],
        scan_settings=["fpr=0.01"],
        pool="s3://data/pool.json",
        architecture="small_cnn",
        register="mine",
        alias="live",
        seed=3,
    )
    assert (request.model_name, request.alias) == ("mine", "live")
    assert plan == Plan(
        model="s3://models/a.pt",
        clean="s3://data/clean.npz",
        policy=plan.policy,
        spec={"architecture": "small_cnn"},
        test="s3://data/test.npz",
        pool="s3://data/pool.json",
        methods=("tsbd", "fine_tuning"),
        configs={"tsbd": {"n": 0.2}},
        scan={"fpr": 0.01},
        seed=3,
    )
    assert plan.policy["name"] == "strict"


def test_without_methods_several_purifiers_and_the_control_run() -> None:
    @takes(run_request, into="request")
    def command(*, request: Request) -> Any:
        return request.plan(model="s3://models/a.pt", clean="s3://data/clean.npz").methods

    assert command() == Plan(model="a", clean="b", policy={}).methods == DEFAULT_METHODS
    rows = [METHODS[name] for name in DEFAULT_METHODS]
    assert [row.name for row in rows if row.control] == [DEFAULT_METHODS[-1]]
    assert not any(row.baseline for row in rows)
    assert len(rows) > 2
