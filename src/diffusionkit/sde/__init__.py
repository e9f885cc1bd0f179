"""Forward processes dx = f(t) x dt + g(t) dw."""

from .chain import Chain
from .ddpm_chain import DDPMChain
from .edm import EDMSDE
from .flow_matching import FlowMatchingSDE
from .learned import LearnedSDE, LogSNRSDE
from .smld_chain import SMLDChain
from .subvp import SubVPSDE
from .ve import VESDE, suggest_sigma_max
from .vp import VPSDE

__all__ = [
    "EDMSDE",
    "VESDE",
    "VPSDE",
    "Chain",
    "DDPMChain",
    "FlowMatchingSDE",
    "LearnedSDE",
    "LogSNRSDE",
    "SMLDChain",
    "SubVPSDE",
    "suggest_sigma_max",
]
