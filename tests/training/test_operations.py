"""The number of operations that a loss dispatches: on small data it is the cost of a step."""

import io
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusionkit import (
    EDMSDE,
    VESDE,
    VLB,
    VPSDE,
    DDPMChain,
    DiscreteTimes,
    EDMModel,
    EDMWeighting,
    EpsModel,
    GaussianDecoder,
    HybridLoss,
    ImportanceTimes,
    LikelihoodWeighting,
    LogNormalTimes,
    ScaledScoreModel,
    ScoreMatching,
    SigmaLabel,
    StepLabel,
    TimeSampler,
    VModel,
    Weighting,
    _chain_terms,
)
from diffusionkit._batch_times import Drawn, kernel_at, known_at, with_schedule


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class Affine(nn.Linear):
    def forward(self, x, noise_label):
        return super().forward(x)


OLDER = 2  # what older versions of torch dispatch more
CHAIN = DDPMChain.linear(100)
LEARNED = {"label": StepLabel(100), "variance": "learned_range"}
DATA = GaussianDecoder().encode(torch.randint(256, (16, 2)))
# Forward and backward; the arithmetic alone takes 42, 35, 52, 48 and 55 for the first five.
LOSSES = {
    "simple": (ScoreMatching(), EpsModel(Affine(2, 2), VPSDE()), 44),
    "scaled": (ScoreMatching(), ScaledScoreModel(Affine(2, 2), VESDE()), 41),
    "edm": (
        ScoreMatching(EDMWeighting(), times=LogNormalTimes()),
        EDMModel(Affine(2, 2), EDMSDE()),
        60,
    ),
    "likelihood": (ScoreMatching(LikelihoodWeighting()), EpsModel(Affine(2, 2), VPSDE()), 52),
    "importance": (
        ScoreMatching(LikelihoodWeighting(), times=ImportanceTimes()),
        EpsModel(Affine(2, 2), VPSDE()),
        72,
    ),
    "chain": (ScoreMatching(times=DiscreteTimes()), EpsModel(Affine(2, 2), CHAIN), 75),
    "hybrid": (HybridLoss(), EpsModel(Affine(2, 4), CHAIN, **LEARNED), 200),
    "vlb": (VLB(), EpsModel(Affine(2, 4), CHAIN, **LEARNED), 190),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_dispatches_few_operations(name) -> None:
    """Before the schedule was shared within a loss, 95 to 864 of them."""
    loss, model, most = LOSSES[name]
    # Past the first calls, which look at the range of the data; no first step of the chain.
    given = {} if loss.times.unbiased or name == "edm" else {"t": torch.full((16,), 0.5)}
    for _ in range(9):
        loss(model, DATA, **given).sum().backward()
    with Operations() as operations:
        loss(model, DATA, **given).mean().backward()
    assert operations.count <= most + OLDER


def test_a_loss_at_drawn_steps_looks_them_up() -> None:
    """The arithmetic alone dispatches 33 operations."""
    loss, model = (
        ScoreMatching(times=DiscreteTimes()),
        EpsModel(Affine(2, 2), CHAIN, label=StepLabel(100)),
    )
    for _ in range(9):
        loss(model, DATA).sum().backward()
    with Operations() as operations:
        loss(model, DATA).mean().backward()
    assert operations.count <= 40 + OLDER


def calls_of(function) -> int:
    """Return the number of Python functions of the library that a call runs."""
    count = 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call" and "/diffusionkit/" in frame.f_code.co_filename

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", ["simple", "scaled", "edm", "likelihood", "importance"])
def test_a_loss_calls_few_functions(name) -> None:
    """On small data these calls take as long as the operations."""
    loss, model, _ = LOSSES[name]
    for _ in range(9):
        loss(model, DATA)
    assert calls_of(lambda: loss(model, DATA)) <= 90


@pytest.mark.parametrize(
    "name",
    ["importance", *(pytest.param(name, marks=pytest.mark.slow) for name in ("edm", "chain"))],
)
def test_a_loss_at_drawn_times_is_one_graph(name) -> None:
    """What a sampler keeps between calls must not stop a compiler."""
    loss, model, _ = LOSSES[name]
    compiled = torch.compile(lambda x0: loss(model, x0), backend="eager", fullgraph=True)
    found = compiled(DATA)
    assert found.shape == (16,)
    assert bool(torch.isfinite(found).all())


class Evaluations:
    """A VP process that counts its evaluations."""

    def __new__(cls):
        class Counted(VPSDE):
            evaluated = 0

            def marginal(self, t):
                type(self).evaluated += 1
                return super().marginal(t)

        return Counted()


def test_a_process_is_evaluated_once() -> None:
    sde = Evaluations()
    loss = ScoreMatching(LikelihoodWeighting())
    loss(VModel(Affine(2, 2), sde, label=SigmaLabel()), DATA)
    before = type(sde).evaluated
    loss(VModel(Affine(2, 2), sde, label=SigmaLabel()), DATA)
    assert type(sde).evaluated == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_of_a_user_carry_nothing(dtype) -> None:
    t = torch.linspace(0.1, 0.9, 16, dtype=dtype)
    ScoreMatching()(EpsModel(Affine(2, 2), VPSDE()), DATA, t=t)
    assert not vars(t)
    buffer = io.BytesIO()
    torch.save(t, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), t)


def test_times_that_are_changed_in_place_do_not_keep_their_schedule() -> None:
    """As a part of a user may do, between the noise and the weights."""

    class Halving(Weighting):
        def __call__(self, sde, t):
            return LikelihoodWeighting()(sde, t.mul_(0.5))

    t, eps = torch.linspace(0.1, 0.9, 16), torch.randn(16, 2)
    model = EpsModel(Affine(2, 2), VPSDE())
    half = LikelihoodWeighting()(VPSDE(), 0.5 * t)
    expected = ScoreMatching()(model, DATA, t=t.clone(), eps=eps) * half
    halved = ScoreMatching(Halving())(model, DATA, t=t.clone(), eps=eps)
    torch.testing.assert_close(halved, expected)


def test_the_schedule_belongs_to_one_process_and_one_mode_of_gradients() -> None:
    t = torch.linspace(0.1, 0.9, 4)
    sde, other = VPSDE(), VPSDE(beta_max=10.0)
    with torch.no_grad():
        carried = with_schedule(sde, Drawn(t))
        assert kernel_at(sde, carried) is kernel_at(sde, carried)
    for process in (sde, other):  # with gradients the values without are not used
        found = kernel_at(process, carried)
        torch.testing.assert_close(found, process.marginal(t.double()), rtol=0, atol=0)
    assert known_at(other, carried) is None


def test_times_out_of_range_are_still_refused() -> None:
    class Late(TimeSampler):
        def sample(self, sde, n, *, generator=None, device=None, dtype=None):
            return torch.full((n,), 1.5), torch.ones(n)

    model = EpsModel(Affine(2, 2), VPSDE())
    with pytest.raises(ValueError, match=r"t: expected times within \[0, T\] = \[0, 1\]"):
        ScoreMatching(times=Late())(model, DATA)


def test_the_first_step_alone_needs_probabilities_of_levels(monkeypatch) -> None:
    """And what it costs to compute them for all samples is the same bound."""
    loss, model, _ = LOSSES["vlb"]
    t = torch.tensor([0.01, 0.5, 0.01, 1.0]).repeat(4)
    some = loss(model, DATA, t=t, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(_chain_terms, "readable", lambda x: False)
    every = loss(model, DATA, t=t, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(some, every, rtol=1e-6, atol=0.0)
