"""Checkpoints of the source papers and of this library, read without running code."""

from .edm_files import load_edm
from .improved_diffusion import load_improved_diffusion
from .own import load_network, save_network
from .score_sde import load_score_sde

__all__ = [
    "load_edm",
    "load_improved_diffusion",
    "load_network",
    "load_score_sde",
    "save_network",
]
