"""Checkpoints of the source papers and of this library, read without running code."""

from diffusionkit.checkpoints.edm import load_edm
from diffusionkit.checkpoints.improved_diffusion import load_improved_diffusion
from diffusionkit.checkpoints.own import load_network, save_network
from diffusionkit.checkpoints.score_sde import load_score_sde

__all__ = [
    "load_edm",
    "load_improved_diffusion",
    "load_network",
    "load_score_sde",
    "save_network",
]
