"""The settings of score_sde's networks, and the published combinations by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..interfaces import ForwardSDE
from ..models import EpsModel, IndexLabel, RawScoreModel, SigmaLabel, StepLabel
from ..models.labels import Label
from ..models.network import NetworkModel
from ..networks import DDPMpp, DDPMUNet, NCSNpp, NCSNv2
from ..sde import VESDE, VPSDE, DDPMChain, SubVPSDE


@dataclass(frozen=True)
class Setting:
    """What makes a score model of a network.

    Args:
        sde: The process that the network was trained for.
        kind: The kind of model: what the network predicts.
        label: What the network is told about time; that of the kind if None.
        sigmas: The noise levels by number, or the largest and the smallest; None if they do not
            matter.
    """

    sde: ForwardSDE
    kind: type[NetworkModel] = EpsModel
    label: Label | None = None
    sigmas: tuple[float, ...] | None = None

    def model(self, network: nn.Module, data_range: tuple[float, float]) -> NetworkModel:
        """Make the score model of a network for data of a range."""
        return self.kind(network, self.sde, label=self.label, data_range=data_range)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Setting:
    """VE with times between the levels: the network is told sigma."""
    sde = VESDE(sigma_min, sigma_max)
    return Setting(sde, RawScoreModel, SigmaLabel(), (sigma_max, sigma_min))


def smld(sigmas: list[float]) -> Setting:
    """VE with numbered levels, the largest first: the network is told the number."""
    sde = VESDE(sigmas[-1], sigmas[0])
    return Setting(sde, RawScoreModel, IndexLabel(sigmas), tuple(sigmas))


def ddpm(steps: int = 1000, beta_min: float = 0.1, beta_max: float = 20.0) -> Setting:
    """VP with numbered steps: the network is told the number."""
    chain = DDPMChain.linear(steps, beta_min=beta_min, beta_max=beta_max)
    return Setting(chain, label=StepLabel(steps))


def smld_sigmas(sigma_min: float, sigma_max: float, levels: int) -> list[float]:
    """Noise levels of a discrete VE chain, the largest first."""
    ratio = torch.linspace(0, 1, levels, dtype=torch.float64)
    sigmas: list[float] = (sigma_max * (sigma_min / sigma_max) ** ratio).tolist()
    return sigmas


Make = Callable[[], nn.Module]
Configured = tuple[Make, Setting]


def _ve(make: Make, sigma_max: float) -> Configured:
    return make, ve(sigma_max=sigma_max)


def _smld(make: Callable[..., nn.Module], sigma_max: float, levels: int = 1000) -> Configured:
    sigmas = smld_sigmas(0.01, sigma_max, levels)
    return partial(make, sigmas=tuple(sigmas)), smld(sigmas)


_ddpm_on_smld = partial(DDPMUNet.cifar10, scale_by_sigma=True, data_range=(0.0, 1.0))
_unconditional = partial(DDPMUNet.cifar10, embedding=None)
_VP, _SUBVP, _DDPM = Setting(VPSDE()), Setting(SubVPSDE()), ddpm()

PUBLISHED: dict[str, Configured] = {
    "ve/cifar10_ncsnpp": _smld(NCSNpp.cifar10_smld, 50.0),
    "ve/cifar10_ncsnpp_continuous": _ve(NCSNpp.cifar10, 50.0),
    "ve/cifar10_ncsnpp_deep_continuous": _ve(partial(NCSNpp.cifar10, deep=True), 50.0),
    "ve/cifar10_ddpm": _smld(_ddpm_on_smld, 50.0),
    "ve/celeba_ncsnpp": _smld(NCSNpp.celeba_64_smld, 90.0),
    "ve/bedroom_ncsnpp_continuous": _ve(NCSNpp.lsun_256, 378.0),
    "ve/church_ncsnpp_continuous": _ve(NCSNpp.lsun_256, 380.0),
    "ve/celebahq_256_ncsnpp_continuous": _ve(NCSNpp.celebahq_256, 348.0),
    "ve/ffhq_256_ncsnpp_continuous": _ve(NCSNpp.ffhq_256, 348.0),
    "ve/celebahq_ncsnpp_continuous": _ve(NCSNpp.celebahq_1024, 1348.0),
    "ve/ffhq_ncsnpp_continuous": _ve(NCSNpp.ffhq_1024, 1348.0),
    "vp/cifar10_ddpmpp": (DDPMpp.cifar10, _DDPM),
    "vp/cifar10_ddpmpp_continuous": (DDPMpp.cifar10, _VP),
    "vp/cifar10_ddpmpp_deep_continuous": (partial(DDPMpp.cifar10, deep=True), _VP),
    "vp/cifar10_ncsnpp": (NCSNpp.cifar10_vp, _DDPM),
    "vp/cifar10_ncsnpp_continuous": (NCSNpp.cifar10_vp, _VP),
    "vp/cifar10_ncsnpp_deep_continuous": (partial(NCSNpp.cifar10_vp, deep=True), _VP),
    "vp/ddpm/cifar10": (DDPMUNet.cifar10, _DDPM),
    "vp/ddpm/cifar10_continuous": (DDPMUNet.cifar10, _VP),
    "vp/ddpm/cifar10_unconditional": (_unconditional, _DDPM),
    "vp/ddpm/celebahq": (DDPMUNet.celebahq_256, _DDPM),
    "vp/ddpm/bedroom": (DDPMUNet.lsun_256, _DDPM),
    "vp/ddpm/church": (DDPMUNet.lsun_256, _DDPM),
    "ve/ncsnv2/cifar10": _smld(NCSNv2.cifar10, 50.0, 232),
    "ve/ncsnv2/celeba": _smld(NCSNv2.celeba_64, 90.0, 500),
    "ve/ncsnv2/bedroom": _smld(NCSNv2.bedroom_128, 190.0, 1086),
    "subvp/cifar10_ddpm_continuous": (DDPMUNet.cifar10, _SUBVP),
    "subvp/cifar10_ddpmpp_continuous": (DDPMpp.cifar10, _SUBVP),
    "subvp/cifar10_ddpmpp_deep_continuous": (partial(DDPMpp.cifar10, deep=True), _SUBVP),
    "subvp/cifar10_ncsnpp_continuous": (NCSNpp.cifar10_vp, _SUBVP),
    "subvp/cifar10_ncsnpp_deep_continuous": (partial(NCSNpp.cifar10_vp, deep=True), _SUBVP),
}
