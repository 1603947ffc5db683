"""The fine-tuning loop: what it hands over, when it stops, and what it leaves alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.errors import Cancelled, ConfigError, MethodDiverged
from defense_core.gradient_steps import plain_step
from defense_core.inference import accuracy, autocast, predictions
from defense_core.loop import Tuning, finished, same_each_time, seeded, tune, working_copy
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 2, (0.5,), (0.5,), augment="none")


def data_of(count: int = 20) -> CleanSet:
    """Dark images of class 0 and bright ones of class 1."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 80, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return CleanSet((images + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, 2)


def network() -> nn.Module:
    return working_copy(build("small_cnn", {"width": 3, "num_classes": 2}), "cpu")


def tuned(model: nn.Module, tuning: Tuning, data: CleanSet | None = None, **options: Any) -> list[dict[str, Any]]:
    shared: dict[str, Any] = {
        "task": TASK,
        "seed": 0,
        "device": "cpu",
        "progress": NullProgress(),
        "name": "tune",
        **options,
    }
    return tune(model, data or data_of(), tuning=tuning, **shared)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# -- copies ------------------------------------------------------------------------------


def test_working_copy_shares_nothing_and_trains_everything() -> None:
    model = build("small_cnn", {"width": 3, "num_classes": 2})
    model.conv1.weight.requires_grad_(False)
    model.conv2.weight.grad = torch.ones_like(model.conv2.weight)
    copied = working_copy(model, "cpu")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in copied.parameters())
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.grad is not None
    with torch.no_grad():
        copied.conv1.weight.zero_()
    assert bool(model.conv1.weight.any())


def test_finished_is_contiguous_without_gradients_in_eval_mode() -> None:
    model = network().train()
    plain_step(model, lambda: model(torch.randn(4, 1, 8, 8)).sum())
    model.linear.bias.requires_grad_(False)
    done = finished(model, "method")
    assert not done.training
    assert all(p.is_contiguous() and p.grad is None and p.requires_grad for p in done.parameters())


@pytest.mark.parametrize("name", ["conv1.weight", "bn2.running_mean"])
def test_finished_refuses_what_is_not_finite(name: str) -> None:
    model = network()
    model.state_dict()[name].view(-1)[0] = math.nan
    with pytest.raises(MethodDiverged, match=r"my_method diverged: expected finite weights.*learning rate"):
        finished(model, "my_method")


# -- training ----------------------------------------------------------------------------


def test_the_loop_learns_and_says_so() -> None:
    model = network()
    history = tuned(model, Tuning(epochs=8, batch_size=8, lr=0.05))
    assert [row["step"] for row in history] == list(range(1, 9))
    assert {row["phase"] for row in history} == {"tune"}
    assert history[-1]["loss"] < history[0]["loss"] / 2
    assert model.training
    assert accuracy(model, data_of(), task=TASK, device="cpu") == 1.0


def test_one_step_is_that_of_sgd() -> None:
    model, data = network(), data_of(8)
    twin = working_copy(model, "cpu")
    tuned(model, Tuning(epochs=1, batch_size=8, lr=0.1, momentum=0.9, weight_decay=0.01, precision="fp32"), data)
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    TASK.losses(twin(TASK.inputs(data.images)), data.labels).mean().backward()
    optimizer.step()
    assert torch.allclose(flat(model), flat(twin), atol=1e-6)


def test_ascent_raises_the_loss_which_is_reported_with_its_own_sign() -> None:
    model = network()
    tuned(model, Tuning(epochs=4, batch_size=8, lr=0.05))
    history = tuned(model, Tuning(epochs=4, batch_size=8, lr=0.05), sign=-1.0)
    assert history[-1]["loss"] > history[0]["loss"] > 0


def test_gradients_are_clipped_to_their_norm() -> None:
    model = network()
    before = flat(model)
    tuned(model, Tuning(epochs=1, batch_size=100, lr=1.0, momentum=0.0, max_grad_norm=1e-3))
    assert float((flat(model) - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_parameters_without_gradient_stay() -> None:
    model = network()
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    tuned(model, Tuning(epochs=1, batch_size=8, lr=0.5))
    assert torch.equal(model.conv1.weight, before)


def test_hooks_of_a_method_run_after_each_step_and_each_epoch() -> None:
    steps, epochs = [0], []

    def after_step() -> None:
        steps[0] += 1

    def after_epoch(epoch: int) -> bool:
        epochs.append(epoch)
        return epoch == 2

    history = tuned(
        network(), Tuning(epochs=5, batch_size=5), data_of(20), after_step=after_step, after_epoch=after_epoch
    )
    assert (steps[0], epochs, len(history)) == (8, [1, 2], 2)


def test_zero_epochs_change_nothing() -> None:
    model = network()
    before = flat(model)
    assert tuned(model, Tuning(epochs=0)) == []
    assert torch.equal(flat(model), before)


def test_the_seed_decides_and_the_process_keeps_its_own_randomness() -> None:
    class Noisy(nn.Sequential):
        pass

    made = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            model = Noisy(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 2))
        state = torch.get_rng_state()
        tuned(model, Tuning(epochs=2, batch_size=8), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        made.append(flat(model))
        torch.rand(3)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize(("device", "inside"), [("cuda:0", (True, False)), ("cpu", (False, True))])
def test_convolutions_on_a_gpu_are_the_same_each_time_and_settings_come_back(
    device: str, inside: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    seen = []

    def stopped() -> None:
        with same_each_time(device):
            seen.append((cudnn.deterministic, cudnn.benchmark))
            raise Cancelled("asked to stop")

    with pytest.raises(Cancelled):
        stopped()
    assert seen == [inside]
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_seeded_restores_the_random_state_after_an_exception() -> None:
    state = torch.get_rng_state()

    def draw_and_fail() -> None:
        with seeded(3, "cpu"):
            torch.rand(5)
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_divergence_ends_the_loop_with_the_epoch() -> None:
    with pytest.raises(MethodDiverged, match=r"tune diverged in epoch 1: expected a finite loss, got nan"):
        tuned(network(), Tuning(epochs=3, batch_size=4, lr=1e38))


def test_cancellation_ends_it_after_one_step() -> None:
    steps = [0]

    def count() -> None:
        steps[0] += 1

    with pytest.raises(Cancelled):
        tuned(network(), Tuning(epochs=3, batch_size=4), after_step=count, progress=NullProgress(lambda: steps[0] >= 2))
    assert steps[0] == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": 0.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Tuning(**{"epochs": 1, **change})


# -- answers -----------------------------------------------------------------------------


def test_predictions_come_in_order_and_leave_the_mode() -> None:
    model, data = network().train(), data_of(23)
    got = predictions(model, data, task=TASK, device="cpu", batch_size=5)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert got.tolist() == model(TASK.inputs(data.images)).argmax(1).tolist()
    assert got.dtype == torch.int64


def test_answers_that_are_not_finite_are_no_answers() -> None:
    model = network()
    with torch.no_grad():
        model.linear.bias[0] = math.inf
    with pytest.raises(MethodDiverged, match="not finite"):
        accuracy(model, data_of(), task=TASK, device="cpu")


def test_precision_is_what_was_asked_for() -> None:
    model, inputs = network(), torch.randn(2, 1, 8, 8)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(model, precision, "cpu")():  # type: ignore[arg-type]
            assert model(inputs).dtype == dtype
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with autocast(linear, "auto", "cpu")():
        assert linear(inputs).dtype == torch.float32


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_vnni": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_convolutional_network_runs_in_bfloat16_where_the_cpu_multiplies_it(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    model = nn.Conv2d(1, 2, 1)
    with autocast(model, "auto", "cpu")():
        assert model(torch.zeros(1, 1, 2, 2)).dtype == dtype
