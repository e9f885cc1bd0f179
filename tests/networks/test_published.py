"""The published networks have the sizes and the options of the released code."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from support.published_networks import ALIASES, OPTIONS, PUBLISHED, built

from diffusionkit.networks import EDM2UNet, NCSNpp
from diffusionkit.networks.unet import UNet


@pytest.mark.parametrize("name", PUBLISHED)
def test_number_of_parameters(name: str) -> None:
    _, count, trained = PUBLISHED[name]
    parameters = list(built(name).parameters())
    assert sum(p.numel() for p in parameters) == count
    assert sum(p.numel() for p in parameters if p.requires_grad) == (trained or count)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_not_visible_in_the_sizes(name: str) -> None:
    config = built(name).config
    assert {key: config[key] for key in OPTIONS[name]} == OPTIONS[name]


@pytest.mark.parametrize(("make", "name"), ALIASES)
def test_aliases(make: Callable[[], UNet], name: str) -> None:
    with torch.device("meta"):
        other = make()
    assert type(other) is type(built(name))
    assert other.config == built(name).config


def test_options_replace_the_published_ones() -> None:
    options = {"width": 4, "multipliers": (1,), "blocks": 1, "attention_levels": (0,)}
    for cls, makers in {
        NCSNpp: ["cifar10", "cifar10_vp", "cifar10_smld", "celeba_64_smld", "celebahq_256"],
        type(built("ddpmpp")): ["cifar10", "edm_cifar10", "edm_image_64"],
        type(built("ddpm")): ["cifar10", "celebahq_256"],
        type(built("improved")): ["cifar10", "improved_imagenet64", "imagenet64", "imagenet128"],
        EDM2UNet: ["imagenet512", "imagenet64"],
    }.items():
        for maker in makers:
            net = getattr(cls, maker)(**options, dropout=0.25, channels=1)
            assert {key: net.config[key] for key in options} == options
            assert (net.config["dropout"], net.channels) == (0.25, 1)


@pytest.mark.parametrize(("name", "sigma_max"), [("ncsnpp smld", 50), ("ncsnpp celeba smld", 90)])
def test_discrete_noise_levels(name: str, sigma_max: float) -> None:
    sigmas = built(name).config["sigmas"]
    assert len(sigmas) == 1000
    assert sigmas[0] == pytest.approx(sigma_max, rel=1e-12)
    assert sigmas[-1] == pytest.approx(0.01, rel=1e-12)
    ratios = [b / a for a, b in pairwise(sigmas)]
    assert ratios == pytest.approx([(0.01 / sigma_max) ** (1 / 999)] * 999, rel=1e-12)
    assert NCSNpp.cifar10_smld(sigma_max=7.0, width=4, multipliers=(1, 1), blocks=1).config[
        "sigmas"
    ][0] == pytest.approx(7, rel=1e-12)


def heads(name: str) -> dict[int, set[int]]:
    """Return the numbers of heads by number of channels."""
    found: dict[int, set[int]] = {}
    for module in built(name).modules():
        if hasattr(module, "heads"):
            found.setdefault(module.norm.num_channels, set()).add(module.heads)
    return found


def test_heads_of_the_published_attention() -> None:
    assert heads("adm 64") == {384: {6}, 576: {9}, 768: {12}}
    assert heads("adm 128") == {512: {4}, 768: {4}, 1024: {4}}
    assert heads("adm 256") == heads("adm 512") == {512: {8}, 1024: {16}}
    assert heads("improved") == {256: {4}}
    assert heads("ncsnpp") == {256: {1}}
