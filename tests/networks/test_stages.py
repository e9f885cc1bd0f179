"""Stages, levels, and activations computed again instead of being kept."""

import pytest
import torch
from support.tiny_networks import FAMILIES, TINY, arguments, fill, tiny
from torch import Tensor, nn

from diffusionkit.networks.unet import DecoderLevel, EncoderLevel, Stage, UNet


class Times(nn.Module):
    """Multiply by a number and, if there is one, add an embedding."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        x = x.sum(1, keepdim=True) * self.factor
        return x if emb is None else x + emb


EMB = torch.tensor([[10.0]])
ONE = torch.tensor([[1.0]])


def test_stage() -> None:
    assert Stage(Times(2.0))(ONE, EMB).item() == 12
    assert Stage(Times(2.0), Times(3.0))(ONE, EMB).item() == 36  # the attention is not told
    assert Stage(Times(2.0), Times(3.0))(ONE, None).item() == 6


def test_encoder_level_returns_every_output() -> None:
    level = EncoderLevel([Stage(Times(2.0)), Stage(Times(3.0))])
    assert [h.item() for h in level(ONE, EMB)] == [12, 46]


def test_decoder_level_takes_skips_from_the_end() -> None:
    level = DecoderLevel([Stage(Times(2.0)), Stage(Times(3.0))])
    skips = [100 * ONE, 5 * ONE, 7 * ONE]
    # ((1 + 7) 2 + 10 + 5) 3 + 10
    assert level(ONE, EMB, skips).item() == 103
    assert [s.item() for s in skips] == [100]


def test_decoder_level_puts_the_features_first() -> None:
    seen = []

    class Watch(Times):
        def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
            seen.append(x)
            return x

    DecoderLevel([Stage(Watch(1.0))])(ONE, None, [7 * ONE])
    assert torch.equal(seen[0], torch.tensor([[1.0, 7.0]]))


def training(kind: str, recompute: bool, **options) -> UNet:
    net = tiny(kind, activation_checkpointing=recompute, dropout=0.3, **options)
    return net.train()


def gradients(net: UNet, evaluate=None) -> list[Tensor]:
    """Loss and gradients of input and parameters, dropout drawn from a fixed seed."""
    given = arguments(net)
    x = given["x"].requires_grad_()
    net.zero_grad()
    torch.manual_seed(3)
    loss = (net if evaluate is None else evaluate)(**given).square().mean()
    loss.backward()
    return [loss, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


def kept_bytes(net: UNet) -> int:
    """Size of what is kept for the backward pass, each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no storage is used twice

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
def test_recomputing_keeps_less(kind: str) -> None:
    ratio = kept_bytes(training(kind, True)) / kept_bytes(training(kind, False))
    assert ratio < 0.3


def test_every_stage_recomputes_or_none() -> None:
    for recompute in (False, True):
        net = training("everything", recompute)
        stages = [m for m in net.modules() if isinstance(m, Stage)]
        assert len(stages) == 10
        assert {stage.recompute for stage in stages} == {recompute}


def test_nothing_is_recomputed_without_gradients(monkeypatch) -> None:
    count = 0

    class Count(Times):
        def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
            nonlocal count
            count += 1
            return x * x

    stage = Stage(Count(1.0), recompute=True)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("diffusionkit.networks.unet.checkpoint", None)
        stage(ONE, EMB)
    assert count == 1
    x = ONE.clone().requires_grad_()
    stage(x, EMB).backward()
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
    # The gradient of a loss linear in the last layer's weight is the loss over the weight: with
    # two masks it would not be.
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
