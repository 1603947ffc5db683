"""Every method against every attack: ``purification-cpu.json`` and ``purification-gpu.json``.

``python -m benchmarks.purification --preset cpu --data FOLDER``. Victims are trained once and kept in the user's
cache; rows that the results file already holds for the same configuration are not measured again, so a run may be
stopped and started at will. Figures are quoted on the 10,000 test images. No method sees them, nor a trigger; the
choice between the candidates (``selected``) sees the clean set alone.
"""

from __future__ import annotations

import argparse
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from benchmarks.memory import device_name, peak_mb, reset_peak
from benchmarks.presets import PRESETS, Setting, described, recipe_of, tiny
from benchmarks.results import FOLDER, read_rows, write_results
from benchmarks.zoo import Victim, load_cifar10, victim
from defense_core import config
from defense_core.data import CleanSet, Splits, split_clean_set
from defense_core.errors import MethodDiverged
from defense_core.evaluate import evaluate
from defense_core.evaluate.metrics import der
from defense_core.progress import Progress, default_progress
from defense_core.purify import METHODS, Purified, purify
from defense_core.purify.soup import SoupConfig, mixed, side_by_side
from defense_core.selection import Candidate, Signals, choose
from defense_core.universal import Perturbations, select_signals, universal_perturbations

KEY = ("attack", "method", "seed", "clean_fraction", "architecture", "config_digest")
"""Fields that identify a row."""

CANDIDATES = ("tsbd", "fip", "nft", "ngf", "soup")
"""Methods that ``selected`` is chosen among, in order of preference, as a run with its defaults does."""
APART = tuple(side_by_side(CANDIDATES))
"""Those of them that run by themselves."""
ASKED = (*CANDIDATES, "fast_fip", "distil")
"""Methods whose models are asked for what a choice needs: all but the control and those of others."""

CHOSEN = ("n", "lr", "ratio", "sparsity", "averaged")
"""Facts of a method that say what its rule chose."""


def jobs(settings: Sequence[Setting]) -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every row that is to be measured, with what identifies it; all methods of a model together."""
    for setting in settings:
        methods = setting.methods or tuple(METHODS)
        for attack, seed, method in product(setting.attacks, setting.seeds, methods):
            yield (
                setting,
                {
                    "attack": attack,
                    "method": method,
                    "seed": seed,
                    "clean_fraction": setting.clean_fraction,
                    "architecture": described(setting),
                    "config_digest": config_digest(method),
                },
            )


def config_digest(method: str) -> str:
    """Of the defaults of ``method``; of a soup with those of its members, which decide what it averages."""
    own = METHODS[method].config()
    if isinstance(own, SoupConfig):
        return config.digest({"soup": own, "members": {name: METHODS[name].config() for name in own.members}})
    return config.digest(own)


def key_of(row: Mapping[str, Any]) -> str:
    """What identifies a row: what was run on what."""
    return config.digest([row[field] for field in KEY])


def clean_splits(subject: Victim, setting: Setting, seed: int) -> Splits:
    """Clean images that the victim has not seen, drawn by ``seed``: four fifths to fit, one fifth to select.

    Where there is one image for each class, it is drawn class by class and nothing is set aside.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    held_out = subject.held_out.subset(torch.randperm(len(subject.held_out), generator=generator))
    count = round(setting.clean_fraction * setting.images)
    if count <= held_out.num_classes:
        first = [int((held_out.labels == label).nonzero()[0]) for label in range(held_out.num_classes)]
        return split_clean_set(held_out.subset(torch.tensor(first)), seed=seed, select=0.0, report=0.0)
    return split_clean_set(held_out.subset(torch.arange(count)), seed=seed, select=0.2, report=0.0)


@dataclass(frozen=True, eq=False)
class Case:
    """A victim, the clean images that the defence gets, and what every method's row shares.

    Attributes:
        before: the victim's own figures.
        device, progress: of what is measured on it.
        made: what methods made of it in this process, with their defaults, and the seconds and peak MB of each.
    """

    subject: Victim
    clean: Splits
    before: Mapping[str, float]
    device: str
    progress: Progress
    made: dict[str, tuple[Purified, float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Victim, clean: Splits, test: CleanSet, *, device: str, progress: Progress) -> Case:
        """Measure what the rows share."""
        return cls(subject, clean, measured(subject.model, subject, test, device=device), device, progress)

    @functools.cached_property
    def perturbations(self) -> Perturbations:
        """Found on the victim, for the signals of the choice; only rows that may be chosen ask for them."""
        return universal_perturbations(
            self.subject.model, self.clean.fit, task=self.subject.task, device=self.device, progress=self.progress
        )


def measured(model: nn.Module, subject: Victim, test: CleanSet, *, device: str) -> dict[str, float]:
    """``acc``, ``asr`` and ``ra`` of a model under the victim's trigger."""
    assert subject.probe is not None
    found = evaluate(model, test, task=subject.task, probes=(subject.probe,), device=device).to_results()
    probe = found["probes"][0]
    return {"acc": found["acc"]["value"], "asr": probe["asr"]["value"], "ra": probe["ra"]["value"]}


def figures(
    case: Case,
    test: CleanSet,
    method: str,
    *,
    seed: int,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Purify once; what the row says beside its key.

    Args:
        settings: what differs from the method's defaults.
    """
    subject, clean, before, device, progress = case.subject, case.clean, case.before, case.device, case.progress
    parsed = config.from_mapping(METHODS[method].config, settings)
    reset_peak(device)
    started = time.perf_counter()
    try:
        result, spent, reached = purified(case, method, parsed, seed=seed)
    except MethodDiverged as error:
        return {"diverged": str(error), "seconds": round(time.perf_counter() - started, 1)}
    seconds, peak = time.perf_counter() - started + spent, max(reached, peak_mb(device))
    if not settings:
        case.made[method] = result, seconds, peak
    row = {}
    if method in ASKED:
        row["select"] = select_signals(
            subject.model, result.model, clean, task=subject.task, device=device, progress=progress,
            perturbations=case.perturbations,
        ).to_mapping()  # fmt: skip
    after = measured(result.model, subject, test, device=device)
    return {
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "der": der(before["acc"] - after["acc"], before["asr"] - after["asr"]),
        "seconds": round(seconds, 2),
        "peak_mb": round(peak),
        "device": device_name(device),
        "chosen": {name: result.facts[name] for name in CHOSEN if name in result.facts},
        **row,
    }


def purified(case: Case, method: str, settings: Any, *, seed: int) -> tuple[Purified, float, float]:
    """What ``method`` makes of the victim, and the seconds and the peak MB that went into it before.

    A soup is mixed from what its members made here already, where they all did: their seconds and memory are its own.
    """
    shared: dict[str, Any] = {
        "task": case.subject.task, "seed": seed, "device": case.device, "progress": case.progress
    }  # fmt: skip
    if isinstance(settings, SoupConfig) and set(settings.members) <= case.made.keys() and not settings.configs:
        members = {name: case.made[name] for name in settings.members}
        models = {name: result for name, (result, _, _) in members.items()}
        result = mixed(case.subject.model, models, case.clean, max_drop=settings.max_drop, **shared)
        return result, sum(each[1] for each in members.values()), max(each[2] for each in members.values())
    return purify(case.subject.model, case.clean, settings, method=method, **shared), 0.0, 0.0


def completed(rows: Sequence[Mapping[str, Any]], candidates: Sequence[str] = CANDIDATES) -> list[dict[str, Any]]:
    """Rows with ``control_der`` and ``selected``, which depend on the others of the same model and data.

    A recipe gives other weights on another processor; a control of another victim is none.

    Args:
        candidates: methods that are chosen among, in order of preference.
    """
    groups = grouped(rows)
    done = []
    for row in rows:
        members = groups[group_of(row)]
        control = [each.get("der") for each in members if METHODS[each["method"]].control and same_victim(each, row)]
        by_method = {each["method"]: each for each in comparable(members, candidates)}
        chosen = choose([_candidate(by_method[name]) for name in candidates if name in by_method])
        selected = chosen is not None and chosen.method == row["method"]
        done.append({**row, "control_der": control[0] if control else None, "selected": selected})
    return done


def same_victim(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two rows of one name are of models with the same figures before."""
    return all(one.get(figure) == other.get(figure) for figure in ("acc_before", "asr_before"))


def comparable(members: Sequence[Mapping[str, Any]], candidates: Sequence[str]) -> list[Mapping[str, Any]]:
    """Those of ``candidates`` that were asked about the same perturbations; one that diverged was asked about none.

    A recipe gives other weights on another processor, so that rows of the same name may be of two victims, and the
    perturbations of one say nothing about the other. Of several the larger part is kept.
    """
    asked: dict[str, list[Mapping[str, Any]]] = {}
    for row in members:
        if row["method"] in candidates and "select" in row:
            asked.setdefault(config.digest(list(row["select"]["reached_before"])), []).append(row)
    return max(asked.values(), key=len, default=[])


def grouped(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of the same model and clean images together, by :func:`group_of`."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def group_of(row: Mapping[str, Any]) -> str:
    """What rows share that are chosen among: the model and the clean images."""
    return config.digest([row[field] for field in ("attack", "seed", "clean_fraction", "architecture")])


def _candidate(row: Mapping[str, Any]) -> Candidate:
    averaged = len(row.get("chosen", {}).get("averaged", ()))
    return Candidate(row["method"], Signals.from_mapping(row["select"]), averaged=averaged)


def run(
    name: str,
    settings: Sequence[Setting],
    data: Path,
    *,
    wanted: Callable[[Mapping[str, Any]], bool],
    device: str,
    command: str,
    folder: Path = FOLDER,
) -> None:
    """Measure what is missing in ``<folder>/<name>.json``, and keep the file whole after every row.

    Rows of other configurations than today's are left out.

    Args:
        wanted: which of the missing rows to measure now.
    """
    started, progress = datetime.now(UTC), default_progress()
    known = {key_of(row): row for row in read_rows(name, folder=folder)}
    everything = {key_of(job): (setting, job) for setting, job in jobs(settings)}
    train, test = load_cifar10(data)
    cases: dict[str, Case] = {}
    for key, (setting, job) in everything.items():
        if key in known or not wanted(job):
            continue
        if (group := group_of(job)) not in cases:
            subject = victim(recipe_of(job["attack"], setting), train, test, device=device, progress=progress)
            clean = clean_splits(subject, setting, job["seed"])
            cases = {group: Case.of(subject, clean, test, device=device, progress=progress)}
        known[key] = {**job, **figures(cases[group], test, job["method"], seed=job["seed"])}
        logging.info("%s", {name: value for name, value in known[key].items() if name != "select"})
        # Another process may have measured other rows meanwhile.
        known = {**{key_of(row): row for row in read_rows(name, folder=folder)}, **known}
        rows = completed([known[each] for each in everything if each in known])
        write_results(name, rows, command=command, started=started, folder=folder)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    for part in ("attack", "method", "seed", "clean_fraction", "architecture"):
        parser.add_argument(f"--{part}", default="", help="measure these rows only, separated by commas")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results file")
    parser.add_argument("--tiny", action="store_true", help="prove that the preset runs; needs --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.tiny and options.out == FOLDER:
        parser.error("--tiny gives no figures: name another folder with --out")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asked = {part: value.split(",") for part in KEY if (value := getattr(options, part, ""))}
    run(
        f"purification-{options.preset}",
        [tiny(each) if options.tiny else each for each in PRESETS[options.preset]],
        options.data,
        wanted=lambda job: all(str(job[part]) in values for part, values in asked.items()),
        device=options.device,
        command=f"make bench-purify PRESET={options.preset} DATA=DATA",
        folder=options.out,
    )


if __name__ == "__main__":
    main()
