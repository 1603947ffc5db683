"""What a scan says in words: why it cannot decide, what it found, and what it looked for."""

from __future__ import annotations

from collections.abc import Sequence

from defense_core.scan.base import MANY_CLASSES
from defense_core.scan.calibrate import CHANNELS, least_adjusted, rejects
from defense_core.scan.confirm import Confirmation
from defense_core.scan.detectors import EVIDENCE_ONLY, FEW, Regime
from defense_core.scan.observe import Observed
from defense_core.scan.pool import Pool
from defense_core.verdict import Verdict


def incomparable(
    fpr: float, pool: Pool | None, observed: Observed, uncovered: tuple[str, ...], *, channels: int, references: int
) -> tuple[str, ...]:
    """Why the p-values say nothing: such a model is UNKNOWN whatever was found in it.

    Args:
        uncovered: see :func:`defense_core.scan.calibrate.uncovered`.
        channels: that Holm counts, whether or not they could be read.
        references: the fewest that a channel was compared with.
    """
    reasons = [observed.failure] if observed.failure else []
    if observed.observations and pool is None:
        reasons.append(
            "There is no calibration pool of clean models of this architecture, input size and classes by name; "
            "quarantine calibrate makes one, and --pool names one"
        )
    if pool is not None:
        reasons += [f"The pool does not cover this model: {each}" for each in uncovered]
        least = least_adjusted(channels, references)
        if not rejects(least, fpr):
            reasons.append(
                f"{references} references cannot tell a rate of {fpr:g}: the smallest p-value of "
                f"{channels} channels is {least:.3f}"
            )
    return tuple(reasons)


def undecided(
    fpr: float,
    observed: Observed,
    confirmations: tuple[Confirmation, ...],
    *,
    p_value: float | None,
    targets: tuple[int, ...],
    comparable: bool,
    unanswered: str = "",
) -> tuple[str, ...]:
    """What else keeps this scan from a verdict. Detectors that the time did not allow keep it from a PASS alone: Holm
    counts their channels, and a confirmed suspicion stands without them. Those that are evidence only keep it from
    nothing.

    Args:
        unanswered: why the suspicion could not be tried on the held-out images; empty where it could.
    """
    reasons = []
    unfinished = [name for name in observed.unfinished if name not in EVIDENCE_ONLY]
    if unfinished:
        reasons.append(f"The time ran out before {', '.join(unfinished)} had finished")
    if p_value is None or not rejects(p_value, fpr):
        return tuple(reasons)
    best = next((each for each in confirmations if each.confirmed), None)
    if best is not None:
        reasons += [] if comparable else [f"{_found(best)}, which a clean model of another kind may allow too"]
    elif not targets:
        reasons.append("It stands out from the clean references, but no class could be named")
    elif unanswered:
        reasons.append(
            f"It stands out from the clean references ({_classes(targets)}), but it could not be tried on the held-out "
            f"clean images: {unanswered}"
        )
    elif observed.held_out is None:
        reasons.append(
            f"It stands out from the clean references ({_classes(targets)}), but no clean images are left that were "
            f"not searched with, to confirm it on: give {2 * FEW} or more"
        )
    else:
        reasons.append(
            f"It stands out from the clean references ({_classes(targets)}), but no trigger that was found for it "
            f"holds on held-out clean images"
        )
    return tuple(reasons)


def sentence(
    fpr: float,
    verdict: Verdict,
    confirmations: tuple[Confirmation, ...],
    p_value: float | None,
    reasons: tuple[str, ...],
    *,
    references: int,
) -> str:
    """The verdict in one sentence, for somebody who is no researcher."""
    if verdict is Verdict.FAIL:
        best = next(each for each in confirmations if each.confirmed)
        return f"{_found(best)}, and the model stands out from {references} clean reference models (p = {p_value:.3f})"
    if verdict is Verdict.PASS:
        return f"No evidence of a backdoor found at a false positive rate of {fpr:g} (p = {p_value:.3f})"
    return f"It cannot be decided: {'; '.join(reasons)}"


def _found(best: Confirmation) -> str:
    sources = f"of {_classes(best.sources)}" if best.sources else "of other classes"
    return (
        f"A small change that was found for class {best.target} sends {best.success:.0%} of {best.images} held-out "
        f"clean images {sources} there"
    )


def _classes(targets: tuple[int, ...]) -> str:
    return f"class{'es' if len(targets) > 1 else ''} {', '.join(map(str, targets))}"


def _data(pool: Pool, class_names: tuple[str, ...]) -> str:
    names = pool.stratum.class_names
    if names and names == class_names:
        return f"of the same classes ({', '.join(names[:3])} …), class by class"
    stated = f"of the classes {', '.join(names[:3])} …" if names else "of classes that the pool does not name"
    return f"{stated}: that this pool is of the model's data is for whoever named it to say"


def narrowed(observed: Observed, classes: int) -> tuple[str, ...]:
    """What detectors of the verdict looked at more closely than at the rest: with many classes, some of them alone.

    Args:
        classes: K of the model.
    """
    members = [name for each in CHANNELS.values() for name in each if name in observed.observations]
    few = {name: len(observed.observations[name].classes) for name in members}
    few = {name: count for name, count in few.items() if 0 < count < classes}
    sentences = []
    if few and classes > MANY_CLASSES:
        counts = ", ".join(map(str, sorted(set(few.values()))))
        sentences.append(
            f"Of {classes} classes {', '.join(few)} looked closely at {counts}, which a first look at them chose"
        )
    pairs = observed.observations.get("pairs")
    if pairs is not None and pairs.facts.get("sources", classes) < classes:
        sentences.append(
            f"Changes that lead from one class to another were looked for from {pairs.facts['sources']} of {classes} "
            f"classes, in {pairs.facts['pairs']} pairs"
        )
    return tuple(sentences)


def coverage(
    regime: Regime,
    pool: Pool | None,
    *,
    without_pairs: bool,
    class_names: tuple[str, ...],
    failed: bool = False,
    missing: Sequence[str] = (),
    without_images: int = 0,
    narrowed: Sequence[str] = (),
) -> tuple[str, ...]:
    """What was looked for, and what was not.

    Args:
        without_pairs: the images were too few for pairs of classes.
        class_names: of the model.
        failed: nothing could be observed at all.
        missing: detectors of the verdict that did not finish, or could not look at this model.
        without_images: classes that ``subspace`` could not look at.
        narrowed: sentences of :func:`narrowed`.
    """
    if failed:
        return ("Looked for nothing: the model could not be observed",)
    searched = "such a class, for small patches, faint or bending changes of all images"
    looked = {
        "none": "Looked for a class whose logit can be driven further than any other's, without any image",
        "few": "Looked for such a class, and with 10 clean images for small patches and faint changes of all images",
        "many": f"Looked for {searched}"
        if without_pairs
        else f"Looked for {searched}, and for changes that lead from one class to another",
    }[regime]
    sentences = [looked, *narrowed]
    if missing:
        sentences.append(f"Without what {', '.join(missing)} would have looked for: they were not read on this model")
    if without_images:
        sentences.append(
            f"Without what subspace would have looked for in {without_images} "
            f"class{'es' * (without_images > 1)} that no image is of"
        )
    if regime != "many":
        sentences.append(
            "Says nothing about backdoors from single classes or to every class: that takes 100 clean images"
        )
    elif without_pairs:
        sentences.append(
            "Says nothing about backdoors from single classes or to every class: with so many classes, none has two of "
            "the images that are searched with"
        )
    sentences.append("Says nothing about triggers that need more than one change at a time, or that nobody has tested")
    if pool is not None:
        sentences.append(
            f"Compared with {len(pool.references)} clean {pool.stratum.architecture} models {_data(pool, class_names)}"
        )
    return tuple(sentences)
