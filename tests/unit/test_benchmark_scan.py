"""The scan that stops in time, as the benchmark reckons it from the seconds of each detector."""

from __future__ import annotations

import pytest

from benchmarks.scan import within_budget
from defense_core.scan.base import Observation
from defense_core.scan.observe import Observed

SECONDS = {"margin": 4.0, "patch": 8.0, "generator": 40.0, "pairs": 2.0}
OBSERVED = Observed({name: Observation(name, 1.0, "") for name in SECONDS}, {"accuracy": 0.8}, ())


@pytest.mark.parametrize(("budget", "kept"), [(3.9, 0), (4.0, 1), (51.0, 2), (52.0, 3), (60.0, 4)])
def test_detectors_are_kept_in_order_until_the_time_is_spent(budget: float, kept: int) -> None:
    stopped = within_budget(OBSERVED, SECONDS, budget)
    assert tuple(stopped.observations) == tuple(SECONDS)[:kept]
    assert stopped.unfinished == tuple(SECONDS)[kept:]
    assert stopped.covariates == OBSERVED.covariates
