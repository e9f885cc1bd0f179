"""The dtype of a network, and conversions."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from diffusionkit import VESDE, VPSDE, EpsModel, RawScoreModel
from diffusionkit._precision import (
    NetworkDtype,
    at_least_float32,
    backward_factor,
    check_float_dtype,
    narrowed,
    network_dtype,
    state_dtype,
)
from diffusionkit.networks import NCSNpp

HALF = torch.bfloat16


class Net(nn.Module):
    def __init__(self, dtype=HALF):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x, noise_label):
        return self.linear(x)


class Wrapper:
    """A callable of one's own that is not a module."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x, noise_label):
        return self.net(x, noise_label)

    def denoise(self, x, noise_label):
        return self.net(x, noise_label)


NET = Net()


def helper(x, noise_label):
    return NET(x, noise_label)


def nested(x, noise_label):
    return helper(x, noise_label)


@pytest.mark.parametrize(
    "network",
    [
        NET,
        nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 30, dtype=HALF)),
        torch.compile(NET, backend="eager"),
        NET.forward,
        NET.__call__,
        functools.partial(NET),
        functools.partial(helper),
        helper,
        nested,
        Wrapper(NET),
        Wrapper(NET).denoise,
        Wrapper(helper),
        lambda x, label: NET(x, label),
        (lambda net: lambda x, label: net(x, label))(Net()),
        (lambda net: lambda x, label: net.net(x, label))(NET.linear),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_dtype_is_that_of_most_parameters(network) -> None:
    """Of a module, or of the modules that a callable refers to."""
    assert network_dtype(network) == HALF
    assert EpsModel(network, VPSDE())._dtype(network) == HALF


def test_what_has_no_parameters_has_no_dtype() -> None:
    def early(x, noise_label):
        return late(x)

    for network in (early, lambda x, label: x, nn.Identity(), torch.tanh, object()):
        assert network_dtype(network) is None
    late = torch.tanh


def test_only_numbers_that_networks_compute_with_are_counted() -> None:
    net = Net()
    net.register_parameter("scale", nn.Parameter(torch.zeros(5)))
    net.register_parameter("none", None)
    net.table = nn.Parameter(torch.zeros(100, dtype=torch.int8), requires_grad=False)
    net.stored = nn.Parameter(torch.zeros(100).to(torch.float8_e4m3fn), requires_grad=False)
    net.register_buffer("frequencies", torch.zeros(1000))
    assert network_dtype(net) == HALF
    assert network_dtype(nn.LazyLinear(3, dtype=HALF)) == HALF
    buffers = nn.Module()
    buffers.register_buffer("weight", torch.zeros(3, dtype=HALF))
    assert network_dtype(buffers) == HALF


def test_float32_frequencies_do_not_count_against_a_half_network() -> None:
    net = NCSNpp(channels=1, width=16, multipliers=(1, 2), blocks=1).half()
    assert next(net.parameters()).dtype == torch.float32
    assert network_dtype(net) == torch.float16
    assert network_dtype(RawScoreModel(net, VESDE())) == torch.float16


def test_the_process_does_not_count() -> None:
    class Learned(VPSDE, nn.Module):
        def __init__(self):
            nn.Module.__init__(self)
            VPSDE.__init__(self)
            self.weight = nn.Parameter(torch.zeros(100, dtype=torch.float64))

    assert network_dtype(EpsModel(Net(), Learned())) == HALF


def test_changes_of_a_network_are_noticed() -> None:
    net = Net()
    model = EpsModel(net, VPSDE())
    found = lambda: model._dtype(model.network)  # noqa: E731
    for dtype in (torch.float16, torch.float64, torch.float32):
        net.to(dtype)
        assert found() == dtype
        assert copy.deepcopy(model)._dtype(model.network) == dtype
    parametrize.register_parametrization(net.linear, "weight", nn.Identity())
    net.half()
    assert found() == torch.float16
    net.linear = nn.Linear(3, 3, dtype=torch.float64)
    model.network = net
    net.bfloat16()
    model.network = Net(torch.float64)
    assert found() == torch.float64
    again = pickle.loads(pickle.dumps(model))
    again.network.half()
    assert again._dtype(again.network) == torch.float16
    swapped = {name: p.bfloat16() for name, p in model.named_parameters()}

    def forward(x):
        assert found() == torch.bfloat16
        return x

    model.predict = lambda x, t: forward(x)
    model.forward = forward
    torch.func.functional_call(model, swapped, (torch.zeros(1),))
    assert found() == torch.float64


def test_a_network_without_parameters_may_get_some() -> None:
    net = nn.Sequential()
    lookup = NetworkDtype(net)
    assert lookup(net) is None
    net.append(nn.Linear(2, 2, dtype=HALF))
    assert lookup(nn.Sequential(net)) == HALF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_widening(dtype) -> None:
    x = torch.ones(2, dtype=dtype)
    wide = at_least_float32(x)
    assert wide.dtype == state_dtype(dtype) == (dtype if dtype.itemsize > 2 else torch.float32)
    assert (wide is x) == (dtype.itemsize > 2)
    assert narrowed(x, dtype, "x", "") is x
    check_float_dtype(dtype)
    integers = torch.ones(2, dtype=torch.uint8)
    assert at_least_float32(integers) is integers


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_samples_have_a_floating_point_dtype(dtype) -> None:
    with pytest.raises(TypeError, match=r"dtype: expected one of torch.float16, .*, got"):
        check_float_dtype(dtype)


def test_numbers_that_float16_does_not_hold_are_refused() -> None:
    for value in (7e4, -1e30):
        with pytest.raises(ValueError, match=r"state: expected numbers that float16 holds.*advice"):
            narrowed(torch.tensor([1.0, value]), torch.float16, "state", "advice")
    for value in (65504.0, float("inf"), float("nan")):  # not the conversion's fault
        assert narrowed(torch.tensor([value]), torch.float16, "state", "").dtype == torch.float16
    assert narrowed(torch.tensor([1e30]), torch.bfloat16, "state", "").isfinite()


def test_backward_factors_are_powers_of_two() -> None:
    assert backward_factor(1e9, torch.bfloat16) is None
    assert backward_factor(1.0, torch.float16) == 1.0
    assert backward_factor(256.0, torch.float16) == 1.0
    assert backward_factor(257.0, torch.float16) == 0.5
    gain = torch.tensor([1e-9, 1e9, float("inf")])
    factor = backward_factor(gain, torch.float16)
    assert factor[0] == 1.0
    assert 128 < float(factor[1] * 1e9) <= 256
    assert factor[2] > 0
