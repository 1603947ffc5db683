"""Learning the given model's answers: the loss against its definition, and what the loop leaves alone."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core import inference
from defense_core.architectures import build
from defense_core.data import CleanSet, Splits, split_clean_set
from defense_core.distillation import TEMPERATURE, Teacher, distillation
from defense_core.loop import Tuning, tune, working_copy
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, choice, distil, stage_one
from defense_core.purify.choice import calibrating_temperature, expected_drop
from defense_core.purify.distil import DistilConfig
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 2, (0.5,), (0.5,))
COMMON: dict[str, Any] = {"task": TASK, "seed": 0, "device": "cpu", "progress": NullProgress()}


def clean(count: int = 24) -> CleanSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return CleanSet(images, torch.arange(count) % 2, 2)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build("small_cnn", {"width": 4, "num_classes": 2}).eval()


def by_hand(outputs: Tensor, taught: Tensor) -> float:
    """``T^2 * mean_n sum_k p log(p / q)``, sample by sample."""
    total = 0.0
    for student, teacher in zip(outputs.double().tolist(), taught.double().tolist(), strict=True):
        weights = [[math.exp(value / TEMPERATURE) for value in logits] for logits in (teacher, student)]
        p, q = ([each / sum(row) for each in row] for row in weights)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return TEMPERATURE**2 * total / len(outputs)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_is_the_tempered_divergence(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, taught = (3 * torch.randn(6, 4, generator=generator) for _ in range(2))
    assert float(distillation(outputs, taught)) == pytest.approx(by_hand(outputs, taught), rel=1e-5)
    assert float(distillation(taught, taught)) == pytest.approx(0.0, abs=1e-6)


def test_answers_to_the_same_inputs_are_kept_and_those_to_others_are_not() -> None:
    asked: list[int] = []

    class Counted(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            asked.append(len(inputs))
            return inputs.flatten(1)[:, :4]

    teacher, inputs = Teacher(Counted()), torch.randn(6, 1, 8, 8)
    first = teacher.answers(0, inputs, contextlib.nullcontext)
    assert teacher.answers(0, inputs.clone(), contextlib.nullcontext) is first
    assert asked == [6]
    assert torch.equal(teacher.answers(1, inputs, contextlib.nullcontext), first)
    # Other images, another order, fewer of them: the answers are to what was given.
    for others in (inputs + 1, inputs.flip(0), inputs[:5]):
        assert torch.equal(teacher.answers(0, others, contextlib.nullcontext), others.flatten(1)[:, :4])
    assert len(asked) == 5


def test_a_teacher_keeps_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("defense_core.distillation.MAX_KEPT_BYTES", 2 * 6 * 4 * 4)
    teacher, inputs = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), torch.randn(6, 1, 8, 8)
    firsts = [teacher.answers(step, inputs, contextlib.nullcontext) for step in range(3)]
    again = [teacher.answers(step, inputs, contextlib.nullcontext) for step in range(3)]
    assert [one is other for one, other in zip(firsts, again, strict=True)] == [True, True, False]
    assert torch.equal(firsts[2], again[2])


def test_a_student_that_is_its_teacher_stays_where_it_is() -> None:
    model = network()
    student = working_copy(model, "cpu")
    rows = tune(
        student,
        clean(),
        tuning=Tuning(2, 8, 0.1, precision="fp32"),
        name="test",
        teacher=Teacher(model),
        fixed_statistics=True,
        mixup=1.0,
        **COMMON,
    )
    assert all(abs(row["loss"]) < 1e-6 for row in rows)
    for before, after in zip(model.state_dict().values(), student.state_dict().values(), strict=True):
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_a_student_comes_closer_to_its_teacher_and_its_statistics_stay() -> None:
    teacher, student = network(0), working_copy(network(1), "cpu")
    buffers = {name: value.clone() for name, value in student.named_buffers()}
    rows = tune(
        student,
        clean(),
        tuning=Tuning(20, 8, 0.05, precision="fp32"),
        name="test",
        teacher=Teacher(teacher),
        fixed_statistics=True,
        **COMMON,
    )
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert buffers
    for name, value in student.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_without_fixed_statistics_they_move() -> None:
    student = working_copy(network(), "cpu")
    before = {name: value.clone() for name, value in student.named_buffers() if name.endswith("running_mean")}
    tune(student, clean(), tuning=Tuning(1, 8, 0.01, precision="fp32"), name="test", **COMMON)
    moved = dict(student.named_buffers())
    assert before
    assert all(not torch.equal(moved[name], value) for name, value in before.items())


# -- how much is zeroed ---------------------------------------------


def purify(
    drops: list[float], monkeypatch: pytest.MonkeyPatch, *, given: nn.Module | None = None, **settings: Any
) -> dict[str, Any]:
    """Facts where the candidates, in the order in which they are made, are expected to lose so much."""
    remaining = iter(drops)
    monkeypatch.setattr(distil, "expected_drop", lambda *_, **__: next(remaining))
    monkeypatch.setattr(stage_one, "correct", lambda *_, **__: torch.arange(100) % 2 == 0)
    monkeypatch.setattr(stage_one, "unlearn", lambda *_, **__: [])
    data = clean(200)
    splits = Splits(data.subset(torch.arange(100)), data.subset(torch.arange(100, 200)), data.subset(torch.arange(0)))
    few = {"epochs": 1, "min_steps": 0, "n_grid": (0.1,), "n_factors": (1.0, 1.5, 2.0, 3.0), "max_drop": 0.03}
    return distil.purify(given or network(), splits, DistilConfig(**(few | settings)), **COMMON).facts


@pytest.mark.parametrize(
    ("architecture", "arguments", "rate"),
    [
        ("small_cnn", {"width": 4}, 0.001),
        ("vit_tiny", {"image_size": 8, "dim": 8, "depth": 1, "heads": 1, "in_channels": 1}, 0.03),
    ],
)
def test_networks_without_batch_normalisation_are_distilled_thirty_times_as_fast(
    architecture: str, arguments: dict[str, Any], rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(distil, "tune", lambda *_, tuning, **__: rates.append(tuning.lr) or [])
    given = build(architecture, {**arguments, "num_classes": 2})
    purify([0.0, 1.0], monkeypatch, given=given, n_factors=(1.0,))
    assert rates == [pytest.approx(rate)]


@pytest.mark.parametrize(
    ("drops", "factor"), [([0.02, 0.029], 3.0), ([0.02, 0.04], 2.0), ([0.04, 0.02], 1.5), ([0.10, 0.10, 0.10], 1.0)]
)
def test_the_most_is_zeroed_at_which_accuracy_holds_after_the_repair(
    drops: list[float], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = purify([*drops, 0.0, 1.0], monkeypatch)
    assert facts["n"] == pytest.approx(0.1 * factor)
    assert [trial["accuracy"] for trial in facts["factor_trials"]] == [-drop for drop in drops]


def test_a_given_n_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert purify([0.0, 0.0, 1.0], monkeypatch, n=0.2)["n"] == 0.2


@pytest.mark.parametrize(("drops", "lr"), [([0.0, 1.0], 0.0), ([0.0, 0.0, 1.0], 0.01), ([0.0, 0.0, 0.0], 0.02)])
def test_the_repair_follows_only_where_it_is_free(
    drops: list[float], lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = purify(drops, monkeypatch, n_factors=(1.0,), lr_grid=(0.01, 0.02))
    assert facts["lr"] == lr
    assert len(facts["lr_trials"]) == len(drops)


def test_without_a_select_split_nothing_is_zeroed_beyond_stage_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate looks harmless on the images that it was distilled on."""
    monkeypatch.setattr(stage_one, "unlearn", lambda *_, **__: [])
    data = clean(10)
    splits = Splits(data, data.subset(torch.arange(0)), data.subset(torch.arange(0)))
    facts = distil.purify(network(), splits, DistilConfig(epochs=1, min_steps=0, n_grid=(0.1,)), **COMMON).facts
    assert len(facts["factor_trials"]) == 1


# -- the expected drop ---------------------------------------------------------------------


def linear(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def test_the_expected_drop_is_the_mean_of_what_each_changed_answer_costs() -> None:
    given, candidate, data = linear(0), linear(3), clean(40)
    total = 0.0
    for image in data.images:
        known = torch.softmax(given(TASK.inputs(image[None])).double(), -1)[0]
        answer = int(candidate(TASK.inputs(image[None])).argmax())
        total += float(known.max() - known[answer])
    found = expected_drop(given, candidate, data, **COMMON, views=1)
    assert found == pytest.approx(total / len(data), rel=1e-4)
    assert found > 0
    assert expected_drop(given, given, data, **COMMON) == 0


def test_a_network_that_ends_in_a_softmax_costs_as_much_as_its_logits() -> None:
    """Taken for logits, numbers between 0 and 1 would make every changed answer cheap, and any change permitted."""
    given, candidate, data = linear(0), linear(3), clean(40)
    ended, taught = (nn.Sequential(each, nn.Softmax(1)) for each in (given, candidate))
    found = expected_drop(ended, taught, data, **COMMON, views=1)
    assert found == pytest.approx(expected_drop(given, candidate, data, **COMMON, views=1), rel=1e-4)
    temperatures = [calibrating_temperature(each, data, task=TASK, device="cpu") for each in (ended, given)]
    assert temperatures[0] == temperatures[1]


def test_large_images_are_looked_at_few_at_a_time_and_augmented_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inference.images_at_once(torch.zeros(1, 3, 32, 32)) == 512
    assert inference.images_at_once(torch.zeros(1, 3, 4000, 4000)) == 1
    sizes, given, data = [], linear(0), clean(40)
    handle = given.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    whole = expected_drop(given, linear(3), data, **COMMON, views=1)
    monkeypatch.setattr(inference, "PIXELS_AT_ONCE", 7 * 64)
    few = expected_drop(given, linear(3), data, **COMMON, views=1)
    expected_drop(given, given, data, **COMMON, views=3)
    assert len(inference.correct(given, data, task=TASK, device="cpu")) == len(data)
    handle.remove()
    assert few == pytest.approx(whole, rel=1e-6)
    assert sizes[0] == 40
    assert max(sizes[1:]) == 7


def test_the_strength_is_decided_in_the_precision_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recording(model: nn.Module, precision: inference.Precision, device: object) -> object:
        asked.append(precision)
        return inference.autocast(model, precision, str(device))

    monkeypatch.setattr(choice, "autocast", recording)
    for name in ("tsbd", "distil", "fip", "nft", "ngf"):
        config = METHODS[name].config(epochs=1, precision="fp32")
        METHODS[name].function(network(), split_clean_set(clean(60), seed=0, report=0.0), config, **COMMON)
        assert asked, name
        assert set(asked) == {"fp32"}, name
        asked.clear()


def test_the_expected_drop_is_the_drop_where_the_given_model_is_calibrated() -> None:
    """Labels drawn from the given model's own probabilities: counting gives the same, with a larger error."""
    given, candidate, data = linear(0), linear(3), clean(200)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        known = torch.softmax(given(TASK.inputs(data.images)), -1)
        first, second = known.argmax(-1), candidate(TASK.inputs(data.images)).argmax(-1)
    labels = torch.multinomial(known, 4000, replacement=True, generator=generator)
    counted = (labels == first[:, None]).double().mean() - (labels == second[:, None]).double().mean()
    found = expected_drop(given, candidate, data, **COMMON, views=1)
    assert found == pytest.approx(float(counted), abs=0.003)


def test_the_calibrating_temperature_brings_an_overconfident_model_back() -> None:
    """Labels drawn from the model at temperature 2.6."""
    generator = torch.Generator().manual_seed(0)
    model, data = linear(0), clean(24)
    images = torch.randint(0, 256, (4000, 1, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        model[1].weight.mul_(8.0)
        known = torch.softmax(model(TASK.inputs(images)) / 2.6, -1)
    drawn = CleanSet(images, torch.multinomial(known, 1, generator=generator).squeeze(1), data.num_classes)
    found = calibrating_temperature(model, drawn, task=TASK, device="cpu")
    assert found == pytest.approx(2.6, rel=0.1)
