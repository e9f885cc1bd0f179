"""Activations of U-Nets recomputed in the backward pass instead of stored."""

import pytest
import torch
from support.tiny_networks import FAMILIES, TINY, arguments, fill, tiny
from torch import Tensor, nn

from diffusionkit.networks.unet import Stage, UNet


def training(kind: str, recompute: bool, **options) -> UNet:
    net = tiny(kind, activation_checkpointing=recompute, dropout=0.3, **options)
    return net.train()


def gradients(net: UNet, evaluate=None) -> list[Tensor]:
    """Return loss and gradients of input and parameters, with seeded dropout."""
    given = arguments(net)
    x = given["x"].requires_grad_()
    net.zero_grad()
    torch.manual_seed(3)
    loss = (net if evaluate is None else evaluate)(**given).square().mean()
    loss.backward()
    return [loss, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def stored_bytes(net: UNet) -> int:
    """Return the bytes stored for the backward pass, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # kept alive, so that no storage is reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(**arguments(net, *(8,) * net.dims))
    return sum(kept.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputing_changes_no_gradient(kind: str) -> None:
    expected = gradients(training(kind, False))
    got = gradients(training(kind, True))
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert got[0].item() > 0


def test_dropout_is_active_in_that_comparison() -> None:
    net = training("NCSNpp", True)
    first = gradients(net)[0]
    net.eval()
    assert first != gradients(net)[0]


@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputing_stores_less(kind: str) -> None:
    ratio = stored_bytes(training(kind, True)) / stored_bytes(training(kind, False))
    assert ratio < 0.3


def test_all_stages_recompute_or_none() -> None:
    for recompute in (False, True):
        net = training("everything", recompute)
        stages = [m for m in net.modules() if isinstance(m, Stage)]
        assert len(stages) == 10
        assert {stage.recompute for stage in stages} == {recompute}


def test_nothing_is_recomputed_without_gradients(monkeypatch) -> None:
    count = 0

    class Count(nn.Module):
        def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
            nonlocal count
            count += 1
            return x * x

    stage, one = Stage(Count(), recompute=True), torch.ones(1, 1)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("diffusionkit.networks.unet.checkpoint", None)
        stage(one, None)
    assert count == 1
    x = one.requires_grad_()
    stage(x, None).backward()
    assert count == 3
    assert x.grad.item() == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_recomputing_in_one_compiled_graph(kind: str) -> None:
    torch.compiler.reset()
    cls, options = FAMILIES[kind]
    net = cls(**TINY | options, activation_checkpointing=True, dropout=0.0).double().train()
    fill(net)
    expected = gradients(net)
    got = gradients(net, torch.compile(net, fullgraph=True, backend="aot_eager"))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_recomputing_compiled_draws_one_mask() -> None:
    # A loss linear in the last layer's weight equals weight times gradient, unless forward and
    # backward pass use different masks.
    torch.compiler.reset()
    net = training("DDPMUNet", True, multipliers=(1,), attention_levels=())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    given = arguments(net)
    layer = net.head.conv
    nn.init.zeros_(layer.bias)
    layer.zero_grad()
    loss = compiled(**given).sum()
    loss.backward()
    torch.testing.assert_close((layer.weight.grad * layer.weight).sum(), loss)
