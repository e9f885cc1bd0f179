"""Entries of a file that are no weights, names of wrapped networks, and the limit of a layout."""

import time
from functools import partial

import pytest
import torch
from torch import nn

from diffusionkit import CheckpointError
from diffusionkit._weights import (
    check_own_values,
    check_tensors,
    fill,
    laid_out,
    unwrapped,
    weight_problems,
)
from diffusionkit.networks import MLP, ADMUNet, DDPMUNet, DiT, NCSNpp, NCSNv2

HALVES = torch.float16, torch.bfloat16
NOT_WEIGHTS = {
    "int64": torch.ones(2, dtype=torch.int64),
    "uint8": torch.ones(2, dtype=torch.uint8),
    "bool": torch.ones(2, dtype=torch.bool),
    "complex": torch.ones(2, dtype=torch.complex64),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "sparse": torch.eye(2).to_sparse(),
    "meta": torch.ones(2, device="meta"),
    "nan": torch.tensor([0.0, torch.nan]),
    "inf": torch.tensor([torch.inf, 0.0]),
    "both": torch.tensor([torch.inf, -torch.inf]),
    "half inf": torch.tensor([-torch.inf, 0.0]).half(),
    "double": torch.ones(2, dtype=torch.float64),
    "number": 1.0,
    "none": None,
    "list": [1.0],
}


@pytest.mark.parametrize("kind", NOT_WEIGHTS)
def test_entries_that_are_no_weights_are_named(kind) -> None:
    tensors = {"a": torch.ones(2), "b": NOT_WEIGHTS[kind], "c": torch.zeros(0), "d": torch.ones(())}
    assert list(weight_problems(tensors)) == ["b"]
    with pytest.raises(CheckpointError, match=r"^x\.pt: the network does not fit, 1 .*: b: expect"):
        check_tensors("x.pt", "network", tensors)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_finite_numbers_are_weights_even_if_their_sum_overflows(dtype) -> None:
    large = torch.full((3,), torch.finfo(dtype).max, dtype=dtype)
    assert weight_problems({"a": large, "b": -large, "c": torch.zeros(3, dtype=dtype)}) == {}


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_some_weights_may_be_in_half_precision(half) -> None:
    ones = torch.ones(2)
    for number in (1, 3):
        mixed = {f"half.{i}": ones.to(half) for i in range(number)}
        assert weight_problems(mixed | {"x": ones, "y": ones}) == {}
        other = next(dtype for dtype in HALVES if dtype != half)
        for stranger in (torch.float64, other):
            found = weight_problems(mixed | {"x": ones, "y": ones, "other": ones.to(stranger)})
            assert list(found) == ["other"] or number == 1


def test_tensors_without_values_of_their_own_are_rejected() -> None:
    base = torch.ones(100)
    check_own_values("x.pt", {"a": base, "tied": base, "b": torch.ones(5), "c": torch.zeros(0)})
    for tensors in (
        {"a": torch.ones(1).expand(1000)},
        {f"view{i}": base for i in range(3)},
        {f"view{i}": base[i:] for i in range(5)},
        {"a": torch.ones(1, 5).expand(3, 5), "b": torch.ones(1)},
    ):
        with pytest.raises(CheckpointError, match=r"x\.pt: expected tensors with values of their"):
            check_own_values("x.pt", tensors)


NAMES = ["input_blocks.0.weight", "out.module.bias", "sigmas"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name,
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.{name}",
        lambda name: f"ema.{name}",
        lambda name: f"model.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace("blocks.0", "blocks._orig_mod.0"),
        lambda name: "module." + name.replace("0.", "0._checkpoint_wrapped_module."),
    ],
)
def test_prefixes_of_wrappers_are_removed(wrap) -> None:
    found = unwrapped("x.pt", {wrap(name): i for i, name in enumerate(NAMES)})
    assert found == {name: i for i, name in enumerate(NAMES)}
    assert list(found) == NAMES


def test_names_of_several_networks_are_rejected() -> None:
    names = dict.fromkeys(NAMES)
    module = {f"module.{name}": None for name in NAMES}
    for both in (names | module, module | {"step": None}):
        with pytest.raises(CheckpointError, match=r"x\.pt: .* with or without 'module\.', got"):
            unwrapped("x.pt", both)
    ema = {f"ema.{name}": None for name in NAMES}
    with pytest.raises(CheckpointError, match=r"one network, with or without 'ema\.' and 'module"):
        unwrapped("x.pt", module | ema)
    with pytest.raises(CheckpointError, match="more than the prefixes of wrappers, got some twice"):
        unwrapped("x.pt", names | {f"_orig_mod.{name}": None for name in NAMES})


SMALL = {
    "mlp": partial(MLP, 2, width=8),
    "ncsnpp": partial(NCSNpp, 3, width=8, multipliers=(1, 2), blocks=1),
    "adm": partial(ADMUNet, 3, width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,)),
    "ddpm": partial(DDPMUNet, 3, width=8, multipliers=(1, 2), blocks=1),
    "dit": partial(DiT, 3, width=8, depth=1, heads=2),
    "ncsnv2": partial(NCSNv2, 3, width=4, sigmas=(2.0, 1.0)),
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_layout_filled_with_values_is_the_network(kind) -> None:
    torch.manual_seed(0)
    wanted = SMALL[kind]().eval()
    state = wanted.state_dict()
    network = laid_out("x.pt", SMALL[kind], state).eval()
    assert all(value.is_meta for value in network.state_dict().values())
    grads = {name: value.requires_grad for name, value in network.named_parameters()}
    fill(network, state)
    assert {name: value.requires_grad for name, value in network.named_parameters()} == grads
    assert not any(b.is_meta for b in (*network.buffers(), *network.parameters()))
    shape = (2, 2) if kind == "mlp" else (2, 3, 8, 8)
    x, label = torch.randn(shape), torch.tensor([1.0, 1.0])
    with torch.no_grad():
        assert torch.equal(network(x, label), wanted(x, label))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MLP(2, depth=1000),
        lambda: NCSNpp(blocks=1000),
        lambda: NCSNpp(multipliers=(1,) * 10**5),
        lambda: ADMUNet(blocks=1000),
        lambda: DiT(depth=1000),
        lambda: NCSNv2(levels=((1, 1),) * 10**5, sigmas=(2.0, 1.0)),
        lambda: nn.ModuleList(nn.Linear(10**9, 10**9) for _ in range(10**9)),
    ],
)
def test_layouts_of_more_tensors_than_a_file_has_are_stopped(make) -> None:
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"x\.pt: expected .*, got"):
        laid_out("x.pt", make, {"weight": torch.ones(1)})
    assert time.process_time() - began < 5
    assert isinstance(torch.ones(1), torch.Tensor)
    assert not torch.ones(1).is_meta


def test_sizes_beyond_torch_are_rejected() -> None:
    with pytest.raises(CheckpointError, match=r"^x\.pt: expected the description of a network"):
        laid_out("x.pt", lambda: nn.Linear(2**40, 2**40), {})
