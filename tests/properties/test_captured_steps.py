"""Steps of training and sampling as CUDA graphs: the same operations for any values.

Each step is traced once, as on a device, whose values are not read. Its graph reads none, copies
none from the host, and gives the step's results for other inputs.
"""

import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    AnnealedLangevin,
    EDMWeighting,
    EpsModel,
    Euler,
    EulerMaruyama,
    ImportanceTimes,
    Langevin,
    LikelihoodWeighting,
    LogNormalTimes,
    MinSNRWeighting,
    ReverseDiffusion,
    ScoreMatching,
    StableTarget,
    StratifiedTimes,
    UniformTimes,
    VModel,
)
from diffusionkit.networks import MLP

PROCESSES = {"VP": VPSDE, "VE": VESDE, "EDM": EDMSDE}
OBJECTIVES = {
    "uniform": lambda: ScoreMatching(times=UniformTimes()),
    "stratified": lambda: ScoreMatching(times=StratifiedTimes()),
    "importance": lambda: ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes()),
    "EDM": lambda: ScoreMatching(EDMWeighting(), times=LogNormalTimes()),
    "min SNR": lambda: ScoreMatching(MinSNRWeighting()),
    "stable target": lambda: ScoreMatching(target=StableTarget()),
}
PARTS = {
    "DDIM": DDIM(),
    "Euler": Euler(),
    "Ancestral": Ancestral(),
    "ReverseDiffusion": ReverseDiffusion(),
    "EulerMaruyama": EulerMaruyama(),
    "Langevin": Langevin(),
    "AnnealedLangevin": AnnealedLangevin(),
}
# What reads a value, or what a tensor of Python numbers starts with.
OF_THE_HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "equal.default")


@pytest.fixture
def as_on_a_device(monkeypatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusionkit"):
            for check in ("readable", "can_be_read"):
                if hasattr(module, check):
                    monkeypatch.setattr(module, check, lambda x: False)


def check_captured(step, model, first: tuple, second: tuple) -> None:
    step(*first)
    graph = make_fx(step)(*first)
    graph.graph.eliminate_dead_code()  # arithmetic of the host, which decides what is traced
    graph.recompile()
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if any(word in name for word in OF_THE_HOST)]
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    constants = [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    assert {tensor.data_ptr() for tensor in constants} <= own
    torch.manual_seed(0)
    results = [step(*second)]
    torch.manual_seed(0)
    with torch.no_grad():  # derivatives are operations of the graph
        results.append(graph(*second))
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][0], step(*first)[0])


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    "process", ["VP", *(pytest.param(p, marks=pytest.mark.slow) for p in ("VE", "EDM"))]
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_gradients_of_a_loss(objective, process) -> None:
    model = VModel(MLP(3, width=8, depth=1), PROCESSES[process]())
    loss, weights = OBJECTIVES[objective](), list(model.parameters())

    def step(x0, reference):
        given = {"reference": reference} if objective == "stable target" else {}
        return torch.autograd.grad(loss(model, x0, **given).mean(), weights)

    first, second = torch.randn(2, 5, 3)
    check_captured(step, model, (first[:4], first), (second[:4], second))


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize(
    "process", ["VE", *(pytest.param(p, marks=pytest.mark.slow) for p in ("VP", "EDM"))]
)
@pytest.mark.parametrize("name", PARTS)
def test_a_step_between_given_times(name, process) -> None:
    model, part = EpsModel(MLP(3, width=8, depth=1), PROCESSES[process]()), PARTS[name]
    T = model.sde.T

    @torch.no_grad()
    def step(x, t, s):
        times = (t,) if "Langevin" in name else (t, s)
        return (part.step(model, x, *times).x,)

    x, t = torch.randn(2, 4, 3), torch.tensor([0.5 * T, 0.9 * T])
    inputs = [(x[i], t[i].expand(4), 0.7 * t[i].expand(4)) for i in range(2)]
    check_captured(step, model, *inputs)


def test_what_is_of_the_host_is_noticed() -> None:
    model = EpsModel(MLP(3, width=8, depth=1), VPSDE())
    x = (torch.ones(3),), (torch.zeros(3),)
    for step in (lambda x: (x * torch.tensor([1.0, 2.0, 3.0]),), lambda x: (x * float(x.sum()),)):
        with pytest.raises((AssertionError, RuntimeError)):
            check_captured(step, model, *x)
