"""The published networks by name, and their sizes in the released code."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from diffusionkit.networks import ADMUNet, DDPMpp, DDPMUNet, EDM2UNet, NCSNpp
from diffusionkit.networks.unet import UNet

# Number of parameters, and of trained ones (None for all), counted in the released code, except for
# the 128 frequencies that EDM's "ncsnpp" stores in a buffer, and the bias of its class embedding,
# which is redundant.
PUBLISHED: dict[str, tuple[Callable[[], UNet], int, int | None]] = {
    "ncsnpp": (NCSNpp.cifar10, 62_758_915, 62_758_787),
    "ncsnpp deep": (partial(NCSNpp.cifar10, deep=True), 107_587_075, 107_586_947),
    "ncsnpp vp": (NCSNpp.cifar10_vp, 62_693_251, None),
    "ncsnpp vp deep": (partial(NCSNpp.cifar10_vp, deep=True), 107_521_411, None),
    "ncsnpp smld": (NCSNpp.cifar10_smld, 62_693_251, None),
    "ncsnpp celeba smld": (NCSNpp.celeba_64_smld, 62_693_251, None),
    "ncsnpp 256": (NCSNpp.celebahq_256, 65_574_549, 65_574_421),
    "ncsnpp 1024": (NCSNpp.ffhq_1024, 105_785_896, 105_785_880),
    "ncsnpp edm": (NCSNpp.edm_cifar10, 56_397_827 + 128, 56_397_827),
    "ncsnpp edm classes": (
        partial(NCSNpp.edm_cifar10, num_classes=10),
        56_400_643 + 128 - 256,
        56_400_643 - 256,
    ),
    "ncsnpp edm 64": (NCSNpp.edm_image_64, 62_761_091 + 128, 62_761_091),
    "ddpmpp": (DDPMpp.cifar10, 61_804_419, None),
    "ddpmpp deep": (partial(DDPMpp.cifar10, deep=True), 106_632_579, None),
    "ddpmpp edm": (DDPMpp.edm_cifar10, 55_733_891, None),
    "ddpmpp edm classes": (partial(DDPMpp.edm_cifar10, num_classes=10), 55_735_299 - 128, None),
    "ddpmpp edm 64": (DDPMpp.edm_image_64, 61_805_571, None),
    "ddpm": (DDPMUNet.cifar10, 35_218_947, None),
    "ddpm 256": (DDPMUNet.celebahq_256, 111_569_923, None),
    "improved": (ADMUNet.cifar10, 52_546_438, None),
    "improved 64": (ADMUNet.improved_imagenet64, 121_063_942, None),
    "improved 64 large": (partial(ADMUNet.improved_imagenet64, large=True), 273_049_350, None),
    "improved 256": (ADMUNet.improved_lsun_256, 113_676_678, None),
    "adm 64": (ADMUNet.imagenet64, 295_904_454, None),
    "adm 128": (ADMUNet.imagenet128, 421_529_606, None),
    "adm 256": (ADMUNet.imagenet256, 553_838_086, None),
    "adm 256 without classes": (partial(ADMUNet.imagenet256, num_classes=None), 552_814_086, None),
    "adm 512": (ADMUNet.imagenet512, 558_997_638, None),
    "adm edm 64": (ADMUNet.edm_imagenet64, 295_899_267, None),
    # Without the uncertainty's 128; the frequencies and phases that are stored in buffers there.
    "edm2 xxs": (partial(EDM2UNet.imagenet512, "xxs"), 31_308_901 + 2 * 64, 31_308_901),
    "edm2 xs": (partial(EDM2UNet.imagenet512, "xs"), 124_713_125 + 2 * 128, 124_713_125),
    "edm2 s": (EDM2UNet.imagenet512, 280_212_709 + 2 * 192, 280_212_709),
    "edm2 m": (partial(EDM2UNet.imagenet512, "m"), 497_807_653 + 2 * 256, 497_807_653),
    "edm2 l": (partial(EDM2UNet.imagenet512, "l"), 777_497_957 + 2 * 320, 777_497_957),
    "edm2 xl": (partial(EDM2UNet.imagenet512, "xl"), 1_119_283_621 + 2 * 384, 1_119_283_621),
    "edm2 xxl": (partial(EDM2UNet.imagenet512, "xxl"), 1_523_164_645 + 2 * 448, 1_523_164_645),
    "edm2 xs without classes": (
        partial(EDM2UNet.imagenet512, "xs", num_classes=None),
        124_201_125 + 2 * 128,
        124_201_125,
    ),
    "edm2 64 s": (EDM2UNet.imagenet64, 280_209_253 + 2 * 192, 280_209_253),
    "edm2 64 xl": (partial(EDM2UNet.imagenet64, "xl"), 1_119_276_709 + 2 * 384, 1_119_276_709),
}


# Options of the released configurations that do not affect the sizes.
_UNIT, _SIGNED = (0.0, 1.0), (-1.0, 1.0)
_FIR = (1, 3, 3, 1)
_SONG = {"activation": "silu", "group_channels": 4, "skip_rescale": True}
_VE = {**_SONG, "data_range": _UNIT, "scale_by_sigma": True, "fir_kernel": _FIR}
_VP = {**_SONG, "data_range": _SIGNED, "scale_by_sigma": False, "fir_kernel": None}
_HO = {**_VP, "group_channels": 1, "skip_rescale": False}
_EDM_64 = {"attention_levels": (2,), "dropout": 0.05}
_EDM2 = {
    "head_channels": 64, "attention_levels": (2, 3), "clip_act": 256.0, "data_range": _SIGNED,
    "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3,
}  # fmt: skip
_ADM = {"head_channels": 64, "dropout": 0.0, "data_range": _SIGNED, "group_channels": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "ncsnpp": {**_VE, "attention_levels": (1,), "dropout": 0.1, "fourier_scale": 16},
    "ncsnpp deep": {**_VE, "attention_levels": (1,), "dropout": 0.1, "fourier_scale": 16},
    "ncsnpp vp": {**_VP, "attention_levels": (1,), "dropout": 0.1, "fir_kernel": _FIR},
    "ncsnpp vp deep": {**_VP, "attention_levels": (1,), "dropout": 0.1, "fir_kernel": _FIR},
    "ncsnpp smld": {**_VE, "attention_levels": (1,), "dropout": 0.1},
    "ncsnpp celeba smld": {**_VE, "attention_levels": (2,), "dropout": 0.1},
    "ncsnpp 256": {**_VE, "attention_levels": (4,), "dropout": 0.0, "progressive_combine": "sum"},
    "ncsnpp 1024": {**_VE, "attention_levels": (6,), "dropout": 0.0, "progressive_combine": "sum"},
    "ncsnpp edm": {**_VP, "attention_levels": (1,), "dropout": 0.13, "fir_kernel": _FIR},
    "ncsnpp edm 64": {**_VP, **_EDM_64, "fir_kernel": _FIR, "embedding": "fourier_linear"},
    "ddpmpp": {**_VP, "attention_levels": (1,), "dropout": 0.1},
    "ddpmpp deep": {**_VP, "attention_levels": (1,), "dropout": 0.1},
    "ddpmpp edm": {**_VP, "attention_levels": (1,), "dropout": 0.13},
    "ddpmpp edm 64": {**_VP, **_EDM_64},
    "ddpm": {**_HO, "attention_levels": (1,), "dropout": 0.1},
    "ddpm 256": {**_HO, "attention_levels": (4,), "dropout": 0.0},
    "improved": {"heads": 4, "head_channels": None, "dropout": 0.3, "scale_shift": True},
    "improved 64": {"heads": 4, "head_channels": None, "dropout": 0.0, "scale_shift": True},
    "improved 64 large": {"heads": 4, "head_channels": None, "dropout": 0.0, "width": 192},
    "improved 256": {"heads": 1, "head_channels": None, "dropout": 0.0, "scale_shift": False},
    "adm 64": {**_ADM, "attention_levels": (1, 2, 3), "dropout": 0.1},
    "adm 128": {**_ADM, "attention_levels": (2, 3, 4), "head_channels": None, "heads": 4},
    "adm 256": {**_ADM, "attention_levels": (3, 4, 5)},
    "adm 512": {**_ADM, "attention_levels": (4, 5, 6)},
    "adm edm 64": {**_ADM, "attention_levels": (1, 2, 3), "dropout": 0.1},
    "edm2 s": {**_EDM2, "dropout": 0.0, "channels": 4},
    "edm2 xs": {**_EDM2, "dropout": 0.0},
    "edm2 m": {**_EDM2, "dropout": 0.1},
    "edm2 xxl": {**_EDM2, "dropout": 0.1},
    "edm2 64 s": {**_EDM2, "dropout": 0.0, "channels": 3},
    "edm2 64 xl": {**_EDM2, "dropout": 0.1},
}
# The same network under another name.
ALIASES: list[tuple[Callable[[], UNet], str]] = [
    (NCSNpp.ffhq_256, "ncsnpp 256"),
    (NCSNpp.lsun_256, "ncsnpp 256"),
    (NCSNpp.celebahq_1024, "ncsnpp 1024"),
    (DDPMUNet.lsun_256, "ddpm 256"),
]


@cache
def built(name: str) -> UNet:
    """Build a published network on the meta device."""
    with torch.device("meta"):
        return PUBLISHED[name][0]()
