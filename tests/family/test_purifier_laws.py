"""One table of laws that every purifier obeys. A new row of ``METHODS`` is held to all of them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.bundle import ModelSpec, bundle_of
from defense_core.config import digest, from_mapping, to_mapping
from defense_core.data import Splits
from defense_core.errors import Cancelled, ConfigError, MethodDiverged
from defense_core.layers import is_finite
from defense_core.loop import Tuning, tune
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, Purified, purify
from defense_core.purify.base import PurifyFunction
from defense_core.task import ImageClassification
from tests.family.conftest import NETWORKS, TINY_TASK, Planted, tiny_images, tiny_splits
from tests.family.methods import (
    ABSURD,
    DEVICES,
    cheap,
    every_method,
    every_network,
    fields_of,
    methods_with,
    run,
    same,
    weights,
)


class Stopped(Exception):
    """An error that no method knows."""


def hooks(model: nn.Module) -> dict[str, int]:
    """Hooks per module and parameter."""
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    counted = {f"{name}:{kind}": len(getattr(part, kind)) for name, part in model.named_modules() for kind in kinds}
    for name, parameter in model.named_parameters():
        counted[name] = len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())
    return counted


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a method might leave changed."""
    gradients = {n: None if p.grad is None else p.grad.numpy().tobytes() for n, p in model.named_parameters()}
    return {
        "tensors": {n: (id(v), v._version) for n, v in [*model.named_parameters(), *model.named_buffers()]},
        "weights": {n: v.numpy().tobytes() for n, v in model.state_dict().items()},
        "gradients": gradients,
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "tracking": {n: getattr(m, "track_running_stats", None) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": hooks(model),
    }


def surroundings() -> dict[str, Any]:
    """The process-wide state that a method might leave changed."""
    module = torch.nn.modules.module
    return {
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "hooks": [len(getattr(module, n)) for n in vars(module) if n.startswith("_global_") and n.endswith("_hooks")],
    }


def lived_in(network: str) -> nn.Module:
    """A network as a user hands it over: mixed modes, old gradients, a frozen parameter, a hook of its own."""
    model = NETWORKS[network]()
    first, *_, last = model.parameters()
    first.grad = torch.full_like(first, 0.25)
    last.requires_grad_(False)
    list(model.children())[-1].train()
    next(iter(model.children())).register_forward_hook(lambda module, inputs, output: None)
    return model


@contextmanager
def counted_passes(kind: type[nn.Module]) -> Iterator[list[int]]:
    """Forward passes of networks of the class ``kind``, working copies included."""
    count = [0]

    def see(module: nn.Module, inputs: Any) -> None:
        count[0] += type(module) is kind

    handle = torch.nn.modules.module.register_module_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()


def task_that(change: Callable[[int, Tensor], Tensor], *, of: str = "losses") -> Any:
    """The tiny task with ``change(call number, result)`` applied to one of its methods."""
    calls = [0]

    class Changed(ImageClassification):
        pass

    def changed(self: Any, *arguments: Any) -> Tensor:
        calls[0] += 1
        return change(calls[0], getattr(ImageClassification, of)(self, *arguments))

    setattr(Changed, of, changed)
    return Changed(**vars(TINY_TASK))


# -- the input model ---------------------------------------------------------------------


@every_network
@every_method
def test_input_model_and_clean_set_are_left_as_they_were(name: str, network: str) -> None:
    model, splits = lived_in(network), tiny_splits()
    before, around = snapshot(model), surroundings()
    pixels, labels = splits.fit.images.clone(), splits.fit.labels.clone()
    result = run(name, model, splits)
    assert snapshot(model) == before
    assert surroundings() == around
    assert torch.equal(splits.fit.images, pixels)
    assert torch.equal(splits.fit.labels, labels)
    shared = {v.data_ptr() for v in model.state_dict().values()} & {
        v.data_ptr() for v in result.model.state_dict().values()
    }
    assert not shared, "the purified model shares memory with the input"


@every_network
@every_method
def test_purified_model_is_ready_to_be_saved(name: str, network: str) -> None:
    model = lived_in(network)
    purified = run(name, model).model
    assert {n: (v.shape, v.dtype) for n, v in purified.state_dict().items()} == {
        n: (v.shape, v.dtype) for n, v in model.state_dict().items()
    }
    assert not any(part.training for part in purified.modules())
    assert all(p.grad is None and p.requires_grad and p.is_contiguous() for p in purified.parameters())
    assert all(value.device.type == "cpu" for value in purified.state_dict().values())
    assert is_finite(purified)
    assert hooks(purified) == hooks(model), "a method left a hook behind"
    assert all(getattr(part, "track_running_stats", True) for part in purified.modules())


@every_method
def test_history_and_facts_are_json(name: str) -> None:
    result = run(name, NETWORKS["small_cnn"]())
    json.dumps(to_mapping({"history": list(result.history), "facts": result.facts}), allow_nan=False)
    assert result.history
    assert all({"phase", "step", "loss"} <= row.keys() for row in result.history)


@pytest.mark.parametrize("call", [1, 2, 5])
@every_method
def test_nothing_is_left_behind_after_an_exception(name: str, call: int) -> None:
    def fail(number: int, losses: Tensor) -> Tensor:
        if number >= call:
            raise Stopped
        return losses

    model = lived_in("small_cnn")
    before, around = snapshot(model), surroundings()
    with pytest.raises(Stopped):
        run(name, model, task=task_that(fail))
    assert snapshot(model) == before
    assert surroundings() == around


# -- determinism -------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@every_network
@every_method
def test_same_seed_and_device_give_the_same_bytes(name: str, network: str, device: str) -> None:
    one = run(name, NETWORKS[network](), device=device)
    torch.rand(7)  # a caller's own random numbers make no difference
    other = run(name, NETWORKS[network](), device=device)
    assert same(weights(one.model), weights(other.model))
    assert one.facts == other.facts
    spec = ModelSpec("small_cnn", {}, TINY_TASK.input_size, TINY_TASK.mean, TINY_TASK.std, TINY_TASK.num_classes)
    assert bundle_of(one.model, spec).digest == bundle_of(other.model, spec).digest


@every_method
def test_the_seed_matters(name: str) -> None:
    one, other = (run(name, NETWORKS["norm_free"](), seed=seed) for seed in (0, 1))
    assert not same(weights(one.model), weights(other.model))


@every_network
@every_method
def test_zero_steps_return_an_equal_model(name: str, network: str) -> None:
    model = NETWORKS[network]()
    result = run(name, model, config=cheap(name, **METHODS[name].zero_steps))
    assert same(weights(result.model), weights(model))


@every_method
def test_some_steps_return_another_model(name: str) -> None:
    model = NETWORKS["small_cnn"]()
    assert not same(weights(run(name, model).model), weights(model))


# -- awkward sets ------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["small_cnn", "preact_resnet18"])
@every_method
def test_a_last_batch_of_one_sample(name: str, network: str) -> None:
    parts = tiny_splits()
    count = 17
    splits = Splits(parts.fit.subset(torch.arange(count)), parts.select, parts.report)
    assert is_finite(run(name, NETWORKS[network](), splits, cheap(name, batch_size=8)).model)


@pytest.mark.parametrize("size", [1, 2, 1000])
@every_method
def test_any_batch_size(name: str, size: int) -> None:
    assert is_finite(run(name, NETWORKS["small_cnn"](), config=cheap(name, batch_size=size)).model)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        (name, field, value)
        for name, method in METHODS.items()
        for field, value in (("batch_size", 0), ("weight_decay", -1.0))
        if field in {each.name for each in dataclasses.fields(method.config)}
    ],
)
def test_what_no_training_can_run_with_is_refused_before_one(name: str, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        METHODS[name].config(**{field: value})


@every_method
def test_weights_of_another_type_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"float32 weights.*float64"):
        run(name, NETWORKS["small_cnn"]().double(), config=cheap(name))


@every_network
@every_method
def test_a_single_sample_per_class(name: str, network: str) -> None:
    splits = tiny_splits(per_class=1)
    assert len(splits.fit) == 4
    assert len(splits.select) == 0
    assert is_finite(run(name, NETWORKS[network](), splits).model)


@every_method
def test_a_single_sample(name: str) -> None:
    one = tiny_images(1).subset(torch.tensor([2]))
    nothing = one.subset(torch.tensor([], dtype=torch.int64))
    assert is_finite(run(name, NETWORKS["small_cnn"](), Splits(one, nothing, nothing)).model)


@every_method
def test_a_class_without_a_sample(name: str) -> None:
    full = tiny_images(8)
    rest = full.subset((full.labels != 3).nonzero().flatten())
    assert is_finite(run(name, NETWORKS["small_cnn"](), Splits(rest, rest, rest)).model)


# -- divergence --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["first", "last", "statistic"])
@every_method
def test_weights_that_are_not_finite(name: str, which: str, value: float) -> None:
    model = NETWORKS["small_cnn"]()
    tensors = {"first": next(model.parameters()), "last": [*model.parameters()][-1], "statistic": model.bn1.running_var}
    with torch.no_grad():
        tensors[which].view(-1)[0] = value
    with pytest.raises(MethodDiverged):
        run(name, model)


@pytest.mark.parametrize("network", ["small_cnn", "norm_free"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_method
def test_inputs_that_are_not_finite(name: str, value: float, network: str) -> None:
    task = task_that(lambda number, inputs: torch.full_like(inputs, value), of="inputs")
    with pytest.raises(MethodDiverged):
        run(name, NETWORKS[network](), task=task)


@pytest.mark.parametrize("call", [1, 3])
@every_method
def test_a_loss_that_is_not_finite(name: str, call: int) -> None:
    task = task_that(lambda number, losses: losses * (math.nan if number >= call else 1))
    with pytest.raises(MethodDiverged):
        run(name, NETWORKS["small_cnn"](), task=task)


@pytest.mark.parametrize("network", ["mlp", "norm_free"])
@every_method
def test_an_absurd_rate(name: str, network: str) -> None:
    with pytest.raises(MethodDiverged) as caught:
        run(name, NETWORKS[network](), config=cheap(name, **ABSURD))
    assert caught.value.hint or caught.value.got


@pytest.mark.parametrize("lr", [1e6, 1e39])
@pytest.mark.parametrize("part", ["masked", "head", "fresh_head", "feature_mask", "block"])
def test_absurd_rates_of_the_parts_of_ngf(part: str, lr: float) -> None:
    try:
        ended = run("ngf", NETWORKS["small_cnn"](), config=cheap("ngf", part=part, lr=lr)).model
    except MethodDiverged:
        return
    assert lr < 1e38
    assert is_finite(ended)


@pytest.mark.parametrize("name", methods_with("lr_grid"))
def test_an_absurd_candidate_does_not_spoil_the_others(name: str) -> None:
    modest, greedy = (run(name, NETWORKS["mlp"](), config=cheap(name, lr_grid=g)) for g in ((0.01,), (0.01, 1e38)))
    assert same(weights(modest.model), weights(greedy.model))
    json.dumps(to_mapping(greedy.facts), allow_nan=False)


@every_method
def test_zero_steps_do_not_let_bad_weights_pass(name: str) -> None:
    model = NETWORKS["mlp"]()
    with torch.no_grad():
        next(model.parameters())[0, 0] = math.nan
    with pytest.raises(MethodDiverged):
        run(name, model, config=cheap(name, **METHODS[name].zero_steps))


# -- cancellation ------------------------------------------------------------------------


@every_method
def test_cancels_within_one_step_wherever_it_is_asked_to(name: str) -> None:
    model = NETWORKS["small_cnn"]()
    with counted_passes(type(model)) as passes:
        run(name, model)
    total = passes[0]
    for asked_at in sorted({1, 2, total // 4, total // 2, 3 * total // 4, total - 3} - {0}):
        before = snapshot(model)
        with counted_passes(type(model)) as passes:
            stop = NullProgress(lambda asked_at=asked_at, passes=passes: passes[0] >= asked_at)  # type: ignore[misc]
            with pytest.raises(Cancelled):
                run(name, model, progress=stop)
        # A step is one pass, or two where the gradient is taken twice; measuring accuracy is another.
        assert passes[0] - asked_at <= 4, f"asked to stop at pass {asked_at} of {total}, went on for {passes[0]}"
        assert snapshot(model) == before


@every_method
def test_cancels_in_the_first_step(name: str) -> None:
    with pytest.raises(Cancelled):
        run(name, NETWORKS["vit_tiny"](), progress=NullProgress(lambda: True))


# -- configuration -----------------------------------------------------------------------


def other_values(hint: Any, value: Any) -> Iterator[Any]:
    """Values of a field's type that differ from ``value``; the config may refuse some."""
    literals = [each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is typing.Literal]
    if literals:
        yield from (choice for choice in typing.get_args(literals[0]) if choice != value)
    elif value is None or type(None) in typing.get_args(hint):
        yield from (item for item in (None, 0.125, 0.25, 1) if item != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield from (item for item in (value * 0.75, value * 1.25, value + 0.125) if item != value)
    elif isinstance(value, tuple):
        yield from (value[:-1], value * 2)
    elif isinstance(value, Mapping):
        yield {"tsbd": {"unlearn_epochs": 3}}
    elif dataclasses.is_dataclass(value):
        yield from changed(value)


def changed(config: Any) -> Iterator[Any]:
    """The config with one field changed, for each field."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        for value in other_values(hints[field.name], getattr(config, field.name)):
            try:
                yield dataclasses.replace(config, **{field.name: value})
            except ConfigError:
                continue
            break
        else:
            pytest.fail(f"{type(config).__name__}.{field.name}: no other value was accepted")


@every_method
def test_config_round_trips_and_its_digest_changes_with_every_field(name: str) -> None:
    kind = METHODS[name].config
    variants = [kind(), cheap(name), *changed(kind())]
    for variant in variants:
        assert from_mapping(kind, json.loads(json.dumps(to_mapping(variant)))) == variant
    digests = [digest(variant) for variant in [kind(), *changed(kind())]]
    assert len(set(digests)) == len(digests) == 1 + len(fields_of(name))


@every_method
def test_config_is_frozen_and_every_field_is_explained(name: str) -> None:
    config = METHODS[name].config()
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)
    explained = inspect.getdoc(type(config)) or ""
    for each in fields_of(name):
        assert f"{each}:" in explained or f"{each}," in explained, f"{each} is not explained"


@every_method
def test_unknown_settings_and_settings_of_another_method_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        from_mapping(METHODS[name].config, {"trigger": "badnets"})

    @dataclasses.dataclass(frozen=True)
    class Foreign:
        epochs: int = 1

    with pytest.raises(ConfigError, match="another method's config"):
        run(name, NETWORKS["mlp"](), config=Foreign())


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(sorted(METHODS))):
        purify(
            NETWORKS["mlp"](),
            tiny_splits(),
            None,
            method="prayer",
            task=TINY_TASK,
            seed=0,
            device="cpu",
            progress=NullProgress(),
        )


def test_there_is_exactly_one_control_and_names_are_keys() -> None:
    assert [name for name, method in METHODS.items() if method.control] == ["fine_tuning"]
    assert all(method.name == name and method.summary for name, method in METHODS.items())


# -- blindness ---------------------------------------------------------------------------


@every_method
def test_signature_gives_a_method_nothing_of_the_attack(name: str) -> None:
    function = METHODS[name].function
    expected = [each for each in inspect.signature(PurifyFunction.__call__).parameters if each != "self"]
    assert list(inspect.signature(function).parameters) == expected
    hints = typing.get_type_hints(function)
    assert hints["model"] is nn.Module
    assert hints["clean"] is Splits
    assert hints["config"] is METHODS[name].config
    assert hints["return"] is Purified
    mentioned = [*expected, *fields_of(name), *map(str, hints.values())]
    mentioned += map(str, typing.get_type_hints(METHODS[name].config).values())
    for word in ("attack", "trigger", "probe", "poison", "target", "asr"):
        assert not [text for text in mentioned if word in text.lower()]


def test_importing_the_purifiers_imports_no_attack() -> None:
    program = "import sys, defense_core.purify; print([name for name in sys.modules if 'attack' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@every_method
def test_the_report_split_is_never_touched(name: str) -> None:
    # tiny_splits() carries a report part that raises on any touch; every other law runs on it too.
    splits = tiny_splits()
    with pytest.raises(AssertionError, match="report split"):
        len(splits.report)
    assert is_finite(run(name, NETWORKS["mlp"](), splits).model)


class Tied(nn.Module):
    """Two convolutions of one weight, and one whose weight is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.two.weight = self.one.weight
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.two(self.one(self.enter(inputs).relu()).relu()).relu()
        features = self.norm(self.scaled(features)).relu().mean((2, 3))
        logits: Tensor = self.linear(features)
        return logits


@every_method
def test_weights_that_are_shared_or_computed_from_others(name: str) -> None:
    torch.manual_seed(0)
    purified = run(name, Tied().eval()).model
    assert is_finite(purified)
    assert torch.equal(purified.get_parameter("one.weight"), purified.two.weight)  # type: ignore[arg-type]


def test_a_trained_network_without_normalisation() -> None:
    # Nothing bounds the clean unlearning there: its gradient grows from step to step.
    model, splits = NETWORKS["norm_free"](), tiny_splits(32)
    tuning = Tuning(40, batch_size=16, lr=0.05)
    tune(model, splits.fit, task=TINY_TASK, tuning=tuning, seed=0, device="cpu", progress=NullProgress(), name="train")
    for name in ("nft", "ngf"):
        assert is_finite(run(name, model.eval(), splits, cheap(name, unlearn_epochs=30, unlearn_lr=0.05)).model)


# -- figures -----------------------------------------------------------------------------


def figures(name: str, planted: Planted) -> tuple[float, float]:
    """(ACC, ASR) at the method's own settings, with every other candidate of its longer grids to save time."""
    config = METHODS[name].config()
    grids = {field: getattr(config, field) for field in fields_of(name) if field.endswith("_grid")}
    thinned = {field: grid[::2] for field, grid in grids.items() if len(grid) > 2}
    return planted.purified(name, dataclasses.replace(config, **thinned))


@pytest.fixture(scope="session")
def control_figures(planted: Planted) -> tuple[float, float]:
    """(ACC, ASR) after the control."""
    control = next(name for name, method in METHODS.items() if method.control)
    return figures(control, planted)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not (method.control or method.baseline)])
def test_beats_or_ties_the_control_on_a_planted_backdoor(
    name: str, planted: Planted, control_figures: tuple[float, float]
) -> None:
    accuracy_before, asr_before = planted.measure(planted.model)
    assert asr_before >= 0.9, "nothing was planted"
    control_accuracy, control_asr = control_figures
    accuracy, asr = figures(name, planted)
    images = int(planted.probe.eligible(planted.test.labels).sum())
    # A tie: within two standard errors of the difference, and never by giving up accuracy.
    margin = 2 * math.sqrt(2 * max(control_asr * (1 - control_asr), 1 / images) / images)
    assert asr <= control_asr + margin, f"ASR {asr:.3f}, control {control_asr:.3f}"
    # A tie with a control that removes nothing would be none: a method that does nothing has it too.
    assert max(asr, control_asr) <= asr_before / 2, f"ASR {asr:.3f}, control {control_asr:.3f}, before {asr_before:.3f}"
    assert accuracy >= min(control_accuracy, accuracy_before) - 0.03, (
        f"ACC {accuracy:.3f}, before {accuracy_before:.3f}"
    )


@every_method
def test_a_network_without_hidden_layers_is_purified_or_refused_with_a_hint(name: str) -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    if name in ("nft", "ngf", "anp"):
        with pytest.raises(ConfigError, match=r"there is nothing to mask|there is no hidden layer"):
            run(name, linear)
    else:
        assert is_finite(run(name, linear).model)
