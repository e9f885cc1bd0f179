"""The cost of steps and of a run's set-up in dispatched operations; kept tables are current."""

import copy
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from support import seeded
from torch.utils._python_dispatch import TorchDispatchMode

from diffusionkit import (
    DDIM,
    DEIS,
    EDMSDE,
    VESDE,
    VPSDE,
    Ancestral,
    DPMSolver2M,
    EDMModel,
    EpsModel,
    Euler,
    FlowMatchingSDE,
    ForwardSDE,
    Heun,
    KarrasGrid,
    Langevin,
    LogSigmaLabel,
    LogSNRGrid,
    PCSampler,
    ReverseDiffusion,
    ScaledScoreModel,
    UniPC,
    VelocityModel,
    X0Model,
)

READS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.item.default"}
COPIES = {"aten._to_copy.default", "aten.copy_.default"}


class Count(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self):
        super().__init__()
        self.by_name = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.by_name[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


def counted(run):
    with Count() as count:
        run()
    return count.by_name


def sampler_of(kind, sde, *parts, steps=20, grid=None, **settings):
    output = torch.ones(5, 2)
    model = kind(lambda x, noise_label: output, sde, **settings)
    return PCSampler(model, *parts, steps=steps, grid=grid, denoise=False)


KARRAS, LOG_SNR = KarrasGrid(to_zero=True), LogSNRGrid()
CASES = {  # the sampler by its number of steps, and the operations of a step
    "ddim": (EpsModel, VPSDE(), (DDIM(),), None, 3),
    "ancestral": (EpsModel, VPSDE(), (Ancestral(),), None, 5),
    "pc vp": (EpsModel, VPSDE(), (ReverseDiffusion(), Langevin()), None, 17),
    "pc ve": (ScaledScoreModel, VESDE(), (ReverseDiffusion(), Langevin()), None, 18),
    "2m of noise": (EpsModel, VPSDE(), (DPMSolver2M(),), LOG_SNR, 6),
    "2m of data": (X0Model, EDMSDE(), (DPMSolver2M(),), KARRAS, 4),
    "unipc": (EpsModel, VPSDE(), (UniPC(),), LOG_SNR, 7),
    "deis": (EpsModel, VPSDE(), (DEIS(),), LOG_SNR, 5),
    "euler": (X0Model, EDMSDE(), (Euler(),), KARRAS, 2),
    "heun": (X0Model, EDMSDE(), (Heun(),), KARRAS, 6),
    "heun edm": (EDMModel, EDMSDE(), (Heun(),), KARRAS, 10),
    "euler flow": (VelocityModel, FlowMatchingSDE(), (Euler(),), None, 3),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_few_operations_and_reads_nothing(case):
    kind, sde, parts, grid, most = CASES[case]
    counts = []
    for steps in (20, 30):
        sampler, x = sampler_of(kind, sde, *parts, steps=steps, grid=grid), torch.ones(5, 2)
        sampler(x)
        counts.append(counted(lambda sampler=sampler, x=x: sampler(x)))
    few, many = counts
    assert sum(many.values()) - sum(few.values()) <= 10 * most
    for name in READS | COPIES:
        assert many[name] == few[name]


@pytest.mark.parametrize("case", CASES)
def test_a_runs_set_up_is_computed_once(case):
    kind, sde, parts, grid, most = CASES[case]
    sampler = sampler_of(kind, sde, *parts, grid=grid)
    counts = [sum(counted(lambda n=n: sampler(torch.ones(5, 2))).values()) for n in range(3)]
    assert counts[1] == counts[2]
    assert counts[1] <= 20 * most + 60


def test_a_call_uses_the_tables_of_the_constructor():
    sampler = sampler_of(EpsModel, VPSDE(), UniPC(), grid=LOG_SNR)
    first = sum(counted(lambda: sampler(torch.ones(5, 2))).values())
    assert first <= 20 * 7 + 60


def samples(sampler, shape=(5, 2), **settings):
    return sampler(torch.ones(shape, **settings), generator=seeded())


@pytest.mark.parametrize(
    "label",
    [
        lambda sde, t: torch.full_like(t, float(t[0])),
        lambda sde, t: torch.full_like(t, float(t[-1])),
        lambda sde, t: t - t.mean() + t.amax() * t.amin(),
        lambda sde, t: t + torch.arange(5.0),
        lambda sde, t: t if len(t) == 5 else t.unknown,
        lambda sde, t: t.reshape(-1) if len(t) == 5 else t.unsqueeze(1),
    ],
    ids=["first", "last", "mean", "of each sample", "error", "shape"],
)
@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_a_label_that_is_no_function_of_each_time_keeps_working(label, steps):
    seen = []

    def network(x, noise_label):
        seen.append(noise_label.clone())
        return 0.1 * x

    grid = torch.linspace(1.0, 0.1, steps + 1)
    PCSampler(EpsModel(network, VPSDE(), label=label), DDIM(), grid=grid)(torch.ones(5, 2))
    for t, found in zip(grid, seen, strict=True):
        torch.testing.assert_close(found, label(VPSDE(), t.expand(5)))


def test_labels_are_computed_once_for_a_run():
    calls = []

    def label(sde, t):
        calls.append(len(t))
        return torch.log1p(t)

    model = EpsModel(lambda x, noise_label: x * noise_label[:, None], VPSDE(), label=label)
    sampler = PCSampler(model, Heun(), Langevin(), steps=10, denoise=False)
    calls.clear()
    found = samples(sampler)
    assert len(calls) == 4  # for the grid and the second stages, each with a check
    calls.clear()
    label.elementwise = False
    torch.testing.assert_close(samples(sampler), found, rtol=0, atol=0)
    assert calls == 30 * [5]
    calls.clear()
    label.elementwise = True
    torch.testing.assert_close(samples(sampler), found, rtol=0, atol=0)
    assert len(calls) == 2


def test_a_network_may_change_its_labels_in_place():
    def network(x, noise_label):
        return x * noise_label.mul_(0.5)[:, None]

    def careful(x, noise_label):
        return x * (noise_label * 0.5)[:, None]

    one, two = (
        PCSampler(EDMModel(f, EDMSDE()), ReverseDiffusion(), Langevin(), steps=8, grid=KARRAS)
        for f in (network, careful)
    )
    for _ in range(2):
        assert torch.equal(samples(one), samples(two))


def fresh(sampler):
    """Return the same sampler, made anew."""
    return PCSampler(
        sampler.model,
        sampler.predictor,
        sampler.corrector,
        steps=sampler.steps,
        grid=sampler.grid,
        denoise=sampler.denoise,
    )


class Mutable(ForwardSDE):
    """A process whose schedule may change."""

    rate = 1.0

    def marginal(self, t):
        return torch.exp(-self.rate * t), torch.sqrt(-torch.expm1(-2 * self.rate * t))


class Growing(VPSDE):
    """A process that is frozen but for an attribute of its own."""

    extra = 1.0

    def marginal(self, t):
        return super().marginal(t * self.extra)


@dataclass
class Weak(DDIM.__mro__[1]):
    """A predictor that may change."""

    share: float = 0.5

    def coefficients(self, sde, t, s):
        c = DDIM().coefficients(sde, t, s)
        return type(c)(c.x * self.share, c.x0, None)


def change(sampler, what):
    if what == "label":
        sampler.model.label = LogSigmaLabel(2.0)
    elif what == "label's own":
        sampler.model.label.power = 3.0
    elif what == "process":
        sampler.model.sde.rate = 2.0
    elif what == "subclass":
        Growing.extra = 0.5
    elif what == "predictor":
        sampler.predictor = DPMSolver2M()
    elif what == "predictor's own":
        sampler.predictor.share = 0.9
    elif what == "steps":
        sampler.steps = 9
    elif what == "grid":
        sampler.grid = LogSNRGrid(t_end=0.1)
    elif what == "grid in place":
        sampler.grid[-1] = 0.2
    elif what == "network":
        sampler.model.network = lambda x, noise_label: torch.cos(x) * noise_label[:, None]


class Powers:
    """A label that may change."""

    power = 1.0

    def __call__(self, sde, t):
        return t**self.power


@pytest.mark.parametrize(
    "what",
    ["label", "label's own", "process", "subclass", "predictor", "predictor's own", "steps",
     "grid", "grid in place", "network"],
)  # fmt: skip
def test_kept_tables_are_those_of_the_parts_of_now(what, monkeypatch):
    monkeypatch.setattr(Growing, "extra", 1.0)
    sde = {"process": Mutable, "subclass": Growing}.get(what, VPSDE)()
    predictor = Weak() if what == "predictor's own" else UniPC()
    predictor = Heun() if what in ("label", "label's own", "network", "grid") else predictor
    grid = torch.linspace(1.0, 0.1, 8) if what == "grid in place" else LogSNRGrid(t_end=0.05)
    model = EpsModel(
        lambda x, noise_label: torch.sin(x) * noise_label[:, None], sde, label=Powers()
    )
    sampler = PCSampler(model, predictor, steps=7, grid=grid)
    before = samples(sampler)
    assert torch.equal(before, samples(sampler))
    change(sampler, what)
    after = samples(sampler)
    assert not torch.equal(before, after)
    assert torch.equal(after, samples(fresh(sampler)))


def test_kept_tables_serve_other_states():
    sampler = sampler_of(EDMModel, EDMSDE(), Heun(churn=2.0), steps=6, grid=KARRAS)
    sampler.model.network = lambda x, noise_label: x * noise_label[:, None].to(x.dtype)
    for shape, dtype in (((5, 2), None), ((3, 1), None), ((3, 1), torch.float64), ((5, 2), None)):
        found = samples(sampler, shape, dtype=dtype)
        assert torch.equal(found, samples(fresh(sampler), shape, dtype=dtype))


def test_tables_made_in_inference_mode_serve_outside_and_the_times_are_a_copy():
    sampler = sampler_of(EpsModel, VPSDE(), DPMSolver2M(), steps=5)
    with torch.inference_mode():
        inside = samples(sampler)
    sampler.times.zero_()
    assert torch.equal(samples(sampler), inside)


def test_copies_of_a_sampler_have_no_tables():
    sampler = PCSampler(EDMModel(torch.nn.Identity(), EDMSDE()), DDIM(), grid=KARRAS, steps=5)
    sampler.model.network.forward = torch.nn.Flatten.forward.__get__(torch.nn.Flatten())
    assert pickle.loads(pickle.dumps(sampler._prepared))._grid is None
    twin = copy.deepcopy(sampler)
    assert twin._prepared is not sampler._prepared


def test_threads_share_a_sampler():
    sampler = PCSampler(EpsModel(lambda x, noise_label: 0.1 * x, VPSDE()), UniPC(), steps=8)
    shapes = [(n % 4 + 1, 2) for n in range(24)]
    expected = [samples(fresh(sampler), shape) for shape in shapes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda shape: samples(sampler, shape), shapes))
    assert all(map(torch.equal, found, expected))
