"""Neural networks conditioned on a noise label; they are independent of any SDE."""

from .adm import ADMUNet
from .ddpm import DDPMUNet
from .ddpmpp import DDPMpp
from .dit import DiT
from .edm2 import EDM2UNet
from .field_positions import PositionChannels
from .fourier_input import FourierFeatures
from .mlp import MLP
from .ncsnpp import NCSNpp
from .ncsnv2 import NCSNv2

__all__ = [
    "MLP",
    "ADMUNet",
    "DDPMUNet",
    "DDPMpp",
    "DiT",
    "EDM2UNet",
    "FourierFeatures",
    "NCSNpp",
    "NCSNv2",
    "PositionChannels",
]
