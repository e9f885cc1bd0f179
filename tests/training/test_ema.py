"""Exponential moving average of a model's weights."""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

from diffusionkit import EMA, VPSDE, EpsModel, HalfLife, PowerEMA


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
    for key, value in before.items():
        assert torch.equal(after[key], value)


# A half-life in images


def test_half_lives_match_the_released_code() -> None:
    """The values of EDM's training loop for 50 images in batches of 4, with and without ramp-up.

    It computes half_life = min(images, seen * ramp_up) and .5 ** (batch / max(half_life, 1e-8)),
    with the images seen before the batch.
    """
    decay = HalfLife(50, 4, ramp_up=0.25)
    found = [decay(n) for n in (1, 2, 3, 50, 51, 52, 1000)]
    expected = [
        0.0, 0.0625, 0.25, 0.9449876283086067, 0.9460576467255959, 0.9460576467255959,
        0.9460576467255959,
    ]  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-14)
    assert HalfLife(50, 4)(1) == pytest.approx(0.9460576467255959, rel=1e-14)
    # The published setting: 500,000 images, batches of 512, at the 10th and the 100,000th.
    published = HalfLife(images=500_000, batch_size=512, ramp_up=0.05)
    expected = [0.2143109957132682, 0.9992904691232699]
    assert [published(10), published(100_000)] == pytest.approx(expected, rel=1e-14)


def test_the_share_of_a_weight_halves_in_a_half_life() -> None:
    model = Weight(1.0)
    averages = follow(EMA(model, HalfLife(images=64, batch_size=8)), model, [0.0] * 24)
    assert [averages[n - 1] for n in (8, 16, 24)] == pytest.approx([0.5, 0.25, 0.125], rel=1e-14)


def test_a_ramp_up_keeps_a_fraction_of_the_training() -> None:
    """d_n = 2^(-1 / (r (n - 1))), of weights that count the updates."""
    model, right = Weight(0.0), 0.0
    averages = follow(EMA(model, HalfLife(1e9, 2, ramp_up=0.1)), model, [1.0, 2.0, 3.0, 4.0])
    for n, d in ((1, 0.0), (2, 2.0**-10), (3, 2.0**-5), (4, 2.0 ** (-10 / 3))):
        right = d * right + (1 - d) * n
        assert averages[n - 1] == pytest.approx(right, rel=1e-14)


def test_a_decay_may_be_any_function_of_the_update() -> None:
    model = Weight(0.0)
    ema = EMA(model, lambda n: 1 - 1 / n)  # the mean
    assert follow(ema, model, [3.0, 5.0, 10.0]) == pytest.approx([3.0, 4.0, 6.0], rel=1e-14)
    wrong = EMA(model, lambda n: 1.5)
    with pytest.raises(ValueError, match=r"decay: expected a number in \[0, 1\), got 1.5"):
        wrong.update(model)
    assert (float(wrong.model.w), wrong.updates) == (10.0, 0)


# A part of another module


class Trained(nn.Module):
    """A module that trains a model and holds its averages, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.ema = EMA(self.net, decay=0.5, warmup=False)
        self.power = PowerEMA(self.net, (0.05, 0.1))

    def step(self) -> None:
        self.net(torch.randn(8, 2)).sum().backward()
        self.ema.update(self.net)
        self.power.update(self.net)

    @property
    def averages(self) -> list[nn.Module]:
        return [self.ema.model, *(average.model for average in self.power.averages.values())]


def test_averages_are_no_parameters_of_the_module_that_holds_them() -> None:
    module = Trained()
    names = {f"net.{name}" for name, _ in module.net.named_parameters()}
    assert {name for name, _ in module.named_parameters()} == names
    assert {name for name, _ in module.named_buffers()} == {
        f"net.{name}" for name, _ in module.net.named_buffers()
    }
    module.train().requires_grad_(True)
    for average in module.averages:
        assert not any(m.training for m in average.modules())
        assert not any(p.requires_grad for p in average.parameters())


def test_averages_are_in_the_state_of_the_module_that_holds_them() -> None:
    module = Trained()
    module.step()
    own = list(module.net.state_dict())
    assert list(module.state_dict()) == [
        *(f"net.{name}" for name in own),
        *(f"ema.model.{name}" for name in own), "ema.updates",
        *(f"power.0_05.model.{name}" for name in own), "power.0_05.updates",
        *(f"power.0_1.model.{name}" for name in own), "power.0_1.updates",
    ]  # fmt: skip
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = Trained()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.ema.updates, other.power.updates) == (1, 1)
    for mine, theirs in zip(module.averages, other.averages, strict=True):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    copied = copy.deepcopy(module)
    copied.step()
    assert (copied.ema.updates, module.ema.updates) == (2, 1)
    assert copied.power.averages[0.1] is copied.power.get_submodule("0_1")


def test_a_module_loads_states_without_its_averages() -> None:
    module, before = Trained(), Trained().state_dict()
    state = {name: x for name, x in before.items() if name.startswith("net.")}
    with pytest.raises(RuntimeError, match=r"ema.model.0.weight"):
        module.load_state_dict(state)
    missing = module.load_state_dict(state, strict=False).missing_keys
    assert missing == [name for name in before if not name.startswith("net.")]
    state = {**module.state_dict(), "ema.model.0.weight": torch.ones(3), "ema.other": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"(?s)ema.other.*weight: expected .*\[2, 2\].*\[3\]"):
        module.load_state_dict(state)


class Converted(nn.Linear):
    """A module whose weights were stored with the other sign in version 1."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *others) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}weight"] = -state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_states_know_the_versions_of_the_modules_in_an_average() -> None:
    module = nn.ModuleDict({"ema": EMA(nn.Sequential(Converted(2, 2)))})
    before = module["ema"].model[0].weight.clone()
    state = module.state_dict()
    module.load_state_dict(copy.deepcopy(state))
    module["ema"].load_state_dict(copy.deepcopy(module["ema"].state_dict()))
    assert torch.equal(module["ema"].model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_averages_move_with_the_module_and_keep_their_digits(dtype) -> None:
    module = Trained()
    with torch.no_grad():
        module.net[0].weight.fill_(1 / 3)
    module.ema.update(module.net)
    exact = module.ema.model[0].weight.clone()
    module.to(dtype)
    assert module.net[0].weight.dtype == dtype
    found = module.ema.model[0].weight
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(found.float(), exact)
    module.to("meta")
    for average in module.averages:
        assert {x.device.type for x in average.state_dict().values()} == {"meta"}


def test_weights_are_matched_once_and_again_after_they_change(monkeypatch) -> None:
    """The names of a large model take longer than the average itself."""
    matched = []
    original = EMA(nn.Linear(1, 1))._average.__class__.matching
    monkeypatch.setattr(
        "diffusionkit.training._averaged_weights.AveragedWeights.matching",
        lambda self, model: matched.append(model) or original(self, model),
    )
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = EMA(model, decay=0.5, warmup=False)

    def moved(change) -> tuple[int, float]:
        before = len(matched)
        change()
        old = ema.model[0].weight.detach().to(torch.float32, copy=True)
        ema.update(model)
        expected = old + 0.5 * (model[0].weight.detach().to(old.dtype) - old)
        torch.testing.assert_close(ema.model[0].weight.detach(), expected)
        mean = ema.model[1].running_mean
        assert torch.equal(mean, model[1].running_mean.to(mean.dtype))
        return len(matched) - before

    def replace_weight() -> None:
        model[0].weight = nn.Parameter(torch.randn(2, 2))

    def replace_layer() -> None:
        model[0] = nn.Linear(2, 2)

    def replace_buffer() -> None:
        model[1].running_mean = torch.randn(2)

    assert moved(lambda: None) == 1
    assert moved(lambda: None) == 0
    assert moved(lambda: model[0].weight.data.add_(1.0)) == 0
    for change in (replace_weight, replace_layer, replace_buffer):
        assert moved(change) == 1
        assert moved(lambda: None) == 0
    assert moved(lambda: model.double()) == 1  # in place: the same parameters, with other data
    assert moved(lambda: ema.model.half()) == 1
    assert ema.model[0].weight.dtype == torch.float32
    model[0].weight.data = torch.randn(3, 2)
    with pytest.raises(ValueError, match="model: expected the tensors of the averaged model"):
        ema.update(model)


def test_an_average_does_not_keep_a_model_or_copy_it() -> None:
    model = nn.Linear(2, 2)
    ema = EMA(model)
    ema.update(model)
    copied = copy.deepcopy(ema)
    weight, alive = model.weight, weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    other = nn.Linear(2, 2)
    other.weight = weight
    copied.update(other)
    assert copied.updates == 2
    assert ema.updates == 1
