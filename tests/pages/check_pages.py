"""axe-core on every page, in headless Chromium, light and dark, wide and narrow: nothing serious.

Not among the tests that ``make test`` collects, because it needs a browser: ``make test-pages``.
Screenshots of what was checked go to the folder that ``QUARANTINE_SCREENSHOTS`` names, if it is set.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from defense_core.evaluate.compare import Estimate
from defense_core.report import build_report, render_report
from defense_core.report_compare import compare_reports, render_comparison
from defense_core.report_fleet import build_fleet, render_fleet, version_of_report, version_without_evidence
from tests.unit.report_records import MODEL, decision, record, rule, whole_run
from tests.unit.test_report_pages import png

AXE = Path(__file__).parent / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
    ),
)
SERIOUS = ("serious", "critical")
TIMEOUT_S = 120


def whole() -> str:
    evidence = whole_run()
    scan = record(
        "scan", {"model": MODEL}, {}, {"p_value": 0.0004, "suspects": [0], "coverage": ["Finds 4×4 patches."]}
    )
    scan["results"]["pictures"] = [
        {"title": f"Class {k}", "alt": f"trigger of class {k}", "png": png(k)} for k in range(5)
    ]
    finding = {"rule": "inversion", "verdict": "FAIL", "value": 4.1, "bound": "<= 2", "why": "Too easy."}
    evidence["scan"] = {**scan, "verdict": "FAIL", "findings": [finding]}
    for name in ("before", "tsbd", "fine_tuning"):
        evidence[f"evaluate.{name}"]["results"]["sharpness"] = {"fisher_trace": 12.5}
    waived = (rule("asr-low", "FAIL", "excepted"), rule("one-class", "FAIL", "warn"))
    evidence["gate"]["results"] = decision("allow", "PASS", rule("accuracy-held"), *waived)
    return render_report(build_report(evidence))


def failed() -> str:
    failure = {"name": "fetch", "error": "SourceNotFound", "message": "no such object", "hint": "Check the key"}
    return render_report(build_report({}, failures=[failure]))


def comparison() -> str:
    evidence = whole_run()
    evidence["gate"]["results"] = decision("deny", "FAIL", rule("accuracy-held", "FAIL"), rule("b", "UNKNOWN"))
    return render_comparison(compare_reports(build_report(whole_run()), build_report(evidence), names=("one", "two")))


def fleet() -> str:
    one = version_of_report(build_report(whole_run()), model="digits", version="1")
    rows = [replace(one, version=str(k), accuracy=Estimate(0.9 + k / 100, 0.9, 0.99)) for k in range(1, 6)]
    rows[-1] = replace(rows[-1], aliases=("champion",), outcome="unknown", scan="UNKNOWN")
    return render_fleet(
        build_fleet([*rows, version_without_evidence("resnet", "1", aliases=["live"], problem="Never went through.")])
    )


PAGES = {"report": whole, "failed": failed, "comparison": comparison, "fleet": fleet}


def browser() -> str:
    """Chromium, by ``CHROMIUM`` or by its usual names."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    assert found, "no Chromium: install it, or name it by the variable CHROMIUM"
    return found


def chromium(folder: Path, page: Path, *arguments: str) -> str:
    command = [browser(), *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return done.stdout


def schemed(page: str, scheme: str) -> str:
    """The page as a reader with this colour scheme sees it."""
    assert page.count("@media (prefers-color-scheme: dark)") == 1
    return page.replace("@media (prefers-color-scheme: dark)", "@media all" if scheme == "dark" else "@media not all")


def with_axe(page: str) -> str:
    """The page with axe and a script that leaves the findings behind as text; its own policy would forbid both."""
    run = (
        "axe.run(document, {resultTypes: ['violations', 'incomplete']}).then((found) => {"
        "const out = document.createElement('pre'); out.id = 'axe-result';"
        "out.textContent = JSON.stringify({violations: found.violations.map((v) => ({id: v.id, impact: v.impact, "
        "nodes: v.nodes.map((n) => n.html.slice(0, 200))})), passes: found.passes.length});"
        "document.body.replaceChildren(out); });"
    )
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    return page.replace("</body>", f"<script>{AXE.read_text('utf-8')}</script><script>{run}</script></body>")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious(name: str, width: int, scheme: str, tmp_path: Path) -> None:
    page = schemed(PAGES[name](), scheme)
    (tmp_path / "page.html").write_text(page)
    shots = os.environ.get("QUARANTINE_SCREENSHOTS")
    if shots:
        Path(shots).mkdir(parents=True, exist_ok=True)
        target = Path(shots).absolute() / f"{name}-{width}-{scheme}.png"
        chromium(
            tmp_path, framed(tmp_path, "page.html", width), f"--window-size={width},3200", f"--screenshot={target}"
        )
    assert serious(tmp_path, page, width) == []


def test_the_check_itself_finds_what_is_wrong(tmp_path: Path) -> None:
    page = failed().replace("</main>", '<img src="data:,"><p style="color:#bbb;background:#ccc">faint</p></main>')
    assert {"image-alt", "color-contrast"} <= set(serious(tmp_path, page, 1200))


def serious(folder: Path, page: str, width: int) -> list[str]:
    """Rules of axe that the page breaks seriously."""
    checked = folder / "checked.html"
    checked.write_text(with_axe(page))
    dom = chromium(folder, checked, f"--window-size={width},900", "--virtual-time-budget=30000", "--dump-dom")
    found = re.search(r'<pre id="axe-result">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, "axe left no result"
    result: dict[str, Any] = json.loads(html.unescape(found.group(1)))
    assert result["passes"] > 10
    broken = [each for each in result["violations"] if each["impact"] in SERIOUS]
    for each in broken:
        print(each)
    return [str(each["id"]) for each in broken]


def framed(folder: Path, page: str, width: int) -> Path:
    """A frame as wide as a phone: no window of a browser is that narrow."""
    path = folder / f"frame{width}.html"
    style = f"border:0;width:{width}px;height:3200px"
    path.write_text(f'<!DOCTYPE html><body style="margin:0"><iframe src="{page}" style="{style}"></iframe>')
    return path
