"""The scan's benchmark: what a scan that stops in time has seen, and that the committed rows are those of the pools."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy
import pytest

from benchmarks.results import read_rows
from benchmarks.scan import shipped_pool, within_budget
from benchmarks.scan_zoo import FAMILIES
from defense_core.scan import calibrate
from defense_core.scan.base import Observation
from defense_core.scan.detectors import MANY
from defense_core.scan.observe import Observed
from defense_core.scan.pool import load_pool

SECONDS = {"margin": 4.0, "patch": 8.0, "generator": 40.0, "pairs": 2.0}
OBSERVED = Observed({name: Observation(name, 1.0, "") for name in SECONDS}, {"accuracy": 0.8}, ())


@pytest.mark.parametrize(("budget", "kept"), [(3.9, 0), (4.0, 1), (51.0, 2), (52.0, 3), (60.0, 4)])
def test_detectors_are_kept_in_order_until_the_time_is_spent(budget: float, kept: int) -> None:
    stopped = within_budget(OBSERVED, SECONDS, budget)
    assert tuple(stopped.observations) == tuple(SECONDS)[:kept]
    assert stopped.unfinished == tuple(SECONDS)[kept:]
    assert stopped.covariates == OBSERVED.covariates


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_verdicts_p_values_follow_from_the_detectors_rows_and_the_pool_that_comes_along(family: str) -> None:
    pool = load_pool(shipped_pool(family, FAMILIES[family]()))
    read = [calibrate._read(reference, ("none", "many")) for reference in pool.references]
    nulls = {}
    for name in {name for members in calibrate.CHANNELS.values() for name in members}:
        readings = [each[name] for each in read if name in each]
        if readings:
            nulls[name] = calibrate._standardised(readings[0], readings, by_class=True)[1]

    def scale(null: Any) -> tuple[float, float]:
        """The median of the references' values and the reach of their 90 % quantile: a score counts in these."""
        centre = float(numpy.median(null))
        return centre, float(numpy.quantile(null, 0.9)) - centre

    models: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in read_rows("scan"):
        if row["model"].startswith(f"{family}/") and row["clean_images"] == MANY:
            models[row["model"]][row["detector"]] = row
    assert len(models) >= 48
    for rows in models.values():
        p_values, scores = dict.fromkeys(calibrate.CHANNELS, 1.0), []
        for channel, members in calibrate.CHANNELS.items():
            known = [name for name in members if name in nulls and rows[name]["score"] is not None]
            if not known:
                continue
            values = []
            for name in known:
                centre, reach = scale(nulls[name])
                values.append(rows[name]["score"] * reach + centre)
            null = numpy.max([nulls[name] for name in known], axis=0)
            centre, reach = scale(null)
            p_values[channel] = calibrate.conformal(max(values) - 1e-9, null.tolist())
            scores.append((max(values) - centre) / reach)
        assert rows["combined"]["p_value"] == pytest.approx(min(calibrate.holm(p_values).values()))
        assert rows["combined"]["score"] == pytest.approx(max(scores), rel=1e-5)
