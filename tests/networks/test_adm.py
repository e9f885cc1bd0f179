"""The U-Net of improved DDPM and ADM, against a second implementation and released numbers."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.reference_unet import check_against_reference
from support.tiny_networks import EVERYTHING, TINY, arguments, tiny

from diffusionkit.checkpoints import load_improved_diffusion
from diffusionkit.networks import ADMUNet

THREE = {"multipliers": (0.5, 1, 2), "blocks": 2, "attention_levels": (0, 2)}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "three levels": {**THREE, "heads": 2},
    "one head": {"heads": 1, "learn_sigma": False},
    "heads of the decoder": {**THREE, "heads": 4, "decoder_heads": 2},
    "channels per head": {**THREE, "head_channels": 4},
    "no level wide enough": {"head_channels": 32},
    "wide enough at one level": {"attention_levels": (0, 1), "head_channels": 16},
    "shift alone": {"scale_shift": False, "num_classes": 3, "group_channels": 2},
    "blocks resample": {**THREE, "resblock_updown": True},
    "without convolution": {**THREE, "resample_with_conv": False},
    "everything": {**EVERYTHING, "out_channels": 3, "data_range": (0.0, 255.0)},
    "groups": {"width": 16, "group_channels": 4},
    "width of no 32 groups": {"width": 36, "heads": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_against_a_second_implementation(case: str) -> None:
    net = tiny(ADMUNet, **CASES[case])
    check_against_reference(net, **arguments(net, 4, 8))


@pytest.mark.parametrize("case", ["everything", "blocks resample"])
@pytest.mark.parametrize("spatial", [(8,), (4, 4, 8)])
def test_other_dimensions_against_a_second_implementation(
    case: str, spatial: tuple[int, ...]
) -> None:
    net = tiny(ADMUNet, dims=len(spatial), **CASES[case])
    check_against_reference(net, **arguments(net, *spatial))


def test_a_learned_variance_doubles_the_output() -> None:
    for options, channels in (
        ({}, 4),
        ({"out_channels": 3}, 6),
        ({"learn_sigma": False}, 2),
        ({"learn_sigma": False, "out_channels": 3}, 3),
    ):
        net = tiny(ADMUNet, **options)
        assert net(**arguments(net)).shape == (2, channels, 4, 6)


def test_last_layers_start_at_zero_and_others_at_the_torch_default() -> None:
    torch.manual_seed(0)
    net = ADMUNet(**TINY | {"width": 32})
    zero = {name.rsplit(".", 1)[0] for name, p in net.named_parameters() if not p.any()}
    zero = {name for name in zero if "norm" not in name}
    parts = ("conv_2", "attention.out", "head.conv")
    assert zero == {n for n, _ in net.named_modules() if n.endswith(parts)}
    bound = 1 / (9 * 32) ** 0.5
    for p in (net.get_parameter(f"downs.0.block.conv.{name}") for name in ("weight", "bias")):
        assert 0.8 * bound < p.abs().max() <= bound


# Output of a model with 2 levels, width 32, 4 heads and 10 classes in the released layout, computed
# in float64 by other code: the first and last 8 entries, then the sum of absolute values.
RELEASED_FIRST = [
    -0.09294580401,
    -0.1229590757,
    -0.06312490947,
    0.01761558939,
    0.07478146924,
    0.09938451018,
    0.1080038584,
    0.1098307021,
]
RELEASED_LAST = [
    0.05677959321,
    0.06402127697,
    0.06709299452,
    0.06800690645,
    0.05908687531,
    0.03999649703,
    0.01138191146,
    -0.009613640859,
]
RELEASED_SUM = 301.1951120728647
SHAPES = {
    "time_embed.0": (128, 32),
    "time_embed.2": (128, 128),
    "label_emb": (10, 128),
    "input_blocks.0.0": (32, 3, 3, 3),
    "input_blocks.1": (32, 32),
    "input_blocks.2.0.op": (32, 32, 3, 3),
    "input_blocks.3": (32, 64),
    "input_blocks.3.1": 64,
    "middle_block.0": (64, 64),
    "middle_block.1": 64,
    "middle_block.2": (64, 64),
    "output_blocks.0": (128, 64),
    "output_blocks.0.1": 64,
    "output_blocks.1": (96, 64),
    "output_blocks.1.1": 64,
    "output_blocks.1.2.conv": (64, 64, 3, 3),
    "output_blocks.2": (96, 32),
    "output_blocks.3": (64, 32),
    "out.0": (32,),
    "out.2": (6, 32, 3, 3),
}


def released_shapes() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the released layout, built block by block."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, shape: tuple[int, ...], bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    for name, shape in SHAPES.items():
        if isinstance(shape, int):
            layer(f"{name}.norm", (shape,))
            layer(f"{name}.qkv", (3 * shape, shape, 1))
            layer(f"{name}.proj_out", (shape, shape, 1))
        elif "block" in name and len(shape) == 2:
            block = name if name.startswith("middle") else f"{name}.0"
            seen, out = shape
            layer(f"{block}.in_layers.0", (seen,))
            layer(f"{block}.in_layers.2", (out, seen, 3, 3))
            layer(f"{block}.emb_layers.1", (2 * out, 128))
            layer(f"{block}.out_layers.0", (out,))
            layer(f"{block}.out_layers.3", (out, out, 3, 3))
            if seen != out:
                layer(f"{block}.skip_connection", (out, seen, 1, 1))
        else:
            layer(name, shape, bias=name != "label_emb")
    return shapes


def test_released_numbers(tmp_path: Path) -> None:
    shapes = released_shapes()
    assert len(shapes) == 129
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 758_310
    state = {}
    for key, shape in shapes.items():
        at = 1 + 0.37 * np.arange(np.prod(shape)) + zlib.crc32(key.encode()) % 1000
        scale = key.endswith("norm.weight") or key.endswith((".in_layers.0.weight", "out.0.weight"))
        one = scale or key.endswith("out_layers.0.weight")
        state[key] = torch.from_numpy((0.05 * np.sin(at) + one).reshape(shape))
    torch.save(state, tmp_path / "model.pt")
    net = load_improved_diffusion(tmp_path / "model.pt", num_heads=4).network
    x = torch.sin(0.1 * torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)).view(2, 3, 16, 16)
    with torch.no_grad():
        out = net(x.float(), torch.tensor([0.25, 250.25]), torch.tensor([3, 7]))
    assert out.shape == (2, 6, 16, 16)
    torch.testing.assert_close(out.flatten()[:8], torch.tensor(RELEASED_FIRST), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.flatten()[-8:], torch.tensor(RELEASED_LAST), rtol=0, atol=1e-5)
    assert out.abs().sum().item() == pytest.approx(RELEASED_SUM, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected an integer >= 1, got 0"),
        ({"dims": 0}, ValueError, "dims: expected an integer >= 1, got 0"),
        ({"width": 9}, ValueError, "width: expected an even integer >= 4, got 9"),
        ({"attention_levels": (2,)}, ValueError, "attention_levels: .* got 2"),
        ({"heads": 0}, ValueError, "heads: expected an integer >= 1, got 0"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of 16 channels, got 3"),
        ({"decoder_heads": 0}, ValueError, "decoder_heads: expected an integer >= 1, got 0"),
        ({"decoder_heads": 3}, ValueError, "heads: expected a divisor of 16 channels, got 3"),
        ({"head_channels": 0}, ValueError, "head_channels: expected an integer >= 1, got 0"),
        ({"group_channels": 0}, ValueError, "group_channels: expected an integer >= 1, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"low_res_channels": 0}, ValueError, "low_res_channels: expected an integer >= 1, got 0"),
        ({"out_channels": 0}, ValueError, "out_channels: expected an integer >= 1, got 0"),
        ({"data_range": (2.0, 1.0)}, ValueError, "data_range: expected finite low < high"),
    ],
)
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ADMUNet(**TINY | options)
