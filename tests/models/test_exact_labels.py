"""Noise labels in float32 inside wrappers that cast the inputs of a network to bfloat16."""

import copy
import io

import pytest
import torch
from support import seeded
from support.processes import skip_without_sharding_on_cpu
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map

from diffusionkit import (
    EMA,
    VESDE,
    VPSDE,
    EpsModel,
    RawScoreModel,
    ScoreMatching,
    load_checkpoint,
    save_checkpoint,
)
from diffusionkit.networks import DDPMpp, NCSNpp

X = torch.randn(3, 2, 4, 4, generator=seeded(1))
T = torch.tensor([0.1234567, 0.5, 0.999999])


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    start = f"file://{tmp_path_factory.mktemp('group')}/start"
    dist.init_process_group("gloo", init_method=start, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Casting(nn.Module):
    """A wrapper that casts what it gets, like that of Lightning Fabric."""

    def __init__(self, network) -> None:
        super().__init__()
        self._original_module = network

    def forward(self, *args, **kwargs):
        def cast(x):
            return x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        return self._original_module(*tree_map(cast, args), **tree_map(cast, kwargs))


class Listening(nn.Module):
    """A network that remembers its noise labels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, noise_label, class_labels=None):
        self.heard = noise_label
        return 1.0 * self.linear(x.to(self.linear.weight.dtype))


def filled(network):
    """Return a network without zero weights, as after training."""
    with torch.no_grad():
        for p in network.parameters():
            if p.abs().max() < 1e-4:
                p.normal_(0, 0.05, generator=seeded(2))
    return network.eval()


def unet(kind=DDPMpp):
    torch.manual_seed(0)
    return filled(kind(channels=2, width=8, multipliers=(1,), blocks=1, attention_levels=()))


def policy(**options):
    return MixedPrecisionPolicy(torch.bfloat16, torch.float32, **options)


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("first", ["model", "wrapper"])
@pytest.mark.parametrize("wrapper", ["fully_shard", "Fabric"])
def test_networks_of_users_get_labels_in_float32(mesh, wrapper, first) -> None:
    network = Listening()
    model = EpsModel(network, VPSDE())
    if wrapper == "fully_shard":
        skip_without_sharding_on_cpu()
        fully_shard(network, mesh=mesh, mp_policy=policy())
    else:
        model.network = Casting(network)
    if first == "wrapper":
        model = EpsModel(model.network, VPSDE())
    model.predict(X, T, class_labels=torch.arange(3))
    assert torch.equal(network.heard, 999 * T)
    loss = ScoreMatching()(model, X)
    assert network.heard.dtype == torch.float32
    loss.mean().backward()
    assert model.network(X, T) is not None  # the network can still be called directly


@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize(("kind", "parts"), [(DDPMpp, EpsModel), (NCSNpp, RawScoreModel)])
def test_a_sharded_network_in_bfloat16_errs_as_under_autocast(mesh, kind, parts, cast) -> None:
    skip_without_sharding_on_cpu()
    """Rounded labels would make the error of the first five times as large."""
    sde = VPSDE() if parts is EpsModel else VESDE()
    with torch.no_grad():
        exact = parts(unet(kind), sde)(X, T)
        with torch.autocast("cpu", torch.bfloat16):
            expected = relative(parts(unet(kind), sde)(X, T), exact)
        network = unet(kind)
        fully_shard(network, mesh=mesh, mp_policy=policy(cast_forward_inputs=cast))
        got = relative(parts(network, sde)(X, T), exact)
    assert 0 < got < 1.3 * expected


def test_frequencies_of_a_sharded_network_are_not_rounded(mesh, tmp_path) -> None:
    skip_without_sharding_on_cpu()
    """In bfloat16, frequencies of 40 would be off by .1, and angles by whole radians."""
    network, noise_label = unet(NCSNpp), torch.tensor([50.0, 0.01, 7.0])
    features = network.embedding.noise_features
    got = []
    features.register_forward_hook(lambda module, args, out: got.append(out.detach()))
    model = RawScoreModel(network, VESDE(), label=lambda sde, t: noise_label)
    model.predict(X, T)
    fully_shard(network, mesh=mesh, mp_policy=policy())
    model.predict(X, T)
    # Others are loaded into the sharded network.
    torch.manual_seed(7)
    other = filled(NCSNpp(2, width=8, multipliers=(1,), blocks=1, attention_levels=()))
    expected = other.embedding.noise_features(noise_label)
    save_checkpoint(tmp_path / "other.pt", RawScoreModel(other, VESDE()))
    load_checkpoint(tmp_path / "other.pt", RawScoreModel(network, VESDE()))
    model.predict(X, T)
    assert torch.equal(got[1], got[0])
    assert not torch.equal(expected, got[0])
    assert torch.equal(got[2], expected)


def test_a_label_that_is_cast_out_of_sight_is_refused(mesh) -> None:
    skip_without_sharding_on_cpu()
    network = unet()
    fully_shard(network.embedding, mesh=mesh, mp_policy=policy())
    with pytest.raises(TypeError, match=r"noise_label: expected float32, float64 or integers, got"):
        EpsModel(network, VPSDE()).predict(X, T)


def test_copies_of_a_guarded_model_work() -> None:
    model = EpsModel(Casting(Listening()), VPSDE())
    model.predict(X, T)
    ema = EMA(model)
    for other in (copy.deepcopy(model), ema.model):
        other.predict(X, T)
        network = getattr(other.network, "_original_module", other.network)
        assert torch.equal(network.heard, 999 * T)
    torch.save(model.network, io.BytesIO())
