"""Small networks in which no part is negligible, and their inputs."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusionkit.networks import ADMUNet, DDPMpp, DDPMUNet, EDM2UNet, NCSNpp
from diffusionkit.networks.unet import UNet

TINY: dict[str, Any] = {
    "channels": 2,
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (1,),
}
EVERYTHING: dict[str, Any] = {"num_classes": 3, "condition_features": 5, "low_res_channels": 2}

# One of each class, then options with separate code paths.
CLASSES: dict[str, tuple[type[UNet], dict[str, Any]]] = {
    "NCSNpp": (NCSNpp, {}),
    "DDPMpp": (DDPMpp, {"num_classes": 3}),
    "DDPMUNet": (DDPMUNet, {"group_channels": 2}),  # else normalization removes the noise embedding
    "ADMUNet": (ADMUNet, {"num_classes": 3, "heads": 2}),
    "EDM2UNet": (EDM2UNet, {"num_classes": 3, "head_channels": 4}),
}
FAMILIES = CLASSES | {
    "skips": (
        NCSNpp,
        {
            "progressive": "output_skip",
            "progressive_input": "input_skip",
            "progressive_combine": "cat",
            "data_range": (0.0, 1.0),
        },
    ),
    "residuals": (
        NCSNpp,
        {"progressive": "residual", "embedding": "positional", "sigmas": (9.0, 3.0, 1.0)},
    ),
    "separate FIR": (DDPMUNet, {"fir_kernel": (1, 3, 3, 1), "embedding": None}),
    "everything": (NCSNpp, {"adaptive_scale": True, "embedding": "fourier_linear", **EVERYTHING}),
    "ADM updown": (
        ADMUNet,
        {"resblock_updown": True, "head_channels": 4, "heads": 1, **EVERYTHING},
    ),
    "EDM2 everything": (EDM2UNet, {"head_channels": 4, "clip_act": None, **EVERYTHING}),
}


def fill(module: nn.Module, std: float = 0.3) -> None:
    """Initialize every parameter so that no part of the module is negligible."""
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=std)


def tiny(kind: str | type[UNet], **options: Any) -> UNet:
    """Build a small float64 network in evaluation mode."""
    cls, chosen = FAMILIES[kind] if isinstance(kind, str) else (kind, {})
    net = cls(**TINY | chosen | options).double().eval()
    fill(net)
    return net


def arguments(
    net: UNet, *spatial: int, batch: int = 2, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Draw the inputs of a network; noise labels are valid levels, steps and indices."""
    torch.manual_seed(1)
    config = net.config
    given = {
        "x": torch.randn(batch, net.channels, *spatial or (4, 6), dtype=dtype),
        "noise_label": torch.tensor([2.0, 1.0, 0.5, 1.5], dtype=dtype)[:batch],
    }
    if config["num_classes"] is not None:
        given["class_labels"] = torch.arange(batch).flip(0) % config["num_classes"]
    if config["condition_features"] is not None:
        given["condition"] = torch.randn(batch, config["condition_features"], dtype=dtype)
    if config["low_res_channels"] is not None:
        small = [max(1, n // 2) for n in given["x"].shape[2:]]
        given["low_res"] = torch.randn(batch, config["low_res_channels"], *small, dtype=dtype)
    return given
