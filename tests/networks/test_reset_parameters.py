"""Networks laid out on the meta device, given memory, and initialized there."""

import copy

import pytest
import torch

from diffusionkit.networks import MLP, ADMUNet, DDPMpp, DDPMUNet, DiT, EDM2UNet, NCSNpp, NCSNv2

SMALL = {"width": 8, "multipliers": (1, 1), "blocks": 1, "attention_levels": (1,)}
NETWORKS = {
    "NCSNpp": lambda: NCSNpp(2, **SMALL, num_classes=3, condition_features=2),
    "DDPMpp": lambda: DDPMpp(2, **SMALL),
    "DDPMUNet": lambda: DDPMUNet(2, **SMALL),
    "ADMUNet": lambda: ADMUNet(2, **SMALL, num_classes=3),
    "DiT": lambda: DiT(2, width=16, depth=1, heads=2, num_classes=3, condition_features=2),
    "EDM2UNet": lambda: EDM2UNet(2, **SMALL, num_classes=3, head_channels=4),
    "NCSNv2": lambda: NCSNv2(2, width=8, sigmas=(3.0, 1.0, 0.1)),
    "MLP": lambda: MLP(3, num_classes=2),
}


def reset(network):
    for module in network.modules():
        if [*module.parameters(recurse=False)]:
            module.reset_parameters()
    return network


def scales(network):
    """Return the root mean squares of the weights, by name."""
    return {name: p.detach().square().mean().sqrt() for name, p in network.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_reset_network_has_the_distribution_of_a_new_one(name) -> None:
    torch.manual_seed(0)
    expected, expected_2 = scales(NETWORKS[name]()), scales(NETWORKS[name]())
    with torch.device("meta"):
        network = NETWORKS[name]()
    assert all(x.is_meta for x in (*network.parameters(), *network.buffers()))
    network.to_empty(device="cpu")
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(torch.nan)
    got = scales(reset(copy.deepcopy(network)))
    for key, value in got.items():
        size = network.get_parameter(key).numel()
        # Within the spread of two draws, and exactly if neither varies.
        spread = 1.5 * expected[key] * size**-0.5 + 2 * (expected[key] - expected_2[key]).abs()
        assert (value - expected[key]).abs() <= 3 * spread, key


def test_a_table_of_noise_levels_is_made_where_the_weights_are() -> None:
    with torch.device("meta"):
        network = NETWORKS["NCSNv2"]()
    assert network.noise_level.sigmas.is_meta
    table = network.to_empty(device="cpu").noise_level
    assert table.sigmas.tolist() == [3.0, 1.0, 0.1]
