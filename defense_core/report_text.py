"""What a report says in words: safe text, numbers as people read them, the verdict, the residual risk."""

from __future__ import annotations

import math
import re
import shlex
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from defense_core.evaluate.compare import Estimate
from defense_core.evidence import UNPURIFIED
from defense_core.rounding import rounded

NOT_MEASURED = "–"
MAX_TEXT = 600
"""Longest text that is taken over from evidence; an error message can be of any length."""
MAX_DIGITS = 17
"""More than these no float has."""
MAX_ARGUMENT = 1 << 16
"""Longest argument of a command; Linux takes twice that."""

_LABELS = {
    "before": "Before",
    "tsbd": "TSBD",
    "distil": "Distillation",
    "fine_tuning": "Fine-tuning",
    "nft": "NFT",
    "ngf": "NGF",
    "fip": "FIP",
    "fast_fip": "Fast FIP",
    "soup": "Soup",
    UNPURIFIED: "As it came in",
}


def label(method: str) -> str:
    """A method's name as its paper writes it, where that is known."""
    return _LABELS.get(method, method)


def at(mapping: Any, *keys: str) -> Any:
    """The value at ``keys``; ``None`` where there is none, whatever stands on the way."""
    for key in keys:
        if not isinstance(mapping, Mapping):
            return None
        mapping = mapping.get(key)
    return mapping


def items_at(mapping: Any, *keys: str) -> list[Any]:
    """The items of the list at ``keys``; nothing where there is no list."""
    found = at(mapping, *keys)
    return list(found) if isinstance(found, (list, tuple)) else []


def mappings_at(mapping: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The mappings in the list at ``keys``; nothing where there is no list."""
    return [item for item in items_at(mapping, *keys) if isinstance(item, Mapping)]


def number(value: Any) -> float | None:
    """``value`` as a finite float; ``None`` for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number that no float can hold
        return None


def count(value: Any) -> int | None:
    """``value`` as a whole number that is not negative; ``None`` for anything else."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """``value`` as text without control, formatting and private characters, at most ``limit`` long.

    Line breaks become spaces. Right-to-left overrides and zero-width characters, which can make
    a name look like another one, become a replacement sign.
    """
    if value is None:
        return ""
    raw = verbatim(value)[: 4 * limit]
    clean = "".join("\ufffd" if _is_unseen(sign) else sign for sign in " ".join(raw.split()))
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"


def verbatim(value: Any) -> str:
    """``value`` as text, whole and as it is: for :func:`command`, and for nothing that is shown by itself."""
    if value is None:
        return ""
    return value if isinstance(value, str) else repr(value) if isinstance(value, (list, tuple, Mapping)) else str(value)


def can_be_shown(argument: str) -> bool:
    """Whether a command can hold ``argument`` so that it is the same when it is pasted into a shell."""
    return len(argument) <= MAX_ARGUMENT and not any(map(_is_unseen, argument))


def _is_unseen(sign: str) -> bool:
    return unicodedata.category(sign).startswith("C")


def percent(value: float | None, digits: int = 1) -> str:
    """``0.9723`` as ``97.2 %``."""
    return NOT_MEASURED if value is None else f"{100 * value:.{digits}f}\u00a0%"


def points(value: float | None) -> str:
    """A drop of ``0.012`` as ``−1.2 points``, a rise with a plus sign."""
    if value is None:
        return NOT_MEASURED
    shown = round(-100 * value, 1)
    return f"{'+' if shown > 0 else '−' if shown < 0 else '±'}{abs(shown):.1f} points"


def span(estimate: Estimate) -> str:
    """The interval of an estimate, ``95.4–98.4 %``; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}\u00a0%"


def plain(value: Any) -> str:
    """Any JSON value as a person reads it in a table cell."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    shown = text(value, 120)
    return f"{shown[7:19]}…" if re.fullmatch(r"sha256:[0-9a-f]{64}", shown) else shown


def plain_beside(value: Any, bound: str) -> str:
    """:func:`plain`, with as many digits as show on which side of ``bound`` (``<= 0.05``) a number lies."""
    return rounded(value, bound) if isinstance(value, float) else plain(value)


def percent_apart(value: float | None, bound: float | None) -> str:
    """:func:`percent`, with as many digits as tell ``value`` from ``bound``."""
    return _apart(value, bound, percent, digits=1)


def code_apart(value: float | None, bound: float | None) -> str:
    """Two significant digits, or as many more as tell ``value`` from ``bound``; empty where there is none."""
    return _apart(value, bound, lambda each, digits: "" if each is None else f"{each:.{digits}g}", digits=2)


def _apart(value: float | None, bound: float | None, form: Callable[[float | None, int], str], *, digits: int) -> str:
    if value is not None and bound is not None and value != bound:
        while digits < MAX_DIGITS and form(value, digits) == form(bound, digits):
            digits += 1
    return form(value, digits)


def size(value: Any) -> str:
    """Bytes as ``44.7 MB``."""
    amount = number(value)
    if amount is None:
        return ""
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"


def seconds(value: Any) -> str:
    """A duration as ``3.2 s`` or ``2 min 5 s``."""
    amount = number(value)
    if amount is None:
        return ""
    if amount < 60:
        return f"{amount:.1f} s"
    return f"{int(amount // 60)} min {int(amount % 60)} s"


def command(program: str, options: Sequence[tuple[str, Any]]) -> str:
    """A shell command; every value is quoted, options without one are left out.

    No value is cut, which would be another one: one that cannot be shown whole is left out too, and the line above
    the command says of which option.
    """
    words, hidden = [program], []
    for name, value in options:
        argument = verbatim(value) if value != () else ""
        if argument and can_be_shown(argument):
            words.append(f"{name} {shlex.quote(argument)}")
        elif argument:
            hidden.append(name)
    line = " \\\n    ".join(words) if len(words) > 2 else " ".join(words)
    told = f"# Add what cannot be shown here: {', '.join(dict.fromkeys(hidden))}\n" if hidden else ""
    return told + line


# -- the verdict -----------------------------------------------------------------------


def verdict_sentences(
    outcome: str,
    *,
    method: str,
    policy: str,
    rules: Mapping[str, int],
    failed: Sequence[str],
    promotion: Any,
    waived: int = 0,
) -> tuple[str, str]:
    """The verdict in one sentence, and a second one that says why or what follows.

    Args:
        outcome: ``allow``, ``deny``, ``unknown``, ``observe``, or empty where nothing was decided.
        method: the chosen method; may be empty.
        policy: the policy's name.
        rules: blocking rules by verdict (``PASS``, ``FAIL``, ``UNKNOWN``).
        failed: names of steps that failed.
        promotion: the results of the promote step, if there are any.
        waived: rules that would block, but that an exception or an approval lets rest.
    """
    total = sum(rules.values())
    rest = f"; {_rules(waived, 'more ')} {_is(waived)} waived, see below" if waived else ""
    under = f" of policy “{policy}”" if policy else ""
    registered = _registered(promotion)
    if not outcome:
        where = f"Stopped at {failed[0]}" if failed else "Incomplete"
        more = "The reason is below." if failed else "The evidence so far is below."
        return f"{where}: no decision was made.", f"Nothing was promoted. {more}"
    if outcome == "allow":
        model = f"the model purified with {label(method)}" if method else "the model"
        if method == UNPURIFIED:
            model = "the model as it came in, not purified,"
        if failed:
            met = f"The model met {_all(total)}{rest}."
            return f"Allowed, but not finished: the step {failed[0]} failed.", f"{met} {registered}"
        return f"Allowed: {model} met {_all(total)}{under}{rest}.", registered
    if outcome == "deny":
        undecided = f", and {_rules(rules['UNKNOWN'])} could not be decided" if rules["UNKNOWN"] else ""
        return f"Denied: {_of(rules['FAIL'], total)}{under} {_is(rules['FAIL'])} not met{undecided}.", registered
    if outcome == "unknown":
        return f"Undecided, so not promoted: {_of(rules['UNKNOWN'], total)}{under} could not be decided.", registered
    unmet = rules["FAIL"] + rules["UNKNOWN"]
    met = f"it met {_all(total)}" if not unmet else f"{_of(unmet, total)} {_is(unmet)} not met or not decided"
    return f"Observed only: {met}{rest}.", f"The policy “{policy}” promotes nothing, whatever the figures say."


def contradiction(outcome: str, *, verdict: Any, rules: Mapping[str, int], chain: Sequence[str]) -> str:
    """Why an outcome ``allow`` cannot be believed; empty where it can, and for every other outcome.

    Args:
        verdict: the decision's own verdict.
        rules: blocking rules by verdict.
        chain: steps whose digests do not fit those of earlier steps.
    """
    if outcome != "allow":
        return ""
    unmet = rules["FAIL"] + rules["UNKNOWN"]
    if verdict != "PASS":
        return "its own verdict is not PASS"
    if unmet:
        return f"{_of(unmet, sum(rules.values()))} {_is(unmet)} not met"
    if not rules["PASS"]:
        return "it names no blocking rule"
    return f"the chain of digests is broken at {', '.join(chain)}" if chain else ""


def _registered(promotion: Any) -> str:
    name, version = text(at(promotion, "name"), 120), text(at(promotion, "version"), 40)
    if not name:
        return "Nothing was registered."
    sentence = f"Registered as {name}, version {version}"
    alias = text(at(promotion, "alias"), 60)
    if at(promotion, "decision") not in (None, "allow"):
        return f"{sentence}, tagged quarantined; no alias was moved."
    if alias and text(at(promotion, "alias_version"), 40) == version:
        return f"{sentence}; the alias {alias} points to it."
    return f"{sentence}."


def _of(some: int, total: int) -> str:
    return f"{some} of {_rules(total, 'blocking ')}"


def _all(total: int) -> str:
    return "the one blocking rule" if total == 1 else f"all {total} blocking rules"


def _is(some: int) -> str:
    return "is" if some == 1 else "are"


def _rules(amount: int, kind: str = "") -> str:
    return f"{amount} {kind}rule{'' if amount == 1 else 's'}"


# -- residual risk ---------------------------------------------------------------------


def residual_risks(evaluation: Any, *, scanned: bool, exported: Any, method: str) -> tuple[str, ...]:
    """What this run does not show, in plain words.

    Args:
        evaluation: the results of evaluating the chosen model, if there are any.
        scanned: whether a backdoor scan is part of the evidence.
        exported: the results of the export step, if there are any.
        method: the chosen method; may be empty.
    """
    risks: list[str] = []
    if not isinstance(evaluation, Mapping) or at(evaluation, "acc") is None:
        risks.append("No model was chosen and measured, so nothing can be said about what a backdoor would still do.")
    else:
        risks.extend(_measured_risks(evaluation))
    if not scanned:
        risks.append(
            "No backdoor scan was part of this run. Whether the incoming model carries a backdoor was not tested "
            "without knowing its trigger."
        )
    if method == UNPURIFIED:
        risks.append(
            "Nothing was purified, because the scan found no evidence of a backdoor. That is not a proof that there is "
            "none: a trigger that the scan does not look for would still work."
        )
    elif method:
        risks.append(
            "Purification lowers the chance that a hidden trigger works. It cannot prove that none is left: a trigger "
            "that is stronger than, or unlike, everything tried here may still work."
        )
    if exported is None:
        risks.append("No ONNX file was made, so the answers of the model as it would be served were not compared.")
    elif not mappings_at(exported, "parity"):
        risks.append("The ONNX file could not be run, so its answers were not compared with those of the model.")
    return tuple(risks)


def _measured_risks(evaluation: Mapping[str, Any]) -> list[str]:
    risks = []
    images = count(at(evaluation, "images")) or count(at(evaluation, "acc", "trials"))
    probes = mappings_at(evaluation, "probes")
    if not probes:
        risks.append(
            "No trigger is known for this model. Attack success was therefore not measured; the figures show only "
            "accuracy on clean images."
        )
    for probe in probes:
        name, kind = text(at(probe, "name"), 60), text(at(probe, "kind"), 40)
        done, trials = count(at(probe, "asr", "successes")), count(at(probe, "asr", "trials"))
        high = number(at(probe, "asr", "high"))
        if done is not None and trials and high is not None:
            risks.append(
                f"The known trigger {name} ({kind}) still worked on {done} of {trials} images; with 95 % confidence "
                f"on at most {percent(high)}. This says nothing about triggers of another shape, place, size or kind."
            )
    if images:
        fewest = min(
            (n for row in mappings_at(evaluation, "classes") if (n := count(row.get("trials"))) is not None),
            default=None,
        )
        thin = (
            f" The smallest class has {fewest}: its own figure is rough." if fewest is not None and fewest < 30 else ""
        )
        risks.append(f"All figures rest on {images} held-out images.{thin}")
    return risks
