"""What each method costs beside another, as ratios in one run: ``speed.json``; and how cost grows: ``cost.json``.

``python -m benchmarks.speed --data FOLDER``. Both sides of a ratio purify the same model with the same clean data, one
after the other, whole methods with their own search for a strength; the fastest of ``--repeats`` counts. ``cost.json``
holds seconds of each method against clean images, width and depth, on untrained networks with one strength each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import device_name
from benchmarks.presets import NARROW, Setting, recipe_of
from benchmarks.purification import clean_splits
from benchmarks.results import commit, read_rows, write_results
from benchmarks.results import device as machine
from benchmarks.zoo import CONVOLUTIONAL, Victim, cifar10_task, load_cifar10, victim
from defense_core import architectures, config
from defense_core.data import CleanSet, split_clean_set
from defense_core.errors import MethodDiverged
from defense_core.evaluate import evaluate
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, Purified, purify

ATTACK = "blended"
PAIRS = (
    ("ngf", "fine_tuning"),
    ("ngf, masked", "fine_tuning"),
    ("ngf, head", "fine_tuning"),
    ("fip", "fine_tuning"),
    ("nft", "fine_tuning"),
    ("tsbd", "fine_tuning"),
    ("distil", "fine_tuning"),
    ("fast_fip", "fip"),
)
"""Method and what it is compared with; after a comma the part that NGF tunes, where it is not its default."""
CLEAN_IMAGES = (250, 500, 1000, 2000)
NETWORKS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("resnet20", {"num_classes": 10}),
    ("wrn16_1", {"num_classes": 10}),
    ("preact_resnet18", {"width": 8, "num_classes": 10}),
    ("preact_resnet18", {"width": 16, "num_classes": 10}),
    ("preact_resnet18", {"width": 32, "num_classes": 10}),
)


def purified(method: str, subject: Victim, setting: Setting, *, device: str) -> tuple[Purified, float]:
    """The outcome and the seconds of one purification."""
    clean = clean_splits(subject, setting, 0)
    started = time.perf_counter()
    name, _, part = method.partition(", ")
    settings = config.from_mapping(METHODS[name].config, {"part": part} if part else {})
    result = purify(
        subject.model, clean, settings, method=name, task=subject.task, seed=0, device=device, progress=NullProgress()
    )
    return result, time.perf_counter() - started


def ratios(
    subject: Victim, setting: Setting, pairs: Sequence[tuple[str, str]], *, device: str, repeats: int
) -> Iterator[dict[str, Any]]:
    """One row a pair."""
    assert subject.probe is not None
    names = dict.fromkeys(name for pair in pairs for name in pair)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    der = {}
    for _ in range(repeats):
        for name in names:
            result, took = purified(name, subject, setting, device=device)
            seconds[name].append(took)
            measured = evaluate(
                result.model, subject.test, task=subject.task, probes=(subject.probe,), reference=subject.model,
                device=device,
            )  # fmt: skip
            der[name] = measured.to_results()["probes"][0]["der"]
    for method, baseline in pairs:
        yield {
            "method": method,
            "baseline": baseline,
            "ratio": round(min(seconds[baseline]) / min(seconds[method]), 2),
            "seconds": round(min(seconds[method]), 2),
            "baseline_seconds": round(min(seconds[baseline]), 2),
            "der": der[method],
            "baseline_der": der[baseline],
            "device": device_name(device),
        }


def costs(train: CleanSet, known: Collection[tuple[Any, ...]] = (), *, device: str) -> Iterator[dict[str, Any]]:
    """Seconds of one attempt of each method, by clean images and by network; without those that are ``known``, by
    :func:`case_of`."""
    middle = ("preact_resnet18", {"width": 16, "num_classes": 10})
    cases = [(1000, *network) for network in NETWORKS if network != middle]
    for images, architecture, arguments in [*((count, *middle) for count in CLEAN_IMAGES), *cases]:
        network = architectures.initialise(architectures.build(architecture, arguments), 0)
        clean = split_clean_set(train.subset(torch.arange(images)), seed=0, select=0.2, report=0.0)
        for method, row in METHODS.items():
            case = {
                "method": method, "clean_images": images, "architecture": architecture, "width": arguments.get("width")
            }  # fmt: skip
            if row.baseline or case_of(case) in known:
                continue
            started = time.perf_counter()
            try:
                purify(
                    network, clean, one_attempt(row.config), method=method, task=cifar10_task(), seed=0, device=device,
                    progress=NullProgress(),
                )  # fmt: skip
                seconds = round(time.perf_counter() - started, 2)
            except MethodDiverged:
                seconds = None
            yield {**case, "parameters": architectures.count_parameters(network), "seconds": seconds}


def case_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row of ``cost.json`` is a figure of."""
    return tuple(row[name] for name in ("method", "clean_images", "architecture", "width"))


def one_attempt(kind: type[Any]) -> Any:
    """The method's defaults with the weakest strength of its grid alone, so that every case does the same work."""
    grids = {
        field.name: getattr(kind(), field.name)[:1]
        for field in fields(kind)
        if field.name.endswith(("_grid", "factors"))
    }
    return kind(**grids)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--method", default="", help="measure the ratios of this method's parts only, and keep the others"
    )
    parser.add_argument("--part", choices=("ratios", "costs", "both"), default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    started = datetime.now(UTC)
    train, test = load_cifar10(options.data)
    setting = Setting(0.05, (ATTACK,), architecture_args=NARROW, training=CONVOLUTIONAL)
    if options.part in ("ratios", "both"):
        subject = victim(recipe_of(ATTACK, setting), train, test, device=options.device, progress=NullProgress())
        pairs = [pair for pair in PAIRS if pair[0].partition(", ")[0] == options.method or not options.method]
        # Ratios of two machines do not compare: what one multiplies faster takes another share of the time.
        others = set(PAIRS) - set(pairs)
        here = [row for row in read_rows("speed") if row["measured"]["device"] == machine()]
        kept = [row for row in here if (row["method"], row["baseline"]) in others]
        rows = list(ratios(subject, setting, pairs, device=options.device, repeats=options.repeats))
        write_results(
            "speed", [*rows, *kept], command="python -m benchmarks.speed --data DATA --part ratios", started=started
        )
    if options.part in ("costs", "both"):
        # Most of an hour: what was measured here of this commit stands, and every figure is kept as soon as it is made.
        earlier, place = read_rows("cost"), (commit(), machine())
        known = {case_of(row) for row in earlier if (row["measured"]["commit"], row["measured"]["device"]) == place}
        rows = [row for row in earlier if case_of(row) in known]
        for row in costs(train, known, device=options.device):
            print(*(row[key] for key in ("architecture", "width", "clean_images", "method", "seconds")), flush=True)
            rows.append(row)
            made = {case_of(each) for each in rows}
            kept = [each for each in earlier if case_of(each) not in made]
            write_results(
                "cost", [*rows, *kept], command="python -m benchmarks.speed --data DATA --part costs", started=started
            )


if __name__ == "__main__":
    main()
