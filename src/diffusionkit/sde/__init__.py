"""Forward processes: dx = f(t) x dt + g(t) dw."""

from ._chain import Chain
from .chain import DDPMChain
from .edm import EDMSDE
from .learned import LearnedSDE, LogSNRSDE
from .smld import SMLDChain
from .subvp import SubVPSDE
from .ve import VESDE, suggest_sigma_max
from .vp import VPSDE

__all__ = [
    "EDMSDE",
    "VESDE",
    "VPSDE",
    "Chain",
    "DDPMChain",
    "LearnedSDE",
    "LogSNRSDE",
    "SMLDChain",
    "SubVPSDE",
    "suggest_sigma_max",
]
