"""Learning-rate warm-up, and clipped steps that skip NaN gradients."""

import copy
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from support import seeded
from support.pretend_device import PretendDevice
from torch import nn

from diffusionkit import clipped_step, inverse_sqrt_decay, linear_warmup
from diffusionkit.training import StepReport


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))]


def test_learning_rates_rise_linearly() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.4)
    scheduler, rates = linear_warmup(optimizer, steps=4), []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_a_warmup_of_one_step_changes_nothing() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.4)
    linear_warmup(optimizer, steps=1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.4)


def test_the_norm_of_all_gradients_is_reported_and_clipped() -> None:
    """The norm of gradients 2, 3 and 6 is 7."""
    a, b = parameters()
    a.grad = torch.tensor([2.0, 0.0])
    b.grad = torch.tensor([[0.0, -3.0], [6.0, 0.0]])
    report = clipped_step(torch.optim.SGD([a, b], lr=1.0), max_norm=3.5)
    assert report == StepReport(norm=pytest.approx(7.0), skipped=False)
    torch.testing.assert_close(a.detach(), torch.tensor([-1.0, 0.0]))
    torch.testing.assert_close(b.detach(), torch.tensor([[0.0, 1.5], [-3.0, 0.0]]))
    assert a.grad is None
    assert b.grad is None


def test_the_norm_agrees_with_float64() -> None:
    p = nn.Parameter(torch.zeros(1000))
    p.grad = torch.randn(1000, generator=seeded())
    expected = math.sqrt(math.fsum(g * g for g in p.grad.tolist()))
    assert clipped_step(torch.optim.SGD([p], lr=1.0)).norm == pytest.approx(expected, rel=1e-6)
    assert float(p.detach().double().norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("max_norm", [7.5, math.inf])
def test_gradients_below_the_norm_are_not_clipped(max_norm) -> None:
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    report = clipped_step(torch.optim.SGD([p], lr=1.0), max_norm=max_norm)
    assert report.norm == pytest.approx(5.0)
    assert p.tolist() == [-3.0, -4.0]


def adam_after_a_step() -> tuple[list[nn.Parameter], torch.optim.Adam]:
    params = parameters()
    optimizer = torch.optim.Adam(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(bad, caplog) -> None:
    params, optimizer = adam_after_a_step()
    before = copy.deepcopy((params, optimizer.state_dict()))
    params[0].grad = torch.ones(2)
    params[1].grad = torch.tensor([[1.0, bad], [1.0, 1.0]])
    with caplog.at_level(logging.WARNING, logger="diffusionkit"):
        report = clipped_step(optimizer)
    assert report.skipped
    assert not math.isfinite(report.norm)
    for p, old in zip(params, before[0], strict=True):
        assert torch.equal(p, old)
        assert p.grad is None
    state = optimizer.state_dict()["state"]
    for index, old in before[1]["state"].items():
        for name, value in old.items():
            assert torch.equal(state[index][name], value)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "skipped an optimizer step" in record.getMessage()


def test_the_next_finite_step_is_taken(caplog) -> None:
    params, optimizer = adam_after_a_step()
    params[0].grad = torch.full((2,), math.nan)
    assert clipped_step(optimizer).skipped
    params[0].grad = torch.ones(2)
    assert not clipped_step(optimizer).skipped
    assert len(caplog.records) == 1
    assert bool((params[0] < -0.1).all())


def test_only_the_given_parameters_are_clipped() -> None:
    a, b = parameters()
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.ones(2, 2)
    report = clipped_step(torch.optim.SGD([a, b], lr=1.0), max_norm=1.0, parameters=iter([a]))
    assert report.norm == pytest.approx(5.0)
    torch.testing.assert_close(a.detach(), torch.tensor([-0.6, -0.8]))
    assert bool((b == -1).all())


def test_a_nan_outside_the_given_parameters_skips_the_step(caplog) -> None:
    a, b = parameters()
    a.grad, b.grad = torch.ones(2), torch.full((2, 2), math.nan)
    report = clipped_step(torch.optim.SGD([a, b], lr=1.0), parameters=[a])
    assert report.skipped
    assert a.tolist() == [0.0, 0.0]
    assert b.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert len(caplog.records) == 1


class Accumulating(torch.optim.SGD):
    """An optimizer like accelerate's, which ignores steps while gradients are accumulated."""

    def __init__(self, params) -> None:
        super().__init__(params, lr=1.0)
        self.gradient_state = SimpleNamespace(sync_gradients=False)

    def step(self) -> None:
        if self.gradient_state.sync_gradients:
            super().step()

    def zero_grad(self, set_to_none=True) -> None:
        if self.gradient_state.sync_gradients:
            super().zero_grad(set_to_none)


def test_accumulated_gradients_are_clipped_once_they_are_complete() -> None:
    """Of partial gradients (2, 0) and (0, 2), each longer than 1, the sum is clipped."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = Accumulating([p])
    p.grad = torch.tensor([2.0, 0.0])
    report = clipped_step(optimizer)
    assert report.skipped
    assert math.isnan(report.norm)
    p.grad += torch.tensor([0.0, 2.0])
    optimizer.gradient_state.sync_gradients = True
    report = clipped_step(optimizer)
    assert report == StepReport(norm=pytest.approx(math.sqrt(8)), skipped=False)
    assert p.tolist() == pytest.approx([-math.sqrt(0.5)] * 2)
    assert p.grad is None


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_host_waits_once_in_a_step(kind, given) -> None:
    with PretendDevice(kind) as device:
        params = [nn.Parameter(torch.zeros(n, device=kind)) for n in (2, 3)]
        optimizer = torch.optim.SGD(params, lr=1.0)
        for p in params:
            p.grad = torch.ones_like(p)
        with device.watched() as events:
            report = clipped_step(optimizer, parameters=params[:1] if given else None)
    assert report.norm == pytest.approx(math.sqrt(2 if given else 5))
    assert [(kind, count) for (kind, *_), count in events.items()] == [("read", 1)]


def test_a_step_without_gradients_raises() -> None:
    with pytest.raises(ValueError, match=r"parameters: expected gradients, got none"):
        clipped_step(torch.optim.SGD(parameters(), lr=1.0))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_not_positive_raises(max_norm) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"max_norm: expected a finite number > 0, got"):
        clipped_step(optimizer, max_norm=max_norm)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (True, TypeError), (1.5, TypeError)])
def test_an_invalid_number_of_warmup_steps_raises(steps, error) -> None:
    with pytest.raises(error, match=r"steps: expected an integer"):
        linear_warmup(torch.optim.SGD(parameters(), lr=1.0), steps=steps)


def test_the_learning_rate_falls_with_the_root_of_the_step() -> None:
    """After step 4 as (4 / i)^(1/2), with a linear warm-up of 2 steps."""
    optimizer = torch.optim.SGD(parameters(), lr=0.4)
    scheduler, rates = inverse_sqrt_decay(optimizer, steps=4, warmup=2), []
    for _ in range(17):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4])
    assert [rates[9], rates[16]] == pytest.approx([0.4 * 2 / 3, 0.2])


@pytest.mark.parametrize("name", ["steps", "warmup"])
def test_an_invalid_length_of_the_schedule_raises(name) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected an integer"):
        inverse_sqrt_decay(torch.optim.SGD(parameters(), lr=1.0), **{name: 0})
