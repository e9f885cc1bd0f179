"""Tables at 4000 steps against 60-digit arithmetic, and in float32."""

import pytest
import torch

from diffusionkit.sde.ddpm_chain import DDPMChain

# Step, beta, 1 - alpha-bar and log-SNR, computed with mpmath at 60 digits from the formulas.
EXACT = {
    "linear": [
        (0, 0.000025, 0.000025, 10.596609732783568146),
        (1, 0.000026244061015253813453, 0.000051243404913728432108, 9.8788723881186064663),
        (9, 0.00003619654913728432108, 0.00030594068150217000021, 8.0918133386126832221),
        (400, 0.00052262440610152538135, 0.10400270835547650452, 2.1535204495703257283),
        (1000, 0.0012690610152538134534, 0.47688393947999851001, 0.092530204662325620986),
        (2000, 0.0025131220305076269067, 0.92125352477574778839, -2.4595017519288248857),
        (3600, 0.0045036196549137284321, 0.99971586182024239515, -8.1657657111324529373),
        (3998, 0.0049987559389847461865, 0.99995732007763012832, -10.061739269586922061),
        (3999, 0.005, 0.99995753347724197768, -10.066752024819163688),
    ],
    "cosine": [
        (0, 9.8658188135916325197e-6, 9.8658188135916325197e-6, 11.526424554182074735),
        (1, 0.000010169414884318670775, 0.000020035133368305614365, 10.818003121798307801),
        (9, 0.000012598299024776122325, 0.00011231471694311943512, 9.0940933335311015886),
        (400, 0.00013253281135701334319, 0.028036097069380274106, 3.5458258059240709244),
        (1000, 0.00033143349273653394295, 0.15326856687211416214, 1.7091918426203649739),
        (2000, 0.00078893555351058431055, 0.5065460203257342255, -0.026185577453990659096),
        (3600, 0.0049534633438529443551, 0.97602761333233227712, -3.7065882659245989769),
        (3990, 0.18999922139591361964, 0.99998770440796662356, -11.306257435418815453),
        (3998, 0.74999996205638021554, 0.99999984820195311504, -15.700714686640107411),
        (3999, 0.999, 0.99999999984820195312, -22.608470117268504823),
    ],
}
# 1 - alpha-bar_249 / alpha-bar_99, and the same of 3998 and 3989.
SPANS = {
    "linear": (0.035666327575673879443, 0.044056638108019109185),
    "cosine": (0.0094038901421737964973, 0.9899999499142759313),
}


def relative(got, wanted):
    return float(((got - wanted) / wanted).abs().max())


@pytest.mark.parametrize("kind", EXACT)
def test_no_digit_is_lost_at_four_thousand_steps(kind) -> None:
    chain = getattr(DDPMChain, kind)(4000)
    i, beta, noise, log_snr = (
        torch.tensor(c, dtype=torch.float64) for c in zip(*EXACT[kind], strict=True)
    )
    t = (i + 1) / 4000
    assert relative(chain.betas[i.long()], beta) < 1e-13
    assert relative(chain.marginal(t)[1] ** 2, noise) < 1e-12
    assert relative(chain.log_snr(t), log_snr) < 1e-12
    scale, std = chain.transition(i / 4000, t)
    assert relative(std**2, beta) < 1e-13
    assert relative(scale**2, 1 - beta) < 1e-12
    first, last = torch.tensor([[100, 3990], [250, 3999]], dtype=torch.float64) / 4000
    spans = torch.tensor(SPANS[kind], dtype=torch.float64)
    assert relative(chain.transition(first, last)[1] ** 2, spans) < 1e-12


@pytest.mark.parametrize("kind", EXACT)
def test_single_precision_times_meet_the_steps(kind) -> None:
    chain = getattr(DDPMChain, kind)(4000)
    i = torch.arange(4000)
    t = chain.time(i).float()
    assert chain.step(t).equal(i)
    std = chain.transition((i / 4000).float(), t)[1]
    assert relative(std.double() ** 2, chain.betas) < 1e-6


def test_a_part_of_a_step_keeps_its_digits() -> None:
    """Over 1e-9 of time: a difference of two sums of the table would have seven digits."""
    chain = DDPMChain.linear(100)
    s = torch.tensor([0.505, 0.995], dtype=torch.float64)
    t = s + 1e-9
    rate = -100 * torch.log1p(-chain.betas[[50, 99]])
    assert relative(chain.transition(s, t)[1] ** 2, -torch.expm1(-rate * (t - s))) < 1e-12
