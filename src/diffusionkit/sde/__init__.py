"""Forward processes: dx = f(t) x dt + g(t) dw."""

from .chain import DDPMChain
from .edm import EDMSDE
from .learned import LearnedSDE, LogSNRSDE
from .subvp import SubVPSDE
from .ve import VESDE, suggest_sigma_max
from .vp import VPSDE

__all__ = [
    "EDMSDE",
    "VESDE",
    "VPSDE",
    "DDPMChain",
    "LearnedSDE",
    "LogSNRSDE",
    "SubVPSDE",
    "suggest_sigma_max",
]
