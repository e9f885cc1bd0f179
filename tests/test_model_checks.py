"""Score models that a wrapper of modules has changed in vain."""

from types import MethodType

import pytest
import torch
from support.processes import skip_without_sharding_on_cpu
from torch import distributed as dist
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from diffusionkit import DDIM, EMA, NELBO, VPSDE, EpsModel, PCSampler, PowerEMA, ScoreMatching
from diffusionkit.checkpoints import save_model
from diffusionkit.networks import MLP

USES = {
    "objective": lambda model: ScoreMatching()(model, torch.zeros(2, 3)),
    "sampler": lambda model: PCSampler(model, DDIM(), steps=2),
    "likelihood": lambda model: NELBO(model),
}
uses = pytest.mark.parametrize("use", USES.values(), ids=USES)


@pytest.fixture
def model() -> EpsModel:
    return EpsModel(MLP(3), VPSDE())


def test_modules_around_and_inside_a_model_are_refused_with_advice(model, tmp_path) -> None:
    """Each kind of module that is passed for a model is told what to pass."""
    for use in (*USES.values(), lambda model: save_model(tmp_path / "model", model)):
        for module, advice in (
            (EMA(model), "got EMA; pass its model: ema.model"),
            (
                PowerEMA(model),
                r"got PowerEMA; pass the model of an average: ema.averages\[0.05\]",
            ),
            (torch.nn.Sequential(model), "got Sequential; wrap the network, not the score model"),
            (model.network, r"got MLP; make one of a network: EpsModel\(network, sde\)"),
        ):
            with pytest.raises(TypeError, match=f"model: expected a ScoreModel, {advice}"):
                use(module)


@uses
def test_a_model_with_another_forward_is_refused(model, use) -> None:
    """As accelerate sets one, in mixed precision."""
    use(model)
    model.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(type(model).forward), model)
    with pytest.raises(TypeError, match=r"model: expected .*; wrap the network, .*prepare\(netw"):
        use(model)


@uses
def test_a_network_with_another_forward_is_right(model, use) -> None:
    network = model.network
    network.forward = MethodType(torch.autocast("cpu", torch.bfloat16)(MLP.forward), network)
    use(model)


@uses
@pytest.mark.parametrize("registered", [False, True])
def test_a_sharded_model_is_refused(tmp_path, model, use, registered) -> None:
    skip_without_sharding_on_cpu()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        if registered:
            register_fsdp_forward_method(model, "predict")
        with pytest.raises(TypeError, match=r"got EpsModel that is itself; .* fully_shard\(netw"):
            use(model)
        network = MLP(3)
        fully_shard(network, mesh=mesh)
        use(EpsModel(network, VPSDE()))
    finally:
        dist.destroy_process_group()


class Saved(EpsModel, Stateful):
    """A model with a base of torch.distributed of its own."""


def test_models_may_have_bases_of_torch_distributed() -> None:
    USES["objective"](Saved(MLP(3), VPSDE()))
