import pytest
import torch

from diffusionkit.interfaces import ForwardSDE
from diffusionkit.sde.ddpm_chain import DDPMChain
from diffusionkit.sde.smld_chain import SMLDChain

# Chain, specification, step after respacing and before, its beta and alpha-bar after respacing.
RESPACED = [
    ("cosine", 4000, "50", 1, 82, 0.0018409056364813159, 0.9981492467067464),
    ("cosine", 4000, "50", 25, 2040, 0.06193848428464421, 0.477875367483632),
    ("cosine", 4000, "50", 48, 3917, 0.7466688492469885, 0.0010203429506643236),
    ("cosine", 4000, "50", 49, 3999, 0.9999998512284063, 1.5179804690207613e-10),
    ("linear", 1000, "250", 0, 0, 9.999999999998899e-05, 0.9999),
    ("linear", 1000, "250", 125, 502, 0.04929790363417974, 0.07623466678988594),
    ("linear", 1000, "ddim50", 1, 20, 0.006165187946595374, 0.9937354285721993),
    ("linear", 1000, "ddim50", 49, 980, 0.3246144475291255, 5.9037513708533764e-05),
]


def chain_of(steps) -> DDPMChain:
    return DDPMChain(torch.full((steps,), 0.1))


@pytest.mark.parametrize(("kind", "steps", "spec", "new", "old", "beta", "alpha_bar"), RESPACED)
def test_respaced_times_are_a_sampler_grid(kind, steps, spec, new, old, beta, alpha_bar) -> None:
    chain: DDPMChain = getattr(DDPMChain, kind)(steps)
    t = chain.respaced(spec).flip(0)
    assert int(chain.step(t)[new]) == old
    before = t[new - 1 : new] if new else torch.zeros(1, dtype=torch.float64)
    scale, std = chain.transition(before, t[new : new + 1])
    assert float(std**2) == pytest.approx(beta, rel=1e-10)
    assert float(scale**2) == pytest.approx(1 - beta, rel=1e-6)
    assert float(chain.marginal(t[new : new + 1])[0] ** 2) == pytest.approx(alpha_bar, rel=1e-8)


def test_time_and_step_are_inverse() -> None:
    chain = chain_of(1000)
    steps = torch.arange(1000)
    t = chain.time(steps)
    assert t.dtype == torch.float64
    assert (float(t[0]), float(t[-1])) == (1e-3, 1.0)
    for dtype in (torch.float64, torch.float32):
        assert chain.step(t.to(dtype)).equal(steps)
    assert chain.step(torch.tensor([0.0314, 0.0316])).tolist() == [30, 31]
    assert float(chain.time(499)) == 0.5
    assert chain.time([[0, 1], [2, 3]]).shape == (2, 2)
    torch.testing.assert_close(chain.respaced([3]), chain.time([999, 500, 0]))


@pytest.mark.parametrize("steps", [-1, 1000, [0, 1000]])
def test_steps_out_of_range_raise(steps) -> None:
    with pytest.raises(ValueError, match=r"step: expected integers 0 \.\.\. 999, got"):
        chain_of(1000).time(steps)


@pytest.mark.parametrize("steps", [1.0, torch.tensor([True]), torch.tensor([0.5])])
def test_non_integer_steps_raise(steps) -> None:
    with pytest.raises(TypeError, match="step: expected integers, got torch"):
        chain_of(10).time(steps)


@pytest.mark.parametrize(
    ("t", "match"),
    [(0.0, "times of steps, from 1/10 to 1, got 0"), (1.2, "within"), (-1, "within")],
)
def test_times_without_a_step_raise(t, match) -> None:
    with pytest.raises(ValueError, match=f"t: expected.*{match}"):
        chain_of(10).step(torch.tensor([0.5, t]))


def test_chains_are_forward_sdes() -> None:
    assert isinstance(chain_of(5), ForwardSDE)
    assert isinstance(SMLDChain.geometric(5), ForwardSDE)
