import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusionkit import (
    DDIM,
    EDMSDE,
    VESDE,
    VPSDE,
    AYSGrid,
    ChainGrid,
    FlowMatchingSDE,
    KarrasGrid,
    LogSNRGrid,
    PCSampler,
    QuadraticGrid,
    ShiftedGrid,
    SMLDChain,
    UniformGrid,
)
from diffusionkit._log_snr import with_signal

GRIDS = [UniformGrid, QuadraticGrid, LogSNRGrid, KarrasGrid, AYSGrid]


@pytest.mark.parametrize("grid", GRIDS)
@given(steps=st.integers(1, 50))
def test_grids_decrease_from_T_to_t_stop(sde, grid, steps):
    times = grid()(sde, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert float(times[0]) == sde.T
    assert float(times[-1]) == sde.t_stop
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_to_zero_appends_zero(sde, grid):
    times = grid(to_zero=True)(sde, 5)
    assert len(times) == 6
    assert float(times[-1]) == 0.0
    assert float(times[-2]) == sde.t_stop


def test_default_stopping_times():
    """Song et al. 2021: 1e-3 for VP and sub-VP, 1e-5 for VE."""
    assert VPSDE().t_stop == 1e-3
    assert VESDE().t_stop == 1e-5
    assert EDMSDE().t_stop == 0.002


def test_spacings_of_the_grids():
    t = QuadraticGrid(t_end=0.04)(VPSDE(), 4)
    torch.testing.assert_close(t, torch.tensor([1.0, 0.64, 0.36, 0.16, 0.04]).double())
    t = UniformGrid(t_end=0.2)(VPSDE(), 4)
    torch.testing.assert_close(t, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]).double())
    t = LogSNRGrid(t_end=0.1)(EDMSDE(sigma_max=10.0), 2)
    torch.testing.assert_close(t, torch.tensor([10.0, 1.0, 0.1]).double())


def test_log_snr_is_equally_spaced(sde):
    l = sde.log_snr(LogSNRGrid()(sde, 40))
    l[0] = l[0].clamp_min(-2 * math.log(160.0))  # where no signal is left at T
    gaps = l.diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)


# Karras et al. 2022, equation 5, N = 18, .002 to 80, rho = 7, independently computed.
def test_karras_grid_of_the_paper():
    t = KarrasGrid(to_zero=True)(EDMSDE(), 18)
    expected = [
        80.0, 57.58598472124816, 40.78557379650796, 28.374584604156837,
        19.35245298032522, 12.910082380757316, 8.400935309099822, 5.3151945217963785,
        3.256821519765538, 1.9233398370400498, 1.0881706365452795, 0.5853481231945423,
        0.29644228447915727, 0.13951646873101647, 0.05994731123547157, 0.02293451837233337,
        0.007528019962784071, 0.002, 0.0,
    ]  # fmt: skip
    torch.testing.assert_close(t, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)


def test_karras_grids_of_other_processes(sde):
    """Equally spaced in (sigma / alpha)^(1 / rho)."""
    alpha, sigma = sde.marginal(KarrasGrid(rho=3.0)(sde, 30))
    ratio = sigma / alpha
    ratio[0] = ratio[0].clamp_max(160.0)  # where no signal is left at T
    gaps = ratio.pow(1 / 3).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand_as(gaps), rtol=1e-6, atol=0)


# Sabour et al. 2024, the levels of ten steps on the authors' page, which begin at 14.615 and 700.
ALIGNED = {
    "stable_diffusion": [6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029],
    "sdxl": [6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029],
    "svd": [54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002],
}


@pytest.mark.parametrize("name", ALIGNED)
def test_published_aligned_levels_and_their_geometric_means(name):
    first = 700.0 if name == "svd" else 14.615
    levels = torch.tensor([first, *ALIGNED[name]], dtype=torch.float64)
    sde = EDMSDE(sigma_min=float(levels[-1]), sigma_max=first)
    torch.testing.assert_close(AYSGrid(name)(sde, 10), levels, rtol=1e-9, atol=0)
    between = AYSGrid(name)(sde, 20)[1::2]
    torch.testing.assert_close(between, (levels[1:] * levels[:-1]).sqrt(), rtol=1e-9, atol=0)


def test_aligned_levels_are_stretched_in_log_snr(sde):
    levels = torch.tensor([14.615, *ALIGNED["stable_diffusion"]], dtype=torch.float64).log()
    found = -0.5 * with_signal(sde.log_snr(AYSGrid()(sde, 10)))
    gaps, wanted = (x.diff() / (x[-1] - x[0]) for x in (found, levels))
    torch.testing.assert_close(gaps, wanted, rtol=1e-5, atol=0)


def test_grids_given_as_times_or_callables(mixture):
    times = torch.tensor([0.9, 0.5, 0.1]) * mixture.sde.T
    sampler = PCSampler(mixture, DDIM(), grid=times)
    assert sampler.times.tolist() == times.double().tolist()
    assert sum(1 for _ in sampler.iterate(torch.ones(1, 2))) == 4
    sampler = PCSampler(mixture, DDIM(), steps=7, grid=lambda sde, n: UniformGrid()(sde, n))
    assert len(sampler.times) == 8


def test_a_rule_that_is_infinite_at_the_end_raises():
    with pytest.raises(ValueError, match="t_end: expected a time with noise for LogSNRGrid, got 0"):
        LogSNRGrid(t_end=0.0)(VPSDE(), 5)


def test_a_chain_grid_has_the_levels_of_the_chain() -> None:
    chain = SMLDChain.geometric(10, sigma_min=0.01, sigma_max=50.0)
    times = ChainGrid(chain)(EDMSDE(sigma_max=60.0), 9)
    assert torch.allclose(times, chain.marginal(chain.respaced(10))[1])


def test_shifted_grids():
    """diffusers' 4 steps with shift 3: 1, 9/10, 3/4, 1/2 and 0."""
    sde = FlowMatchingSDE()
    times = ShiftedGrid(3.0, UniformGrid(t_end=0.0))(sde, 4)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]).double())
    assert float(times[0]) == 1.0
    assert float(times[-1]) == 0.0
    again = ShiftedGrid(1 / 3, ShiftedGrid(3.0, QuadraticGrid()))(sde, 7)
    torch.testing.assert_close(again, QuadraticGrid()(sde, 7))
    wide = EDMSDE(sigma_max=80.0)
    for shift in (0.3, 7.0):
        assert float(ShiftedGrid(shift)(wide, 5)[0]) == 80.0
