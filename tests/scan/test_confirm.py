"""What a suspicion must stand: a trigger on held-out images, from every source, smaller and better than placebos."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from defense_core.data import CleanSet, joined
from defense_core.errors import CorruptArtifact
from defense_core.progress import NullProgress
from defense_core.scan import confirm as confirmation
from defense_core.scan import pictures
from defense_core.scan.base import Deadline, InvertedTrigger, Observation, Subject, subject_of
from defense_core.scan.confirm import confirm, cut_to, enough, lower_bound, size_of, success, surely_lost, upper_bound
from defense_core.scan.pictures import class_pictures, trigger_picture
from defense_core.scan.residual import Residual, residuals
from defense_core.scan.stored_triggers import INDEX, kept_triggers, load_triggers, save_triggers
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 4, mean=(0.0,), std=(1.0,))


class Corner(nn.Module):
    """Class of the brightest quarter, unless the top left pixel is white: then class 2, except for images of class
    ``immune``."""

    def __init__(self, immune: int = -1, backdoored: bool = True) -> None:
        super().__init__()
        self.immune, self.backdoored = immune, backdoored
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.shortcut = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        quarters = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits = self.scale * quarters
        hit = (x[:, 0, 0, 0] > 0.95) & (quarters.argmax(1) != self.immune) & torch.tensor(self.backdoored)
        return logits + 1000.0 * self.shortcut * hit[:, None] * nn.functional.one_hot(torch.tensor(2), 4)


class Rigid(Corner):
    """Answers the trigger by no weight that could be trained away."""

    def __init__(self) -> None:
        super().__init__()
        value = self.shortcut.detach()
        del self.shortcut
        self.register_buffer("shortcut", value)


def images(per_class: int = 6) -> CleanSet:
    labels = torch.arange(4 * per_class) % 4
    pixels = torch.full((len(labels), 1, 8, 8), 20, dtype=torch.uint8)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        pixels[row, :, top : top + 4, left : left + 4] = 200
    return CleanSet(pixels, labels, 4)


def subject(model: nn.Module) -> Subject:
    return subject_of(model, images(), task=TASK, seed=0, device="cpu", progress=NullProgress())


def patch(target: int, *, side: int = 1) -> InvertedTrigger:
    mask = torch.zeros(1, 8, 8)
    mask[:, :side, :side] = 1.0
    return InvertedTrigger(target, "patch", torch.full((1, 8, 8), 255.0), mask)


def observation(*triggers: InvertedTrigger) -> Observation:
    return Observation("patch", 5.0, "because", triggers=triggers, targets=(2,))


def test_a_real_trigger_is_confirmed() -> None:
    (found,) = confirm(subject(Corner()), images(), [observation(patch(2), patch(0), patch(1))], (2,))
    assert found.confirmed
    assert (found.success, found.least_source, found.images) == (1.0, 1.0, 18)
    assert found.placebo is not None
    assert found.placebo <= 0.5
    assert found.unlearnt == 0.0
    assert found.accuracy_lost == 0.0


@pytest.mark.parametrize(
    ("model", "triggers", "why"),
    [
        (Corner(backdoored=False), (patch(2), patch(0)), "does not generalise"),
        (Corner(immune=1), (patch(2), patch(0)), "one source resists"),
        (Corner(), (patch(2, side=4), patch(0)), "too large"),
        (Rigid(), (patch(2), patch(0)), "cannot be unlearnt"),
    ],
)
def test_what_is_not_confirmed(model: nn.Module, triggers: tuple[InvertedTrigger, ...], why: str) -> None:
    (found,) = confirm(subject(model), images(), [observation(*triggers)], (2,))
    assert not found.confirmed, why


class TwoCorners(Rigid):
    """:class:`Rigid`, and a second corner that leads to class 2 by a weight that can be trained away."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        hit = (x[:, 0, 7, 7] > 0.95)[:, None] * nn.functional.one_hot(torch.tensor(2), 4)
        return super().forward(x) + 1000.0 * self.second * hit


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_the_best_trigger_is_not_unlearnt_the_next_is_tried(order: tuple[int, int]) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, 7, 7] = 1.0
    second = replace(patch(2), mask=mask)
    triggers = [(patch(2), second)[i] for i in order]
    (found,) = confirm(subject(TwoCorners()), images(), [observation(*triggers, patch(0))], (2,))
    assert found.confirmed
    assert found.unlearnt == 0.0


class Deaf(Corner):
    """As :class:`Corner`, but an image whose last pixel is white answers no trigger."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where((x[:, 0, 7, 7] > 0.95)[:, None], super().forward(x.clamp(max=0.9)), super().forward(x))


def unheard(per_class: dict[int, tuple[int, int]]) -> CleanSet:
    """Of each class so many images, and so many of them that the model :class:`Deaf` is deaf on."""
    drawn = images(max(count for count, _ in per_class.values()))
    rows = [(drawn.labels == label).nonzero().flatten()[:count] for label, (count, _) in per_class.items()]
    clean = drawn.subset(torch.cat(rows))
    for label, (_, deaf) in per_class.items():
        clean.images[(clean.labels == label).nonzero().flatten()[:deaf], 0, 7, 7] = 255
    return clean


@pytest.mark.parametrize(
    ("per_class", "success", "least", "confirmed"),
    [
        ({0: (30, 0), 1: (3, 3), 2: (3, 0), 3: (30, 0)}, 60 / 63, 0.0, False),
        ({0: (10, 2), 1: (10, 2), 2: (10, 0), 3: (10, 2)}, 0.8, 0.8, False),
        ({0: (10, 1), 1: (10, 1), 2: (10, 0), 3: (10, 1)}, 0.9, 0.9, True),
    ],
    ids=["one source of few images resists", "too few of every source", "enough of every source"],
)
def test_a_trigger_works_on_most_images_and_on_every_source(
    per_class: dict[int, tuple[int, int]], success: float, least: float, confirmed: bool
) -> None:
    (found,) = confirm(subject(Deaf()), unheard(per_class), [observation(patch(2), patch(0), patch(1))], (2,))
    assert (found.success, found.least_source) == (pytest.approx(success), pytest.approx(least))
    assert found.small
    assert found.confirmed is confirmed


@pytest.mark.parametrize(("per_class", "confirmed"), [(6, False), (9, True)])
def test_a_trigger_for_one_source_takes_enough_of_its_images(per_class: int, confirmed: bool) -> None:
    pair = replace(patch(2), sources=(1,))
    (found,) = confirm(subject(Corner()), images(per_class), [observation(pair, patch(0), patch(1))], (2,))
    assert (found.success, found.images, found.confirmed) == (1.0, per_class, confirmed)


@pytest.mark.parametrize(("facts", "confirmed"), [({"cell_pixels": 4}, True), ({}, False)])
def test_one_patch_of_a_grid_of_sixteen_is_small(facts: dict[str, int], confirmed: bool) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :2] = 1.0
    whole = InvertedTrigger(2, "patch", torch.full((1, 8, 8), 255.0), mask)
    seen = replace(observation(whole, patch(0), patch(1)), facts=facts)
    (found,) = confirm(subject(Corner()), images(), [seen], (2,))
    assert (found.success, found.small, found.confirmed) == (1.0, confirmed, confirmed)


def test_the_lower_bound_is_the_rate_at_which_so_many_hits_are_rare() -> None:
    assert lower_bound(0, 9) == 0.0
    assert lower_bound(9, 9) == pytest.approx(0.05 ** (1 / 9))
    assert lower_bound(8, 8) < 0.7 < lower_bound(9, 9)
    rate = lower_bound(7, 12)
    tail = sum(math.comb(12, k) * rate**k * (1 - rate) ** (12 - k) for k in range(7, 13))
    assert tail == pytest.approx(0.05)


def test_a_trigger_no_better_than_a_placebo_is_not_confirmed() -> None:
    """A model that answers class 2 and class 0 to their own patches alike: two easy classes, and one is suspected."""

    class Easy(Corner):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            hit = x[:, 0, 0, 1] > 0.95
            return logits + 90.0 * hit[:, None] * nn.functional.one_hot(torch.tensor(0), 4)

    mask = torch.zeros(1, 8, 8)
    mask[:, 0, 1] = 1.0
    other = InvertedTrigger(0, "patch", torch.full((1, 8, 8), 255.0), mask)
    (found,) = confirm(subject(Easy()), images(), [observation(patch(2), other)], (2,))
    assert found.success == 1.0
    assert found.placebo == 1.0
    assert not found.confirmed


def test_of_many_placebos_every_nth_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirmation, "MAX_PLACEBOS", 2)
    asked: list[int] = []
    real = confirmation.success

    def counted(subject: Subject, clean: CleanSet, trigger: InvertedTrigger) -> tuple[Tensor, Tensor]:
        asked.append(trigger.target)
        return real(subject, clean, trigger)

    monkeypatch.setattr(confirmation, "success", counted)
    tuple(confirm(subject(Corner()), images(), [observation(patch(2), patch(0), patch(1), patch(3))], (2,)))
    assert asked[:3] == [2, 0, 3]


def test_a_placebo_is_cut_to_the_size_of_the_suspect() -> None:
    """The patch of another class covers four pixels, one of them is the backdoor's: at the suspect's size it is not."""
    mask = torch.zeros(1, 8, 8)
    mask[0, :2, :2] = torch.tensor([[0.4, 0.9], [0.8, 0.7]])
    wide = InvertedTrigger(0, "patch", torch.full((1, 8, 8), 255.0), mask)
    cut = cut_to(wide, 1.75)
    assert cut.mask is not None
    assert torch.equal(cut.mask[0, :2, :2], torch.tensor([[0.0, 0.9], [0.8, 0.0]]))
    assert cut_to(wide, 3.0) is wide
    faint = InvertedTrigger(0, "additive", torch.full((1, 8, 8), 6.0))
    assert cut_to(faint, 0.0) is faint


@pytest.mark.parametrize(("hits", "count"), [(0, 3), (2, 3), (3, 3), (5, 9), (60, 100)])
def test_what_so_few_hits_still_allow(hits: int, count: int) -> None:
    """The largest rate at which so few hits or fewer are seen in one of twenty draws."""
    found = upper_bound(hits, count)
    tail = sum(math.comb(count, each) * found**each * (1 - found) ** (count - each) for each in range(hits + 1))
    assert tail == pytest.approx(1.0 if hits == count else 0.05, abs=1e-9)


def test_a_source_that_resists_by_one_image_is_no_proof() -> None:
    assert upper_bound(2, 3) > 0.7
    assert upper_bound(0, 3) < 0.7


@pytest.mark.parametrize(("lost", "gained", "count", "surely"), [
    (0, 0, 36, False), (3, 0, 36, False), (6, 0, 36, True), (6, 4, 36, False), (60, 0, 1000, True),
    (40, 0, 1000, False),
])  # fmt: skip
def test_accuracy_is_lost_when_chance_does_not_explain_it(lost: int, gained: int, count: int, surely: bool) -> None:
    assert surely_lost(lost, gained, count) is surely


def test_without_a_trigger_for_the_suspect_nothing_can_be_confirmed() -> None:
    assert not tuple(confirm(subject(Corner()), images(), [observation(patch(0))], (2,)))


def test_placebos_are_tried_only_where_they_can_decide() -> None:
    clean = Corner(backdoored=False)
    (found,) = confirm(subject(clean), images(), [observation(patch(2), patch(0), patch(1))], (2,))
    assert (found.success, found.placebo, found.confirmed) == (0.0, None, False)


def test_success_counts_only_the_sources_that_the_trigger_is_for() -> None:
    trigger = InvertedTrigger(2, "patch", patch(2).pattern, patch(2).mask, sources=(0, 3))
    hits, labels = success(subject(Corner(immune=3)), images(), trigger)
    assert labels.unique().tolist() == [0, 3]
    assert float(hits.float().mean()) == 0.5


def test_the_size_of_a_change_is_what_it_does_to_the_images() -> None:
    share, square = size_of(patch(2), images(), device="cpu")
    assert share == pytest.approx(1 / 64)
    values = [(255 - 200) / 255] * 6 + [(255 - 20) / 255] * 18
    assert square == pytest.approx(sum(each**2 for each in values) / 24 / 64)
    faint = InvertedTrigger(1, "additive", torch.full((1, 8, 8), 6.0))
    assert size_of(faint, images(), device="cpu") == (1.0, pytest.approx((6 / 255) ** 2))


def test_the_size_is_measured_on_few_images_at_once() -> None:
    seen = []

    class Counting(InvertedTrigger):
        def apply(self, images: Tensor) -> Tensor:
            seen.append(len(images))
            return super().apply(images)

    many = images(150)
    faint = Counting(1, "additive", torch.full((1, 8, 8), 60.0))
    share, square = size_of(faint, many, device="cpu")
    assert seen == [256, 256, 88]
    change = (InvertedTrigger.apply(faint, many.images) - many.images.float()) / 255
    assert (share, square) == (1.0, pytest.approx(float(change.square().mean()), rel=1e-6))


def test_a_suspicion_is_tried_on_an_equal_share_of_each_class_of_a_large_set() -> None:
    (found,) = confirm(subject(Corner()), images(400), [observation(patch(2), patch(0))], (2,))
    assert found.images == 750
    assert found.confirmed


def test_a_thousand_images_are_all_tried() -> None:
    whole, uneven = images(250), images(400).subset(torch.cat([torch.arange(1100), torch.arange(1101, 1600, 4)]))
    assert enough(whole) is whole
    counts = enough(uneven).labels.bincount()
    assert int(counts.sum()) == 1000
    assert int(counts.max() - counts.min()) <= 1


def test_triggers_survive_their_files_and_are_tried_again(tmp_path: Path) -> None:
    faint = InvertedTrigger(1, "additive", torch.full((1, 8, 8), 6.0), sources=(0,))
    kept = kept_triggers([observation(patch(0), patch(2)), Observation("additive", 1.0, "", triggers=(faint,))], (2, 1))
    assert [(name, each.target) for name, each in kept] == [("patch", 2), ("additive", 1)]
    save_triggers(tmp_path, kept)
    loaded = load_triggers(tmp_path)
    assert [(name, each.target, each.kind, each.sources) for name, each in loaded] == [
        ("patch", 2, "patch", ()),
        ("additive", 1, "additive", (0,)),
    ]
    assert torch.equal(loaded[0][1].apply(images().images), patch(2).apply(images().images))
    after = subject(Corner(backdoored=False))
    (first, _) = residuals(subject(Corner()), after, different(), loaded, suspects=(2,))
    assert (first.before, first.after, first.images) == (1.0, 0.0, 18)


def different() -> CleanSet:
    """Images of which none is a copy of another."""
    clean = images()
    clean.images[:, 0, 7, 0] = torch.arange(len(clean), dtype=torch.uint8)
    return clean


class Broken(Corner):
    """Answers NaN to the trigger."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (x[:, :1, 0, 0] <= 0.95)


def test_a_suspected_class_is_answered_for_by_what_was_measured_or_by_nothing() -> None:
    tried = [("patch", patch(2)), ("patch", patch(0))]
    late = replace(subject(Corner()), deadline=Deadline(0.0))
    clean = different()
    assert residuals(subject(Corner()), None, clean, tried[1:], suspects=(2,))[1:] == (Residual("", 2, None, None, 0),)
    assert residuals(subject(Corner()), subject(Broken()), clean, tried[:1], suspects=(2,)) == (
        Residual("patch", 2, 1.0, None, 18),
    )
    assert residuals(late, None, clean, tried, suspects=(2, 3)) == tuple(
        Residual("", target, None, None, 0) for target in (2, 3)
    )
    assert residuals(subject(Corner()), None, clean, tried[:1], suspects=()) == (Residual("patch", 2, 1.0, 1.0, 18),)
    copied = residuals(subject(Corner()), None, joined(clean, clean), tried[:1], suspects=())
    assert copied[0].images == 18


@pytest.mark.parametrize("content", ["", "{}", '[{"detector": "patch", "target": 0, "kind": "pickle"}]', "[{}]"])
def test_damaged_triggers(tmp_path: Path, content: str) -> None:
    save_triggers(tmp_path, [("patch", patch(2))])
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CorruptArtifact, match="holds no inverted triggers"):
        load_triggers(tmp_path)


def test_pictures_are_png_and_say_what_they_show() -> None:
    scored = Observation(
        "patch", 5.0, "class 2 needs one pixel", (0.1, 0.2, 5.0, 0.0), (0, 1, 2, 3), (2,), triggers=(patch(2),)
    )
    (bars,) = class_pictures({"patch": scored, "weights": scored}, (2,), ("a", "b", "c", "d"))
    assert bars.png.startswith(b"\x89PNG")
    assert "c is highest; suspected: c" in bars.alt
    shown = trigger_picture("patch", patch(2), images(), "works", ("a", "b", "c", "d"))
    assert shown.png.startswith(b"\x89PNG")
    assert len(shown.png) < 64_000
    assert shown.name == "trigger-patch-2"
    assert "c" in shown.title
    again = trigger_picture("patch", patch(2), images(), "works", ("a", "b", "c", "d"))
    assert again.png == shown.png


def test_a_picture_of_a_trigger_for_single_classes_shows_images_of_these(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(pictures, "_shown", lambda image: shown.append(float(image[0, 0, 0])) or image[0].numpy())
    top_left = replace(patch(2), sources=(0,))
    made = [
        trigger_picture("pairs", each, images(), "works", ("a", "b", "c", "d"))
        for each in (top_left, replace(top_left, sources=(1,)))
    ]
    assert [each.name for each in made] == ["trigger-pairs-2-from-0", "trigger-pairs-2-from-1"]
    assert made[0].title == "pairs: patch found to lead from a to c"
    assert shown[:4] == [200.0] * 4, "the top left quarter of class 0 is bright"
    assert shown[12:16] == [20.0] * 4


def test_a_picture_shows_images_of_every_class_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(pictures, "_shown", lambda image: shown.append(image) or image[0].numpy())
    sorted_by_class = images().subset(images().labels.argsort(stable=True))
    trigger_picture("patch", patch(2), sorted_by_class, "works")
    quarters = {tuple(nn.functional.adaptive_avg_pool2d(each, 2).flatten().tolist()) for each in shown[:3]}
    assert len(quarters) == 3, "one of each class but the target's"


def test_bars_of_many_classes_say_that_some_are_left_out() -> None:
    scored = Observation("patch", 5.0, "because", tuple(map(float, range(100))), tuple(range(100)), (99,))
    (bars,) = class_pictures({"patch": scored}, (99,))
    assert bars.alt.startswith(f"Bars of the highest {pictures.MAX_BARS} of 100 around the median of all")


def test_a_class_name_is_no_formula() -> None:
    names = ("a", "b", "$\\frac$", "d")
    scored = Observation("patch", 5.0, "costs 3 $ or $\\frac$", (0.1, 0.2, 5.0, 0.0), (0, 1, 2, 3), (2,))
    (bars,) = class_pictures({"patch": scored}, (2,), names)
    shown = trigger_picture("patch", patch(2), images(), "works", names)
    assert bars.png.startswith(b"\x89PNG")
    assert shown.png.startswith(b"\x89PNG")
