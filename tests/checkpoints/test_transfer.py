"""Reordering of weights, against explicit indices, and strict transfer."""

import pytest
import torch
from torch import nn

from diffusionkit._files import CheckpointError
from diffusionkit.checkpoints._transfer import (
    Source,
    by_kind,
    matrix,
    rename,
    sines_first,
    transfer,
)


@pytest.mark.parametrize("order", ["kind head channel", "head kind channel", "head channel kind"])
@pytest.mark.parametrize("tail", [(), (5,), (5, 1), (5, 1, 1)], ids=str)
def test_by_kind_reorders_rows_by_index(order, tail) -> None:
    heads, channels = 2, 3
    weight = torch.randn(3 * heads * channels, *tail)
    sizes = {"kind": 3, "head": heads, "channel": channels}
    got = by_kind(weight, heads, order)
    assert got.shape == weight.shape[:2]
    for kind in range(3):
        for head in range(heads):
            for channel in range(channels):
                ours = (kind * heads + head) * channels + channel
                theirs = 0
                for axis in order.split():
                    theirs = theirs * sizes[axis]
                    theirs += {"kind": kind, "head": head, "channel": channel}[axis]
                assert torch.equal(got[ours], weight[theirs].flatten() if tail else weight[theirs])


@pytest.mark.parametrize("shape", [(17,), (18, 5, 2), (18, 5, 3, 3)], ids=str)
def test_by_kind_rejects_other_shapes(shape) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        by_kind(torch.zeros(shape), 2, "kind head channel")


def test_sines_first_swaps_the_halves() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert sines_first(weight).tolist() == [[3, 4, 1, 2], [7, 8, 5, 6]]


def test_matrix_drops_kernel_dimensions_of_size_one() -> None:
    weight = torch.randn(4, 3, 1, 1)
    assert torch.equal(matrix(weight), weight[:, :, 0, 0])
    with pytest.raises(RuntimeError):
        matrix(torch.randn(4, 3, 2))


def test_rename_maps_weights_and_biases() -> None:
    assert rename("a.", "b.", {"x": "y"}) == {
        "a.x.weight": Source(("b.y.weight",)),
        "a.x.bias": Source(("b.y.bias",)),
    }


def test_all_problems_are_listed_and_no_tensor_is_copied() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 3) for name in "abc"})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    sources = rename("", "", {"a": "x", "b": "y"})
    sources["b.weight"] = Source(("y.weight", "z.weight"), lambda one, two: one @ two)
    tensors = {
        "x.weight": torch.ones(3, 2),
        "x.bias": torch.full((3,), torch.inf),
        "y.weight": torch.ones(3, 4),
        "z.weight": torch.ones(5, 2),
        "more": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        transfer("some.file", network, sources, tensors)
    assert str(caught.value) == (
        "some.file: the file does not fit the network, 6 problems: "
        "x.bias: expected finite numbers, got NaN or infinity; "
        "y.weight, z.weight: expected tensors for (3, 2), got (3, 4), (5, 2); "
        "missing y.bias; "
        "missing a source of c.weight; missing a source of c.bias; "
        "unexpected more"
    )
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_are_cast_to_the_dtype_of_the_network() -> None:
    network = nn.Linear(2, 3).double()
    tensors = {"y.weight": torch.randn(3, 2).half(), "y.bias": torch.randn(3)}
    transfer("some.file", network, {k: Source((f"y.{k}",)) for k in ("weight", "bias")}, tensors)
    assert network.weight.dtype == torch.float64
    assert torch.equal(network.weight, tensors["y.weight"].double())
    assert torch.equal(network.bias, tensors["y.bias"].double())
    assert network.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_weights_of_other_dtypes_are_rejected(dtype) -> None:
    sources = {"weight": Source(("y",))}
    network = nn.Linear(2, 3, bias=False)
    with pytest.raises(CheckpointError, match=r"y: expected floating-point numbers, got torch\."):
        transfer("some.file", network, sources, {"y": torch.ones(3, 2, dtype=dtype)})
