"""DDPM++: NCSN++ with other defaults."""

from typing import Any

import pytest
from support.reference_unet import check_against_reference
from support.tiny_networks import TINY, arguments, tiny

from diffusionkit.networks import DDPMpp

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "deep": {"multipliers": (1, 2, 3), "blocks": 2, "attention_levels": (0, 1)},
    "classes": {"num_classes": 3, "out_channels": 3},
    "augmentation": {"condition_features": 9, "multipliers": (2, 2, 2)},
    "fourier": {"embedding": "fourier"},
    "filter": {"fir_kernel": (1, 3, 3, 1), "progressive_input": "input_skip"},
    "scaled": {"scale_by_sigma": True},
}


@pytest.mark.parametrize("case", CASES)
def test_against_a_second_implementation(case: str) -> None:
    net = tiny(DDPMpp, **CASES[case])
    check_against_reference(net, **arguments(net, 4, 8))


def test_attention_sits_at_its_levels() -> None:
    def attentions(levels: tuple[int, ...]) -> list[str]:
        net = DDPMpp(1, width=8, multipliers=(1, 2, 3), blocks=2, attention_levels=levels)
        return [n.removesuffix(".attention.qkv") for n, _ in net.named_modules() if "qkv" in n]

    assert attentions(()) == ["middle.0"]
    encoder, decoder = ["encoder.1.stages.0", "encoder.1.stages.1"], ["decoder.1.stages.2"]
    assert attentions((1,)) == [*encoder, "middle.0", *decoder]


def test_unknown_option() -> None:
    with pytest.raises(
        TypeError, match=r"heads: expected an argument of DDPMpp\(.*, got an unknown name$"
    ):
        DDPMpp(**TINY, heads=2)
