"""Neural networks that embed the label they are given; they know no SDE."""

from diffusionkit.networks.ddpmpp import DDPMpp
from diffusionkit.networks.mlp import MLP

__all__ = ["MLP", "DDPMpp"]
