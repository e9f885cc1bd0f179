"""Fewer steps: those that the released code of improved DDPM takes, to the last one."""

import hashlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionkit.interfaces import ForwardSDE
from diffusionkit.sde.ddpm_chain import DDPMChain
from diffusionkit.sde.smld_chain import SMLDChain

# Steps of the chain, specification, number and sum of the steps taken, and the sha256 of the
# steps joined by commas.
REFERENCE = [
    (1000, "250", 250, 124875, "d7b0f48aae57b0da26bd5b24b757c7398375d94fd95f52f8fd20bae7557e182b"),
    (1000, [21], 21, 10489, "2256c158d10aed3375cc1c08a4a350d81c8bc42f66e06b2dbf59a10432e2ede3"),
    (1000, "ddim25", 25, 12000, "5b9ec4c84a79d007830d0e0705eecc7c8ed0f4c8c8bd8915a1123296b56d0eb0"),
    (4000, "100", 100, 199950, "9eadc57a494452ee9ae53ddb814b55c098ce464de11fffee94b5820901e6b559"),
    (4000, "ddim50", 50, 98000, "04b0f0a7dc8fe71eeb7c00d32cf869b0ffa95c2b41030bd4924443634095efc4"),
    (300, [10, 15, 20], 45, 7727,
     "17dc1f7fd73284394d74b9d2bfb541c52a4cf87227c9df3b604394db1669d816"),
    (25, [7], 7, 84, "7039130a494713b98326ed2ed1d0925645be4aecdf45c1b501ae05ceb96c2960"),
    (11, [2, 3, 1], 6, 28, "7f6e0c56c2b42b007135b3d8ba2b90023b7f8cc9fff5a0cb4c99b525d9ec17d5"),
    (1000, "10,20,30", 60, 36655,
     "a1b1653431049cf617b7b8dfa8f8a1bb4b4a0189d8dc349725545d78d32c8a21"),
]  # fmt: skip
# Chain, specification, the new step, its old number, and the beta and alpha-bar it has then.
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


@pytest.mark.parametrize(("steps", "spec", "count", "total", "digest"), REFERENCE)
def test_the_same_steps_as_the_released_code(steps, spec, count, total, digest) -> None:
    taken = chain_of(steps).subsequence(spec)
    assert (len(taken), sum(taken)) == (count, total)
    assert hashlib.sha256(",".join(map(str, taken)).encode()).hexdigest() == digest


def test_ways_to_say_the_same() -> None:
    chain = SMLDChain.geometric(100)
    assert chain.subsequence(7) == chain.subsequence("7") == chain.subsequence((7,))
    assert chain.subsequence([4, 3]) == chain.subsequence("4,3") == chain.subsequence(" 4, 3 ")
    assert chain.subsequence(1) == [0]
    assert chain.subsequence(100) == chain.subsequence("ddim100") == list(range(100))


@given(st.integers(2, 300), st.data())
def test_a_subsequence_is_one(steps, data) -> None:
    count = data.draw(st.integers(2, steps))
    taken = chain_of(steps).subsequence(count)
    assert len(taken) == count
    assert taken[0] == 0
    assert taken[-1] == steps - 1
    assert all(a < b for a, b in itertools.pairwise(taken))


@pytest.mark.parametrize(("kind", "steps", "spec", "new", "old", "beta", "alpha_bar"), RESPACED)
def test_respacing_is_a_grid(kind, steps, spec, new, old, beta, alpha_bar) -> None:
    chain: DDPMChain = getattr(DDPMChain, kind)(steps)
    t = chain.respaced(spec).flip(0)
    assert int(chain.step(t)[new]) == old
    before = t[new - 1 : new] if new else torch.zeros(1, dtype=torch.float64)
    scale, std = chain.transition(before, t[new : new + 1])
    assert float(std**2) == pytest.approx(beta, rel=1e-10)
    assert float(scale**2) == pytest.approx(1 - beta, rel=1e-6)
    assert float(chain.marginal(t[new : new + 1])[0] ** 2) == pytest.approx(alpha_bar, rel=1e-8)


def test_times_and_steps() -> None:
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
def test_steps_outside(steps) -> None:
    with pytest.raises(ValueError, match=r"step: expected integers 0 \.\.\. 999, got"):
        chain_of(1000).time(steps)


@pytest.mark.parametrize("steps", [1.0, torch.tensor([True]), torch.tensor([0.5])])
def test_steps_that_are_none(steps) -> None:
    with pytest.raises(TypeError, match="step: expected integers, got torch"):
        chain_of(10).time(steps)


@pytest.mark.parametrize(
    ("t", "match"),
    [(0.0, "times of steps, from 1/10 to 1, got 0"), (1.2, "within"), (-1, "within")],
)
def test_times_without_a_step(t, match) -> None:
    with pytest.raises(ValueError, match=f"t: expected.*{match}"):
        chain_of(10).step(torch.tensor([0.5, t]))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("ddim1", 'integer stride through 1000 gives, the next being "ddim2", got "ddim1"'),
        ("ddim300", 'the next being "ddim250" or "ddim334", got "ddim300"'),
        ("ddim2000", 'the next being "ddim1000", got "ddim2000"'),
        ("ddim", '"ddimN", "N" or "N,N,...".*got \'ddim\''),
        ("ddim-5", "got 'ddim-5'"),
        ("many", "got 'many'"),
        ("10,,20", "got '10,,20'"),
        ("1001", "1 to 1000 of the 1000 steps in section 0 of 1, got 1001 in '1001'"),
        ([10, 501], "1 to 500 of the 500 steps in section 1 of 2, got 501"),
        ([0, 5], "got 0 in"),
        (-5, "got -5"),
    ],
)
def test_specifications_that_are_none(spec, match) -> None:
    with pytest.raises(ValueError, match=f"spec: expected.*{match}"):
        chain_of(1000).subsequence(spec)


@pytest.mark.parametrize("spec", [None, 2.5, True, [], [2.5], [True], {10}])
def test_specifications_of_another_type(spec) -> None:
    with pytest.raises(TypeError, match='spec: expected a string "ddimN"'):
        chain_of(1000).subsequence(spec)


def test_chains_are_processes() -> None:
    assert isinstance(chain_of(5), ForwardSDE)
    assert isinstance(SMLDChain.geometric(5), ForwardSDE)
