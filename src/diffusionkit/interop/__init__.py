"""Models and samplers of other libraries: diffusers, and denoisers D(x, sigma) of k-diffusion."""

from .denoisers import SigmaDenoiser, as_denoiser, from_denoiser
from .diffusers_models import from_diffusers, load_diffusers
from .scheduler_samplers import sampler_from_scheduler
from .schedulers import chain_from_scheduler, scheduler_config
from .unet_adapter import UNetAdapter, to_diffusers

__all__ = [
    "SigmaDenoiser",
    "UNetAdapter",
    "as_denoiser",
    "chain_from_scheduler",
    "from_denoiser",
    "from_diffusers",
    "load_diffusers",
    "sampler_from_scheduler",
    "scheduler_config",
    "to_diffusers",
]
