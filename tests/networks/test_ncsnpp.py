"""NCSN++: all options against a second implementation, and errors."""

from typing import Any

import pytest
import torch
from support.reference_unet import check_against_reference
from support.tiny_networks import EVERYTHING, TINY, arguments, tiny

from diffusionkit.networks import NCSNpp

SKIPS = {"progressive": "output_skip", "progressive_input": "input_skip"}
RESIDUALS = {"progressive": "residual", "progressive_input": "residual"}
THREE = {"multipliers": (1, 2, 2), "blocks": 2, "attention_levels": (0, 2)}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "three levels": {**THREE, "data_range": (0.0, 1.0)},
    "skips, sum": {**SKIPS, **THREE},
    "skips, cat": {**SKIPS, **THREE, "progressive_combine": "cat"},
    "cat into residual": {**RESIDUALS, "progressive_input": "input_skip", **THREE}
    | {"progressive_combine": "cat"},
    "residuals": {**RESIDUALS, **THREE},
    "residuals without filter": {**RESIDUALS, **THREE, "fir_kernel": None},
    "residual output alone": {"progressive": "residual", "progressive_input": "none", **THREE},
    "output skip, residual input": {"progressive": "output_skip", **THREE},
    "no rescaling": {**RESIDUALS, "skip_rescale": False},
    "three taps": {**SKIPS, "fir_kernel": (1, 2, 1)},
    "five uneven taps": {**RESIDUALS, "fir_kernel": (1, 2, 3, 4, 5)},
    "two taps": {"fir_kernel": (3, 1)},
    "ddpm blocks": {"resblock": "ddpm", **THREE},
    "ddpm blocks without filter": {"resblock": "ddpm", "fir_kernel": None, **THREE},
    "ddpm blocks without convolution": {"resblock": "ddpm", "resample_with_conv": False},
    "ddpm blocks, nothing": {"resblock": "ddpm", "resample_with_conv": False, "fir_kernel": None},
    "ddpm blocks, cat": {"resblock": "ddpm", **SKIPS, "progressive_combine": "cat", **THREE},
    "positional": {"embedding": "positional"},
    "linear Fourier": {"embedding": "fourier_linear", "scale_by_sigma": False},
    "no embedding": {"embedding": None},
    "no embedding, adaptive": {"embedding": None, "adaptive_scale": True},
    "sigmas": {"embedding": "positional", "sigmas": (30.0, 4.0, 0.5)},
    "everything": {**EVERYTHING, **SKIPS, "adaptive_scale": True, "data_range": (-2.0, 3.0)},
    "everything, residual": {**EVERYTHING, **RESIDUALS, "out_channels": 3},
    "relu": {"activation": "relu"},
    "elu": {"activation": "elu"},
    "leaky relu": {**RESIDUALS, "activation": "leaky_relu"},
    "groups": {"group_channels": 1, **THREE},
    "odd widths": {"width": 6, "multipliers": (1, 3), "channels": 5, "out_channels": 7},
    "fractions": {"width": 10, "multipliers": (0.5, 1.5)},
    "one level": {"multipliers": (1,), "attention_levels": ()},
}


@pytest.mark.parametrize("case", CASES)
def test_against_a_second_implementation(case: str) -> None:
    net = tiny(NCSNpp, **CASES[case])
    check_against_reference(net, **arguments(net, 4, 8))


@pytest.mark.parametrize("case", ["everything", "everything, residual", "ddpm blocks"])
@pytest.mark.parametrize("spatial", [(8,), (4, 8, 4)])
def test_other_dimensions_against_a_second_implementation(
    case: str, spatial: tuple[int, ...]
) -> None:
    net = tiny(NCSNpp, dims=len(spatial), **CASES[case])
    check_against_reference(net, **arguments(net, *spatial))


def test_low_resolution_image_of_any_size() -> None:
    net = tiny(NCSNpp, low_res_channels=1)
    given = arguments(net, 6, 4)
    for size in ((1, 1), (2, 3), (6, 4), (7, 2)):
        given["low_res"] = torch.randn(2, 1, *size, dtype=torch.float64)
        check_against_reference(net, **given)


def test_noise_level_divides_the_output() -> None:
    net, plain = tiny(NCSNpp), tiny(NCSNpp, scale_by_sigma=False)
    plain.load_state_dict(net.state_dict())
    given = arguments(net)
    expected = plain(**given) / given["noise_label"].view(-1, 1, 1, 1)
    torch.testing.assert_close(net(**given), expected)
    # Integer noise labels are noise levels too.
    given["noise_label"] = torch.tensor([3, 7])
    torch.testing.assert_close(
        net(**given), plain(**given) / given["noise_label"].view(-1, 1, 1, 1)
    )


def test_scale_of_the_frequencies() -> None:
    torch.manual_seed(0)
    for scale in (16.0, 2.0):
        net = NCSNpp(1, width=256, multipliers=(0.03125,), blocks=1, fourier_scale=scale,
                     attention_levels=())  # fmt: skip
        frequencies = net.get_parameter("embedding.noise_features.frequencies")
        assert frequencies.shape == (256,)
        assert frequencies.std().item() == pytest.approx(scale, rel=0.2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels: expected an integer >= 1, got 0"),
        ({"channels": 1.5}, TypeError, "channels: expected an integer, got float"),
        ({"out_channels": 0}, ValueError, "out_channels: expected an integer >= 1, got 0"),
        ({"dims": 4}, ValueError, "dims: expected an integer <= 3, got 4"),
        ({"dims": 2.0}, TypeError, "dims: expected an integer, got float"),
        ({"width": 7}, ValueError, "width: expected an even integer >= 4, got 7"),
        ({"width": 2}, ValueError, "width: expected an even integer >= 4, got 2"),
        ({"width": 8.0}, TypeError, "width: expected an integer, got float"),
        ({"multipliers": ()}, ValueError, "multipliers: .* got none"),
        ({"multipliers": (1, 0)}, ValueError, "at least one of 8 channels, and .*, got 0"),
        ({"multipliers": (1, 0.1)}, ValueError, "at least one of 8 channels, and .*, got 0.1"),
        ({"multipliers": (1, float("inf"))}, ValueError, "multipliers: .* got inf"),
        ({"multipliers": (1, True)}, TypeError, "multipliers: expected a number, got bool"),
        ({"multipliers": (1, "2")}, TypeError, "multipliers: expected a number, got str"),
        ({"blocks": 0}, ValueError, "blocks: expected an integer >= 1, got 0"),
        ({"attention_levels": (2,)}, ValueError, r"expected levels in \[0, 2\), got 2"),
        ({"attention_levels": (-1,)}, ValueError, "attention_levels: .* got -1"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"condition_features": 0}, ValueError, "condition_features: expected .* 1, got 0"),
        ({"low_res_channels": 0}, ValueError, "low_res_channels: expected an integer >= 1, got 0"),
        ({"low_res_channels": 1.0}, TypeError, "low_res_channels: expected an integer, got float"),
        ({"embedding": "none"}, ValueError, "embedding: expected one of 'fourier', .*got 'none'"),
        ({"fourier_scale": 0.0}, ValueError, "scale: expected a finite number > 0, got 0.0"),
        ({"embedding": None, "num_classes": 2}, ValueError, "embedding: expected one for"),
        ({"embedding": None, "condition_features": 2}, ValueError, "embedding: expected one for"),
        ({"resblock": "adm"}, ValueError, "resblock: expected one of 'biggan', 'ddpm', got 'adm'"),
        ({"fir_kernel": (1,)}, ValueError, r"fir_kernel: expected at least two taps.*got \(1,\)"),
        ({"fir_kernel": (1, -1)}, ValueError, "fir_kernel: expected .* of nonzero sum"),
        ({"fir_kernel": (1, float("nan"))}, ValueError, "fir_kernel: expected"),
        ({"progressive": "input_skip"}, ValueError, "progressive: expected one of 'none', 'out"),
        ({"progressive_input": "skip"}, ValueError, "progressive_input: expected one of 'none'"),
        ({"progressive_combine": "add"}, ValueError, "combine: expected one of 'sum', 'cat', got"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of 'silu', .*got 'gelu'"),
        ({"group_channels": 0}, ValueError, "group_channels: expected an integer >= 1, got 0"),
        ({"sigmas": ()}, ValueError, "sigmas: expected finite numbers > 0"),
        ({"data_range": (1.0, 1.0)}, ValueError, "data_range: expected finite low < high"),
        ({"data_range": (0.0, float("inf"))}, ValueError, "data_range: expected finite"),
        ({"data_range": (float("nan"), 0.0)}, ValueError, "data_range: expected finite"),
    ],
)  # fmt: skip
def test_constructor_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NCSNpp(**TINY | options)
