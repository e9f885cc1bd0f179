"""Whole models in files, and checkpoints of the source papers, read without running code."""

from .._parts import register_part
from .dit_files import load_dit, load_sit
from .edm2_files import load_edm2
from .edm_files import load_edm
from .hub import from_pretrained, push_to_hub
from .improved_diffusion import load_improved_diffusion
from .model_files import load_model, save_model
from .own import load_network, save_network
from .score_sde import load_score_sde

__all__ = [
    "from_pretrained",
    "load_dit",
    "load_edm",
    "load_edm2",
    "load_improved_diffusion",
    "load_model",
    "load_network",
    "load_score_sde",
    "load_sit",
    "push_to_hub",
    "register_part",
    "save_model",
    "save_network",
]
