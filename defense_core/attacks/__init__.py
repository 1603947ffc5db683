"""Triggers and poisoned training: for benchmarks, tests, the demo and the positive control.

Nothing under ``defense_core.purify`` or ``defense_core.scan`` may import this package.
"""

from defense_core.attacks.badnets import BadNets
from defense_core.attacks.blended import Blended
from defense_core.attacks.poison import Poisoned, Poisoning, poison, poison_by
from defense_core.attacks.probe import MAX_UNTRIGGERED, TRIGGERS, Probe, Trigger, probe_from_spec, without_trigger

__all__ = [
    "MAX_UNTRIGGERED",
    "TRIGGERS",
    "BadNets",
    "Blended",
    "Poisoned",
    "Poisoning",
    "Probe",
    "Trigger",
    "poison",
    "poison_by",
    "probe_from_spec",
    "without_trigger",
]
