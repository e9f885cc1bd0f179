import pytest
import torch

from diffusionkit.likelihood.flow.bijections import ActNorm, ChannelMixing
from diffusionkit.likelihood.flow.logistic_coupling import LogisticCoupling, checkerboard


def coupling(dims: int, channels: int, parity: int = 0, heads: int = 2) -> LogisticCoupling:
    return LogisticCoupling(
        dims, channels, 2, parity=parity, components=3, width=8, blocks=1, heads=heads
    )


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """The module in float64, with all its parameters moved."""
    module.double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return module


LAYERS = {
    "actnorm": (lambda: ActNorm(3), (3, 2, 2)),
    "mixing": (lambda: ChannelMixing(3), (3, 2, 2)),
    "vector": (lambda: coupling(0, 4), (4, 1)),
    "series": (lambda: coupling(1, 1), (1, 5)),
    "image": (lambda: coupling(2, 2, parity=1), (2, 2, 3)),
    "image without attention": (lambda: coupling(2, 2, heads=0), (2, 2, 3)),
    "volume": (lambda: coupling(3, 1), (1, 2, 1, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_log_determinant(name) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = stirred(build()).eval()
    z = torch.randn(2, *shape, dtype=torch.float64)
    context = torch.randn(2, 2, *shape[1:], dtype=torch.float64)
    y, log_det = layer(z, context)
    torch.testing.assert_close(layer.inverse(y, context), z, rtol=1e-10, atol=1e-10)
    for n in range(2):
        one, about = z[n : n + 1], context[n : n + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, c=about: layer(v, c)[0], one)
        expected = torch.linalg.slogdet(jacobian.reshape(z[0].numel(), -1)).logabsdet
        torch.testing.assert_close(log_det[n], expected, rtol=1e-10, atol=1e-10)
        assert abs(expected) > 1e-3  # or the test says nothing


def test_actnorm_normalises_the_very_draw_it_starts_with() -> None:
    layer = ActNorm(3).double()
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 20.0]).view(3, 1, 1)
    z = 5 + spread * torch.randn(4, 3, 2, 5, generator=generator, dtype=torch.float64)
    y, _ = layer(z, z)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3).double())
    # Only the first draw does so.
    again, _ = layer(2 * z, z)
    torch.testing.assert_close(again.std((0, 2, 3), correction=0), torch.full((3,), 2.0).double())


def test_actnorm_starts_in_training_only_and_once_for_all_copies() -> None:
    z = 3 + 2 * torch.randn(8, 2, 4)
    fresh = ActNorm(2).eval()
    assert torch.equal(fresh(z, z)[0], z)
    used = ActNorm(2)
    y, _ = used(z, z)
    loaded = ActNorm(2)
    loaded.load_state_dict(used.state_dict())
    torch.testing.assert_close(loaded.train()(10 * z, z)[0], used.eval()(10 * z, z)[0])
    assert not torch.equal(y, z)


def test_actnorm_of_a_single_number_stays_finite() -> None:
    layer = ActNorm(1)
    y, log_det = layer(torch.tensor([[[3.0]]]), torch.zeros(1, 1, 1))
    assert y.item() == 0.0
    assert log_det.item() == 0.0


def test_mixing_starts_as_a_rotation() -> None:
    weight = ChannelMixing(5).weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(5), rtol=0, atol=1e-6)


def test_coupling_starts_as_the_identity_and_moves_one_colour() -> None:
    torch.manual_seed(0)
    layer = coupling(2, 2, parity=1)
    z, context = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    y, log_det = layer(z, context)
    torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(3).double(), rtol=0, atol=1e-5)
    layer = stirred(layer)
    y, _ = layer(z.double(), context.double())
    colour = checkerboard((2, 3, 3), 1, z.device)
    assert torch.equal(y == z, colour.expand_as(z))


def test_the_components_of_a_new_coupling_part_when_trained() -> None:
    """Equal components with equal gradients would remain one logistic for ever."""
    torch.manual_seed(0)
    layer = coupling(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    z, context = torch.randn(16, 1, 6), torch.randn(16, 2, 6)
    for _ in range(3):
        optimizer.zero_grad()
        layer(z, context)[0].square().mean().backward()
        optimizer.step()
    means = layer._moves(z, context)[3].means
    assert means.std(0).mean() > 0.05 * means.abs().mean()


def test_colours_of_a_checkerboard() -> None:
    board = checkerboard((2, 3), 0, torch.device("cpu"))
    assert board.tolist() == [[True, False, True], [False, True, False]]
    assert torch.equal(checkerboard((2, 3), 1, torch.device("cpu")), ~board)


def test_autocast_leaves_the_mixture_in_the_dtype_of_the_state() -> None:
    """A scale and its logarithm, rounded apart to bfloat16, would not fit together."""
    z, context = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        _, a, b, mixture = coupling(2, 2)._moves(z, context)
    assert {a.dtype, b.dtype, mixture.log_scales.dtype} == {torch.float32}
