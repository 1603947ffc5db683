"""Evaluation of models whose every answer is known."""

import copy
import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from defense_core.attacks import BadNets, Probe
from defense_core.data import CleanSet
from defense_core.errors import (
    EXIT_UNKNOWN,
    Cancelled,
    ConfigError,
    DataError,
    EvidenceMismatch,
    NonFiniteOutputs,
    StateDictMismatch,
)
from defense_core.evaluate import HEADINGS, ComparisonRow, Estimate, PairedCounts, Proportion, compare, evaluate
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

CLASSES = 4
TASK = ImageClassification((1, 4, 4), CLASSES, (0.0,), (1.0,))


class Reader(nn.Module):
    """Answers with the class written in the top left pixel, or with ``obey`` where the bottom right pixel is 255.

    ``blind`` classes are mistaken for the next one. The unused layers carry the state that must survive.
    """

    def __init__(self, obey: str | int | None = None, blind: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.obey, self.blind = obey, blind
        self.norm, self.dropout = nn.BatchNorm2d(1), nn.Dropout(0.9)
        self.calls: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.dropout(self.norm(inputs))
        self.calls.append(len(inputs))
        pixels = (inputs * 255).round().long()
        answers = pixels[:, 0, 0, 0] % CLASSES
        for label in self.blind:
            answers = torch.where(answers == label, (label + 1) % CLASSES, answers)
        if self.obey is not None:
            wanted = (answers + 1) % CLASSES if self.obey == "next" else torch.full_like(answers, int(self.obey))
            answers = torch.where(pixels[:, 0, 3, 3] == 255, wanted, answers)
        return nn.functional.one_hot(answers, CLASSES).float()


def clean_set(counts: tuple[int, ...] = (10, 10, 10, 10)) -> CleanSet:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    return CleanSet(images, labels, CLASSES)


def patch(target: int | None = 0, name: str = "patch") -> Probe:
    return Probe(name, "badnets", BadNets(size=1), CLASSES, target)


# -- figures ---------------------------------------------------------------------------


def test_accuracy_counts_every_image_over_uneven_batches():
    found = evaluate(Reader(blind=(1,)), clean_set((10, 7, 3, 5)), task=TASK, batch_size=4)
    assert found.acc == Proportion(18, 25)
    assert [(row.label, row.acc) for row in found.classes] == [
        (0, Proportion(10, 10)),
        (1, Proportion(0, 7)),
        (2, Proportion(3, 3)),
        (3, Proportion(5, 5)),
    ]


def test_asr_and_ra_count_images_of_other_classes_only():
    backdoored, cured = Reader(obey=2), Reader()
    before = evaluate(backdoored, clean_set((10, 7, 9, 5)), task=TASK, probes=[patch(2)]).probes[0]
    assert (before.asr, before.ra) == (Proportion(22, 22), Proportion(0, 22))
    after = evaluate(cured, clean_set((10, 7, 9, 5)), task=TASK, probes=[patch(2)]).probes[0]
    assert (after.asr, after.ra) == (Proportion(0, 22), Proportion(22, 22))


def test_an_innocent_error_towards_the_target_counts_as_success():
    """Class 1 is mistaken for class 2 with or without trigger: ASR counts answers, not causes."""
    found = evaluate(Reader(blind=(1,)), clean_set(), task=TASK, probes=[patch(2)]).probes[0]
    assert (found.asr, found.ra) == (Proportion(10, 30), Proportion(20, 30))


def test_all_to_all_counts_every_image_against_its_own_target():
    found = evaluate(Reader(obey="next"), clean_set(), task=TASK, probes=[patch(None)]).probes[0]
    assert found.target is None
    assert (found.asr, found.ra) == (Proportion(40, 40), Proportion(0, 40))


def test_reference_gives_paired_drops_and_der():
    found = evaluate(Reader(blind=(3,)), clean_set(), task=TASK, probes=[patch(0)], reference=Reader(obey=0))
    assert found.paired == PairedCounts(30, 10, 0, 0)
    assert found.acc_drop == 0.25
    assert [row.drop for row in found.classes] == [0, 0, 0, 1]
    assert found.class_acc_drop_max == 1
    probe = found.probes[0]
    # Class 3 is now mistaken for class 0, which is what the attacker wants.
    assert probe.asr_paired == PairedCounts(10, 20, 0, 0)
    assert probe.ra_paired == PairedCounts(0, 0, 20, 10)
    assert probe.der == pytest.approx((20 / 30 - 0.25 + 1) / 2)
    assert probe.der_interval.low <= probe.der <= probe.der_interval.high


def test_without_reference_nothing_is_said_about_before():
    found = evaluate(Reader(), clean_set(), task=TASK, probes=[patch()])
    assert (found.paired, found.acc_drop, found.class_acc_drop_max) == (None, None, None)
    assert all(row.paired is None and row.drop is None for row in found.classes)
    probe = found.probes[0]
    assert (probe.asr_paired, probe.ra_paired, probe.der, probe.der_interval) == (None, None, None, None)


def test_only_target_class_images_leave_asr_undefined():
    found = evaluate(Reader(), clean_set((5, 0, 0, 0)), task=TASK, probes=[patch(0)], reference=Reader())
    results = found.to_results()
    assert results["probes"][0]["asr"] == {"value": None, "low": None, "high": None, "successes": 0, "trials": 0}
    assert results["probes"][0]["der"] is None
    assert results["probes"][0]["der_interval"] is None
    assert results["asr_max"] is None
    assert results["class_acc_drop_max"] is None  # three classes were never looked at
    assert results["classes"][1] == {"label": 1, "acc": None, "acc_before": None, "drop": None, "trials": 0}


# -- the evidence mapping --------------------------------------------------------------


def test_results_have_the_documented_shape():
    probes = [patch(0, "one"), patch(1, "two")]
    results = evaluate(Reader(blind=(3,)), clean_set(), task=TASK, probes=probes, reference=Reader(obey=0)).to_results()
    figure = {"value", "low", "high", "successes", "trials"}
    assert set(results) == {
        "images", "acc", "acc_before", "acc_drop", "acc_drop_interval",
        "class_acc_drop_max", "classes", "probes", "asr_max",
    }  # fmt: skip
    assert set(results["acc"]) == set(results["acc_before"]) == figure
    assert results["acc"]["value"] == 0.75
    assert results["acc_before"]["value"] == 1
    assert results["acc_drop"] == 0.25
    assert results["acc_drop_interval"]["value"] == 0.25
    assert results["acc_drop_interval"]["low"] < 0.25 < results["acc_drop_interval"]["high"]
    assert results["images"] == 40
    assert results["classes"][3] == {"label": 3, "acc": 0.0, "acc_before": 1.0, "drop": 1.0, "trials": 10}
    one, two = results["probes"]
    assert set(one) == {"name", "kind", "target", "asr", "ra", "asr_before", "ra_before", "der", "der_interval"}
    assert set(one["asr"]) == set(one["ra"]) == set(one["asr_before"]) == set(one["ra_before"]) == figure
    assert (one["name"], one["kind"], one["target"]) == ("one", "badnets", 0)
    assert one["asr_before"]["value"] == 1
    assert one["ra_before"]["value"] == 0
    assert results["asr_max"] == {"value": one["asr"]["value"], "high": one["asr"]["high"]}
    assert one["asr"]["value"] > two["asr"]["value"]
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_results_without_reference_and_probes_hold_nulls():
    results = evaluate(Reader(), clean_set(), task=TASK).to_results()
    for key in ("acc_before", "acc_drop", "acc_drop_interval", "class_acc_drop_max", "asr_max"):
        assert results[key] is None
    assert results["probes"] == []
    assert {row["acc_before"] for row in results["classes"]} == {None}


# -- the model is left as it was -------------------------------------------------------


def state(model: Reader) -> tuple:
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        list(model.calls),
    )


def same(one: tuple, other: tuple) -> bool:
    tensors = all(torch.equal(one[2][name], other[2][name]) for name in one[2])
    grads = all((a is None and b is None) or torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))
    return tensors and grads and one[:2] == other[:2] and one[4] == other[4]


def prepared() -> Reader:
    model = Reader(obey=0).train()
    model.dropout.eval()  # a mixed mode must come back mixed
    model.norm.register_forward_hook(lambda *_: None)
    model.norm.weight.grad = torch.tensor([3.0])
    return model


def test_model_and_reference_are_left_as_they_were():
    model, reference = prepared(), prepared()
    before, reference_before = state(model), state(reference)
    evaluate(model, clean_set(), task=TASK, probes=[patch()], reference=reference)
    assert same(state(model), before)
    assert same(state(reference), reference_before)


def test_model_is_left_as_it_was_after_a_failure():
    model = prepared()
    before = state(model)
    with pytest.raises(DataError):
        evaluate(model, clean_set(), task=TASK, probes=[Broken("float")])
    assert same(state(model), before)


def test_clean_set_is_left_as_it_was():
    clean = clean_set()
    digest = clean.digest
    evaluate(Reader(), clean, task=TASK, probes=[Vandal("vandal", "badnets", BadNets(size=1), CLASSES, 0)])
    assert CleanSet(clean.images, clean.labels, CLASSES).digest == digest


def test_evaluation_mode_is_used_whatever_the_mode():
    class Moody(Reader):
        def forward(self, inputs: Tensor) -> Tensor:
            answers = super().forward(inputs)
            return answers.flip(1) if self.training or torch.is_grad_enabled() else answers

    assert evaluate(Moody().train(), clean_set(), task=TASK).acc == Proportion(40, 40)


def test_equal_models_give_equal_results():
    model = Reader(obey=0)
    first = evaluate(model, clean_set(), task=TASK, probes=[patch()], batch_size=7)
    assert evaluate(copy.deepcopy(model), clean_set(), task=TASK, probes=[patch()], batch_size=40) == first


# -- bad input -------------------------------------------------------------------------


class Vandal(Probe):
    def apply(self, images: Tensor) -> Tensor:
        images.zero_()
        return images


@dataclass(frozen=True)
class Broken:
    """A probe that returns something else than uint8 images of the same shape."""

    how: str
    name: str = "broken"
    kind: str = "broken"
    target: int = 0

    def apply(self, images: Tensor) -> Tensor:
        return images.float() if self.how == "float" else images[:, :, :2]

    def expected(self, labels: Tensor) -> Tensor:
        return torch.zeros_like(labels)

    def eligible(self, labels: Tensor) -> Tensor:
        return labels != 0


class Constant(nn.Module):
    def __init__(self, row: list[float]) -> None:
        super().__init__()
        self.row = row

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.tensor(self.row).expand(len(inputs), -1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_logits_are_an_error_never_a_figure(value):
    with pytest.raises(NonFiniteOutputs, match="NaN or Inf") as caught:
        evaluate(Constant([0.0, value, 0.0, 0.0]), clean_set(), task=TASK)
    assert caught.value.exit_code == EXIT_UNKNOWN


def test_non_finite_logits_of_the_reference_are_an_error_too():
    with pytest.raises(NonFiniteOutputs):
        evaluate(Reader(), clean_set(), task=TASK, reference=Constant([float("nan")] * 4))


@pytest.mark.parametrize("row", [[1.0, 0.0], [0.0] * 5])
def test_wrong_class_count_is_named(row):
    with pytest.raises(StateDictMismatch, match=r"expected logits of shape \(40, 4\), got \(40, "):
        evaluate(Constant(row), clean_set(), task=TASK)


def test_answers_that_are_no_tensor_are_named():
    class Pair(nn.Module):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            return inputs, inputs

    with pytest.raises(StateDictMismatch, match="got tuple"):
        evaluate(Pair(), clean_set(), task=TASK)


def test_empty_set_is_refused():
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(Reader(), clean_set((0, 0, 0, 0)), task=TASK)


def test_samples_of_another_task_are_refused():
    other = ImageClassification((1, 4, 4), 7, (0.0,), (1.0,))
    with pytest.raises(DataError, match="expected 7 classes, got 4 classes"):
        evaluate(Reader(), clean_set(), task=other)


def test_repeated_probe_names_are_refused():
    with pytest.raises(DataError, match="got patch"):
        evaluate(Reader(), clean_set(), task=TASK, probes=[patch(0), patch(1)])
    with pytest.raises(DataError, match="other than 'clean', got clean"):
        evaluate(Reader(), clean_set(), task=TASK, probes=[patch(name="clean")])


@pytest.mark.parametrize("how", ["float", "crop"])
def test_probe_that_returns_no_images_is_refused(how):
    with pytest.raises(DataError, match="probe broken"):
        evaluate(Reader(), clean_set(), task=TASK, probes=[Broken(how)])


def test_large_images_go_through_a_few_at_a_time(monkeypatch):
    seen = []

    class Counting(Reader):
        def forward(self, x):
            seen.append(len(x))
            return super().forward(x)

    clean = clean_set((10, 7, 3, 5))
    whole = evaluate(Reader(), clean, task=TASK)
    monkeypatch.setattr("defense_core.inference.PIXELS_AT_ONCE", 6 * clean.images[0, 0].numel())
    assert evaluate(Counting(), clean, task=TASK) == whole
    assert seen == [6, 6, 6, 6, 1]


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(Reader(), clean_set(), task=TASK, batch_size=0)


# -- progress --------------------------------------------------------------------------


class Recorder(NullProgress):
    def __init__(self, stop_at: int | None = None) -> None:
        self.opened: list[tuple[str, int | None]] = []
        self.asked = 0
        self.stop_at = stop_at
        super().__init__(self._asked)

    def _asked(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at

    def phase(self, name, total=None):
        self.opened.append((name, total))
        return super().phase(name, total)


def test_progress_reaches_its_total():
    progress = Recorder()
    evaluate(Reader(), clean_set(), task=TASK, probes=[patch()], reference=Reader(), batch_size=16, progress=progress)
    assert progress.opened == [("evaluate", 2 * 3 + 2 * 2)]
    assert progress.asked == 10


def test_a_stop_request_takes_effect_within_one_batch():
    progress = Recorder(stop_at=2)
    with pytest.raises(Cancelled):
        evaluate(Reader(), clean_set(), task=TASK, batch_size=8, progress=progress)
    assert progress.asked == 2


# -- the table -------------------------------------------------------------------------


def results_by_method() -> dict:
    clean, probes, source = clean_set(), [patch(0, "one"), patch(1, "two")], Reader(obey=0)
    return {
        "fine_tuning": evaluate(source, clean, task=TASK, probes=probes, reference=source).to_results(),
        "tsbd": evaluate(Reader(), clean, task=TASK, probes=probes, reference=source).to_results(),
        "before": evaluate(source, clean, task=TASK, probes=probes).to_results(),
        "anp": evaluate(Reader(blind=(3,)), clean, task=TASK, probes=probes, reference=source).to_results(),
    }


def test_table_stands_in_a_fixed_order_with_roles():
    rows = compare(results_by_method(), selected="tsbd")
    assert [(row.method, row.role, row.selected, row.probe) for row in rows] == [
        ("before", "before", False, "one"),
        ("before", "before", False, "two"),
        ("tsbd", "after", True, "one"),
        ("tsbd", "after", True, "two"),
        ("anp", "after", False, "one"),
        ("anp", "after", False, "two"),
        ("fine_tuning", "control", False, "one"),
        ("fine_tuning", "control", False, "two"),
    ]


def test_table_carries_figures_with_intervals():
    rows = compare(results_by_method(), selected="tsbd")
    before, after = rows[0], rows[2]
    interval = Proportion(30, 30).wilson()
    assert before.asr == Estimate(1.0, interval.low, interval.high)
    assert before.der == Estimate()
    assert (after.asr.value, after.ra.value, after.der.value) == (0.0, 1.0, 1.0)
    assert after.der.low < 1.0 == after.der.high


def test_table_rows_read_as_text():
    row = ComparisonRow(
        "tsbd", "after", True, None, Estimate(0.9, 0.85, 0.95), Estimate(), Estimate(0.5), Estimate(0.25, 0.2, 0.3)
    )
    assert row.cells() == ("tsbd *", "after", "n/a", "0.900 [0.850, 0.950]", "n/a", "0.500", "0.250 [0.200, 0.300]")
    assert row.cells(digits=1)[3] == "0.9 [0.8, 0.9]"
    assert len(row.cells()) == len(HEADINGS)


def test_table_without_probes_has_one_row_a_model():
    results = {"before": evaluate(Reader(), clean_set(), task=TASK).to_results()}
    rows = compare(results, selected=None)
    assert [(row.method, row.probe, row.acc.value, row.asr) for row in rows] == [("before", None, 1.0, Estimate())]


def test_the_control_can_be_the_chosen_one():
    rows = compare(results_by_method(), selected="fine_tuning")
    assert [(row.method, row.role) for row in rows if row.selected] == [("fine_tuning", "control")] * 2


@pytest.mark.parametrize("damage", [{}, {"acc": None, "probes": []}, {"acc": {"value": 1}, "probes": []}])
def test_table_of_something_else_is_refused(damage):
    with pytest.raises(EvidenceMismatch, match=r"evaluate\.tsbd"):
        compare({"tsbd": damage}, selected=None)
