"""Sharded and replicated networks that processes call another number of times."""

import pytest
import torch
from support.processes import run_in_two_processes, skip_without_sharding_on_cpu
from torch import nn

from diffusionkit.distributed import gathered_weights

PROGRAM = """
import itertools
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from diffusionkit import *
from diffusionkit.distributed import gathered_weights
from diffusionkit.metrics import extract_features, load_shards, sample_to_shards
from diffusionkit.networks import MLP

class Buffered(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("table", torch.zeros(2))
    def forward(self, x, label):
        return self.inner(x, label)

def network(kind):
    torch.manual_seed(0)
    net = MLP(3, width=8, depth=2)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    if kind == "sharded":
        for part in net.modules():
            if isinstance(part, torch.nn.Linear):
                fully_shard(part)
        fully_shard(net)
    return DistributedDataParallel(Buffered(net)) if kind == "replicated" else net

def draw(sampler):
    return lambda n, generators: sampler((n, 3), generator=generators)

def run(kind):
    net = network(kind)
    model, found = EpsModel(net, VPSDE()), {}
    settings = {"batch_size": 4, "progress": False}
    sampler = PCSampler(model, Ancestral(), Langevin(), steps=2)
    with gathered_weights(model):
        sample_to_shards(draw(sampler), 18, f"{folder}/{kind}", **settings)  # 5 batches
    found["samples"] = torch.cat(list(load_shards(f"{folder}/{kind}")))
    tolerance = 10.0 ** (-2 - 2 * rank)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(rank))
    likelihood = ODELikelihood(model, rtol=tolerance, atol=tolerance)(
        x, generator=torch.Generator().manual_seed(0))
    found["nats"], found["nfe"] = likelihood.nats, likelihood.nfe
    adaptive = PCSampler(model, AdaptiveSDE(rtol=0.3 - 0.2 * rank, atol=0.1), steps=1)
    found["adaptive"] = adaptive((2, 3), generator=torch.Generator().manual_seed(rank))
    found["adaptive nfe"] = adaptive.nfe
    flow = ProbabilityFlow(model, rtol=tolerance, atol=tolerance)
    found["code"] = flow.encode(x)
    found["bits"] = evaluate_bits_per_dim(
        ODELikelihood(model, rtol=1e-2, atol=1e-2), torch.randn(10, 3, generator=
        torch.Generator().manual_seed(3)), batch_size=4, progress=False).bits  # 3 batches
    label = torch.ones(2)
    batches = itertools.repeat(torch.ones(2, 3), 1 + rank)
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, x):
            return self.net(x, label)
    found["features"] = extract_features(batches, Features(), progress=False)[:2]
    # Training goes on as before.
    loss = ScoreMatching()(model.train(), x, generator=torch.Generator().manual_seed(1)).mean()
    loss.backward()
    found["loss"] = loss.detach()
    found["whole"] = not any(hasattr(p, "full_tensor") for p in model.parameters())
    found["gradient"] = torch.cat([
        (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).flatten()
        for p in model.parameters() if p.grad is not None])
    return found, model

result, model = {}, None
for kind in ("bare", "replicated", "sharded"):
    result[kind], model = run(kind)

# What cannot work is refused, before it hangs.
result["errors"] = []
sampler = PCSampler(model, DDIM(), steps=2)
for attempt in (
    lambda: sample_to_shards(draw(sampler), 3, f"{folder}/no", batch_size=1, progress=False),
    lambda: sample_to_shards(draw(PCSampler(model, AdaptiveSDE(), steps=1)), 3, f"{folder}/no",
                             batch_size=1, progress=False),
    lambda: ODELikelihood(model, differentiable=True)(torch.zeros(1, 3)),
):
    try:
        attempt()
    except ValueError as error:
        result["errors"].append(str(error))
states = [(g.post_forward_mesh_info is None, g.reshard_after_backward) for m in model.modules()
          if hasattr(m, "_get_fsdp_state") for g in m._get_fsdp_state()._fsdp_param_groups]
result["states"] = states
"""


@pytest.mark.slow
def test_processes_call_networks_as_often_as_they_need(tmp_path) -> None:
    skip_without_sharding_on_cpu()
    found = run_in_two_processes(PROGRAM, tmp_path)
    for one in found:
        for kind in ("replicated", "sharded"):
            for name in ("samples", "nfe", "adaptive nfe", "bits", "code", "nats", "adaptive"):
                torch.testing.assert_close(one[kind][name], one["bare"][name], rtol=0, atol=0)
            torch.testing.assert_close(one[kind]["features"], one["bare"]["features"])
            torch.testing.assert_close(one[kind]["loss"], one["bare"]["loss"])
        assert one["replicated"]["whole"]
        assert not one["sharded"]["whole"]
        assert (
            one["errors"][0]
            == one["errors"][1]
            == (
                "model: expected all weights in each process, where processes call it "
                "independently, as inside `with gathered_weights(model):`, got weights sharded "
                "over processes"
            )
        )
        assert one["errors"][2].startswith("differentiable: expected False for a network sharded")
        # Only the root stays gathered after forward, as fully_shard has it.
        assert [stays for stays, _ in one["states"]] == [True] + [False] * (len(one["states"]) - 1)
        assert all(after_backward for _, after_backward in one["states"])
    for name in ("nfe", "adaptive nfe"):
        assert found[0]["bare"][name] != found[1]["bare"][name]
    mean = (found[0]["bare"]["gradient"] + found[1]["bare"]["gradient"]) / 2
    for one in found:
        for kind in ("replicated", "sharded"):
            torch.testing.assert_close(one[kind]["gradient"], mean)


def test_without_a_group_it_does_nothing() -> None:
    network = nn.Linear(2, 2)
    with gathered_weights(network):
        assert network(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(TypeError, match="model: expected a Module"):
        gathered_weights("network").__enter__()
