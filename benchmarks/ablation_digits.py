"""The purifiers on scikit-learn's digits, with their parts taken away: ``ablation-digits.json``.

``python -m benchmarks.ablation_digits``. A small network with a 2x2 patch planted at 10 %, three seeds;
each is purified with 397 clean images that it has not seen, and measured on 500 others.
"""

from __future__ import annotations

import argparse
import logging
import time
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.results import write_results
from benchmarks.zoo import load_digits_set
from defense_core import config
from defense_core.attacks import poison, probe_from_spec
from defense_core.data import split_clean_set
from defense_core.evaluate import evaluate
from defense_core.loop import Tuning, tune, working_copy
from defense_core.networks.small_cnn import small_cnn
from defense_core.progress import NullProgress
from defense_core.purify import METHODS
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 10, (0.3,), (0.35,))
TRIGGER = {"kind": "badnets", "size": 2, "target": 0}
RUNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("plain fine-tuning", "fine_tuning", {}),
    ("TSBD", "tsbd", {}),
    ("TSBD, no gradient norm", "tsbd", {"alpha": 0.0}),
    ("TSBD, nothing zeroed", "tsbd", {"n": 0.0}),
    ("distil", "distil", {}),
    ("distil, no more zeroed", "distil", {"n_factors": (1.0,)}),
    ("FIP", "fip", {}),
    ("FIP, the paper's", "fip", {"start": "given", "taught_lr": 0.0}),
    ("FIP, labels alone", "fip", {"taught_lr": 0.0}),
    ("FIP, answers alone", "fip", {"lr": 0.0}),
    ("FIP, no trace", "fip", {"eta_f": 0.0}),
    ("FIP, no retainer", "fip", {"eta_r": 0.0}),
    ("FIP, true Fisher", "fip", {"fisher": "true"}),
    ("Fast FIP", "fast_fip", {}),
    ("Fast FIP, the paper's", "fast_fip", {"start": "given", "taught_lr": 0.0}),
    ("Fast FIP, shifts alone", "fast_fip", {"norms": False}),
    ("NFT", "nft", {}),
    ("NFT, the paper's", "nft", {"taught_lr": 0.0, "sites": "norm", "ratio": 0.0, "sparsity": 0.0}),
    ("NFT, labels alone", "nft", {"taught_lr": 0.0}),
    ("NFT, answers alone", "nft", {"lr": 0.0}),
    ("NFT, no MixUp", "nft", {"mixup": 0.0}),
    ("NGF", "ngf", {}),
    ("NGF, the paper's", "ngf", {"part": "head"}),
    ("NGF, classifier after closing", "ngf", {"part": "masked"}),
    ("NGF, nothing closed", "ngf", {"part": "block"}),
)
"""What the tables call a run, the method, and what differs from its defaults."""


def rows_of(seed: int) -> list[dict[str, Any]]:
    """Train one victim and purify it with everything in ``RUNS``."""
    data, probe = load_digits_set(), probe_from_spec(TRIGGER, num_classes=10)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    train, clean, test = (data.subset(order[part]) for part in (slice(900), slice(900, 1297), slice(1297, None)))
    torch.manual_seed(seed)
    victim = working_copy(small_cnn(width=32, in_channels=1, num_classes=10), "cpu")
    tune(
        victim,
        poison(train, probe, rate=0.1, seed=seed).data,
        task=TASK,
        tuning=Tuning(30, 64, 0.05, weight_decay=5e-4, schedule="onecycle"),
        seed=seed,
        device="cpu",
        progress=NullProgress(),
        name="train",
    )
    splits = split_clean_set(clean, seed=seed, select=0.2, report=0.0)
    rows = []
    for label, method, settings in RUNS:
        row = METHODS[method]
        started = time.perf_counter()
        result = row.function(
            victim.eval(),
            splits,
            config.from_mapping(row.config, settings),
            task=TASK,
            seed=seed,
            device="cpu",
            progress=NullProgress(),
        )
        seconds = time.perf_counter() - started
        measured = evaluate(
            result.model, test, task=TASK, probes=(probe,), reference=victim, device="cpu", progress=NullProgress()
        ).to_results()
        attack = measured["probes"][0]
        rows.append(
            {
                "run": label,
                "method": method,
                "seed": seed,
                "acc_before": measured["acc_before"]["value"],
                "acc_after": measured["acc"]["value"],
                "asr_before": attack["asr_before"]["value"],
                "asr_after": attack["asr"]["value"],
                "der": attack["der"],
                "seconds": round(seconds, 1),
            }
        )
        logging.info("%s", rows[-1])
    return rows


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    rows = [row for seed in range(seeds) for row in rows_of(seed)]
    write_results("ablation-digits", rows, command="python -m benchmarks.ablation_digits", started=started)


if __name__ == "__main__":
    main()
