"""Networks that cannot use a model's noise labels are refused when the two are joined."""

import pytest
import torch
from torch import nn

from diffusionkit import (
    EDMSDE,
    VESDE,
    VPSDE,
    DDPMChain,
    EDMModel,
    EpsModel,
    IndexLabel,
    LearnedSDE,
    LogSNRSDE,
    RawScoreModel,
    ScaledScoreModel,
    SigmaLabel,
    SMLDChain,
    SubVPSDE,
    VModel,
    X0Model,
)
from diffusionkit.models import NetworkModel
from diffusionkit.networks import MLP, DDPMpp, NCSNpp

SMALL = {"channels": 1, "width": 4, "multipliers": (1,), "blocks": 1}
PROCESSES = {
    "VP": VPSDE(),
    "sub-VP": SubVPSDE(),
    "VE": VESDE(),
    "EDM": EDMSDE(),
    "log SNR": LogSNRSDE(),
    "learned": LearnedSDE(hidden=4),
    "DDPM": DDPMChain.linear(100),
    "cosine": DDPMChain.cosine(100),
    "SMLD": SMLDChain.geometric(100),
}


@pytest.fixture(params=PROCESSES.values(), ids=PROCESSES)
def sde(request):
    return request.param


@pytest.fixture(scope="module")
def default():
    """NCSN++ by default: it embeds the logarithm of the label, and divides its output by it."""
    return NCSNpp(**SMALL)


@pytest.mark.parametrize("make", [EDMModel, ScaledScoreModel])
def test_labels_that_are_no_noise_levels_are_refused(make, sde, default) -> None:
    """Their logarithm was NaN from the first step of training."""
    with pytest.raises(ValueError, match="noise_label: expected finite numbers > 0, since the net"):
        make(default, sde)


@pytest.mark.parametrize("label", [None, SigmaLabel()], ids=["999 t", "sigma"])
@pytest.mark.parametrize("make", [EpsModel, X0Model, VModel])
def test_outputs_of_one_size_are_not_divided_by_the_label(make, label, sde, default) -> None:
    """The loss stayed at 1: a network would have to span as many decades as the label does."""
    message = r"network: expected one that does not divide .* scale_by_sigma=False, or predict the "
    with pytest.raises(ValueError, match=message):
        make(default, sde, label=label)


def test_scores_are_divided_by_sigma(sde, default) -> None:
    model = RawScoreModel(default, sde)
    t = torch.full((2,), 0.5 * sde.T)
    assert model(torch.randn(2, 1, 4, 4), t).shape == (2, 1, 4, 4)


@pytest.mark.parametrize("embedding", ["positional", "fourier_linear", None])
@pytest.mark.parametrize("make", [EpsModel, EDMModel, VModel, ScaledScoreModel])
def test_what_the_errors_advise_is_taken(make, embedding, sde) -> None:
    make(NCSNpp(**SMALL, embedding=embedding, scale_by_sigma=False), sde)


def test_an_index_out_of_the_table_is_refused() -> None:
    sigmas = (9.0, 3.0, 1.0)
    network = NCSNpp(**SMALL, embedding="positional", sigmas=sigmas)
    RawScoreModel(network, SMLDChain([1.0, 3.0, 9.0]), label=IndexLabel(sigmas))
    with pytest.raises(ValueError, match=r"index of a noise level, in \[0, 3\), got values from"):
        RawScoreModel(network, VESDE())


def test_wrapped_networks_are_checked_inside(default) -> None:
    with pytest.raises(ValueError, match="embeds their logarithm"):
        EDMModel(nn.DataParallel(default), EDMSDE())


def test_networks_that_say_nothing_are_not_evaluated() -> None:
    def label(sde, t):
        raise AssertionError("called")

    EpsModel(lambda x, noise_label: x, VPSDE(), label=label)
    EpsModel(MLP(2, width=4), VPSDE(), label=label)
    with pytest.raises(AssertionError, match="called"):
        EpsModel(DDPMpp(**SMALL), VPSDE(), label=label)


class Late(NetworkModel):
    """A user's model, which sets what its parameterization reads after the base's constructor."""

    def __init__(self, network, sde) -> None:
        super().__init__(network, sde)
        self.factor = 2.0

    def parameterization(self, alpha, sigma):
        return 0.0, self.factor


def test_a_parameterization_that_is_not_ready_is_not_checked(default) -> None:
    assert Late(default, VPSDE()).factor == 2.0
