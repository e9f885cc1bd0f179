"""Averages of any precision, kept by name, and lent to models."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Lock

import pytest
import torch
from support.processes import skip_without_sharding_on_cpu
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from diffusionkit import (
    EMA,
    VPSDE,
    Ancestral,
    EpsModel,
    LearnedSDE,
    PCSampler,
    PowerEMA,
    load_checkpoint,
    power_exponent,
    reconstruct_ema,
    save_checkpoint,
)
from diffusionkit.networks import MLP

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def filled(value: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Linear(1, 1, dtype=dtype)
    return fill(model, value)


@torch.no_grad()
def fill(model: nn.Module, value: float) -> nn.Module:
    for p in model.parameters():
        p.fill_(value)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("decay", "n"), [(0.999, 1500), (0.9999, 1500)])
def test_averages_of_any_precision_follow_the_recursion(dtype, decay, n) -> None:
    """From 0 towards 1 the average is 1 - d^n, wherever a step is lost in the model's dtype."""
    model = filled(0.0, dtype)
    ema = EMA(model, decay=decay, warmup=False)
    fill(model, 1.0)
    for _ in range(n):
        ema.update(model)
    assert ema.model.weight.dtype == torch.promote_types(dtype, torch.float32)
    assert float(ema.model.weight) == pytest.approx(1 - decay**n, rel=1e-3)
    with ema.applied(model):
        assert model.weight.dtype == dtype
        assert float(model.weight.detach()) == float(ema.model.weight.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_power_averages_of_any_precision(dtype) -> None:
    """The mean of s / n under the weights s^gamma is (gamma + 1) / (gamma + 2)."""
    model = filled(0.0, dtype)
    ema, gamma, n = PowerEMA(model, sigma_rels=(0.05,)), power_exponent(0.05), 1500
    for k in range(1, n + 1):
        ema.update(fill(model, k / n))
    right = (gamma + 1) / (gamma + 2)
    assert float(ema.averages[0.05].model.weight) == pytest.approx(right, abs=2e-3)


@pytest.mark.parametrize("average", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_models_of_another_precision_than_the_average(average, dtype) -> None:
    ema = EMA(filled(0.0, average), decay=0.9, warmup=False)
    ema.update(filled(1.0, dtype))
    assert float(ema.model.weight) == pytest.approx(0.1, rel=1e-6)


class Mixed(nn.Module):
    """Every kind of tensor, in several precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        self.single = nn.Parameter(torch.zeros(2))
        self.wide = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        self.whole = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.frozen = nn.Parameter(torch.full((2,), 0.3, dtype=torch.float16), requires_grad=False)
        self.tied = self.low
        self.register_parameter("absent", None)
        self.register_buffer("mean", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("mask", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


class Locked(nn.Module):
    """A model that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.lock = nn.ModuleDict({"part": Mixed()}), Lock()


@pytest.mark.parametrize("build", [Mixed, Locked])
def test_every_tensor_is_averaged_or_copied(build) -> None:
    model = build()
    ema = EMA(model, decay=0.75, warmup=False)
    mine, theirs = (m if build is Mixed else m.parts.part for m in (model, ema.model))
    frozen = mine.frozen.clone()
    with torch.no_grad():
        for name in ("low", "single", "wide", "phase", "whole", "mean", "mask", "hidden"):
            getattr(mine, name).fill_(1)
    ema.update(model)
    for name in ("low", "single", "wide", "phase"):
        assert getattr(theirs, name).tolist() == [0.25, 0.25]
    for name in ("whole", "mean", "mask", "hidden"):
        assert getattr(theirs, name).tolist() == [1, 1]
    assert theirs.tied is theirs.low
    assert theirs.frozen.tolist() == frozen.float().tolist()
    kept = {name: x.dtype for name, x in theirs.state_dict().items()}
    assert kept == {
        "low": torch.float32, "single": torch.float32, "wide": torch.float64,
        "phase": torch.complex64, "whole": torch.int64, "frozen": torch.float32,
        "tied": torch.float32, "mean": torch.float32, "mask": torch.bool,
    }  # fmt: skip
    with ema.applied(model):
        assert mine.low.dtype == torch.bfloat16
        assert mine.low.tolist() == [0.25, 0.25]
    assert mine.low.tolist() == [1, 1]
    assert mine.frozen.tolist() == frozen.tolist()
    other = EMA(build())
    other.load_state_dict(ema.state_dict())
    for one, two in zip(ema.model.state_dict().values(), other.model.state_dict().values(),
                        strict=True):  # fmt: skip
        assert torch.equal(one, two)


def test_weights_of_a_model_that_cannot_be_copied_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="expected a model that can be copied, got"):
        EMA(Locked()).model(torch.ones(1))
    with pytest.raises(AttributeError, match=r"'predict': .* use `with ema.applied"):
        EMA(Locked()).model.predict(torch.ones(1))


def test_the_average_of_a_half_precision_model_predicts_in_float32() -> None:
    model = EpsModel(nn.Sequential(), VPSDE())
    model.network = HalfMLP().bfloat16()
    ema = EMA(model)
    x, t = torch.randn(4, 3), torch.full((4,), 0.5)
    prediction = ema.model.predict(x, t).eps
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(prediction, copy.deepcopy(model).float().eval().predict(x, t).eps)


class HalfMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, noise_label: Tensor) -> Tensor:
        return self.norm(self.linear(x.to(self.linear.weight.dtype)))


def test_an_averaged_model_moved_to_half_precision_goes_on_in_float32() -> None:
    model = filled(0.0)
    ema = EMA(model, decay=0.999, warmup=False)
    ema.model.half()
    fill(model, 1.0)
    for _ in range(1000):
        ema.update(model)
    assert float(ema.model.weight) == pytest.approx(1 - 0.999**1000, rel=1e-3)


def test_states_of_averages_once_kept_in_half_precision_load() -> None:
    model = filled(0.5, torch.bfloat16)
    ema = EMA(filled(0.0, torch.bfloat16))
    state = {f"model.{name}": x for name, x in model.state_dict().items()}
    ema.load_state_dict({**state, "updates": torch.tensor(7)})
    assert (float(ema.model.weight), ema.model.weight.dtype, ema.updates) == (0.5, torch.float32, 7)


BAD = {
    "missing .*model.weight": lambda s: s.pop("model.weight"),
    "unexpected .*model.other": lambda s: s.update({"model.other": torch.ones(1)}),
    r"weight: expected .*\[1, 1\].*, got .*\[2\]": lambda s: s.update(
        {"model.weight": torch.ones(2)}
    ),
    "weight: expected .*, got None": lambda s: s.update({"model.weight": [[1.0]]}),
    "bias: expected .*, got": lambda s: s.update({"model.bias": torch.ones(1, dtype=torch.int64)}),
    "missing .*updates": lambda s: s.pop("updates"),
    "updates: expected an integer >= 0": lambda s: s.update(updates=torch.tensor(-1)),
}


@pytest.mark.parametrize("message", BAD)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(message) -> None:
    ema, power = EMA(filled(1.0)), PowerEMA(filled(1.0), (0.05, 0.1))
    state = copy.deepcopy(EMA(filled(2.0)).state_dict())
    good = copy.deepcopy(state)
    BAD[message](state)
    with pytest.raises((ValueError, TypeError), match=message):
        ema.load_state_dict(state)
    with pytest.raises((ValueError, TypeError), match=message):
        power.load_state_dict(
            {f"{length}.{n}": x for length, s in (("0_05", good), ("0_1", state))
             for n, x in s.items()}
        )  # fmt: skip
    for average in (ema, *power.averages.values()):
        assert [float(p) for p in average.model.parameters()] == [1.0, 1.0]


def test_a_model_without_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match="model: expected parameters with a shape, got"):
        EMA(nn.LazyLinear(2))


# Lending


def two(kind: str) -> tuple[EMA, nn.Module]:
    """Return an average of 2 and a model of 3."""
    model = filled(2.0)
    ema = EMA(model) if kind == "EMA" else PowerEMA(model, (0.05, 0.1)).averages[0.05]
    return ema, fill(model, 3.0)


@pytest.fixture(params=["EMA", "PowerEMA"])
def kind(request) -> str:
    return request.param


def values(*models: nn.Module) -> list[float]:
    return [float(p.detach()) for model in models for p in model.parameters()]


def test_a_state_saved_inside_holds_the_average(kind) -> None:
    ema, model = two(kind)
    with ema.applied(model):
        state = copy.deepcopy(ema.state_dict())
        assert values(model, ema.model) == [2.0] * 4
    assert float(state["model.weight"]) == 2.0
    assert values(model, ema.model) == [3.0, 3.0, 2.0, 2.0]


def test_an_update_inside_is_refused(kind) -> None:
    ema, model = two(kind)
    power = PowerEMA(model)
    for average in (ema, EMA(model), power):
        with pytest.raises(ValueError, match="model: expected its own weights"), ema.applied(model):
            average.update(model)
        assert average.updates == 0
    assert values(model, ema.model) == [3.0, 3.0, 2.0, 2.0]
    ema.update(model)


def test_a_checkpoint_inside_is_refused(kind, tmp_path) -> None:
    ema, model = two(kind)
    path = tmp_path / "run.pt"
    whole = nn.Sequential(model)  # part of what is saved holds the average
    save_checkpoint(path, whole)
    before = path.read_bytes()
    with ema.applied(model):
        for act in (save_checkpoint, load_checkpoint):
            with pytest.raises(ValueError, match="model: expected its own weights, got averaged"):
                act(path, whole)
    assert path.read_bytes() == before
    load_checkpoint(path, whole)


def test_nested_blocks_of_one_average(kind) -> None:
    ema, model = two(kind)
    with ema.applied(model):
        with ema.applied(model):
            assert values(model) == [2.0, 2.0]
        assert values(model) == [2.0, 2.0]
    assert values(model) == [3.0, 3.0]


def test_another_average_inside_is_refused(kind) -> None:
    ema, model = two(kind)
    score = nn.Sequential(model)
    for other, target in ((EMA(model), model), (EMA(score), score)):
        with ema.applied(model):
            with pytest.raises(ValueError, match="got averaged ones; leave"), other.applied(target):
                pass
            assert values(model) == [2.0, 2.0]
        assert values(model) == [3.0, 3.0]
        with other.applied(target):
            pass


def test_one_average_in_two_models(kind) -> None:
    ema, model = two(kind)
    other = filled(5.0)
    with ema.applied(model), ema.applied(other):
        assert values(model, other) == [2.0] * 4
    assert values(model, other) == [3.0, 3.0, 5.0, 5.0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_that_overlap_end_with_the_last(kind, order) -> None:
    ema, model = two(kind)
    blocks = [ema.applied(model) for _ in order]
    for block in blocks:
        block.__enter__()
    blocks[order[0]].__exit__(None, None, None)
    assert values(model) == [2.0, 2.0]
    blocks[order[1]].__exit__(None, None, None)
    assert values(model) == [3.0, 3.0]


def test_threads_share_an_average(kind) -> None:
    ema, model = two(kind)
    barrier, wrong = Barrier(4), []

    def run(_: int) -> None:
        barrier.wait(60)
        for _ in range(50):
            with ema.applied(model):
                if values(model) != [2.0, 2.0]:
                    wrong.append(values(model))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    assert not wrong
    assert values(model) == [3.0, 3.0]


def test_an_update_in_another_thread_is_refused(kind) -> None:
    ema, model = two(kind)
    inside, done = Event(), Event()

    def hold() -> None:
        with ema.applied(model):
            inside.set()
            done.wait(60)

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert inside.wait(60)
        with pytest.raises(ValueError, match="model: expected its own weights"):
            ema.update(model)
        done.set()
        held.result(60)
    ema.update(model)


def test_a_generator_left_halfway_gives_the_weights_back(kind) -> None:
    ema, model = two(kind)

    def steps():
        with ema.applied(model):
            yield values(model)
            yield values(model)

    run = steps()
    assert next(run) == [2.0, 2.0]
    run.close()
    assert values(model) == [3.0, 3.0]


def test_a_step_inside_is_undone_and_logged(kind, caplog) -> None:
    ema, model = two(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with caplog.at_level(logging.WARNING), ema.applied(model):
        model(torch.ones(1, 1)).sum().backward()
    assert not caplog.records
    with caplog.at_level(logging.WARNING), ema.applied(model):
        optimizer.step()
    assert "changed weight, bias" in caplog.text
    assert values(model, ema.model) == [3.0, 3.0, 2.0, 2.0]


def test_a_model_cast_inside_gets_its_own_weights_back(kind) -> None:
    ema, model = two(kind)
    model.register_buffer("count", torch.tensor(1.0))
    ema = EMA(model)
    fill(model, 3.0)
    model.count.fill_(4.0)
    with ema.applied(model):
        model.double()
    assert values(model) == [3.0, 3.0]
    assert (float(model.count), model.count.dtype) == (4.0, torch.float64)


def test_averages_in_inference_mode() -> None:
    model = filled(2.0)
    with torch.inference_mode():
        ema = EMA(model, decay=0.5, warmup=False)
    fill(model, 4.0)
    ema.update(model)
    with torch.inference_mode(), ema.applied(model):
        assert values(model) == [3.0, 3.0]
    assert values(model) == [4.0, 4.0]
    model(torch.ones(1, 1)).sum().backward()


# Wrapped and sharded models


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


WRAPPERS = {
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "DDP": DistributedDataParallel,
    "both": lambda net: torch.compile(DistributedDataParallel(net), backend="eager"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_without_wrappers(process_group, wrap, first) -> None:
    network = MLP(3)
    plain = EpsModel(network, VPSDE())
    wrapped = EpsModel(WRAPPERS[wrap](network), VPSDE())
    one, other = (wrapped, plain) if first else (plain, wrapped)
    ema = EMA(one, decay=0.5, warmup=False)
    assert list(ema.model.state_dict()) == list(plain.state_dict())
    assert list(ema.state_dict()) == [*(f"model.{name}" for name in plain.state_dict()), "updates"]
    before = network.head.weight.detach().clone() if hasattr(network, "head") else None
    fill(network, 1.0)
    ema.update(other)
    fill(network, 2.0)
    with ema.applied(other):
        applied = {name: x.clone() for name, x in plain.state_dict().items()}
    for name, x in ema.model.state_dict().items():
        assert torch.equal(x, applied[name])
    assert before is None or values(network)[0] == 2.0
    assert all(float(x.detach().min()) == 2.0 for x in network.parameters())
    x, t = torch.randn(2, 3), torch.full((2,), 0.5)
    assert ema.model.predict(x, t).eps.shape == (2, 3)


def shard(model: EpsModel) -> EpsModel:
    skip_without_sharding_on_cpu()
    fully_shard(model.network, mesh=init_device_mesh("cpu", (1,)))
    return model


def trained(parameters: list[Tensor]) -> None:
    """Change the weights as an optimizer would, whole or sharded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator)
            (p.to_local() if hasattr(p, "to_local") else p).add_(noise)


def networks() -> tuple[EpsModel, EpsModel]:
    torch.manual_seed(0)
    network = MLP(3)
    return EpsModel(network, VPSDE()), EpsModel(copy.deepcopy(network), VPSDE())


def full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: x.full_tensor() if hasattr(x, "full_tensor") else x for k, x in state.items()}


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("build", [EMA, PowerEMA])
def test_averages_of_a_sharded_model(process_group, tmp_path, build, early) -> None:
    plain, sharded = networks()
    first = [build(sharded)] if early else []
    shard(sharded)
    reference, ema = build(plain), first[0] if early else build(sharded)
    for _ in range(3):
        for model, average in ((plain, reference), (sharded, ema)):
            trained(list(model.parameters()))
            average.update(model)
    ones, others = (
        list(e.averages.values()) if isinstance(e, PowerEMA) else [e] for e in (reference, ema)
    )
    x, t = torch.randn(4, 3), torch.full((4,), 0.5)
    for one, other in zip(ones, others, strict=True):
        found = full(other.model.state_dict())
        assert found.keys() == one.model.state_dict().keys()
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(found[name], value)
        own = plain.predict(x, t).eps
        with torch.no_grad():
            with other.applied(sharded):
                torch.testing.assert_close(sharded.predict(x, t).eps, one.model.predict(x, t).eps)
            torch.testing.assert_close(sharded.predict(x, t).eps, own)
        other.update(sharded)
        one.update(plain)
    if isinstance(ema, PowerEMA):
        for path in ema.save(tmp_path):
            assert torch.load(path, weights_only=True)["updates"] == 4
        plain.load_state_dict(reconstruct_ema(tmp_path, 0.08))


def test_a_checkpoint_of_a_sharded_model_is_whole(process_group, tmp_path) -> None:
    plain, sharded = networks()
    shard(sharded)
    ema, optimizer = EMA(sharded), torch.optim.Adam(sharded.parameters())
    for p in sharded.parameters():
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    ema.update(sharded)
    path = tmp_path / "run.pt"
    save_checkpoint(path, sharded, ema=ema, optimizer=optimizer)
    mine = EMA(plain), torch.optim.Adam(plain.parameters())
    load_checkpoint(path, plain, ema=mine[0], optimizer=mine[1])
    again = shard(networks()[0])
    theirs = EMA(again), torch.optim.Adam(again.parameters())
    load_checkpoint(path, again, ema=theirs[0], optimizer=theirs[1])
    for model, (average, adam) in ((plain, mine), (again, theirs)):
        assert average.updates == 1
        for p, q in zip(model.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(*(full({"": x})[""] for x in (p, q)))
            moment, other = (o.state[w]["exp_avg"] for o, w in ((adam, p), (optimizer, q)))
            assert torch.equal(*(full({"": x})[""] for x in (moment, other)))
            p.grad = torch.full_like(p, 0.2)
        adam.step()
        average.update(model)
    for name, x in full(again.state_dict()).items():
        torch.testing.assert_close(x, plain.state_dict()[name])


def test_a_sharded_model_samples_with_its_average(process_group) -> None:
    plain, sharded = networks()
    shard(sharded)
    ema, reference = EMA(sharded, decay=0.5), EMA(plain, decay=0.5)
    start = torch.randn(4, 3)
    for model, average in ((plain, reference), (sharded, ema)):
        parameters = list(model.parameters())  # as an optimizer holds them
        PCSampler(model, Ancestral(), steps=2)(start)
        trained(parameters)
        average.update(model)
    ones = [torch.Generator().manual_seed(0) for _ in range(2)]
    with ema.applied(sharded), reference.applied(plain):
        x, y = (PCSampler(model, Ancestral(), steps=3)(start, generator=g)
                for model, g in zip((plain, sharded), ones, strict=True))  # fmt: skip
    torch.testing.assert_close(x, y)


def test_a_learned_process_is_averaged_too() -> None:
    model = EpsModel(MLP(3), LearnedSDE())
    ema = EMA(model, decay=0.5, warmup=False)
    assert any(name.startswith("model.sde.") for name in ema.state_dict())
    fill(model.sde, 0.25)
    ema.update(model)
    assert ema.model.sde is not model.sde
