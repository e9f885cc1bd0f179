"""Neural networks that embed the label they are given; they know no SDE."""

from diffusionkit.networks.adm import ADMUNet
from diffusionkit.networks.ddpm import DDPMUNet
from diffusionkit.networks.ddpmpp import DDPMpp
from diffusionkit.networks.fourier_input import FourierFeatures
from diffusionkit.networks.mlp import MLP
from diffusionkit.networks.ncsnpp import NCSNpp
from diffusionkit.networks.ncsnv2 import NCSNv2

__all__ = ["MLP", "ADMUNet", "DDPMUNet", "DDPMpp", "FourierFeatures", "NCSNpp", "NCSNv2"]
