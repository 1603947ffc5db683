"""How pages are made: templates that escape everything, and the filters that they share."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from defense_core import report_text as words

TEMPLATES = Path(__file__).parent / "templates"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=words.percent,
        points=words.points,
        span=words.span,
        method=words.label,
        seconds=words.seconds,
        plain=words.plain,
        percent_apart=words.percent_apart,
        code_apart=words.code_apart,
    )
    return environment


def template(name: str) -> jinja2.Template:
    """The page template ``name``; every value in it is escaped."""
    return _environment().get_template(name)


def safe_svg(drawing: str) -> Markup:
    """A chart of :mod:`defense_core.report_charts`, which has escaped every text in it."""
    return Markup(drawing)  # noqa: S704


def script(name: str) -> str:
    """The text of a script that lies beside the templates; it goes into the page as it is."""
    return (TEMPLATES / name).read_text("utf-8")
