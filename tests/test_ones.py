"""Ones that need not be multiplied by."""

import copy
import io

import pytest
import torch

from diffusionkit import EDMSDE, VESDE, SimpleWeighting
from diffusionkit._coefficients import linear, per_sample
from diffusionkit._ones import are_ones, ones_like, product


def test_a_product_with_ones_is_the_other_factor() -> None:
    x, ones = torch.randn(3), ones_like(torch.empty(3))
    assert torch.equal(ones, torch.ones(3))
    assert product(x, ones) is x
    assert product(ones, x) is x
    assert torch.equal(product(x, torch.full((3,), 2.0)), 2 * x)
    state, eps = torch.randn(2, 3, 2)
    sigma = torch.rand(3)
    expected = linear(torch.ones(3), state, sigma, eps)
    assert torch.equal(linear(ones, state, sigma, eps), expected)
    assert are_ones(per_sample(ones.double(), state)) is False
    assert are_ones(per_sample(ones_like(torch.empty(3), torch.float64), state))


@pytest.mark.parametrize(
    "change", [lambda x: x.mul_(2.0), lambda x: x[:1].zero_(), lambda x: x.requires_grad_()]
)
def test_a_mark_ends_with_a_change(change) -> None:
    ones = ones_like(torch.empty(3))
    change(ones)
    assert not are_ones(ones)


def test_no_copy_is_marked() -> None:
    """A copy has a version of its own: ones changed in place and copied would seem unchanged."""
    ones = ones_like(torch.empty(3))
    buffer = io.BytesIO()
    torch.save(ones, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    for other in (copy.deepcopy(ones), ones.clone(), ones.view(3), ones[:], loaded):
        assert torch.equal(other, torch.ones(3))
        assert not are_ones(other)
    ones.mul_(2.0)
    assert not are_ones(copy.deepcopy(ones))


def test_inside_inference_mode_vmap_and_compiled_code_nothing_is_marked() -> None:
    with torch.inference_mode():
        assert not are_ones(ones_like(torch.empty(3)))
    torch.func.vmap(lambda x: x + are_ones(ones_like(x)))(torch.zeros(2, 3))
    assert not are_ones(1.0)


def test_weights_of_one_and_alpha_of_processes_that_add_noise() -> None:
    t = torch.tensor([0.5, 0.7])
    for found in (SimpleWeighting()(VESDE(), t), VESDE().marginal(t)[0], EDMSDE().marginal(t)[0]):
        assert are_ones(found)
