"""The coupling layer: its start, its halves and its precision."""

import torch
from support.flows import coupling, perturbed

from diffusionkit.likelihood.flow.logistic_coupling import checkerboard


def test_coupling_starts_as_the_identity_and_changes_one_color() -> None:
    torch.manual_seed(0)
    layer = coupling(2, 2, parity=1)
    z, context = torch.randn(3, 2, 3, 3), torch.randn(3, 2, 3, 3)
    y, log_det = layer(z, context)
    torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det, torch.zeros(3).double(), rtol=0, atol=1e-5)
    layer = perturbed(layer)
    y, _ = layer(z.double(), context.double())
    color = checkerboard((2, 3, 3), 1, z.device)
    assert torch.equal(y == z, color.expand_as(z))


def test_training_separates_the_components_of_a_new_coupling() -> None:
    """Equal components with equal gradients would always remain equal."""
    torch.manual_seed(0)
    layer = coupling(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    z, context = torch.randn(16, 1, 6), torch.randn(16, 2, 6)
    for _ in range(3):
        optimizer.zero_grad()
        layer(z, context)[0].square().mean().backward()
        optimizer.step()
    means = layer._transform(z, context)[3].means
    assert means.std(0).mean() > 0.05 * means.abs().mean()


def test_colors_of_a_checkerboard() -> None:
    board = checkerboard((2, 3), 0, torch.device("cpu"))
    assert board.tolist() == [[True, False, True], [False, True, False]]
    assert torch.equal(checkerboard((2, 3), 1, torch.device("cpu")), ~board)


def test_autocast_preserves_the_dtype_of_the_mixture() -> None:
    """A scale and its logarithm, rounded separately to bfloat16, would not agree."""
    z, context = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        _, a, b, mixture = coupling(2, 2)._transform(z, context)
    assert {a.dtype, b.dtype, mixture.log_scales.dtype} == {torch.float32}
