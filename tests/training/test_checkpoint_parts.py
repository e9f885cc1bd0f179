"""What a checkpoint holds besides weights: schedulers, objectives, batches, averages, prefixes."""

import io
import logging
import math

import pytest
import torch
from support.nested import same
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim import lr_scheduler as lr

from diffusionkit import (
    EMA,
    VLB,
    VPSDE,
    CheckpointError,
    DDPMChain,
    EpsModel,
    HybridLoss,
    PowerEMA,
    ScoreMatching,
    linear_warmup,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit.checkpoints import load_network, save_network
from diffusionkit.networks import MLP
from diffusionkit.training import LossSecondMomentTimes

# Raised by importing the compiler of torch.
WRAPPERS = ["compiled", "parallel", "both", "other both", "inside"]

SCHEDULERS = {
    "LambdaLR": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr.StepLR(o, 2),
    "MultiStepLR": lambda o: lr.MultiStepLR(o, [2, 4]),
    "ConstantLR": lr.ConstantLR,
    "LinearLR": lr.LinearLR,
    "ExponentialLR": lambda o: lr.ExponentialLR(o, 0.9),
    "PolynomialLR": lr.PolynomialLR,
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: lr.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr.SequentialLR(
        o, [linear_warmup(o, 3), lr.MultiStepLR(o, [2, 4])], [3]
    ),
    "ChainedScheduler": lambda o: lr.ChainedScheduler(
        [linear_warmup(o, 3), lr.MultiStepLR(o, [2, 4])]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01),
    "linear_warmup": lambda o: linear_warmup(o, 5),
}


def rates(model, optimizer, scheduler, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step(*((1.0 + step,) if isinstance(scheduler, lr.ReduceLROnPlateau) else ()))
        found.append(optimizer.param_groups[0]["lr"])
    return found


# torch 2.6 and 2.8 warn of their own call in SequentialLR.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_of_torch_resumes(tmp_path, name) -> None:
    def make():
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return model, optimizer, SCHEDULERS[name](optimizer)

    model, optimizer, scheduler = make()
    if any(callable(value) for value in scheduler.state_dict().values()):
        pytest.skip("older versions of torch keep a function in the state of this scheduler")
    rates(model, optimizer, scheduler, 3)
    parts = {"optimizer": optimizer, "stateful": {"scheduler": scheduler}}
    save_checkpoint(tmp_path / "run.pt", model, **parts)
    other, resumed, again = make()
    parts = {"optimizer": resumed, "stateful": {"scheduler": again}}
    load_checkpoint(tmp_path / "run.pt", other, **parts)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert rates(other, resumed, again, 5) == rates(model, optimizer, scheduler, 5)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("last_epoch", "x"), ("last_epoch", -4), ("last_epoch", math.nan), ("base_lrs", [-0.1]),
        ("base_lrs", [math.nan]), ("base_lrs", 0.1), ("_last_lr", [math.inf]), ("gamma", "x"),
    ],
)  # fmt: skip
def test_wrong_values_of_a_scheduler_are_refused_by_name(tmp_path, key, wrong) -> None:
    model = nn.Linear(2, 2)
    scheduler = lr.StepLR(torch.optim.SGD(model.parameters(), 0.1), 2)
    save_checkpoint(tmp_path / "run.pt", model, stateful={"scheduler": scheduler})
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    state["stateful"]["scheduler"][key] = wrong
    torch.save(state, tmp_path / "run.pt")
    before = dict(scheduler.state_dict())
    with pytest.raises(CheckpointError, match=rf"stateful\['scheduler'\]\['{key}'\].*expected"):
        load_checkpoint(tmp_path / "run.pt", model, stateful={"scheduler": scheduler})
    assert scheduler.state_dict() == before


class Stateful:
    """An object with any state."""

    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"stateful": {"s": Stateful({"a": [1, {"fn": len}]})}},
         r"stateful\['s'\]\.state_dict\(\)\['a'\]\[1\]\['fn'\]"),
        ({"stateful": {"s": Stateful({"a": 1, "b": {(1, 2): 3}})}},
         r"stateful\['s'\]\.state_dict\(\)\['b'\]"),
        ({"extra": {"mean": torch.ones(2), "process": VPSDE()}}, r"extra\['process'\]"),
        ({"extra": {"deep": [[[lambda: 0]]]}}, r"extra\['deep'\]\[0\]\[0\]\[0\]"),
        ({"extra": {"sparse": torch.eye(3).to_sparse()}}, r"extra\['sparse'\]"),
        ({"extra": {"a": {"b": io.BytesIO()}}}, r"extra\['a'\]\['b'\]"),
    ],
)  # fmt: skip
def test_the_part_that_cannot_be_stored_is_named(tmp_path, options, name) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected tensors, numbers, .*got values that"):
        save_checkpoint(tmp_path / "run.pt", nn.Linear(2, 2), **options)
    assert not list(tmp_path.iterdir())


def wrapped(kind: str, network: nn.Module) -> nn.Module:
    if kind == "compiled":
        return torch.compile(network)
    if kind == "parallel":
        return DataParallel(network)
    if kind == "both":
        return DataParallel(torch.compile(network))
    if kind == "other both":
        return torch.compile(DataParallel(network))
    if kind == "inside":
        network[2] = torch.compile(network[2])
    return network


@pytest.mark.parametrize(
    ("first", "second"),
    [("bare", kind) for kind in WRAPPERS]
    + [(kind, "bare") for kind in WRAPPERS]
    + [("inside", "both"), ("other both", "inside")],
)
def test_wrapped_and_bare_networks_load_each_other(tmp_path, first, second) -> None:
    def run(kind: str):
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        model = EpsModel(wrapped(kind, network), VPSDE())
        ema, optimizer = EMA(model), torch.optim.Adam(model.parameters())
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        optimizer.step()
        ema.update(model)
        return model, ema, optimizer

    (model, ema, optimizer), (other, average, resumed) = run(first), run(second)
    save_checkpoint(tmp_path / "run.pt", model, ema=ema, optimizer=optimizer)
    names = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert set(names) >= {"network.0.weight", "network.1.running_mean", "network.2.bias"}
    load_checkpoint(tmp_path / "run.pt", other, ema=average, optimizer=resumed)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ema.model.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert same(resumed.state_dict()["state"], optimizer.state_dict()["state"])
    assert EMA(other).updates == 0


@pytest.mark.parametrize("part", ["_orig_mod", "module", "module._orig_mod"])
def test_prefixes_in_earlier_files_are_understood(tmp_path, part) -> None:
    model = EpsModel(nn.Linear(2, 2), VPSDE())
    save_checkpoint(tmp_path / "run.pt", model, ema=EMA(model))
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    for holder in (state, state["ema"]):
        weights = holder["model"].items()
        holder["model"] = {n.replace("network.", f"network.{part}."): x for n, x in weights}
    torch.save(state, tmp_path / "run.pt")
    other = EpsModel(nn.Linear(2, 2), VPSDE())
    load_checkpoint(tmp_path / "run.pt", other, ema=EMA(other))
    assert torch.equal(other.network.weight, model.network.weight)


class Named(nn.Module):
    """A network whose own parts have the names of wrappers' parts."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.add_module("linear", nn.Sequential())
        self.linear.module = nn.Linear(2, 2)


def test_own_parts_named_module_are_kept(tmp_path) -> None:
    model, other = Named(), DataParallel(Named())
    save_checkpoint(tmp_path / "run.pt", model)
    load_checkpoint(tmp_path / "run.pt", other)
    assert torch.equal(other.module.module.weight, model.module.weight)
    assert torch.equal(other.module.linear.module.weight, model.linear.module.weight)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", ["compiled", "parallel", "both", "other both"])
def test_wrapped_networks_are_saved_without_their_wrappers(tmp_path, kind, ending) -> None:
    network = MLP(2, width=4)
    save_network(tmp_path / f"n.{ending}", wrapped(kind, network))
    back = load_network(tmp_path / f"n.{ending}")
    assert same(dict(back.state_dict()), dict(network.state_dict()))


OBJECTIVES = {
    "ScoreMatching": lambda times: ScoreMatching(times=times),
    "VLB": lambda times: VLB(times=times),
    "HybridLoss": lambda times: HybridLoss(times=times),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_state_of_an_objective_is_part_of_the_checkpoint(tmp_path, name, caplog) -> None:
    model = EpsModel(nn.Linear(2, 2), DDPMChain([0.5, 0.5]))
    times = LossSecondMomentTimes(history=1)
    objective = OBJECTIVES[name](times)
    times.sample(model.sde, 3)
    times.update(torch.tensor([0.5, 1.0]), torch.tensor([3.0, 1.0]))
    save_checkpoint(tmp_path / "run.pt", model, objective=objective)
    fresh = OBJECTIVES[name](LossSecondMomentTimes(history=1))
    load_checkpoint(tmp_path / "run.pt", model, objective=fresh)
    assert torch.equal(fresh.times.probabilities, times.probabilities)
    assert not caplog.records
    # What nothing asks for is told, and what the file lacks is an error.
    load_checkpoint(tmp_path / "run.pt", model)
    assert "not loaded, since not requested: objective['times']" in caplog.text
    caplog.clear()
    load_checkpoint(tmp_path / "run.pt", model, restore_random=False)  # only the weights
    assert not caplog.records
    save_checkpoint(tmp_path / "run.pt", model)
    with pytest.raises(CheckpointError, match=r"expected objective \['times'\], got none"):
        load_checkpoint(tmp_path / "run.pt", model, objective=objective)
    load_checkpoint(tmp_path / "run.pt", model, objective=ScoreMatching())


def test_unread_parts_are_told(tmp_path, caplog) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    parts = {
        "ema": EMA(model), "optimizer": optimizer, "generators": {"loop": torch.Generator()},
        "stateful": {"warmup": linear_warmup(optimizer, 3)},
    }  # fmt: skip
    save_checkpoint(tmp_path / "run.pt", model, **parts)
    with caplog.at_level(logging.WARNING):
        load_checkpoint(tmp_path / "run.pt", model, **parts)
        assert not caplog.records
        load_checkpoint(tmp_path / "run.pt", model)
    for name in ("ema", "optimizer", "stateful['warmup']", "generators['loop']"):
        assert name in caplog.records[0].message


def test_averages_are_those_of_the_file(tmp_path) -> None:
    model = nn.Linear(2, 2)
    ema, power = EMA(model), PowerEMA(model, (0.05, 0.1))
    for average in (ema, power):
        average.update(model)
        save_checkpoint(tmp_path / "run.pt", model, ema=average)
        fresh = EMA(model) if average is ema else PowerEMA(model, (0.05, 0.1))
        load_checkpoint(tmp_path / "run.pt", model, ema=fresh)
        assert same(fresh.state_dict(), average.state_dict())
        other = PowerEMA(model) if average is ema else EMA(model)
        with pytest.raises(CheckpointError, match=r"ema: expected \w*EMA, got \w*EMA"):
            load_checkpoint(tmp_path / "run.pt", model, ema=other)
    with pytest.raises(CheckpointError, match=r"expected the lengths \[0.2\], got \[0.05, 0.1\]"):
        load_checkpoint(tmp_path / "run.pt", model, ema=PowerEMA(model, (0.2,)))


@pytest.mark.parametrize("block", [EMA, PowerEMA])
def test_a_model_that_holds_an_average_is_not_saved(tmp_path, block) -> None:
    model = nn.Linear(2, 2)
    ema = block(model)
    average = ema if block is EMA else ema.averages[0.05]
    save_checkpoint(tmp_path / "run.pt", model, ema=ema)
    with average.applied(model):
        with pytest.raises(ValueError, match="model: expected its own weights, got averaged ones"):
            save_checkpoint(tmp_path / "run.pt", model, ema=ema)
        with pytest.raises(ValueError, match="model: expected its own weights, got averaged ones"):
            load_checkpoint(tmp_path / "run.pt", model, ema=ema)
    save_checkpoint(tmp_path / "run.pt", model, ema=ema)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_cast(tmp_path, dtype) -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to(dtype), nn.Sequential(
        nn.Linear(2, 2), nn.BatchNorm1d(2)
    )  # fmt: skip
    save_checkpoint(tmp_path / "run.pt", model)
    load_checkpoint(tmp_path / "run.pt", other)
    assert torch.equal(other[0].weight, model[0].weight.float())


def test_weights_that_no_load_would_take_are_not_saved(tmp_path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    ema = EMA(model)
    save_checkpoint(tmp_path / "run.pt", model, ema=ema)
    load_checkpoint(tmp_path / "run.pt", model, ema=ema)
    for holder, name in ((model, "model"), (ema.model, "ema")):
        for tensor, place in ((holder[0].weight, "0.weight"), (holder[1].running_var, "1.running")):
            old = tensor.detach().clone()
            tensor.detach().fill_(math.nan)
            with pytest.raises(ValueError, match=f"^{name}: {place}.*: expected finite numbers"):
                save_checkpoint(tmp_path / "run.pt", model, ema=ema)
            tensor.detach().copy_(old)
    save_checkpoint(tmp_path / "run.pt", model, ema=ema)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 1.9}, "step: expected an integer, got float"),
        ({"step": True}, "step: expected an integer, got bool"),
        ({"step": -1}, "step: expected an integer >= 0, got -1"),
        ({"ema": nn.Linear(1, 1)}, "ema: expected an EMA or a PowerEMA, got Linear"),
        ({"optimizer": "Adam"}, "optimizer: expected a Optimizer, got the string"),
        ({"stateful": [1]}, "stateful: expected a mapping by names, got list"),
        ({"stateful": {1: Stateful({})}}, r"stateful: expected a mapping by names, got keys \[1\]"),
        ({"stateful": {"a": 3}}, r"stateful\['a'\]: expected an object with state_dict and"),
        ({"stateful": {"a": Stateful}}, r"stateful\['a'\]: expected an object with state_dict and"),
        ({"generators": {"a": 3}}, r"generators\['a'\]: expected a Generator, got int"),
        ({"extra": 3}, "extra: expected a mapping by names, got int"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, match) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        save_checkpoint(tmp_path / "run.pt", nn.Linear(1, 1), **options)
    with pytest.raises(TypeError, match="model: expected a Module, got int"):
        save_checkpoint(tmp_path / "run.pt", 3)
    with pytest.raises(TypeError, match="path: expected a path, got NoneType"):
        load_checkpoint(None, nn.Linear(1, 1))
    assert not list(tmp_path.iterdir())
