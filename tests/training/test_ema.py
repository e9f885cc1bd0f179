"""Exponential moving average of a model's weights."""

import copy

import pytest
import torch
from torch import nn

from diffusionkit import EMA, VPSDE, EpsModel


class Weight(nn.Module):
    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value], dtype=torch.float64))


def follow(ema: EMA, model: Weight, values: list[float]) -> list[float]:
    averages = []
    for value in values:
        with torch.no_grad():
            model.w.fill_(value)
        ema.update(model)
        averages.append(float(ema.model.w))
    return averages


def test_warmup_matches_hand_computed_values() -> None:
    """From 0 towards 1 with d = 2/11, 3/12, 4/13: the distances are 2/11, 1/22, 2/143."""
    model = Weight(0.0)
    averages = follow(EMA(model, decay=0.9999), model, [1.0, 1.0, 1.0])
    assert averages == pytest.approx([9 / 11, 21 / 22, 141 / 143], rel=1e-14)


def test_warmup_ends_at_the_decay() -> None:
    """d = min(0.2, (1 + n) / (10 + n)) is 2/11, then 0.2 from then on."""
    model = Weight(0.0)
    averages = follow(EMA(model, decay=0.2), model, [1.0] * 3)
    assert averages == pytest.approx([9 / 11, 1 - 0.4 / 11, 1 - 0.08 / 11], rel=1e-14)


def test_fixed_decay_lags_behind_a_drifting_weight() -> None:
    """For weights 1, 2, ..., n after 0 the average is n - d (1 - d^n) / (1 - d)."""
    model = Weight(0.0)
    ema = EMA(model, decay=0.9, warmup=False)
    averages = follow(ema, model, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert averages == pytest.approx([0.1, 0.29, 0.561, 0.9049, 1.31441], rel=1e-14)
    assert ema.updates == 5


def test_with_decay_zero_the_average_is_the_model() -> None:
    model = Weight(3.0)
    assert follow(EMA(model, decay=0.0), model, [7.0]) == [7.0]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_a_decay_outside_zero_to_one_raises(decay) -> None:
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got"):
        EMA(Weight(), decay=decay)


def test_it_starts_as_a_copy_without_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    ema = EMA(model)
    assert not ema.model.training
    assert model.training
    for average, p in zip(ema.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(average, p)
        assert average is not p
        assert not average.requires_grad
        assert p.requires_grad


def test_buffers_are_copied_not_averaged() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9)
    model(torch.randn(16, 2) + 5)
    ema.update(model)
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert int(ema.model.num_batches_tracked) == 1


def test_applied_swaps_weights_in_and_restores_them() -> None:
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.5, warmup=False)
    with torch.no_grad():
        model.weight.fill_(3.0)  # from 1, so that the average is 2
    ema.update(model)
    model.running_mean.fill_(9.0)
    with ema.applied(model) as given:
        assert given is model
        assert model.weight.tolist() == [2.0, 2.0]
        assert model.running_mean.tolist() == [0.0, 0.0]
    assert model.weight.tolist() == [3.0, 3.0]
    assert model.running_mean.tolist() == [9.0, 9.0]
    assert ema.model.weight.tolist() == [2.0, 2.0]


def fail_inside(model: Weight) -> None:
    assert float(model.w.detach()) == 2.0
    raise RuntimeError("stop")


def test_applied_restores_after_an_exception() -> None:
    model = Weight(1.0)
    ema = EMA(model, decay=0.5, warmup=False)
    follow(ema, model, [3.0])
    with pytest.raises(RuntimeError, match="stop"), ema.applied(model):
        fail_inside(model)
    assert float(model.w.detach()) == 3.0
    assert float(ema.model.w) == 2.0


def test_the_optimizer_keeps_its_references_to_the_parameters() -> None:
    model = Weight(1.0)
    ema = EMA(model, decay=0.5, warmup=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    where = model.w.data_ptr()
    follow(ema, model, [3.0])
    with ema.applied(model):
        assert model.w.data_ptr() == where
    assert optimizer.param_groups[0]["params"][0] is model.w
    model.w.grad = torch.ones_like(model.w)
    optimizer.step()
    assert float(model.w.detach()) == 2.0


def test_it_averages_a_score_model() -> None:
    model = EpsModel(nn.Linear(2, 2), VPSDE())
    ema = EMA(model, decay=0.0)
    with torch.no_grad():
        model.network.weight.fill_(0.25)
    ema.update(model)
    assert bool((ema.model.network.weight == 0.25).all())
    assert ema.model.sde == model.sde


def test_a_restored_state_continues_the_warmup() -> None:
    model = Weight(0.0)
    first = EMA(model)
    follow(first, model, [1.0, 1.0])
    second = EMA(Weight(5.0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.updates == 2
    assert follow(second, Weight(), [1.0]) == pytest.approx([141 / 143], rel=1e-14)


def test_applying_to_another_model_raises() -> None:
    ema = EMA(nn.Linear(2, 2))
    for other in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False)):
        with (
            pytest.raises(ValueError, match="model: expected the tensors of the"),
            ema.applied(other),
        ):
            pass


@pytest.mark.parametrize("other", [nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Linear(1, 2)])
def test_updating_from_another_model_raises_and_changes_nothing(other) -> None:
    ema = EMA(nn.Linear(2, 2))
    before = copy.deepcopy(ema.state_dict())
    with pytest.raises(ValueError, match="model: expected the tensors of the averaged"):
        ema.update(other)
    after = ema.state_dict()
    assert after["updates"] == before["updates"] == 0
    for key, value in before["model"].items():
        assert torch.equal(after["model"][key], value)
