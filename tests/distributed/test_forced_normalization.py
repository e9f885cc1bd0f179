"""Forced weight normalization of networks that are sharded or trained in several processes."""

import pytest
import torch
from support.processes import run_in_processes, skip_without_sharding_on_cpu
from torch import nn

from diffusionkit import normalize_weights
from diffusionkit._magnitude import MPLinear
from diffusionkit.networks import EDM2UNet

TRAIN = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from diffusionkit import *
from diffusionkit.distributed._sharded import whole
from diffusionkit.networks import EDM2UNet

def trained(wrap):
    torch.manual_seed(0)
    net = EDM2UNet(1, dims=1, width=6, multipliers=(1,), blocks=1)
    uncertainty = LearnedUncertainty(features=7)
    net, loss = wrap(net), wrap(uncertainty)
    model = EDMModel(net, EDMSDE())
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 0.1)
    for step in range(3):
        normalize_weights(model, loss)
        x0 = 0.5 * torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(step))
        t = torch.tensor([0.3, 2.0])
        loss(model, x0, t=t, generator=torch.Generator().manual_seed(step)).mean().backward()
        clipped_step(optimizer, 1.0)
    normalize_weights(model, loss)
    weights = [whole(p.detach()) for p in (*model.parameters(), *loss.parameters())]
    return weights

def sharded(module):
    return fully_shard(module, mesh=init_device_mesh("cpu", (world,)))

result = [trained(w) for w in (lambda m: m, nn.parallel.DistributedDataParallel, sharded)]
"""


@pytest.mark.slow
def test_wrapped_and_sharded_networks_are_normalized_as_plain_ones(tmp_path) -> None:
    """Two processes with the same data take the steps of one; weights of six rows, in two parts."""
    skip_without_sharding_on_cpu()
    for plain, parallel, sharded in run_in_processes(2, TRAIN, tmp_path):
        assert len(plain) == len(parallel) == len(sharded) > 20
        for a, b, c in zip(plain, parallel, sharded, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(c, a, rtol=1e-5, atol=1e-5)


def test_compiled_networks_are_normalized() -> None:
    net = EDM2UNet(1, width=8, multipliers=(1,), blocks=1)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
    normalize_weights(nn.Sequential(torch.compile(net, backend="eager")))
    for layer in net.modules():
        if isinstance(layer, MPLinear):
            magnitude = layer.weight.detach().flatten(1).square().mean(1).sqrt()
            assert magnitude.sub(1).abs().max() < 2e-4


def test_weights_sharded_along_their_rows_are_refused(monkeypatch) -> None:
    class Sharded(nn.Parameter):
        placements = (type("Shard", (), {"dim": 1})(),)

        def full_tensor(self):
            raise AssertionError

    layer = MPLinear(4, 2)
    layer.weight = Sharded(torch.ones(2, 4))
    with pytest.raises(ValueError, match="expected weights sharded along their first dimension"):
        normalize_weights(layer)
