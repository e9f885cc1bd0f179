"""The U-Net of DDPM: NCSN++ with plain blocks and separate resampling."""

from typing import Any

import pytest
import torch
from support.reference_unet import check_against_reference
from support.tiny_networks import TINY, arguments, tiny

from diffusionkit.networks import DDPMUNet

# With one channel per group, normalization would remove the noise embedding.
PAIRS = {"group_channels": 2}
THREE = {**PAIRS, "multipliers": (1, 1, 2), "blocks": 2, "attention_levels": (1,)}
CASES: dict[str, dict[str, Any]] = {
    "default": {"width": 64, "multipliers": (1, 1.5)},  # 32 groups at both levels
    "three levels": THREE,
    "without convolution": {**THREE, "resample_with_conv": False},
    "unconditional": {"embedding": None},
    "on noise levels": {**PAIRS, "sigmas": (20.0, 1.0, 0.1), "scale_by_sigma": True},
    "classes": {**PAIRS, "num_classes": 3, "condition_features": 2, "low_res_channels": 1},
    "biggan": {**PAIRS, "resblock": "biggan", "fir_kernel": (1, 3, 3, 1)},
    "branches": {"progressive_input": "residual", "progressive": "residual", **THREE},
    "rescaled": {"skip_rescale": True, "group_channels": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_against_a_second_implementation(case: str) -> None:
    net = tiny(DDPMUNet, **CASES[case])
    check_against_reference(net, **arguments(net, 8, 4))


@pytest.mark.parametrize("spatial", [(6,), (4, 2, 6)])
def test_other_dimensions_against_a_second_implementation(spatial: tuple[int, ...]) -> None:
    net = tiny(DDPMUNet, dims=len(spatial), **PAIRS)
    check_against_reference(net, **arguments(net, *spatial))


def test_shortcuts_are_initialized_like_attention() -> None:
    torch.manual_seed(0)
    for resblock, scale in (("ddpm", 0.1), ("biggan", 1.0)):
        net = DDPMUNet(**TINY | {"width": 32}, resblock=resblock)
        weight = net.get_parameter("encoder.1.stages.0.block.shortcut.weight")
        assert weight.shape == (64, 32, 1, 1)
        assert weight.var().item() == pytest.approx(scale / 48, rel=0.1)


def test_unknown_option() -> None:
    with pytest.raises(
        TypeError, match=r"learn_sigma: expected an argument of DDPMUNet\(.*, got an unknown name$"
    ):
        DDPMUNet(**TINY, learn_sigma=True)


@pytest.mark.parametrize(("options", "warnings"), [({}, 1), (PAIRS, 0), ({"embedding": None}, 0)])
def test_warns_where_the_noise_label_has_no_effect(
    caplog, options: dict[str, Any], warnings: int
) -> None:
    net = tiny(DDPMUNet, **options)
    messages = [record.message for record in caplog.records]
    assert len(messages) == warnings
    assert all("removes the noise embedding at levels of [8, 16] channels" in m for m in messages)
    if options == PAIRS or not options:
        given = arguments(net)
        other = given | {"noise_label": given["noise_label"] * 0.7}
        change = (net(**given) - net(**other)).abs().max()
        assert change < 1e-12 if warnings else change > 1e-3
