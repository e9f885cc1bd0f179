"""Sums of states with coefficients, in compiled graphs too."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusionkit._coefficients import add_noise, add_scaled, linear
from diffusionkit._magnitude import mp_sum

X, Y = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, -8.0]])
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add_scaled": lambda x, y: add_scaled(x, y, 0.25),
    "linear": lambda x, y: linear(1.0, x, 0.25, y),
    "add_noise": lambda x, y: add_noise(x, 0.25, y.clone()),
    "mp_sum": lambda x, y: mp_sum(x, y, 0.25),
}


@pytest.mark.parametrize("name", ["add_scaled", "linear", "add_noise"])
def test_values(name) -> None:
    assert SUMS[name](X, Y).tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("name", SUMS)
def test_compiled_graphs_have_no_scaled_addition(name) -> None:
    """Inductor of torch 2.13 computes x + a @ b for `torch.add(x, a @ b, alpha=factor)`."""
    found: list[float] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.extend(n.kwargs["alpha"] for n in graph.graph.nodes if "alpha" in n.kwargs)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(SUMS[name], fullgraph=True, backend=backend)(X, Y)
        torch.testing.assert_close(compiled, SUMS[name](X, Y))
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMS)
def test_sums_with_a_matrix_product_by_inductor(name) -> None:
    def f(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return SUMS[name](x, a @ b)

    given = torch.randn(2, 3), torch.randn(2, 5), torch.randn(5, 3)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(f)(*given), f(*given))
