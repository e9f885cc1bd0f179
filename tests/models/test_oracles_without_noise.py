"""Exact models at a time without noise return the data."""

import pytest
import torch
from support import seeded

from diffusionkit import (
    EDMSDE,
    VPSDE,
    DDPMChain,
    EmpiricalModel,
    ForwardSDE,
    GaussianMixtureModel,
    ProbabilityFlow,
    SMLDChain,
    SubVPSDE,
    ddim_encode,
)


class RectifiedFlow(ForwardSDE):
    def marginal(self, t):
        return 1 - t, t.clone()


SDES = [VPSDE(), SubVPSDE(), EDMSDE(), DDPMChain.linear(100), SMLDChain([0.1, 1.0]),
        RectifiedFlow()]  # fmt: skip
DATA = torch.randn(5, 3, generator=seeded())
MODELS = {
    "empirical": lambda sde: EmpiricalModel(sde, DATA),
    "empirical, in blocks": lambda sde: EmpiricalModel(sde, DATA, block=2),
    "empirical, far away": lambda sde: EmpiricalModel(sde, DATA),
    "points": lambda sde: GaussianMixtureModel(sde, DATA, torch.zeros(5)),
    "some are points": lambda sde: GaussianMixtureModel(
        sde, torch.cat([DATA, DATA + 9]), torch.cat([torch.zeros(5), torch.ones(5)])
    ),
    "Gaussians": lambda sde: GaussianMixtureModel(sde, DATA, torch.full((5,), 0.1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", MODELS)
def test_data_are_their_own_prediction(name, sde, dtype):
    model, x = MODELS[name](sde), DATA.to(dtype)
    prediction = model.predict(x, torch.zeros(5))
    assert bool(torch.isfinite(prediction.eps).all())
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        prediction.x0, DATA.to(prediction.x0.dtype), rtol=tolerance, atol=tolerance
    )
    with pytest.raises(ValueError, match="t: expected times with noise for a score, got sigma = 0"):
        model(x, torch.zeros(5))


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_the_nearest_point_is_predicted(sde):
    x = DATA + 0.01
    for name in ("empirical", "points"):
        got = MODELS[name](sde).predict(x, torch.zeros(5)).x0
        torch.testing.assert_close(got, DATA)


@pytest.mark.parametrize("sde", SDES, ids=lambda s: type(s).__name__)
def test_encoding_begins_with_noise(sde):
    model = EmpiricalModel(sde, DATA)
    with pytest.raises(ValueError, match="noise"):
        ddim_encode(model, DATA, grid=torch.linspace(sde.T, 0.0, 20))
    with pytest.raises(ValueError, match="t_end: expected a time"):
        ProbabilityFlow(model, t_end=0.0)
