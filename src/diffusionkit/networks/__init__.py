"""Neural networks conditioned on a noise label; they are independent of any SDE."""

from .adm import ADMUNet
from .ddpm import DDPMUNet
from .ddpmpp import DDPMpp
from .fourier_input import FourierFeatures
from .mlp import MLP
from .ncsnpp import NCSNpp
from .ncsnv2 import NCSNv2
from .positions import PositionChannels

__all__ = [
    "MLP",
    "ADMUNet",
    "DDPMUNet",
    "DDPMpp",
    "FourierFeatures",
    "NCSNpp",
    "NCSNv2",
    "PositionChannels",
]
